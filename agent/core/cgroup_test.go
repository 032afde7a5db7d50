package core

import (
	"errors"
	"io/fs"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// The root of a hierarchy is not writable for root without CAP_DAC_OVERRIDE, which the
// core has neither as a unit nor in a pod. What it makes there comes about all the same,
// is taken away again, and the directory is left as it was.
func TestClosedRoot(t *testing.T) {
	const closed = 0o555
	m := newMachine(t)
	must(t, os.Chmod(m.config.CgroupRoot, closed))
	tree, err := openTree(m.config.CgroupRoot)
	must(t, err)
	all, err := readCapabilities()
	must(t, err)
	canary := tree.dir + canaryPath
	holding(t, all&^(1<<unix.CAP_DAC_OVERRIDE), func() {
		if err := os.Mkdir(canary, 0o755); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("without the right to write: %v", err)
		}
		if err := makeCanary(tree); err != nil {
			t.Errorf("make the canary's cgroup: %v", err)
		}
		if info, err := os.Stat(canary); err != nil || !info.IsDir() {
			t.Errorf("the canary's cgroup: %v", err)
		}
		if err := removeCanary(tree.dir); err != nil {
			t.Errorf("remove the canary's cgroup: %v", err)
		}
	})
	if _, err := os.Stat(canary); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the canary's cgroup is left: %v", err)
	}
	if info, err := os.Stat(tree.dir); err != nil || info.Mode().Perm() != closed {
		t.Errorf("the root is left as %v, %v", info.Mode(), err)
	}
}
