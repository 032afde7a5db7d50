package core

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cilium/ebpf"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/envelope"
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
	came      []byte // the same as it came, in its envelope if it had one
	signer    string // id of the trusted key that signed it; "" = no key is trusted
	image     *image.Image
	digest    [sha256.Size]byte // of bytes
	selectors *selectors        // claims included
	clock     bootClock         // its windows were converted with this one
	adding    sync.Mutex        // held while a table is added to these two
	tables    map[string]*ebpf.Map
	ids       map[string]ebpf.MapID // of the tables
	known     abi.Query             // a question that the loaded programs answered with allow; zero = there is none
	since     time.Time             // when it came into force, or lay ready for that
	staged    bool                  // it is on disk, to become the stored one
	left      *selftest             // of one that lies ready: what has not been asked yet; nil = nothing
	bindings  int                   // cgroups with a workload's identity when it was filled
}

// openImage decodes and verifies what somebody wants to be in force. Where a key is
// trusted, one of those keys must have signed it.
func openImage(b []byte, trusted []envelope.Key) (*generation, error) {
	body, signed, err := envelope.Open(b)
	if err != nil {
		return nil, proto.Refuse("build the image again from its policy", "verify image: %w", err)
	}
	g := &generation{bytes: body, came: b}
	if len(trusted) > 0 {
		const hint = "demarc policy build --sign KEYFILE, with a key whose public half is in trust_dir"
		if signed == nil {
			return nil, proto.Refuse(hint, "verify image: it is not signed, and trust_dir holds keys")
		}
		key, good := signed.Signer(trusted)
		if !good {
			return nil, proto.Refuse(hint, "verify image: no key of trust_dir signed it")
		}
		g.signer = key.ID
	}
	if g.image, g.digest, err = image.DecodeDigest(body); err == nil {
		err = image.Verify(g.image)
	}
	if err != nil {
		return nil, proto.Refuse("build the image again from its policy", "verify image: %w", err)
	}
	g.selectors = newSelectors(g.image)
	g.clock, err = readBootClock()
	return g, err
}

// describe says what the agent may know.
func (g *generation) describe() *proto.Generation {
	mode := "enforce"
	if g.image.Mode == image.Observe {
		mode = "observe"
	}
	return &proto.Generation{
		Slot: int(g.slot), Epoch: g.epoch, Name: g.image.Name, Version: g.image.Version, Digest: hex.EncodeToString(g.digest[:]),
		Signer: g.signer, Mode: mode, Since: g.since, Bindings: g.bindings,
	}
}

// expired says whether the image must not be loaded any more.
func (g *generation) expired(now time.Time) bool {
	return g.image.NotAfter != 0 && now.Unix() >= g.image.NotAfter
}

// floor is what it makes the floor once it is in force.
func (g *generation) floor() abi.Floor { return abi.Floor{Version: g.image.Version, Digest: g.digest} }

// fill makes the tables of a generation and puts them into its slot, which no
// program reads yet.
func (g *generation) fill(o *objects) error {
	g.tables, g.ids = map[string]*ebpf.Map{}, map[string]ebpf.MapID{}
	img := g.image
	fill := map[string]func(string) error{
		"rules": func(name string) error {
			keys, values := ruleEntries(img)
			return addTable(g, o, name, len(keys), keys, values)
		},
		"subjects": func(name string) error {
			keys, values := subjectEntries(img)
			return addTable(g, o, name, len(keys), keys, values)
		},
		"crossings": func(name string) error {
			return addTable(g, o, name, len(img.Crossings), indexes(len(img.Crossings)), crossingEntries(img, g.clock))
		},
		"buckets": func(name string) error { return addTable[uint32, uint64](g, o, name, 2*len(img.Crossings), nil, nil) },
		"prefixes": func(name string) error {
			keys, values := prefixEntries(img)
			return addTable(g, o, name, len(keys), keys, values)
		},
		"ports": func(name string) error { return addTable(g, o, name, abi.Rows, indexes(abi.Rows), portEntries(img)) },
		"paths": func(name string) error {
			keys, values := g.selectors.pathEntries()
			return addTable(g, o, name, len(keys)+maxClaims, keys, values)
		},
		"units": func(name string) error {
			keys, values := g.selectors.unitEntries()
			return addTable(g, o, name, len(keys), keys, values)
		},
	}
	return eachTable(func(name string) error { return fill[name](name) })
}

// addTable makes one inner map of the size that the image needs, puts it into the slot,
// which waits until no program reads what was there, and fills it meanwhile.
func addTable[K, V any](g *generation, o *objects, name string, size int, keys []K, values []V) error {
	spec := o.spec.Maps[name].InnerMap.Copy()
	spec.Name, spec.MaxEntries = name, uint32(max(size, 1))
	m, err := ebpf.NewMap(spec)
	if err != nil {
		return fmt.Errorf("make table %s: %w", name, err)
	}
	info, err := m.Info()
	if err == nil {
		g.adding.Lock()
		g.tables[name] = m
		g.ids[name], _ = info.ID()
		g.adding.Unlock()
		placed := make(chan error, 1)
		go func() { placed <- o.Maps[name].Put(g.slot, m) }()
		err = putAll(m, keys, values)
		err = errors.Join(err, <-placed)
	}
	if err != nil {
		return fmt.Errorf("fill table %s of slot %d: %w", name, g.slot, err)
	}
	return nil
}

// freeze lets nobody write the tables any more, but for the paths: the agent adds to
// them.
func (g *generation) freeze() error {
	for _, name := range tableNames {
		if name == "paths" {
			continue
		}
		if err := g.tables[name].Freeze(); err != nil {
			return fmt.Errorf("freeze table %s: %w", name, err)
		}
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
