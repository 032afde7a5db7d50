package core

import (
	"testing"
	"time"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
)

// identityIn is a cgroup's identity in a slot.
func identityIn(t *testing.T, c *Core, slot uint32, path string) uint32 {
	t.Helper()
	s := scanner{objects: c.objects, tree: c.tree, slot: slot}
	got, _, err := s.binding(path)
	must(t, err)
	return got
}

// wantQuiet shows that nothing is wrong, and nothing has to be mended.
func wantQuiet(t *testing.T, when string, c *Core) {
	t.Helper()
	before := c.Status().Drifts
	c.upkeep()
	if s := c.Status(); s.State != proto.StateEnforcing || len(s.Problems) > 0 || s.Drifts != before {
		t.Errorf("%s: %s, %v, %d drifts", when, s.State, s.Problems, s.Drifts-before)
	}
}

func shadows(t *testing.T, c *Core, v uint64) *proto.Status {
	t.Helper()
	s, err := c.Shadow(shop(t, version(v)), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if s.Shadow == nil || s.Shadow.Version != v || time.Until(s.Shadow.Until) < 50*time.Minute {
		t.Fatalf("in shadow is %+v, want version %d for an hour", s.Shadow, v)
	}
	return s
}

// What is in shadow knows the cgroups that are there, those that come, and those that
// the agent names; and a preview beside it takes nothing of it away.
func TestShadowKnowsCgroups(t *testing.T) {
	m := newMachine(t)
	m.mkdir("/lab/pod-1")
	b := shop(t, version(7))
	c := enforcing(t, m, b)
	shadows(t, c, 8)
	pod := id(t, b, "pod")
	must(t, c.Bind("/lab/pod-1", pod))
	if _, err := c.Preview(shop(t, version(9)), proto.Own{}); err != nil {
		t.Fatal(err)
	}
	m.mkdir("/lab/pod-1/c1")
	for _, path := range []string{"/lab/pod-1", "/lab/pod-1/c1"} {
		for name, g := range map[string]*generation{"active": c.active, "shadow": c.shadow} {
			if got := identityIn(t, c, g.slot, path); got != pod {
				t.Errorf("%s is %d in the slot of %s, want %d", path, got, name, pod)
			}
		}
	}
	wantQuiet(t, "bound", c)
	must(t, c.Unbind("/lab/pod-1"))
	if got := identityIn(t, c, c.shadow.slot, "/lab/pod-1"); got != 1 {
		t.Errorf("unbound, it is %d in shadow", got)
	}
}

// Whatever the order of changes, the shadow has a slot of its own and frees it.
func TestShadowSlots(t *testing.T) {
	m := newMachine(t)
	c := enforcing(t, m, shop(t, version(1)))
	wants := func(when string, version uint64, shadow bool) {
		t.Helper()
		s := c.Status()
		if s.Active.Version != version || (s.Shadow != nil) != shadow {
			t.Errorf("%s: version %d, shadow %+v", when, s.Active.Version, s.Shadow)
		}
		wantQuiet(t, when, c)
		filled := map[uint32]bool{}
		for slot := range uint32(abi.Slots) {
			var id uint32
			if c.objects.Maps["rules"].Lookup(slot, &id) == nil {
				filled[slot] = true
			}
		}
		if !filled[c.active.slot] || shadow && (!filled[c.shadow.slot] || c.shadow.slot == c.active.slot) {
			t.Errorf("%s: filled are %v", when, filled)
		}
	}
	for v := uint64(2); v < 12; v += 2 {
		shadows(t, c, v)
		wants("in shadow", v-1, true)
		if _, err := c.Preview(shop(t, version(v+1)), proto.Own{}); err != nil {
			t.Fatal(err)
		}
		wants("previewed beside it", v-1, true)
		shadows(t, c, v+1)
		wants("another one in shadow", v-1, true)
		if _, err := c.Apply(shop(t, version(v+1)), 0); err != nil {
			t.Fatal(err)
		}
		wants("promoted", v+1, false)
	}
	shadows(t, c, 20)
	if _, err := c.Rollback(); err != nil {
		t.Fatal(err)
	}
	wants("rolled back", 9, false)
	shadows(t, c, 20)
	slot := c.shadow.slot
	if _, err := c.EndShadow(); err != nil {
		t.Fatal(err)
	}
	wants("ended", 9, false)
	var id uint32
	if c.objects.Maps["rules"].Lookup(slot, &id) == nil {
		t.Errorf("slot %d is not freed", slot)
	}
	if _, err := c.EndShadow(); err == nil || err.Error() != "no policy is in shadow" {
		t.Errorf("ended twice: %v", err)
	}

	// Beside a change that waits to be confirmed there is none.
	if _, err := c.Apply(shop(t, version(21)), time.Hour); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Shadow(shop(t, version(22)), time.Hour); err == nil || err.Error() != "version 21 waits to be confirmed" {
		t.Errorf("shadow of a trial: %v", err)
	}
}

// What somebody else does to a shadow is mended as what is done to the policy in force.
func TestShadowTampered(t *testing.T) {
	m := newMachine(t)
	c := enforcing(t, m, shop(t, version(1)))
	shadows(t, c, 2)
	for name, tamper := range map[string]func() error{
		"table": func() error { return c.objects.Maps["rules"].Put(c.shadow.slot, c.active.tables["rules"]) },
		"state": func() error {
			state, err := kernelState(c.objects)
			if err != nil {
				return err
			}
			state.Shadow, state.Shadowed = state.Active, 1<<62
			return c.objects.Maps["state"].Put(uint32(0), &state)
		},
	} {
		before := c.Status().Drifts
		must(t, tamper())
		c.upkeep()
		if s := c.Status(); s.Drifts == before {
			t.Errorf("%s: nobody saw it", name)
		}
		c.upkeep()
		wantQuiet(t, name+" mended", c)
	}
}
