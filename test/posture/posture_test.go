// Package posture_test measures from outside, through /proc, what the daemons hold
// while they run.
package posture_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/test/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m) }

const policy = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: posture, version: 1}
trustDomain: posture.example
zones: {app: {trust: 10}}
workloads:
  web: {zone: app, match: [{cgroup: /lab/web}]}
  api: {zone: app, match: [{cgroup: /lab/api}]}
crossings:
  - {name: web-api, from: [workload/web], to: [workload/api], ports: [tcp/8080]}
`

// nobody is who the agent runs as here.
const nobody = 65534

// documented is what the table in docs/operate.md says of a daemon, as
// /proc/PID/status has it. The columns are the core's and the agent's.
func documented(t *testing.T, column int) map[string]string {
	t.Helper()
	text, err := os.ReadFile("../../docs/operate.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "| `/proc/PID/status` |")
	table, _, _ = strings.Cut(table, "\n\n")
	all := map[string]string{}
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if !strings.HasPrefix(line, "| `") || len(cells) != 5 {
			continue
		}
		field, value := strings.Trim(cells[1], " `"), strings.Trim(cells[2+column], " `")
		switch {
		case value == "as started":
			continue
		case field == "Uid":
			uid := map[string]int{"root": 0, "agent_user": nobody}[value]
			value = fmt.Sprintf("%d\t%d\t%d\t%d", uid, uid, uid, uid)
		case strings.HasPrefix(field, "Cap"):
			value = fmt.Sprintf("%016x", capabilities(t, value))
		}
		all[field] = value
	}
	if len(all) < 7 {
		t.Fatalf("docs/operate.md says only %v", all)
	}
	return all
}

// capabilities are the bits of include/uapi/linux/capability.h.
func capabilities(t *testing.T, list string) (set uint64) {
	t.Helper()
	bits := map[string]uint64{"none": 0, "CAP_BPF": 1 << unix.CAP_BPF, "CAP_NET_ADMIN": 1 << unix.CAP_NET_ADMIN}
	for name := range strings.SplitSeq(list, ", ") {
		bit, known := bits[name]
		if !known {
			t.Fatalf("docs/operate.md names %q", name)
		}
		set |= bit
	}
	return set
}

// read takes the wanted fields from the status of every thread.
func read(t *testing.T, pid int, want map[string]string) map[string]map[string]string {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) < 2 { // the Go runtime has more than one
		t.Fatalf("threads %v, %v", files, err)
	}
	got := map[string]map[string]string{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the thread ended
		}
		if err != nil {
			t.Fatal(err)
		}
		got[file] = map[string]string{}
		for line := range strings.Lines(string(text)) {
			name, value, _ := strings.Cut(line, ":")
			if _, wanted := want[name]; wanted {
				got[file][name] = strings.TrimSpace(value)
			}
		}
	}
	return got
}

// The core has what the documentation says once it serves, whether a policy was in
// force before or not, and that is enough for the first policy.
func TestCorePosture(t *testing.T) {
	lab := netlab.New(t)
	node := lab.Node("", netlab.NodeOptions{CoreOnly: true})
	want := documented(t, 0)
	look := func(when string) {
		t.Helper()
		for thread, got := range read(t, node.Core.PID(), want) {
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s, %s (-want +got):\n%s", when, thread, diff)
			}
		}
		shut(t, when, node.Core.PID())
	}
	look("idle")
	node.Apply(policy)
	look("enforcing")
	node.RestartCore()
	look("after a restart")
	if s := node.Status(); s.State != proto.StateEnforcing {
		t.Errorf("status %+v", s)
	}
}

// TestI08Closed: nobody looks into the daemons, or writes there, but who may do so to
// every process of the machine: root with CAP_SYS_PTRACE.
func TestI08Closed(t *testing.T) {
	lab := netlab.New(t)
	node := lab.Node(policy, netlab.NodeOptions{})
	shut(t, "core", node.Core.PID())
	shut(t, "agent", node.Agent.PID())
}

