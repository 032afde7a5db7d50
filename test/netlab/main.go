package netlab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/probe"
)

// probeName is what the test binary is called where it acts as a probe.
const probeName = "demarc-probe"

// privateVariable says that this process is in a mount namespace of the tests'
// own: what it mounts, the machine does not notice. test/run sets it too.
const privateVariable = "DEMARC_PRIVATE_MOUNTS"

// prefix and the process id of their test name the cgroup and the directory of all
// labs.
const prefix = "demarc-lab-"

// process is what the labs of this process share.
var process struct {
	dir    string // temporary files
	cgroup string // parent of every lab's cgroup

	mu   sync.Mutex
	labs map[*Lab]bool
	over bool // interrupted: no test makes anything any more
}

func prepared() bool { return process.cgroup != "" }

func registerLab(l *Lab) {
	process.mu.Lock()
	over := process.over
	process.labs[l] = true
	process.mu.Unlock()
	if over {
		select {} // until the process ends
	}
}

func unregisterLab(l *Lab) {
	process.mu.Lock()
	defer process.mu.Unlock()
	delete(process.labs, l)
}

func init() {
	// Children are told to die with the thread that made them; the main thread
	// is the one that never ends before the process.
	runtime.LockOSThread()
}

// Main runs the tests of a package in a mount namespace of their own and removes
// what they leave, also when SIGINT or SIGTERM ends them. It does not return.
func Main(m *testing.M) {
	if os.Args[0] == probeName {
		probe.Main()
	}
	if os.Args[0] == machineName {
		fmt.Fprintln(os.Stderr, "become a machine:", becomeMachine(os.Args[1], os.Args[2]))
		os.Exit(1)
	}
	os.Exit(mainRun(m))
}

func mainRun(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // New says what is missing, test by test
	}
	if os.Getenv(privateVariable) == "" {
		return again()
	}
	if err := prepare(); err != nil {
		fmt.Fprintf(os.Stderr, "netlab: %v\n", err)
		return 1
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		s := <-signals
		if err := tidy(); err != nil {
			fmt.Fprintf(os.Stderr, "netlab: clean up: %v\n", err)
		}
		os.Exit(128 + int(s.(syscall.Signal)))
	}()
	status := m.Run()
	if err := tidy(); err != nil {
		fmt.Fprintf(os.Stderr, "netlab: clean up: %v\n", err)
		return max(status, 1)
	}
	return status
}

// again runs this program in a mount namespace of its own and passes signals on.
func again() int {
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.Env = append(os.Environ(), privateVariable+"=1")
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	if err := c.Start(); err != nil {
		fmt.Fprintf(os.Stderr, "netlab: enter mount namespace: %v\n", err)
		return 1
	}
	go func() {
		for s := range signals {
			_ = c.Process.Signal(s)
		}
	}()
	err := c.Wait()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return exit.ExitCode()
	}
	fmt.Fprintf(os.Stderr, "netlab: %v\n", err)
	return 1
}

// prepare makes the parents of all labs, and removes those of tests that were
// killed before they could.
func prepare() error {
	mount, err := cgroup2Mount()
	if err != nil {
		return err
	}
	if err := removeStale(mount); err != nil {
		return err
	}
	process.labs = make(map[*Lab]bool)
	name := prefix + strconv.Itoa(os.Getpid())
	process.dir, process.cgroup = filepath.Join(os.TempDir(), name), filepath.Join(mount, name)
	return errors.Join(os.Mkdir(process.dir, 0o755), os.Mkdir(process.cgroup, 0o755))
}

// removeStale removes cgroups and files of tests whose process is gone.
func removeStale(mount string) error {
	for _, parent := range []string{mount, os.TempDir()} {
		old, err := filepath.Glob(filepath.Join(parent, prefix+"*"))
		if err != nil {
			return err
		}
		for _, dir := range old {
			pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), prefix))
			if err != nil || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
				continue
			}
			if parent == mount {
				err = errors.Join(killCgroup(dir), removeCgroup(dir))
			} else if err = unmountBelow(dir); err == nil {
				err = os.RemoveAll(dir)
			}
			if err != nil {
				return fmt.Errorf("remove what a killed test left: %w", err)
			}
		}
	}
	return nil
}

// unmountBelow unmounts what is mounted below a directory: under test/run, packages
// share a mount namespace, and the one before may have been killed.
func unmountBelow(dir string) error {
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); strings.HasPrefix(fields[1], dir+"/") {
			if err := unix.Unmount(fields[1], unix.MNT_DETACH); err != nil {
				return err
			}
		}
	}
	return nil
}

// tidy ends what still runs and removes what the labs share. Whoever comes second,
// be it a signal or the end of the tests, waits for the first.
var tidy = sync.OnceValue(func() error {
	process.mu.Lock()
	process.over = true
	labs := make([]*Lab, 0, len(process.labs))
	for l := range process.labs {
		labs = append(labs, l)
	}
	process.mu.Unlock()
	var problems []error
	for _, l := range labs {
		problems = append(problems, l.close())
	}
	return errors.Join(append(problems, killCgroup(process.cgroup), removeCgroup(process.cgroup), os.RemoveAll(process.dir))...)
})
