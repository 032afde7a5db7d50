package identity

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/demarc/demarc/policy/image"
)

// Source says who runs on this node, and follows it.
type Source interface {
	// Current returns the last good inventory, nil before the first, when it was read,
	// and what is wrong now, if anything.
	Current() (*Inventory, time.Time, error)
	// Changed receives after every reading that could matter. There is one receiver.
	Changed() <-chan struct{}
	// Path is the file or the socket that it is read from.
	Path() string
}

// Claims says which cgroup paths of an inventory belong to which identity of an
// image, and why others belong to none. A container that nobody selects is nobody's,
// and need not wait any longer. A cgroup that two identities select is bound to
// neither.
func Claims(inv *Inventory, img *image.Image) (claims map[string]image.ID, problems []string) {
	claims = make(map[string]image.ID)
	waiting := slices.ContainsFunc(img.Selectors, func(s image.Selector) bool {
		return s.Kind == image.SelectKubernetes || s.Kind == image.SelectContainer
	})
	found := make(map[string]map[string]image.ID) // by cgroup and name of the workload
	for _, w := range inv.Workloads {
		if w.Cgroup == "" {
			continue
		}
		if found[w.Cgroup] == nil {
			found[w.Cgroup] = make(map[string]image.ID)
		}
		for _, s := range img.Selectors {
			if w.Matches(s) {
				owner := img.Workloads[s.Workload]
				found[w.Cgroup][owner.Name] = owner.ID
			}
		}
	}
	told := make(map[string]bool)
	for _, w := range inv.Workloads {
		if w.Cgroup == "" || told[w.Cgroup] {
			continue
		}
		told[w.Cgroup] = true
		names := slices.Sorted(maps.Keys(found[w.Cgroup]))
		switch len(names) {
		case 0:
			if _, _, ok := ContainerOf(w.Cgroup); ok && waiting {
				claims[w.Cgroup] = image.Unmanaged
			}
		case 1:
			claims[w.Cgroup] = found[w.Cgroup][names[0]]
		default:
			problems = append(problems, fmt.Sprintf("%s is selected by workloads %q: not bound", w.Key(), names))
		}
	}
	return claims, problems
}
