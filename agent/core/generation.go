package core

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// maxClaims bounds the paths that the agent may bind.
const maxClaims = 1 << 14

// generation is one image, and its tables in one slot of the kernel's maps.
type generation struct {
	slot      uint32
	epoch     uint32 // under which it came into force; 0 = not yet
	flags     uint32 // of the word that put it there
	bytes     []byte // the encoded image
	image     *image.Image
	digest    [sha256.Size]byte
	selectors *selectors // claims included
	clock     bootClock  // its windows were converted with this one
	tables    map[string]*ebpf.Map
	since     time.Time // when it came into force
	bindings  int       // cgroups with a workload's identity when it was filled
}

// openImage decodes and verifies what somebody wants to be in force.
func openImage(b []byte) (*generation, error) {
	img, err := image.Decode(b)
	if err == nil {
		err = image.Verify(img)
	}
	if err != nil {
		return nil, proto.Refuse("build the image again from its policy", "verify image: %w", err)
	}
	return &generation{bytes: b, image: img, digest: sha256.Sum256(b), selectors: newSelectors(img)}, nil
}

// describe says what the agent may know.
func (g *generation) describe() *proto.Generation {
	mode := "enforce"
	if g.image.Mode == image.Observe {
		mode = "observe"
	}
	return &proto.Generation{
		Slot: int(g.slot), Epoch: g.epoch, Name: g.image.Name, Version: g.image.Version, Digest: hex.EncodeToString(g.digest[:]),
		Mode: mode, Since: g.since, Bindings: g.bindings,
	}
}

// expired says whether the image must not be loaded any more.
func (g *generation) expired(now time.Time) bool {
	return g.image.NotAfter != 0 && now.Unix() >= g.image.NotAfter
}

// fill makes the tables of a generation and puts them into its slot, which no
// program reads yet.
func (g *generation) fill(o *objects) (err error) {
	if g.clock, err = readBootClock(); err != nil {
		return err
	}
	g.tables = map[string]*ebpf.Map{}
	img := g.image
	subjects, facts := subjectEntries(img)
	rules, lists := ruleEntries(img)
	prefixes, classes := prefixEntries(img)
	paths, ids, names, units := g.selectors.entries()
	for _, err := range []error{
		addTable(g, o, "rules", len(rules), rules, lists),
		addTable(g, o, "subjects", len(subjects), subjects, facts),
		addTable(g, o, "crossings", len(img.Crossings), indexes(len(img.Crossings)), crossingEntries(img, g.clock)),
		addTable[uint32, uint64](g, o, "buckets", 2*len(img.Crossings), nil, nil),
		addTable(g, o, "prefixes", len(prefixes), prefixes, classes),
		addTable(g, o, "ports", abi.Rows, indexes(abi.Rows), portEntries(img)),
		addTable(g, o, "paths", len(paths)+maxClaims, paths, ids),
		addTable(g, o, "units", len(names), names, units),
	} {
		if err != nil {
			return err
		}
	}
	return g.insert(o)
}

// addTable makes one inner map of the size that the image needs, and fills it.
func addTable[K, V any](g *generation, o *objects, name string, size int, keys []K, values []V) error {
	spec := o.spec.Maps[name].InnerMap.Copy()
	spec.Name, spec.MaxEntries = name, uint32(max(size, 1))
	m, err := ebpf.NewMap(spec)
	if err != nil {
		return fmt.Errorf("make table %s: %w", name, err)
	}
	g.tables[name] = m
	if err := putAll(m, keys, values); err != nil {
		return fmt.Errorf("fill table %s: %w", name, err)
	}
	return nil
}

// putAll writes many entries, at once where the kernel can.
func putAll[K, V any](m *ebpf.Map, keys []K, values []V) error {
	if len(keys) == 0 {
		return nil
	}
	n, err := m.BatchUpdate(keys, values, nil)
	if err == nil && n == len(keys) {
		return nil
	}
	if err != nil && !errors.Is(err, ebpf.ErrNotSupported) {
		return err
	}
	for i := range keys {
		if err := m.Put(&keys[i], &values[i]); err != nil {
			return err
		}
	}
	return nil
}

// tableNames are the outer maps.
var tableNames = []string{"rules", "subjects", "crossings", "buckets", "prefixes", "ports", "paths", "units"}

// insert puts the tables into the slot.
func (g *generation) insert(o *objects) error {
	return eachTable(func(name string) error {
		if err := o.Maps[name].Put(g.slot, g.tables[name]); err != nil {
			return fmt.Errorf("insert table %s into slot %d: %w", name, g.slot, err)
		}
		return nil
	})
}

// emptySlot takes the tables of whatever generation out of a slot that is not
// active, and frees them.
func emptySlot(o *objects, slot uint32) error {
	return eachTable(func(name string) error {
		if err := o.Maps[name].Delete(slot); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("empty slot %d of %s: %w", slot, name, err)
		}
		return nil
	})
}

// eachTable works on all outer maps at once: each change of one waits until no
// program reads what was there before.
func eachTable(work func(name string) error) error {
	done := make(chan error, len(tableNames))
	for _, name := range tableNames {
		go func() { done <- work(name) }()
	}
	errs := make([]error, len(tableNames))
	for i := range errs {
		errs[i] = <-done
	}
	return errors.Join(errs...)
}

// close gives up the tables' descriptors. Those in a slot stay in the kernel.
func (g *generation) close() { closeAll(g.tables) }

func indexes(n int) []uint32 {
	out := make([]uint32, n)
	for i := range out {
		out[i] = uint32(i)
	}
	return out
}
