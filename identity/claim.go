package identity

import (
	"fmt"
	"maps"
	"slices"

	"github.com/demarc/demarc/policy/image"
)

// Claims says which cgroup paths of an inventory belong to which identity of an
// image, and why others belong to none. A workload that two identities select is
// bound to neither.
func Claims(inv *Inventory, img *image.Image) (claims map[string]image.ID, problems []string) {
	claims = make(map[string]image.ID)
	for _, w := range inv.Workloads {
		if w.Cgroup == "" {
			continue
		}
		found := make(map[string]image.ID)
		for _, s := range img.Selectors {
			if w.Matches(s) {
				owner := img.Workloads[s.Workload]
				found[owner.Name] = owner.ID
			}
		}
		names := slices.Sorted(maps.Keys(found))
		switch len(names) {
		case 0:
		case 1:
			claims[w.Cgroup] = found[names[0]]
		default:
			problems = append(problems, fmt.Sprintf("%s is selected by workloads %q: not bound", w.Key(), names))
		}
	}
	return claims, problems
}