// shut wants a process closed to ptrace, /proc and core dumps. The same questions
// about this process itself must be answered.
func shut(t *testing.T, when string, pid int) {
	t.Helper()
	type answers struct{ Executable, Memory, Descriptors, Trace error }
	ask := func(pid int) (a answers) {
		proc := fmt.Sprintf("/proc/%d/", pid)
		_, a.Executable = os.Readlink(proc + "exe")
		var f *os.File
		if f, a.Memory = os.OpenFile(proc+"mem", os.O_RDWR, 0); a.Memory == nil {
			f.Close()
		}
		a.Descriptors = take(pid)
		// EPERM, too, for a process itself: nobody traces himself.
		if a.Trace = unix.PtraceAttach(pid); a.Trace == nil {
			_ = unix.PtraceDetach(pid)
		}
		return a
	}
	var about, self answers
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its capabilities
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var sets [2]unix.CapUserData
		err := unix.Capget(&header, &sets[0])
		for _, c := range []int{unix.CAP_SYS_PTRACE, unix.CAP_DAC_READ_SEARCH, unix.CAP_DAC_OVERRIDE} {
			sets[0].Effective &^= 1 << c
		}
		if err = errors.Join(err, unix.Capset(&header, &sets[0])); err == nil {
			about, self = ask(pid), ask(os.Getpid())
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if self.Executable != nil || self.Memory != nil || self.Descriptors != nil {
		t.Fatalf("this process cannot look at itself: %+v", self)
	}
	if diff := cmp.Diff(answers{unix.EACCES, unix.EACCES, unix.EPERM, unix.EPERM}, about, cmpopts.EquateErrors()); diff != "" {
		t.Errorf("%s, for another process of root's (-want +got):\n%s", when, diff)
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil || !regexp.MustCompile(`(?m)^Max core file size +0 +0 `).Match(limits) {
		t.Errorf("%s: it may leave core dumps: %v\n%s", when, err, limits)
	}
}

// take gets a descriptor out of a process, and gives it up again.
func take(pid int) error {
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(process)
	fd, err := unix.PidfdGetfd(process, 0, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// held is everything that the core may have open. A number stands for itself.
var held = regexp.MustCompile(`^(` + strings.Join([]string{
	`/dev/null`,
	`pipe:\[\d+\]`,                         // standard output and error: the test's own
	`anon_inode:bpf-(map|prog)`,            // what it loaded
	`anon_inode:bpf_link`,                  // what it attached
	`anon_inode:\[?(eventpoll|eventfd)\]?`, // of the Go runtime
	`anon_inode:btf`,                       // types of its own programs
	`socket:\[\d+\]`,                       // of the agent, rtnetlink, and the canary
	`/.*/state/(lock|audit\.log)`,
	`/.*/cpu\.(max|cfs_quota_us|cfs_period_us)`, // the Go runtime follows its share of the CPUs
}, "|") + `)$`)

// Nothing is left open by accident: no directory, no file, no foreign object.
func TestCoreDescriptors(t *testing.T) {
	lab := netlab.New(t)
	node := lab.Node(policy, netlab.NodeOptions{CoreOnly: true})
	// What a request holds while it is answered may be open for a moment longer.
	settle := func(most int) (n int) {
		t.Helper()
		var strange []string
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			n, strange = descriptors(t, node.Core.PID())
			if len(strange) == 0 && (most == 0 || n <= most) {
				break
			}
		}
		if len(strange) > 0 {
			t.Errorf("the core holds %q", strange)
		}
		return n
	}
	// Many policies leave no more open than two: what is in force and nothing else.
	for v := range 3 {
		node.Apply(strings.Replace(policy, "version: 1", fmt.Sprintf("version: %d", v+2), 1))
	}
	before := settle(0)
	for v := range 10 {
		node.Apply(strings.Replace(policy, "version: 1", fmt.Sprintf("version: %d", v+10), 1))
	}
	if after := settle(before); after > before {
		t.Errorf("%d descriptors after ten more policies, %d before", after, before)
	}
}

// descriptors counts what a process has open, and lists what the core may not.
func descriptors(t *testing.T, pid int) (n int, strange []string) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue // closed meanwhile
		}
		if err != nil {
			t.Fatal(err)
		}
		if n++; !held.MatchString(target) {
			strange = append(strange, target)
		}
	}
	return n, strange
}

// The agent is nobody, with no capability at all, and nothing but maps of the core's.
func TestAgentPosture(t *testing.T) {
	lab := netlab.New(t)
	node := lab.Node(policy, netlab.NodeOptions{})
	want := documented(t, 1)
	for thread, got := range read(t, node.Agent.PID(), want) {
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", thread, diff)
		}
	}
	// It has maps from the core, and no program and no link.
	dir := fmt.Sprintf("/proc/%d/fd", node.Agent.PID())
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil && strings.HasPrefix(target, "anon_inode:bpf") {
			kinds = append(kinds, target)
		}
	}
	slices.Sort(kinds)
	if kinds = slices.Compact(kinds); !slices.Equal(kinds, []string{"anon_inode:bpf-map"}) {
		t.Errorf("the agent holds %v", kinds)
	}
}

// Whoever takes the agent over can do nothing with it that the agent does not do
// itself, however the files and the network of the machine are arranged.
func TestAgentConfined(t *testing.T) {
	lab := netlab.New(t)
	node := lab.Node(policy, netlab.NodeOptions{})
	if out, err := exec.Command("go", "build", "-o", lab.Dir(), "../../agent/testdata/confined").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	const killed = "killed"
	for attempt, want := range map[string]string{
		"OK read a map":                "<nil>",
		"OK call the core again":       "<nil>",
		"bad write a map":              "operation not permitted",
		"bad open a map by its number": "operation not permitted",
		"bad open a pin":               "operation not permitted",
		"bad load a program":           "operation not permitted",
		"bad memory of the core":       "permission denied",
		"bad descriptors of the core":  "permission denied",
		"bad read a file":              "permission denied",
		"bad write a file":             "permission denied",
		"bad call another host":        "permission denied",
		"bad run a program":            killed,
		"bad trace the core":           killed,
		"bad signal the core":          killed,
		"bad new user namespace":       killed,
		"bad frames":                   killed,
	} {
		t.Run(attempt, func(t *testing.T) {
			_, name, _ := strings.Cut(attempt, " ")
			c := exec.Command(filepath.Join(lab.Dir(), "confined"), node.AgentConfig(), fmt.Sprint(node.Core.PID()), name)
			c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
			out, err := c.CombinedOutput()
			got := strings.TrimSpace(string(out))
			var exit *exec.ExitError
			if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == unix.SIGSYS {
				got += killed
			} else if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if got != want {
				t.Errorf("%s, want %s", got, want)
			}
		})
	}
}
