package agent

import (
	"strings"
	"sync/atomic"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/identity"
)

// Bounds of what is kept to name flows.
const (
	maxContainers = 16384 // that run
	maxEnded      = 4096  // that do not run any more
	maxNameText   = 255   // bytes of a name
)

// containers tells what the inventory calls the processes in a cgroup. The zero value
// knows nothing. One task follows the inventory; Of is safe for concurrent use.
type containers struct {
	from    *identity.Inventory // that was last followed
	current atomic.Pointer[map[string]named]
}

// named is what a cgroup is called.
type named struct {
	flow.Container
	ended bool // it is in the inventory no more
}

// follow takes what the inventory says now. Containers that have ended keep their
// names for flows that are resolved later, where the path is never used again: where
// it holds the container's id.
func (c *containers) follow(inv *identity.Inventory) {
	if inv == nil || inv == c.from {
		return
	}
	c.from = inv
	next := make(map[string]named, len(inv.Workloads))
	for i := range inv.Workloads {
		w := &inv.Workloads[i]
		n, known := next[w.Cgroup]
		if w.Cgroup == "" || !known && len(next) == maxContainers {
			continue
		}
		// A runtime gives a container's cgroup twice: for itself, and for its pod.
		if w.Namespace != "" {
			n.Pod, n.Labels = tame(w.Namespace+"/"+w.Name), stable(w.Labels)
		} else {
			n.Name, n.Image = tame(w.Name), tame(w.Image)
		}
		next[w.Cgroup] = n
	}
	c.keepEnded(next)
	c.current.Store(&next)
}

// keepEnded adds to the next names those of containers that have ended: first those
// that ended just now, then others as there is room.
func (c *containers) keepEnded(next map[string]named) {
	before := c.current.Load()
	if before == nil {
		return
	}
	ended := 0
	for _, already := range []bool{false, true} {
		for path, n := range *before {
			if _, known := next[path]; known || n.ended != already || ended == maxEnded {
				continue
			}
			if _, at, found := identity.ContainerOf(path); found && at == path {
				n.ended = true
				next[path] = n
				ended++
			}
		}
	}
}

// Of says who is in a cgroup: whoever has it, or else the nearest one above it, to
// whom the core gives it, too.
func (c *containers) Of(path string) flow.Container {
	all := c.current.Load()
	if all == nil || len(*all) == 0 {
		return flow.Container{}
	}
	for path != "" {
		if n, ok := (*all)[path]; ok {
			return n.Container
		}
		path = path[:max(strings.LastIndexByte(path, '/'), 0)]
	}
	return flow.Container{}
}

// tame is a name that moves no cursor, or "" if it is too long for one.
func tame(s string) string {
	if len(s) > 2*maxNameText+1 { // NAMESPACE/NAME
		return ""
	}
	return flow.Escape(s)
}

// stable are those of a pod's labels that flows carry, or nil.
func stable(labels map[string]string) (out map[string]string) {
	for _, key := range flow.StableLabels {
		value, ok := labels[key]
		if !ok || value == "" || len(value) > maxNameText {
			continue
		}
		if out == nil {
			out = make(map[string]string, len(flow.StableLabels))
		}
		out[key] = tame(value)
	}
	return out
}
