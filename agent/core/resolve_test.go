package core

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

func TestSelectors(t *testing.T) {
	img := &image.Image{
		Workloads: []image.Workload{{Name: "a", ID: 101}, {Name: "b", ID: 102}, {Name: "c", ID: 103}, {Name: "d", ID: 104}},
		Selectors: []image.Selector{
			{Workload: 0, Kind: image.SelectCgroup, Path: "/lab/web"},
			{Workload: 1, Kind: image.SelectUnit, Path: "nginx.service"},
			{Workload: 2, Kind: image.SelectUnit, Path: "api@*.service"},
			{Workload: 2, Kind: image.SelectUnit, Path: "a*.socket"},
			{Workload: 3, Kind: image.SelectUnit, Path: "aa*a.service"},
		},
	}
	s := newSelectors(img)
	s.claims["/lab/pod/"] = 105
	tests := []struct {
		name   string
		path   string
		parent uint32
		flags  uint32
		want   uint32
	}{
		{"OK path", "/lab/web", 1, 0, 101},
		{"OK below path", "/lab/web/x/y", 1, 0, 101},
		{"OK claim", "/lab/pod/x", 1, 0, 105},
		{"OK unit", "/nginx.service", 1, abi.BindingSlices, 102},
		{"OK pattern", "/system.slice/api@1.service", 1, abi.BindingSlices, 103},
		{"OK pattern with nothing for the star", "/api@.service", 1, abi.BindingSlices, 103},
		{"OK shorter beginning", "/api@1.socket", 1, abi.BindingSlices, 103},
		{"OK inherits", "/lab/x", 7, 0, 7},
		{"bad name that goes on", "/lab/website", 1, 0, 1},
		{"bad above path", "/lab", 1, 0, 1},
		{"bad unit below no slice", "/lab/nginx.service", 1, 0, 1},
		{"bad unit name that goes on", "/nginx.service2", 1, abi.BindingSlices, 1},
		{"bad unit name cut", "/nginx.servic", 1, abi.BindingSlices, 1},
		{"bad prefix and suffix overlap", "/aa.service", 1, abi.BindingSlices, 1},
		{"OK prefix and suffix meet", "/aaa.service", 1, abi.BindingSlices, 104},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := s.identity(cgroup{path: tt.path}, tt.parent, tt.flags); got != tt.want {
				t.Errorf("got %d, want %d", got, tt.want)
			}
		})
	}
}

// The scan in Go and the program in the kernel must name every cgroup the same:
// random trees of names that nearly match.
func TestScanAgreesWithKernel(t *testing.T) {
	const seed = 1
	r := rand.New(rand.NewPCG(seed, seed))
	m := newMachine(t)
	c := m.start()
	selectors := map[string][]policy.Selector{
		"api":      {{Kind: image.SelectUnit, Path: "api@*.service"}, {Kind: image.SelectUnit, Path: "ap*.socket"}},
		"bastion":  {{Kind: image.SelectCgroup, Path: "/lab/bastion"}, {Kind: image.SelectCgroup, Path: "/" + strings.Repeat("d/", 60) + "e"}},
		"postgres": {{Kind: image.SelectUnit, Path: "aa*a.service"}, {Kind: image.SelectCgroup, Path: "/lab/postgres"}},
		"web":      {{Kind: image.SelectUnit, Path: "nginx.service"}, {Kind: image.SelectCgroup, Path: "/x.slice/web"}},
	}
	if _, err := c.Apply(shop(t, func(p *policy.Policy) {
		for i := range p.Workloads {
			if match := selectors[p.Workloads[i].Name]; match != nil {
				p.Workloads[i].Match = match
			}
		}
	}), 0); err != nil {
		t.Fatal(err)
	}
	names := []string{"x.slice", "y.slice", ".slice", "slice", "lab", "bastion", "bastio", "bastions", "postgres", "web", "nginx.service",
		"nginx.service ", "api@.service", "api@1.service", "api@1.servic", "ap.socket", "api@1.socket", "a.socket", "aa.service", "aaa.service",
		strings.Repeat("long", 50), strings.Repeat("l", 240) + ".slice", "d", "e"}
	m.mkdir("/" + strings.Repeat("d/", 60) + "e/f")
	m.mkdir("/" + strings.Repeat("d/", 59) + "e/f")
	for range 300 {
		path := ""
		for range 1 + r.IntN(4) {
			path += "/" + names[r.IntN(len(names))]
		}
		m.mkdir(path)
	}
	all, err := c.tree.walk("/")
	must(t, err)
	before := map[string]uint32{}
	named := 0
	for _, cg := range all {
		before[cg.path] = identity(t, c, cg.path)
		if before[cg.path] >= uint32(image.FirstID) {
			named++
		}
	}
	s := scanner{objects: c.objects, tree: c.tree, slot: c.active.slot, selectors: c.active.selectors}
	if _, changed, err := s.scan("/"); err != nil || changed {
		for _, cg := range all {
			if got := identity(t, c, cg.path); got != before[cg.path] {
				t.Errorf("%q: the kernel says %d, the scan %d", cg.path, before[cg.path], got)
			}
		}
		t.Fatalf("seed %d: the scan changed bindings: %v", seed, err)
	}
	if named < 50 || named == len(all) {
		t.Fatalf("%d of %d cgroups are a workload's: the test proves little", named, len(all))
	}
}

// Sockets keep the identity of a cgroup that is gone, also in a generation that
// never saw it.
func TestRemovedCgroupKeepsIdentity(t *testing.T) {
	m := newMachine(t)
	m.mkdir("/lab/postgres")
	c := m.start()
	b := shop(t, nil)
	if _, err := c.Apply(b, 0); err != nil {
		t.Fatal(err)
	}
	gone, err := cgroupID(m.config.CgroupRoot + "/lab/postgres")
	must(t, err)
	removeCgroup(t, m.config.CgroupRoot+"/lab/postgres")
	for v := uint64(8); v < 14; v++ { // through all slots
		if _, err := c.Apply(shop(t, version(v)), 0); err != nil {
			t.Fatal(err)
		}
		var kept abi.Binding
		must(t, c.objects.Maps["graveyard"].Lookup(gone, &kept))
		if got := kept.Identity[c.active.slot]; got != id(t, b, "postgres") {
			t.Errorf("version %d: identity %d", v, got)
		}
	}
	var kept abi.Binding
	if err := c.objects.Maps["bindings"].Lookup(gone, &kept); err == nil {
		t.Errorf("a removed cgroup is bound: %+v", kept)
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{`/a\040b`: "/a b", `/a\134b`: `/a\b`, `/a\04`: `/a\04`, `/a\999`: `/a\999`, "/a": "/a"} {
		if got := unescape(in); got != want {
			t.Errorf("unescape(%s) = %s, want %s", in, got, want)
		}
	}
}
