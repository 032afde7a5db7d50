package kubernetes

import (
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/demarc/demarc/identity"
)

// Bounds of a look at the tree.
const (
	lookEvery      = 100 * time.Millisecond
	maxDirectories = 1 << 15
	maxDepth       = 12
	aboveKubepods  = 3 // how deep the kubelet's own group may be
)

// place is where a container is.
type place struct {
	path string // below the managed root
	pod  string // UID that the path names; "" = none
}

// tree finds containers in the groups that kubelets make. It looks only where somebody
// asks for an id that it does not know. Not for concurrent use.
type tree struct {
	root  func() string
	known map[string][]place
	at    string // root of what is known
	last  time.Time
}

// find returns the places of all ids that have one, and forgets all others.
func (t *tree) find(ids map[string][]int) map[string][]place {
	root := t.root()
	if root != t.at {
		t.known, t.at, t.last = nil, root, time.Time{}
	}
	unknown := false
	for id := range ids {
		unknown = unknown || len(t.known[id]) == 0
	}
	if unknown && root != "" && time.Since(t.last) >= lookEvery {
		t.known = look(root)
		t.last = time.Now()
	}
	found := make(map[string][]place, len(ids))
	for id := range ids {
		if at := t.known[id]; len(at) > 0 {
			found[id] = at
		}
	}
	t.known = found
	return found
}

// pod lists the containers below a pod.
func (t *tree) pod(uid string) (paths []string) {
	root := t.root()
	if root == "" {
		return nil
	}
	for _, places := range look(root) {
		for _, at := range places {
			if at.pod == uid {
				paths = append(paths, at.path)
			}
		}
	}
	slices.Sort(paths)
	return paths
}

// look walks what kubelets made below a root. It goes into no container: who has a part
// of the tree to himself may make groups there that are named like others.
func look(root string) map[string][]place {
	found := make(map[string][]place)
	left := maxDirectories
	var walk func(dir string, depth int, within bool)
	walk = func(dir string, depth int, within bool) {
		entries, err := os.ReadDir(root + dir)
		if err != nil {
			return // it has ended meanwhile
		}
		for _, e := range entries {
			if !e.IsDir() || left == 0 {
				continue
			}
			left--
			below := path.Join(dir, e.Name())
			if c, at, ok := identity.ContainerOf(below); ok {
				if within && at == below {
					found[c.ID] = append(found[c.ID], place{below, c.Pod})
				}
				continue
			}
			inside := within || kubepods(e.Name())
			if inside && depth < maxDepth || depth < aboveKubepods {
				walk(below, depth+1, inside)
			}
		}
	}
	walk("/", 0, false)
	return found
}

// kubepods says whether a group is the kubelet's for pods, of either driver, also below
// a group of its own (kubelet-kubepods.slice).
func kubepods(name string) bool {
	name = strings.TrimSuffix(name, ".slice")
	return name == "kubepods" || strings.HasSuffix(name, "-kubepods")
}
