// Command init is the first process of a virtual machine: it mounts what a
// distribution would, loads the modules of /modules in their order, runs /bin/node
// and switches the machine off. The last line of the log says how node ended.
//
// Where there is a systemd, it does what an initial RAM disk does: it loads the modules
// and becomes that.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/vm/talk"
)

func main() {
	if _, err := os.Stat(talk.Systemd); err == nil {
		fmt.Println("init: hand over:", handOver()) // it does not return
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
		select {}
	}
	status := 1
	if err := prepare(); err != nil {
		fmt.Println("init:", err)
	} else {
		fmt.Println(talk.Started)
		status = run()
	}
	fmt.Printf("\n%s%d\n", talk.Marker, status)
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // QEMU ends here, too
	select {}
}

// mounts are made in this order.
var mounts = []struct{ kind, at, options string }{
	{"devtmpfs", "/dev", ""},
	{"proc", "/proc", ""},
	{"sysfs", "/sys", ""},
	{"tmpfs", "/tmp", ""},
	{"tmpfs", "/run", ""},
	{"cgroup2", "/sys/fs/cgroup", ""},
	{"bpf", "/sys/fs/bpf", "mode=0700"}, // as systemd does
}

func prepare() error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		err := unix.Mount(m.kind, m.at, m.kind, 0, m.options)
		if err != nil && !(m.kind == "devtmpfs" && errors.Is(err, unix.EBUSY)) { // the kernel may have been first
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	return loadAll()
}

func loadAll() error {
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	slices.Sort(modules)
	for _, m := range modules {
		if err := load(m); err != nil {
			return fmt.Errorf("load %s: %w", m, err)
		}
	}
	return nil
}

func load(module string) error {
	f, err := os.Open(module)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

// handOver makes the root a mount of its own, as who changes to another one finds it,
// and becomes systemd there.
func handOver() error {
	if err := loadAll(); err != nil {
		return err
	}
	const root = "/sysroot"
	err := os.MkdirAll(root, 0o755)
	if err == nil {
		err = unix.Mount("/", root, "", unix.MS_BIND, "")
	}
	if err == nil {
		err = os.Chdir(root)
	}
	if err == nil {
		err = unix.Mount(".", "/", "", unix.MS_MOVE, "")
	}
	if err == nil {
		err = unix.Chroot(".")
	}
	if err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	fmt.Println(talk.Started)
	return unix.Exec(talk.Systemd, []string{talk.Systemd}, []string{"PATH=/usr/sbin:/usr/bin", "TERM=dumb"})
}

// run runs the node as a child: the first process gets no signals by default, and
// its end is a panic.
func run() int {
	c := exec.Command("/bin/node")
	c.Env = []string{"PATH=/bin", "HOME=/tmp"}
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	if err := c.Start(); err != nil {
		fmt.Println("init: start node:", err)
		return 1
	}
	// Orphans become children of the first process, and are waited for as well.
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			fmt.Println("init: wait:", err)
			return 1
		case pid == c.Process.Pid && status.Exited():
			return status.ExitStatus()
		case pid == c.Process.Pid:
			fmt.Println("init: node ended by", status.Signal())
			return 1
		}
	}
}
