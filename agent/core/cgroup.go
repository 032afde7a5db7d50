package core

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
)

// tree is the managed part of the cgroup2 hierarchy.
type tree struct {
	dir  string // directory of the managed root
	id   uint64 // its cgroup id
	path string // its path below the hierarchy's root as the kernel says it; "" for that root itself
}

// writing does what makes or removes a cgroup right below the managed root. The kernel
// makes the root of a hierarchy without the right to write there, also for root, whose it
// is. The core gives itself that right for the moment: it needs no capability over
// everybody's files.
func (t *tree) writing(do func() error) (err error) {
	if err := do(); !errors.Is(err, fs.ErrPermission) {
		return err
	}
	info, err := os.Stat(t.dir)
	if err != nil {
		return err
	}
	if err := os.Chmod(t.dir, info.Mode().Perm()|0o200); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Chmod(t.dir, info.Mode().Perm())) }()
	return do()
}

// openTree finds the managed root: a directory inside a cgroup2 mount, or that
// mount itself if nothing is configured. On a hybrid machine cgroup2 is mounted
// beside v1, so it is found by its type, never by its place.
func openTree(configured string) (*tree, error) {
	mounts, err := cgroup2Mounts("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	if len(mounts) == 0 {
		return nil, proto.Refuse("mount -t cgroup2 none /sys/fs/cgroup/unified", "find cgroup2: it is not mounted")
	}
	dir := configured
	if !filepath.IsAbs(dir) {
		dir = filepath.Join(mounts[0].point, configured)
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, proto.Refuse("make the directory, or correct cgroup_root", "open cgroup_root: %w", err)
	}
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err != nil {
		return nil, fmt.Errorf("open cgroup_root: %w", err)
	}
	if stat.Type != unix.CGROUP2_SUPER_MAGIC {
		return nil, proto.Refuse("name a directory below "+mounts[0].point, "cgroup_root %s is not in a cgroup2 file system", dir)
	}
	t := &tree{dir: dir}
	if t.id, err = cgroupID(dir); err != nil {
		return nil, err
	}
	for _, m := range mounts {
		if dir == m.point || strings.HasPrefix(dir, m.point+"/") {
			t.path = strings.TrimSuffix(strings.TrimSuffix(m.root, "/")+strings.TrimPrefix(dir, m.point), "/")
			return t, nil
		}
	}
	return nil, fmt.Errorf("open cgroup_root: no cgroup2 mount leads to %s", dir)
}

// cgroupID is the inode number of a cgroup's directory: kernfs makes both of the
// same 64 bits.
func cgroupID(dir string) (uint64, error) {
	var stat unix.Stat_t
	if err := unix.Lstat(dir, &stat); err != nil {
		return 0, fmt.Errorf("read cgroup id of %s: %w", dir, err)
	}
	return stat.Ino, nil
}

// cgroup is one directory of the tree.
type cgroup struct {
	path string // below the managed root, "/" for that itself
	id   uint64
}

// name is the last component of the path.
func (c cgroup) name() string { return c.path[strings.LastIndexByte(c.path, '/')+1:] }

// isSlice says whether only the system manager makes cgroups of this name.
func (c cgroup) isSlice() bool {
	return len(c.name()) < pathBytes && strings.HasSuffix(c.name(), ".slice")
}

// walk lists the cgroups at and below a path, parents first. Those that vanish
// meanwhile are left out.
func (t *tree) walk(below string) ([]cgroup, error) {
	var out []cgroup
	err := filepath.WalkDir(filepath.Join(t.dir, below), func(dir string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		if err != nil {
			return err
		}
		if !d.IsDir() {
			return nil
		}
		id, err := cgroupID(dir)
		if err != nil {
			return nil //nolint:nilerr // removed since its parent was read
		}
		out = append(out, cgroup{path: "/" + strings.Trim(strings.TrimPrefix(dir, t.dir), "/"), id: id})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("walk cgroups: %w", err)
	}
	return out, nil
}

// exists says whether the cgroup is still there.
func (t *tree) exists(c cgroup) bool {
	id, err := cgroupID(filepath.Join(t.dir, c.path))
	return err == nil && id == c.id
}

type mount struct {
	root  string // what of the hierarchy is mounted
	point string // where
}

// cgroup2Mounts lists mounts of the type, whole hierarchies first.
func cgroup2Mounts(file string) ([]mount, error) { return mountsOf(file, "cgroup2") }

// mountsOf lists mounts of a type, whole ones first.
func mountsOf(file, kind string) ([]mount, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", kind, err)
	}
	var whole, partial []mount
	for line := range strings.Lines(string(text)) {
		left, right, ok := strings.Cut(line, " - ")
		fields := strings.Fields(left)
		if !ok || len(fields) < 5 || !strings.HasPrefix(right, kind+" ") {
			continue
		}
		m := mount{root: unescape(fields[3]), point: unescape(fields[4])}
		if m.root == "/" {
			whole = append(whole, m)
		} else {
			partial = append(partial, m)
		}
	}
	return append(whole, partial...), nil
}

// unescape undoes what the kernel does to paths in mountinfo.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace
