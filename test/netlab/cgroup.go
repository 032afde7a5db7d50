package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Cgroup is a directory of the lab's part of the cgroup2 hierarchy.
type Cgroup struct {
	lab *Lab
	dir string
}

// Cgroup makes a cgroup, with its parents, that no node manages: for the machine
// on the other side of the wire, which has no demarc.
func (l *Lab) Cgroup(path string) *Cgroup {
	l.t.Helper()
	return l.makeCgroup(filepath.Join(l.cgroup, "elsewhere", path))
}

func (l *Lab) makeCgroup(dir string) *Cgroup {
	l.t.Helper()
	l.check(os.MkdirAll(dir, 0o755), "make cgroup")
	return &Cgroup{lab: l, dir: dir}
}

// Dir is the cgroup's directory.
func (c *Cgroup) Dir() string { return c.dir }

// Child makes a cgroup, with its parents, below this one.
func (c *Cgroup) Child(path string) *Cgroup {
	c.lab.t.Helper()
	return c.lab.makeCgroup(filepath.Join(c.dir, path))
}

// Remove removes the cgroup's directory. Sockets made in it may live on.
func (c *Cgroup) Remove() {
	c.lab.t.Helper()
	c.lab.check(awaitEmpty(c.dir), "empty cgroup")
	c.lab.check(os.Remove(c.dir), "remove cgroup")
}

// cgroup2Mount finds the mount by its type: on hybrid machines it is beside v1.
func cgroup2Mount() (string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		left, right, _ := strings.Cut(line, " - ")
		if fields := strings.Fields(left); strings.HasPrefix(right, "cgroup2 ") && len(fields) > 4 && fields[3] == "/" {
			return fields[4], nil
		}
	}
	return "", errors.New("find cgroup2: it is not mounted; mount -t cgroup2 none /sys/fs/cgroup/unified")
}

// killCgroup kills every process at and below a cgroup and waits for their end.
func killCgroup(dir string) error {
	err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	return awaitEmpty(dir)
}

// awaitEmpty waits until no process is at or below a cgroup. What a test ended
// may take the kernel a moment to bury, and longer where thousands of devices' changes are
// still to be followed up.
func awaitEmpty(dir string) error {
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		text, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		if err != nil {
			return err
		}
		if strings.Contains(string(text), "populated 0") {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("processes stay in cgroup %s: %s", dir, inside(dir))
		}
	}
}

// inside says what processes are at and below a cgroup, and where in the kernel they are.
func inside(dir string) string {
	var all []string
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		pids, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		for pid := range strings.FieldsSeq(string(pids)) {
			name, _ := os.ReadFile(filepath.Join("/proc", pid, "comm"))
			stack, _ := os.ReadFile(filepath.Join("/proc", pid, "stack"))
			all = append(all, fmt.Sprintf("%s %s\n%s", pid, name, stack))
		}
		return nil
	})
	return strings.Join(all, "\n")
}

// removeCgroup removes a cgroup and all below it, the deepest first.
func removeCgroup(dir string) error {
	var all []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() {
			all = append(all, path)
		}
		return err
	})
	for _, path := range slices.Backward(all) {
		if bad := os.Remove(path); bad != nil && !errors.Is(bad, fs.ErrNotExist) {
			err = errors.Join(err, fmt.Errorf("remove cgroup: %w", bad))
		}
	}
	return err
}
