package core

import (
	"errors"
	"fmt"
	"path"

	"github.com/cilium/ebpf"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// scanner names the cgroups that are older than the programs or than a
// generation. Newer ones are named by the cgroup_mkdir program, in the slots that
// state.active and state.filling list.
type scanner struct {
	objects   *objects
	tree      *tree
	slot      uint32
	selectors *selectors
	wrong     []string // cgroups that were bound to something else
}

// scan binds all cgroups at and below a path in the scanner's slot, until one
// pass changes nothing: a cgroup made meanwhile under one that had no binding yet
// is found by the next pass. It returns how many have a workload's identity, and
// whether any binding changed.
func (s *scanner) scan(below string) (named int, changed bool, err error) {
	const passes = 100 // more means that something works against us
	for range passes {
		more := false
		if named, more, err = s.pass(below); err != nil {
			return 0, changed, err
		}
		if !more {
			return named, changed, nil
		}
		changed = true
	}
	return 0, changed, fmt.Errorf("scan cgroups: still changing after %d passes", passes)
}

func (s *scanner) pass(below string) (named int, changed bool, err error) {
	cgroups, err := s.tree.walk(below)
	if err != nil {
		return 0, false, err
	}
	type parent struct{ identity, flags uint32 }
	parents := map[string]parent{}
	for i, c := range cgroups {
		var p parent
		switch {
		case c.path == "/":
			p = parent{uint32(image.Unmanaged), abi.BindingSlices}
		case i == 0:
			p.identity, p.flags, err = s.binding(path.Dir(c.path))
		default:
			p = parents[path.Dir(c.path)]
		}
		if err != nil {
			return 0, false, err
		}
		var here parent
		here.identity = s.selectors.identity(c, p.identity, p.flags)
		if c.path == "/" {
			here = parent{s.selectors.byPath("/"), abi.BindingSlices | abi.BindingRoot}
			if here.identity == 0 {
				here.identity = uint32(image.Unmanaged)
			}
		} else if p.flags&abi.BindingSlices != 0 && c.isSlice() {
			here.flags = abi.BindingSlices
		}
		parents[c.path] = here
		if here.identity >= uint32(image.FirstID) {
			named++
		}
		wrote, err := s.bind(c, here.identity, here.flags)
		if err != nil {
			return 0, false, err
		}
		changed = changed || wrote
	}
	return named, changed, s.rebury()
}

// binding reads what a cgroup is bound to.
func (s *scanner) binding(path string) (identity, flags uint32, err error) {
	id, err := cgroupID(s.tree.dir + path)
	if err != nil {
		return 0, 0, err
	}
	var b abi.Binding
	if err := s.objects.Maps["bindings"].Lookup(id, &b); err != nil {
		return 0, 0, fmt.Errorf("read binding of %s: %w", path, err)
	}
	return b.Identity[s.slot], b.Flags, nil
}

// bind writes one cgroup's identity where it differs.
func (s *scanner) bind(c cgroup, identity, flags uint32) (bool, error) {
	bindings := s.objects.Maps["bindings"]
	var b abi.Binding
	err := bindings.Lookup(c.id, &b)
	fresh := errors.Is(err, ebpf.ErrKeyNotExist)
	if err != nil && !fresh {
		return false, fmt.Errorf("read binding of %s: %w", c.path, err)
	}
	if !fresh && b.Identity[s.slot] == identity && b.Flags == flags {
		return false, nil
	}
	if !fresh {
		s.wrong = append(s.wrong, c.path)
	}
	b.Identity[s.slot], b.Flags = identity, flags
	how := ebpf.UpdateExist
	if fresh {
		b.Since, how = uint64(bootTime()), ebpf.UpdateNoExist
	}
	err = bindings.Update(c.id, &b, how)
	if errors.Is(err, ebpf.ErrKeyExist) || errors.Is(err, ebpf.ErrKeyNotExist) {
		return true, nil // made or removed just now: the next pass looks again
	}
	if err != nil {
		return false, fmt.Errorf("bind %s: %w", c.path, err)
	}
	if fresh && !s.tree.exists(c) {
		_ = bindings.Delete(c.id) // removed before it was bound: nobody else would
	}
	return true, nil
}

// prepare takes what a former generation left in the slot out of all bindings,
// before programs write there.
func (s *scanner) prepare() error {
	if err := s.rewrite("bindings", func(b *abi.Binding, _ uint32) { b.Identity[s.slot] = 0 }); err != nil {
		return err
	}
	return s.rewrite("graveyard", func(b *abi.Binding, active uint32) { b.Identity[s.slot] = b.Identity[active] })
}

// rebury gives sockets that outlive a cgroup no pass has seen an identity in this
// slot: the one they have now. Their path is gone, so nothing else can be said of
// them; if the image does not know it, they may do nothing.
func (s *scanner) rebury() error {
	return s.rewrite("graveyard", func(b *abi.Binding, active uint32) {
		if b.Identity[s.slot] == 0 {
			b.Identity[s.slot] = b.Identity[active]
		}
	})
}

// rewrite changes bindings in place; `active` is the slot in force.
func (s *scanner) rewrite(name string, change func(b *abi.Binding, active uint32)) error {
	state, err := readState(s.objects)
	if err != nil {
		return err
	}
	active := abi.ActiveSlot(state.Active)
	if abi.ActiveFlags(state.Active)&abi.ActiveOn == 0 || active == s.slot {
		return nil
	}
	m := s.objects.Maps[name]
	var id uint64
	var b abi.Binding
	entries := m.Iterate()
	for entries.Next(&id, &b) {
		before := b
		if change(&b, active); b == before {
			continue
		}
		if err := m.Update(id, &b, ebpf.UpdateExist); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("rewrite %s: %w", name, err)
		}
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("rewrite %s: %w", name, err)
	}
	return nil
}

// readState is the state as this core last wrote it. Programs only read it, so that
// what else stands there is somebody else's doing, and must not become ours.
func readState(o *objects) (abi.State, error) {
	if s := o.state.Load(); s != nil {
		return *s, nil
	}
	return kernelState(o)
}

func kernelState(o *objects) (abi.State, error) {
	var s abi.State
	if err := o.Maps["state"].Lookup(uint32(0), &s); err != nil {
		return s, fmt.Errorf("read state: %w", err)
	}
	return s, nil
}

// changeState writes the state with a change of it. Whoever does holds the core's mu.
func changeState(o *objects, change func(*abi.State)) error {
	state, err := readState(o)
	if err == nil {
		change(&state)
		err = writeState(o, state)
	}
	return err
}

func writeState(o *objects, s abi.State) error {
	if err := o.Maps["state"].Put(uint32(0), &s); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	o.state.Store(&s)
	return nil
}
