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
	defer func() {
		if err != nil {
			g.empty(o)
		}
	}()
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

// insert puts the tables into the slot. Each insertion waits until no program
// reads what was there before, so they wait together.
func (g *generation) insert(o *objects) error {
	done := make(chan error, len(g.tables))
	for name, inner := range g.tables {
		go func() {
			if err := o.Maps[name].Put(g.slot, inner); err != nil {
				done <- fmt.Errorf("insert table %s into slot %d: %w", name, g.slot, err)
				return
			}
			done <- nil
		}()
	}
	var errs []error
	for range g.tables {
		errs = append(errs, <-done)
	}
	return errors.Join(errs...)
}

// empty takes the tables out of the slot and frees them. The slot must not be
// active.
func (g *generation) empty(o *objects) {
	for name, inner := range g.tables {
		_ = o.Maps[name].Delete(g.slot) // absent is as good
		inner.Close()
	}
	g.tables = nil
}

// release closes the tables and leaves them in the kernel.
func (g *generation) release() { closeAll(g.tables) }

func indexes(n int) []uint32 {
	out := make([]uint32, n)
	for i := range out {
		out[i] = uint32(i)
	}
	return out
}
