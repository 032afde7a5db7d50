package core

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/image/encode"
	"github.com/demarc/demarc/policy/policytest"
)

func init() {
	// Tests give threads away that have lost their rights. The main thread, which
	// /proc/self is about, must not be one of them.
	runtime.LockOSThread()
}

// TestMain begins anew in a network namespace of the tests' own, so that no core
// ever meets a device of the machine.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == CanaryCommand {
		if err := Canary(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	const apart = "DEMARC_TEST_APART"
	if os.Geteuid() == 0 && os.Getenv(apart) == "" {
		runtime.LockOSThread() // the thread that leaves is the one that goes on
		err := errors.Join(os.Setenv(apart, "1"), unix.Unshare(unix.CLONE_NEWNET))
		if err == nil {
			err = unix.Exec("/proc/self/exe", os.Args, os.Environ())
		}
		fmt.Fprintln(os.Stderr, "make a network namespace:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// machine is a piece of this one: a cgroup subtree and a BPF file system of the
// test's own. The programs are attached to that subtree only, and to devices only
// where a test says so.
type machine struct {
	t      testing.TB
	config Config
}

func newMachine(t testing.TB) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it loads programs into the kernel")
	}
	mounts, err := cgroup2Mounts("/proc/self/mountinfo")
	if err != nil || len(mounts) == 0 {
		t.Fatalf("find cgroup2: %v", err)
	}
	root, err := os.MkdirTemp(mounts[0].point, fmt.Sprintf("demarc-test-%d-", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	bpffs := filepath.Join(dir, "bpf")
	if err := os.Mkdir(bpffs, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", bpffs, "bpf", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, config: Config{
		CgroupRoot: root, BPFFS: filepath.Join(bpffs, "demarc"), RunDir: filepath.Join(dir, "run"),
		StateDir: filepath.Join(dir, "state"), Keyring: filepath.Join(dir, "state", "keyring"),
		Unguarded: true, // tests do what the guard keeps others from
	}}
	t.Cleanup(func() {
		if err := unix.Unmount(bpffs, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
		removeCgroups(t, root)
	})
	return m
}

func removeCgroups(t testing.TB, root string) {
	t.Helper()
	tree := tree{dir: root}
	all, err := tree.walk("/")
	if err != nil {
		t.Error(err)
	}
	for i := len(all) - 1; i >= 0; i-- {
		if err := os.Remove(filepath.Join(root, all[i].path)); err != nil {
			t.Errorf("remove cgroup: %v", err)
		}
	}
}

// mkdir makes a cgroup below the managed root, with its parents.
func (m *machine) mkdir(path string) {
	m.t.Helper()
	if err := os.MkdirAll(m.config.CgroupRoot+path, 0o755); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) open(h hooks) (*Core, error) { return open(m.config, m.log(), h) }

func (m *machine) log() *slog.Logger {
	return slog.New(slog.NewTextHandler(testWriter{m.t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// start opens a core, with its upkeep, and closes it when the test ends.
func (m *machine) start() *Core {
	m.t.Helper()
	c, err := m.open(hooks{})
	if err != nil {
		m.t.Fatal(err)
	}
	c.start()
	m.t.Cleanup(func() { c.Close() })
	return c
}

// steady is a status without the time at which the canary was asked, which is each time
// somebody asks for a status.
func steady(s *proto.Status) *proto.Status {
	same := *s
	same.Proved = time.Time{}
	return &same
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSuffix(string(b), "\n"))
	return len(b), nil
}

// shop compiles the documentation's policy, with a workload that only metadata
// finds, after the change.
func shop(t *testing.T, change func(*policy.Policy)) []byte {
	t.Helper()
	p := policytest.Shop()
	p.Crossings[3].Until = time.Now().Add(time.Hour).Truncate(time.Second)
	p.Workloads = append(p.Workloads[:2:2], append([]policy.Workload{
		{Name: "pod", Zone: "app", Match: []policy.Selector{{Kind: image.SelectKubernetes, Namespace: "shop"}}},
	}, p.Workloads[2:]...)...)
	if change != nil {
		change(p)
	}
	img, err := policy.Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	b, err := encode.Image(img)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// id is the identity of a workload in an encoded image.
func id(t *testing.T, b []byte, name string) uint32 {
	t.Helper()
	img, err := image.Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	for i := range img.Workloads {
		if img.Workloads[i].Name == name {
			return uint32(img.Workloads[i].ID)
		}
	}
	t.Fatalf("no workload %s", name)
	return 0
}

// identity is what the kernel binds a cgroup to in the active slot; 0 = nothing.
func identity(t *testing.T, c *Core, path string) uint32 {
	t.Helper()
	s := scanner{objects: c.objects, tree: c.tree, slot: c.active.slot}
	got, _, err := s.binding(path)
	if err != nil {
		return 0
	}
	return got
}

// attached counts the programs on the managed root's hooks, ours or not.
func attached(t *testing.T, m *machine) int {
	t.Helper()
	spec, err := loadDemarc()
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.Open(m.config.CgroupRoot)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	n := 0
	for _, name := range attachOrder[namers:] {
		found, err := link.QueryPrograms(link.QueryOptions{Target: int(root.Fd()), Attach: spec.Programs[name].AttachType})
		if err != nil {
			t.Fatal(err)
		}
		n += len(found.Programs)
	}
	return n
}

func removeCgroup(t *testing.T, dir string) {
	t.Helper()
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
}

// as runs something with another effective user, who is let through to a path.
func as(t *testing.T, uid int, do func(), path string) {
	t.Helper()
	for dir := filepath.Dir(path); dir != "/" && dir != os.TempDir(); dir = filepath.Dir(dir) {
		must(t, os.Chmod(dir, 0o711))
	}
	must(t, os.Chmod(path, 0o666))
	done := make(chan error)
	go func() {
		// The thread is thrown away with its user: it is never unlocked.
		runtime.LockOSThread()
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
			done <- errno
			return
		}
		do()
		done <- nil
	}()
	must(t, <-done)
}

// What root asks for on the socket, in short.

func (c *Core) Apply(b []byte, within time.Duration) (*proto.Status, error) {
	return c.apply(b, change{within: within}, "core")
}

func (c *Core) Shadow(b []byte, lasting time.Duration) (*proto.Status, error) {
	return c.beginShadow(b, lasting, "core")
}

func (c *Core) EndShadow() (*proto.Status, error) { return c.stopShadow("core") }
func (c *Core) Confirm() (*proto.Status, error)   { return c.confirm("core") }
func (c *Core) Rollback() (*proto.Status, error)  { return c.rollback("core") }
func (c *Core) Image() (*os.File, error) {
	files, err := c.imageOf(false)
	return append(files, nil)[0], err
}
