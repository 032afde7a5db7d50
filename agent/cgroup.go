package agent

import (
	"io/fs"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// cgroups tells the paths of cgroups by their ids. An id is the inode number of the
// cgroup's directory. The zero value is ready; it is safe for concurrent use.
type cgroups struct {
	mu    sync.RWMutex
	root  string
	paths map[uint64]string // below root, "/" for itself
	last  time.Time
}

// rescanAfter bounds how often an unknown id leads to a walk of the tree. Ids of
// cgroups that are gone stay unknown.
const rescanAfter = time.Second

// Path returns the path of a cgroup below root, or "".
func (c *cgroups) Path(root string, id uint64) string {
	c.mu.RLock()
	p, ok := c.paths[id]
	known := ok && root == c.root
	c.mu.RUnlock()
	if known {
		return p
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if p, ok := c.paths[id]; ok && root == c.root { // another has looked for it
		return p
	}
	if root == "" || root == c.root && time.Since(c.last) < rescanAfter {
		return ""
	}
	c.scan(root)
	return c.paths[id]
}

// scan walks the tree. Cgroups that end during the walk are left out.
func (c *cgroups) scan(root string) {
	// Ids are not reused while the machine runs, so that cgroups which are gone may
	// keep their names for events that are still kept; the bound keeps a machine
	// with many short-lived cgroups from growing this for ever.
	const keep = 1 << 16
	if root != c.root || len(c.paths) > keep {
		c.paths = make(map[uint64]string)
	}
	c.root, c.last = root, time.Now()
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return nil
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			c.paths[st.Ino] = "/" + strings.Trim(strings.TrimPrefix(path, root), "/")
		}
		return nil
	})
}

// searchAfter bounds how often the tree is walked for cgroups that are not in it.
const searchAfter = 200 * time.Millisecond

// Relative finds a cgroup by how the kernel names it to a process with a cgroup
// namespace of its own, as the agent's in a pod: up from there with `..`, and down by
// names. How far up leads where is not to be seen, so the names must end the path of
// exactly one cgroup below root, which is itself below in the hierarchy.
func (c *cgroups) Relative(root, below, cgroup string) (string, bool) {
	tail := cgroup
	for strings.HasPrefix(tail, "/../") {
		tail = strings.TrimPrefix(tail, "/..")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if root == c.root {
		if path, found := c.ending(below, tail); found {
			return path, true
		}
		if time.Since(c.last) < searchAfter {
			return "", false
		}
	}
	c.scan(root)
	return c.ending(below, tail)
}

// ending is the only known cgroup whose path in the hierarchy ends so.
func (c *cgroups) ending(below, tail string) (only string, found bool) {
	for _, path := range c.paths {
		if !strings.HasSuffix(below+path, tail) {
			continue
		}
		if found && path != only {
			return "", false
		}
		only, found = path, true
	}
	return only, found
}

// managed turns a cgroup of the hierarchy into one below the managed root, if it is
// there.
func (s *service) managed(cgroup string) (string, bool) {
	root := s.link.view().Root
	mount := ""
	for _, at := range cgroupMounts() {
		if len(at) > len(mount) && (root == at || strings.HasPrefix(root, at+"/")) {
			mount = at
		}
	}
	below := strings.TrimPrefix(root, mount) // of the mount: "" or "/lab"
	if mount != "" && strings.HasPrefix(cgroup, "/../") {
		return s.cgroups.Relative(root, below, cgroup)
	}
	if mount == "" || !strings.HasPrefix(cgroup, below+"/") {
		return "", false
	}
	return strings.TrimPrefix(cgroup, below), true
}
