package image

import (
	"fmt"
	"slices"
	"strings"

	"github.com/demarc/demarc/bpf/abi"
)

// selectors checks that each selects something, that no process below a cgroup
// can belong to two workloads, and that the unit names fit their map.
func (v *verifier) selectors() error {
	for i := range v.img.Selectors {
		s := &v.img.Selectors[i]
		if int64(s.Workload) >= int64(len(v.img.Workloads)) {
			return fmt.Errorf("selector %d: workload %d of %d", i, s.Workload, len(v.img.Workloads))
		}
		if i > 0 && v.img.Selectors[i-1].Workload > s.Workload {
			return fmt.Errorf("selector %d is out of order", i)
		}
		if !s.valid() {
			return fmt.Errorf("selector %d of workload %q is not valid", i, v.img.Workloads[s.Workload].Name)
		}
	}
	if err := v.cgroups(); err != nil {
		return err
	}
	return v.units()
}

// valid says whether the selector has exactly the fields of its kind, and at
// least one that narrows: an empty selector would select everything.
func (s *Selector) valid() bool {
	pod := s.Namespace != "" || s.ServiceAccount != ""
	container := s.Name != "" || s.Image != ""
	for i, l := range s.Labels {
		if l.Key == "" || !validText(l.Key, MaxText) || !validText(l.Value, MaxText) ||
			i > 0 && s.Labels[i-1].Key >= l.Key {
			return false
		}
	}
	for _, text := range [...]string{s.Namespace, s.ServiceAccount, s.Name, s.Image} {
		if !validText(text, MaxText) {
			return false
		}
	}
	switch s.Kind {
	case SelectCgroup:
		return validPath(s.Path) && !pod && !container && s.Labels == nil
	case SelectUnit:
		return validUnit(s.Path) && !pod && !container && s.Labels == nil
	case SelectKubernetes:
		return s.Path == "" && s.Image == "" && (s.Name == "" || s.Namespace != "") && (pod || len(s.Labels) > 0)
	case SelectContainer:
		return s.Path == "" && !pod && (container || len(s.Labels) > 0)
	}
	return false
}

// validPath: absolute, no empty, "." or ".." component, printable ASCII. "/" alone
// is the managed root.
func validPath(s string) bool {
	if !printable(s) || len(s) > MaxPath || !strings.HasPrefix(s, "/") {
		return false
	}
	if s == "/" {
		return true
	}
	for part := range strings.SplitSeq(s[1:], "/") {
		if part == "" || part == "." || part == ".." {
			return false
		}
	}
	return true
}

// validUnit: a unit name with a type, at most one '*' with something before it,
// and behind it at most what the map holds.
func validUnit(s string) bool {
	before, after, star := strings.Cut(s, "*")
	if !printable(s) || len(s) > MaxPath || strings.ContainsAny(s, "/ ") || strings.Contains(after, "*") {
		return false
	}
	if star && (before == "" || len(after) >= abi.UnitSuffix) {
		return false
	}
	dot := strings.LastIndexByte(s, '.')
	return dot > 0 && dot < len(s)-1
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

// cgroups refuses a path of one workload inside a path of another.
func (v *verifier) cgroups() error {
	paths := v.paths(SelectCgroup)
	// With a slash at its end, a path sorts right before everything below it.
	below := func(s *Selector) string { return strings.TrimSuffix(s.Path, "/") + "/" }
	slices.SortFunc(paths, func(a, b *Selector) int { return strings.Compare(below(a), below(b)) })
	var top *Selector
	for _, s := range paths {
		if top == nil || !strings.HasPrefix(below(s), below(top)) {
			top = s
		} else if s.Workload != top.Workload {
			return fmt.Errorf("workloads %q and %q both select cgroup %s",
				v.img.Workloads[top.Workload].Name, v.img.Workloads[s.Workload].Name, s.Path)
		}
	}
	return nil
}

// units refuses a unit name that two workloads give in the same words, and more
// names with one beginning than an entry of the map holds. The kernel looks only
// at the longest beginning, so a shorter one takes room in each longer one too.
func (v *verifier) units() error {
	names := v.paths(SelectUnit)
	slices.SortFunc(names, func(a, b *Selector) int { return strings.Compare(a.Path, b.Path) })
	for i, s := range names {
		if i > 0 && names[i-1].Path == s.Path && names[i-1].Workload != s.Workload {
			return fmt.Errorf("workloads %q and %q both select unit %s",
				v.img.Workloads[names[i-1].Workload].Name, v.img.Workloads[s.Workload].Name, s.Path)
		}
	}
	beginnings := map[string]int{}
	for _, s := range names {
		if before, _, star := strings.Cut(s.Path, "*"); star {
			beginnings[before]++
		}
	}
	for whole := range beginnings {
		n := 0
		for i := range len(whole) + 1 {
			n += beginnings[whole[:i]]
		}
		if n > abi.UnitAlternatives {
			return fmt.Errorf("unit names beginning with %q: %d, at most %d fit", whole, n, abi.UnitAlternatives)
		}
	}
	return nil
}

func (v *verifier) paths(kind SelectorKind) []*Selector {
	var out []*Selector
	for i := range v.img.Selectors {
		if v.img.Selectors[i].Kind == kind {
			out = append(out, &v.img.Selectors[i])
		}
	}
	return out
}
