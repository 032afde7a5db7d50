package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/demarc/demarc/policy/image"
)

// maxOverlaps bounds the pairs that are listed: in a document where everything
// overlaps there are as many as the square of its selectors.
const maxOverlaps = 50

// owned is a selector and its workload.
type owned struct {
	*Selector
	workload string
}

// overlaps reports pairs of selectors of different workloads that could match one
// process, each pair of workloads once.
type overlaps struct {
	*document
	seen map[[2]string]bool
}

// checkOverlap refuses two workloads that could match the same process: which of
// them a process is must not depend on luck. Selectors of one workload may overlap.
func (d *document) checkOverlap() {
	var names, metadata []owned
	for i := range d.p.Workloads {
		w := &d.p.Workloads[i]
		for j := range w.Match {
			s := owned{&w.Match[j], w.Name}
			if s.Kind == image.SelectCgroup || s.Kind == image.SelectUnit {
				names = append(names, s)
			} else {
				metadata = append(metadata, s)
			}
		}
	}
	o := overlaps{document: d, seen: map[[2]string]bool{}}
	o.cgroups(names)
	o.units(names)
	for _, kind := range []image.SelectorKind{image.SelectKubernetes, image.SelectContainer} {
		var group []attributed
		for _, s := range metadata {
			if s.Kind == kind {
				group = append(group, attributed{s, s.attributes()})
			}
		}
		o.attributes(group)
	}
}

func (o *overlaps) full() bool { return len(o.seen) >= maxOverlaps }

func (o *overlaps) report(a, b owned) {
	if a.workload == b.workload || o.full() {
		return
	}
	if a.Pos.compare(b.Pos) > 0 {
		a, b = b, a
	}
	pair := [2]string{a.workload, b.workload}
	if o.seen[pair] {
		return
	}
	o.seen[pair] = true
	o.add(b.Pos, "make them differ: a process belongs to one workload", "two workloads could match the same process: %s of workload %s, and %s of workload %s at line %d",
		b.Selector, b.workload, a.Selector, a.workload, a.Pos.Line)
}

// String writes a selector for messages.
func (s *Selector) String() string {
	switch s.Kind {
	case image.SelectCgroup:
		return "cgroup " + s.Path
	case image.SelectUnit:
		return "systemdUnit " + s.Path
	case image.SelectKubernetes:
		return "the kubernetes selector"
	case image.SelectContainer:
		return "the container selector"
	}
	return fmt.Sprintf("selector(%d)", s.Kind)
}

// cgroups finds paths that are equal or nested. In the order of whole components
// everything below a path follows it directly.
func (o *overlaps) cgroups(all []owned) {
	type pathed struct {
		owned
		key string
	}
	var paths []pathed
	for _, s := range all {
		if s.Kind == image.SelectCgroup {
			// A zero byte sorts before every character of a component.
			key := strings.ReplaceAll(strings.TrimSuffix(s.Path, "/"), "/", "\x00") + "\x00"
			paths = append(paths, pathed{s, key})
		}
	}
	slices.SortStableFunc(paths, func(a, b pathed) int { return strings.Compare(a.key, b.key) })
	for i, a := range paths {
		for _, b := range paths[i+1:] {
			if !strings.HasPrefix(b.key, a.key) || o.full() {
				break
			}
			o.report(a.owned, b.owned)
		}
	}
}

// namePattern is what a selector says of a unit's name: everything, or a prefix
// and, with a '*', a suffix.
type namePattern struct {
	owned
	prefix, suffix string
	glob           bool
}

func (a namePattern) intersects(b namePattern) bool {
	switch {
	case !a.glob && !b.glob:
		return a.prefix == b.prefix
	case !a.glob:
		return b.matches(a.prefix)
	case !b.glob:
		return a.matches(b.prefix)
	}
	prefixes := strings.HasPrefix(a.prefix, b.prefix) || strings.HasPrefix(b.prefix, a.prefix)
	suffixes := strings.HasSuffix(a.suffix, b.suffix) || strings.HasSuffix(b.suffix, a.suffix)
	return prefixes && suffixes
}

