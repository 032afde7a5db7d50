// Package posture_test measures from outside, through /proc, what the daemons hold
// while they run.
package posture_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
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

// What each daemon may hold; every thread of it is looked at. Capabilities are
// bits of include/uapi/linux/capability.h.
const (
	kept = 1<<unix.CAP_BPF | 1<<unix.CAP_NET_ADMIN
	none = 0
)

func status(uid int, permitted, bounding uint64) map[string]string {
	ids := fmt.Sprintf("%d\t%d\t%d\t%d", uid, uid, uid, uid)
	hex := func(set uint64) string { return fmt.Sprintf("%016x", set) }
	return map[string]string{
		"Uid": ids, "Gid": ids, "NoNewPrivs": "1",
		"CapInh": hex(none), "CapPrm": hex(permitted), "CapEff": hex(permitted), "CapBnd": hex(bounding), "CapAmb": hex(none),
	}
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

// The core has two capabilities once it serves, whether a policy was in force
// before or not, and those are enough for the first policy.
func TestCorePosture(t *testing.T) {
	lab := netlab.New(t)
	node := lab.Node("", netlab.NodeOptions{CoreOnly: true})
	want := status(0, kept, none)
	look := func(when string) {
		t.Helper()
		for thread, got := range read(t, node.Core.PID(), want) {
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s, %s (-want +got):\n%s", when, thread, diff)
			}
		}
		if !closed(t, node.Core.PID()) {
			t.Errorf("%s: another process of root's can look into the core", when)
		}
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

// closed says whether the process is closed to ptrace and to core dumps: not even
// its executable is told to a process of the same user without CAP_SYS_PTRACE. The
// same question about this process itself must be answered.
func closed(t *testing.T, pid int) bool {
	t.Helper()
	type answer struct{ about, self error }
	answers := make(chan answer)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its capabilities
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var sets [2]unix.CapUserData
		err := unix.Capget(&header, &sets[0])
		sets[0].Effective &^= 1 << unix.CAP_SYS_PTRACE
		if err = errors.Join(err, unix.Capset(&header, &sets[0])); err != nil {
			answers <- answer{self: err}
			return
		}
		_, about := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		_, self := os.Readlink(fmt.Sprintf("/proc/%d/exe", os.Getpid()))
		answers <- answer{about, self}
	}()
	a := <-answers
	if a.self != nil {
		t.Fatalf("look at this process: %v", a.self)
	}
	return errors.Is(a.about, unix.EACCES)
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
	settle := func(expected int) (n int) {
		t.Helper()
		var strange []string
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			n, strange = descriptors(t, node.Core.PID())
			if len(strange) == 0 && (expected == 0 || n == expected) {
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
	if after := settle(before); after != before {
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

// The agent is nobody, with no capability at all.
func TestAgentPosture(t *testing.T) {
	lab := netlab.New(t)
	node := lab.Node(policy, netlab.NodeOptions{})
	want := status(65534, none, none)
	// Its bounding set and no_new_privs are its service manager's to set.
	delete(want, "CapBnd")
	delete(want, "NoNewPrivs")
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
