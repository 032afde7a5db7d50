// Package netlab builds a small world for a test: namespaces joined by a switch,
// cgroups, nodes that run demarc, processes that make odd socket calls, and a
// wire that says what really went out.
//
// Nothing of it outlives the test. Namespaces have no name: they end with the
// descriptors that hold them. Processes end with the thread that started them
// and with their cgroup. BPF file systems are mounted in a mount namespace of the
// test's own (see Main). Nothing is attached above the test's cgroup, and the
// machine's own interfaces are never touched.
//
// A test binary that uses netlab needs
//
//	func TestMain(m *testing.M) { netlab.Main(m) }
package netlab

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
)

// Lab is one test's world. Make it with New.
type Lab struct {
	t       testing.TB
	dir     string // temporary files; short, because it holds sockets
	cgroup  string // directory that all cgroups of the lab are below
	keyring string // shared by the nodes: they are of one installation

	mu      sync.Mutex
	network *Namespace // holds the switch; nil until something is joined to it
	hosts   int        // namespaces joined to it
	cables  int        // without it
	nodes   int
	undo    []func() error // newest last
	closed  bool
}

// New makes an empty lab that ends with the test. Errors of the lab itself end the
// test.
func New(t testing.TB) *Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes namespaces and cgroups and loads programs into the kernel")
	}
	if !prepared() {
		t.Fatal("this package needs: func TestMain(m *testing.M) { netlab.Main(m) }")
	}
	l := &Lab{t: t}
	registerLab(l) // before anything is made
	t.Cleanup(func() {
		if err := l.close(); err != nil {
			t.Errorf("clean up: %v", err)
		}
		unregisterLab(l)
	})
	var err error
	if l.dir, err = os.MkdirTemp(process.dir, "lab"); err != nil {
		t.Fatal(err)
	}
	l.check(os.Chmod(l.dir, 0o755), "open directory to the agent")
	l.later(func() error { return os.RemoveAll(l.dir) })
	l.keyring = filepath.Join(l.dir, "keyring")
	if l.cgroup, err = os.MkdirTemp(process.cgroup, "lab"); err != nil {
		t.Fatal(err)
	}
	l.later(func() error { return removeCgroup(l.cgroup) })
	return l
}

// Dir is a directory for files that end with the lab.
func (l *Lab) Dir() string { return l.dir }

// later remembers how something is undone. Labs are undone from the newest to the
// oldest, and once. A test that goes on behind the end of its lab, because a signal
// ended it, does so no further than here.
func (l *Lab) later(undo func() error) {
	l.mu.Lock()
	closed := l.closed
	l.undo = append(l.undo, undo)
	l.mu.Unlock()
	if closed {
		_ = undo()
		select {}
	}
}

// close undoes everything, also what comes after something that failed. The
// processes go first: nothing that they hold can be taken away under them.
func (l *Lab) close() error {
	l.mu.Lock()
	undo, closed := l.undo, l.closed
	l.undo, l.closed = nil, true
	l.mu.Unlock()
	if closed {
		return nil
	}
	var problems []error
	if l.cgroup != "" {
		if err := killCgroup(l.cgroup); err != nil {
			problems = append(problems, err)
		}
	}
	for _, f := range slices.Backward(undo) {
		if err := f(); err != nil {
			problems = append(problems, err)
		}
	}
	if len(problems) > 0 {
		return fmt.Errorf("%d problems, the first: %w", len(problems), problems[0])
	}
	return nil
}

func (l *Lab) check(err error, doing string, args ...any) {
	l.t.Helper()
	if err != nil {
		l.t.Fatalf("%s: %v", fmt.Sprintf(doing, args...), err)
	}
}
