package core

import (
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
)

// trying is a core with version 7 in force and version 8 on trial.
func trying(t *testing.T, m *machine, within time.Duration) *Core {
	t.Helper()
	c := m.start()
	if _, err := c.Apply(shop(t, version(7)), 0); err != nil {
		t.Fatal(err)
	}
	s, err := c.Apply(shop(t, version(8)), within)
	if err != nil {
		t.Fatal(err)
	}
	if s.State != proto.StateEnforcing || s.Active.Version != 8 || s.Unconfirmed == nil || s.Unconfirmed.Fallback.Version != 7 {
		t.Fatalf("on trial: %+v", s)
	}
	return c
}

// lapse lets the deadline pass, as the kernel sees it.
func lapse(t *testing.T, c *Core) {
	t.Helper()
	state, err := readState(c.objects)
	must(t, err)
	state.Deadline = 1
	must(t, writeState(c.objects, state))
}

func wantInForce(t *testing.T, c *Core, version uint64) {
	t.Helper()
	s := c.Status()
	state, err := readState(c.objects)
	must(t, err)
	if s.Active.Version != version || s.State != proto.StateEnforcing || s.Unconfirmed != nil || len(s.Problems) > 0 {
		t.Errorf("status %+v, want version %d in force", s, version)
	}
	if word := state.InForce(c.active.clock.now()); word != c.active.word() || state.Deadline != 0 {
		t.Errorf("the kernel reads %#x of %+v, want %#x", word, state, c.active.word())
	}
}

func TestConfirmKeeps(t *testing.T) {
	m := newMachine(t)
	c := trying(t, m, time.Hour)
	if _, err := c.Confirm(); err != nil {
		t.Fatal(err)
	}
	wantInForce(t, c, 8)
	if p := c.Status().Previous; p == nil || p.Version != 7 {
		t.Errorf("previous %+v", p)
	}
	if _, err := c.Confirm(); err == nil || err.Error() != "no change waits to be confirmed" {
		t.Errorf("a second confirmation: %v", err)
	}
	c.Close()
	wantInForce(t, m.start(), 8)
}

func TestUnconfirmedComesBack(t *testing.T) {
	m := newMachine(t)
	c := trying(t, m, time.Hour)
	cached := c.active.epoch
	lapse(t, c)
	wantInForce(t, c, 7)
	if c.active.epoch <= cached {
		t.Errorf("epoch %d after %d: verdicts of the change would still count", c.active.epoch, cached)
	}
	if _, err := c.Confirm(); err == nil {
		t.Error("confirmed after the deadline")
	}
	// It was never for good, so its version may be offered again.
	if _, err := c.Apply(shop(t, func(p *policy.Policy) { p.Version = 8; p.Crossings[0].Purpose = "mended" }), 0); err != nil {
		t.Errorf("apply again: %v", err)
	}
	wantInForce(t, c, 8)
}

func TestUnconfirmedRolledBack(t *testing.T) {
	m := newMachine(t)
	c := trying(t, m, time.Hour)
	if _, err := c.Apply(shop(t, version(9)), 0); err == nil || err.Error() != "version 8 waits to be confirmed" {
		t.Errorf("another change: %v", err)
	}
	if _, err := c.Rollback(); err != nil {
		t.Fatal(err)
	}
	wantInForce(t, c, 7)
}

// A core that starts does not know who asked the last one: it goes back at once,
// and the disk has never heard of the change.
func TestUnconfirmedEndsWithTheCore(t *testing.T) {
	m := newMachine(t)
	c := trying(t, m, time.Hour)
	c.Close()
	wantInForce(t, m.start(), 7)
}

// Before the first policy there is nothing to return to but to let pass.
func TestFirstPolicyUnconfirmed(t *testing.T) {
	for _, restart := range []bool{false, true} {
		m := newMachine(t)
		c := m.start()
		s, err := c.Apply(shop(t, nil), time.Hour)
		if err != nil || s.State != proto.StateEnforcing || s.Unconfirmed == nil || s.Unconfirmed.Fallback != nil {
			t.Fatalf("%+v, %v", s, err)
		}
		if restart {
			c.Close()
			c = m.start()
			state, err := readState(c.objects)
			must(t, err)
			if abi.ActiveFlags(state.Active)&abi.ActiveObserve == 0 || state.Deadline != 0 {
				t.Errorf("state %+v", state)
			}
		} else {
			lapse(t, c)
		}
		if s := c.Status(); s.State != proto.StateDegraded || len(s.Problems) != 1 {
			t.Errorf("restarted %v: %+v", restart, s)
		}
		if s, err := c.Apply(shop(t, nil), 0); err != nil || s.State != proto.StateEnforcing || len(s.Problems) > 0 {
			t.Errorf("restarted %v: apply again: %+v, %v", restart, s, err)
		}
	}
}

// What the agent says meanwhile holds under either image.
func TestBindOnTrial(t *testing.T) {
	m := newMachine(t)
	m.mkdir("/lab/pod-1/c1")
	c := trying(t, m, time.Hour)
	pod := id(t, c.active.bytes, "pod")
	must(t, c.Bind("/lab/pod-1", pod))
	m.mkdir("/lab/pod-1/c2")
	if s := c.Status(); len(s.Problems) > 0 || s.Unconfirmed == nil {
		t.Errorf("status %+v", s)
	}
	for _, confirmed := range []bool{false, true} {
		for _, path := range []string{"/lab/pod-1/c1", "/lab/pod-1/c2"} {
			if got := identity(t, c, path); got != pod {
				t.Errorf("taken back %v: %s is %d, want %d", confirmed, path, got, pod)
			}
		}
		if !confirmed {
			lapse(t, c)
			wantInForce(t, c, 7)
		}
	}
	must(t, c.Unbind("/lab/pod-1"))
	if got := identity(t, c, "/lab/pod-1/c1"); got == pod {
		t.Error("unbound, and still a pod")
	}
}

func TestTrialBounds(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	for _, within := range []time.Duration{-time.Second, time.Millisecond, 25 * time.Hour} {
		if _, err := c.Apply(shop(t, nil), within); err == nil || !strings.Contains(err.Error(), "is out of bounds") {
			t.Errorf("within %v: %v", within, err)
		}
	}
	if s := c.Status(); s.State != proto.StateIdle {
		t.Errorf("status %+v", s)
	}
}
