package core

import (
	"maps"
	"slices"
	"strings"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// pathBytes is what of a path or a name the kernel programs look at.
const pathBytes = abi.PathMax - 1

// selectors say which workload a cgroup belongs to. They hold the entries of the
// kernel's selector tries and answer as bpf/cgroup.h does.
type selectors struct {
	paths  map[string]uint32   // "/lab/web/": identity
	units  map[string]abi.Unit // what is before the '*', or a whole name and a NUL
	claims map[string]uint32   // as paths; what the agent said, not the image
	own    int                 // units that the image itself names
}

// byMetadata says whether only metadata finds what a selector means.
func byMetadata(s image.Selector) bool {
	return s.Kind == image.SelectKubernetes || s.Kind == image.SelectContainer
}

// containers are where runtimes put containers and pods, which only metadata can name:
// directories, and names of units. What is there may do nothing until the agent has
// named it.
var (
	containers     = []string{"/kubepods/", "/kubepods.slice/", "/docker/", "/libpod_parent/"}
	containerUnits = []string{"cri-containerd-", "crio-", "docker-", "libpod-"}
)

// newSelectors takes the selectors that need no metadata from an image.
func newSelectors(img *image.Image) *selectors {
	s := &selectors{paths: map[string]uint32{}, units: map[string]abi.Unit{}, claims: map[string]uint32{}}
	patterns := map[string][]abi.UnitMatch{}
	for i := range img.Selectors {
		sel := &img.Selectors[i]
		id := uint32(img.Workloads[sel.Workload].ID)
		switch sel.Kind {
		case image.SelectCgroup:
			s.paths[pathKey(sel.Path)] = id
		case image.SelectUnit:
			if before, after, star := strings.Cut(sel.Path, "*"); star {
				patterns[before] = append(patterns[before], unitMatch(id, before, after))
			} else {
				s.units[sel.Path+"\x00"] = abi.Unit{Match: [abi.UnitAlternatives]abi.UnitMatch{unitMatch(id, sel.Path, "")}}
			}
		}
	}
	s.own = len(s.units) + len(patterns)
	if slices.ContainsFunc(img.Selectors, byMetadata) {
		for _, key := range containers {
			if s.paths[key] == 0 {
				s.paths[key] = uint32(image.Pending)
			}
		}
		for _, before := range containerUnits {
			patterns[before] = append(patterns[before], unitMatch(uint32(image.Pending), before, ".scope"))
		}
	}
	// The kernel finds only the longest beginning of a name, so each entry lists
	// what its shorter beginnings lead to as well. Verify knows that it fits.
	for before := range patterns {
		var all []abi.UnitMatch
		for n := len(before); n > 0; n-- {
			all = append(all, patterns[before[:n]]...)
		}
		var unit abi.Unit
		copy(unit.Match[:], all)
		s.units[before] = unit
	}
	s.paths[pathKey(canaryPath)] = uint32(image.Canary) // whatever the image says
	return s
}

func unitMatch(id uint32, before, after string) abi.UnitMatch {
	m := abi.UnitMatch{Identity: id, Length: uint16(len(after)), Least: uint16(len(before) + len(after))}
	copy(m.Suffix[:], after)
	return m
}

// pathKey is a path with a slash at its end, so that /lab/web is no beginning of
// /lab/website.
func pathKey(path string) string { return strings.TrimSuffix(path, "/") + "/" }

// identity resolves a cgroup from its own name and its parent's binding.
func (s *selectors) identity(c cgroup, parent uint32, parentFlags uint32) uint32 {
	if id := s.byPath(c.path); id != 0 {
		return id
	}
	if parentFlags&abi.BindingSlices != 0 {
		if id := s.byUnit(c.name()); id != 0 {
			return id
		}
	}
	return parent
}

func (s *selectors) byPath(path string) uint32 {
	if key := pathKey(path); len(key) <= pathBytes {
		path = key
	} else {
		path = path[:min(len(path), pathBytes)]
	}
	for end := len(path); end > 0; end = strings.LastIndexByte(path[:end-1], '/') + 1 {
		if id := s.paths[path[:end]]; id != 0 {
			return id
		}
		if id := s.claims[path[:end]]; id != 0 {
			return id
		}
	}
	return 0
}

func (s *selectors) byUnit(name string) uint32 {
	if name == "" {
		return 0
	}
	name = name[:min(len(name), pathBytes)]
	key := name + "\x00"
	for n := len(key); n > 0; n-- {
		unit, found := s.units[key[:n]]
		if !found {
			continue
		}
		for _, m := range unit.Match {
			if m.Identity == 0 {
				break
			}
			if len(name) >= int(m.Least) && strings.HasSuffix(name, string(m.Suffix[:m.Length])) {
				return m.Identity
			}
		}
		return 0
	}
	return 0
}

// selectorKey is a trie key: length in bits, zero-padded.
func selectorKey(s string) abi.PathKey {
	k := abi.PathKey{Length: uint32(8 * len(s))}
	copy(k.Path[:], s)
	return k
}

// pathEntries and unitEntries are the tries as the kernel keeps them, in a fixed order.
func (s *selectors) pathEntries() (keys []abi.PathKey, ids []uint32) {
	for _, found := range []map[string]uint32{s.paths, s.claims} {
		for _, key := range sortedKeys(found) {
			keys, ids = append(keys, selectorKey(key)), append(ids, found[key])
		}
	}
	return keys, ids
}

func (s *selectors) unitEntries() (keys []abi.PathKey, units []abi.Unit) {
	for _, key := range sortedKeys(s.units) {
		keys, units = append(keys, selectorKey(key)), append(units, s.units[key])
	}
	return keys, units
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
