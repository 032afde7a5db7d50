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
	mu    sync.Mutex
	root  string
	paths map[uint64]string // below root, "/" for itself
	last  time.Time
}

// rescanAfter bounds how often an unknown id leads to a walk of the tree. Ids of
// cgroups that are gone stay unknown.
const rescanAfter = time.Second

// Path returns the path of a cgroup below root, or "".
func (c *cgroups) Path(root string, id uint64) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.paths[id]
	if ok && root == c.root {
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
	if mount == "" || !strings.HasPrefix(cgroup, below+"/") {
		return "", false
	}
	return strings.TrimPrefix(cgroup, below), true
}
