package policy

import (
	"fmt"
	"math/rand/v2"
	"path"
	"strings"
	"testing"

	"github.com/demarc/demarc/policy/image"
)

// processes a small world can hold: where its cgroup is and what is known of it.
type worldProcess struct {
	cgroup string
	attrs  map[string]string
}

// selects says slowly what a selector means. A process of a unit lives in a cgroup
// whose first component below slices is the unit.
func (p worldProcess) selectedBy(s *Selector) bool {
	switch s.Kind {
	case image.SelectCgroup:
		return s.Path == "/" || p.cgroup == s.Path || strings.HasPrefix(p.cgroup, s.Path+"/")
	case image.SelectUnit:
		ok, _ := path.Match(strings.ReplaceAll(s.Path, `\`, `\\`), firstBelowSlices(p.cgroup))
		return ok
	}
	for k, v := range s.attributes() {
		if p.attrs[k] != v {
			return false
		}
	}
	return true
}

// TestOverlapAgainstEveryProcess compares the search for overlaps with trying
// every process of a small world.
func TestOverlapAgainstEveryProcess(t *testing.T) {
	var units []string
	letters := []string{"", "a", "b", "aa", "ab", "ba", "bb", "aab", "aba", "bab"}
	for _, l := range letters[1:] {
		units = append(units, l+".service", l+".scope")
	}
	var cgroups []string
	for _, parent := range []string{"", "/x.slice", "/x.slice/y.slice"} {
		if parent != "" {
			cgroups = append(cgroups, parent)
		}
		for _, u := range units {
			cgroups = append(cgroups, parent+"/"+u, parent+"/"+u+"/sub")
		}
	}
	var world []worldProcess
	for _, c := range cgroups {
		world = append(world, worldProcess{cgroup: c})
	}
	for i := range 81 {
		attrs := map[string]string{}
		for j, k := range []string{"namespace", "label p", "label q", "serviceAccount"} {
			if v := i / [...]int{1, 3, 9, 27}[j] % 3; v > 0 {
				attrs[k] = fmt.Sprint("v", v)
			}
		}
		world = append(world, worldProcess{cgroup: "/pods", attrs: attrs})
	}
	r := rand.New(rand.NewPCG(1, 2))
	pick := func(all []string) string { return all[r.IntN(len(all))] }
	random := func() Selector {
		switch r.IntN(4) {
		case 0:
			return Selector{Kind: image.SelectCgroup, Path: pick(append(cgroups, "/"))}
		case 1:
			return Selector{Kind: image.SelectUnit, Path: pick(units)}
		case 2:
			return Selector{Kind: image.SelectUnit, Path: pick(letters) + "*" + pick(letters) + pick([]string{".service", ".scope"})}
		}
		s := Selector{Kind: image.SelectKubernetes, Labels: map[string]string{}}
		value := func() string { return pick([]string{"", "v1", "v2"}) }
		s.Namespace, s.ServiceAccount = value(), value()
		for _, k := range []string{"p", "q"} {
			if v := value(); v != "" {
				s.Labels[k] = v
			}
		}
		if len(s.attributes()) == 0 {
			s.Namespace = "v1"
		}
		return s
	}
	overlapped := 0
	for range 2000 {
		var workloads []Workload
		for i := range 2 + r.IntN(12) {
			w := Workload{Name: fmt.Sprintf("w%02d", i), Pos: Pos{i + 1, 1}}
			for range 1 + r.IntN(2) {
				s := random()
				s.Pos = w.Pos
				w.Match = append(w.Match, s)
			}
			workloads = append(workloads, w)
		}
		d := &document{reporter: &reporter{}, p: &Policy{Workloads: workloads}}
		d.checkOverlap()
		got := len(d.errs) > 0
		want := ""
		for _, p := range world {
			var by []string
			for _, w := range workloads {
				for i := range w.Match {
					if p.selectedBy(&w.Match[i]) && (len(by) == 0 || by[len(by)-1] != w.Name) {
						by = append(by, w.Name)
					}
				}
			}
			if len(by) > 1 {
				want = fmt.Sprintf("%+v is selected by %v", p, by)
			}
		}
		if want != "" {
			overlapped++
		}
		// Globs may intersect in names that the small world does not hold.
		if want != "" && !got || got && want == "" && !hasGlob(workloads) {
			t.Fatalf("%+v\ngot %v\nwant %q", workloads, d.errs, want)
		}
	}
	if overlapped < 100 || overlapped > 1990 {
		t.Errorf("%d of 2000 worlds overlap: the test tries too little", overlapped)
	}
}

func hasGlob(ws []Workload) bool {
	for _, w := range ws {
		for _, s := range w.Match {
			if strings.Contains(s.Path, "*") {
				return true
			}
		}
	}
	return false
}

func TestNamePatternsIntersect(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"a.service", "a.service", true},
		{"a.service", "b.service", false},
		{"a*.service", "a.service", true},
		{"a*.service", "ab.service", true},
		{"a*a.service", "a.service", false}, // the two parts of the pattern may not overlap
		{"a*.service", "b*.service", false},
		{"a*.service", "a*.scope", false},
		{"a*.service", "ab*.service", true},
		{"a*b.service", "ac*.service", true},
		{"a*b.service", "a*c.service", false},
		{"*-x.service", "y*.service", true},
	} {
		t.Run(tt.a+" "+tt.b, func(t *testing.T) {
			pattern := func(s string) namePattern {
				prefix, suffix, glob := strings.Cut(s, "*")
				return namePattern{prefix: prefix, suffix: suffix, glob: glob}
			}
			if got := pattern(tt.a).intersects(pattern(tt.b)); got != tt.want {
				t.Errorf("got %t", got)
			}
			if got := pattern(tt.b).intersects(pattern(tt.a)); got != tt.want {
				t.Errorf("turned around: got %t", got)
			}
		})
	}
}