func (a namePattern) matches(name string) bool {
	return len(name) >= len(a.prefix)+len(a.suffix) && strings.HasPrefix(name, a.prefix) && strings.HasSuffix(name, a.suffix)
}

// units finds unit patterns that intersect, and cgroup paths that a unit could
// live in. Two names can only intersect where one's prefix begins the other's, so
// in sorted order the candidates follow each other.
func (o *overlaps) units(all []owned) {
	var patterns []namePattern
	for _, s := range all {
		if s.Kind == image.SelectUnit {
			prefix, suffix, glob := strings.Cut(s.Path, "*")
			patterns = append(patterns, namePattern{s, prefix, suffix, glob})
		}
	}
	if len(patterns) == 0 {
		return
	}
	for _, s := range all {
		if s.Kind != image.SelectCgroup {
			continue
		}
		if unit := firstBelowSlices(s.Path); unit != "" {
			patterns = append(patterns, namePattern{owned: s, prefix: unit})
			continue
		}
		// Only slices: any unit may be started in them. One example is enough.
		if i := slices.IndexFunc(patterns, func(p namePattern) bool { return p.Kind == image.SelectUnit && p.workload != s.workload }); i >= 0 {
			o.report(s, patterns[i].owned)
		}
	}
	slices.SortStableFunc(patterns, func(a, b namePattern) int { return strings.Compare(a.prefix, b.prefix) })
	for i, a := range patterns {
		for _, b := range patterns[i+1:] {
			if !strings.HasPrefix(b.prefix, a.prefix) || o.full() {
				break
			}
			if (a.Kind == image.SelectUnit || b.Kind == image.SelectUnit) && a.intersects(b) {
				o.report(a.owned, b.owned)
			}
		}
	}
}

// firstBelowSlices returns the first component of a cgroup path that is no slice:
// where systemd put it, the unit's name. "" means that there is none.
func firstBelowSlices(path string) string {
	for part := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		if part != "" && !strings.HasSuffix(part, ".slice") {
			return part
		}
	}
	return ""
}

// attributed is a selector by metadata as a set of values that must hold.
type attributed struct {
	owned
	want map[string]string
}

// attributes returns what a selector asks for. Label keys are told from the rest
// by a prefix.
func (s *Selector) attributes() map[string]string {
	want := make(map[string]string, len(s.Labels)+2)
	for k, v := range s.Labels {
		want["label "+k] = v
	}
	for k, v := range map[string]string{"namespace": s.Namespace, "serviceAccount": s.ServiceAccount, "name": s.Name, "image": s.Image} {
		if v != "" {
			want[k] = v
		}
	}
	return want
}

func (a attributed) intersects(b attributed) bool {
	for k, v := range a.want {
		if w, ok := b.want[k]; ok && v != w {
			return false
		}
	}
	return true
}

// attributes finds selectors that do not contradict each other. It splits the
// group by the attribute that most of it has, because selectors with different
// values of it cannot overlap.
func (o *overlaps) attributes(group []attributed) {
	if len(group) < 2 || o.full() {
		return
	}
	count := map[string]int{}
	values := map[string]map[string]bool{}
	for _, s := range group {
		for k, v := range s.want {
			count[k]++
			if values[k] == nil {
				values[k] = map[string]bool{}
			}
			values[k][v] = true
		}
	}
	key := ""
	for _, k := range slices.Sorted(maps.Keys(count)) {
		if len(values[k]) > 1 && (key == "" || count[k] > count[key]) {
			key = k
		}
	}
	if key == "" || len(group) < 8 {
		for i, a := range group {
			for _, b := range group[i+1:] {
				if a.intersects(b) {
					o.report(a.owned, b.owned)
				}
				if o.full() {
					return
				}
			}
		}
		return
	}
	parts := map[string][]attributed{}
	var without []attributed
	for _, s := range group {
		if v, ok := s.want[key]; ok {
			parts[v] = append(parts[v], s)
		} else {
			without = append(without, s)
		}
	}
	for _, v := range slices.Sorted(maps.Keys(parts)) {
		o.attributes(parts[v])
		for _, a := range without {
			for _, b := range parts[v] {
				if a.intersects(b) {
					o.report(a.owned, b.owned)
				}
			}
		}
	}
	o.attributes(without)
}
