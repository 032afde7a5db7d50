package core

import (
	"time"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
)

// maxShadow bounds the time that an image is in shadow.
const maxShadow = 7 * 24 * time.Hour

// beginShadow has live traffic judged by an image beside the one in force, for a time. The
// image is verified, filled and tested as if it were applied; no verdict depends on
// it. Another change ends that, and so does a core that starts.
func (c *Core) beginShadow(b []byte, lasting time.Duration, by string) (*proto.Status, error) {
	if err := checkTime("shadow for", lasting, minTrial, maxShadow); err != nil {
		return nil, err
	}
	g, err := c.offered(b, "")
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settle()
	if err == nil && c.active == nil {
		err = proto.Refuse("apply a policy", "shadow: no policy is in force beside which to be")
	}
	if err == nil {
		err = c.mayChange(g)
	}
	if err != nil {
		c.peerRecord(by, auditRefused, g, "shadow: %v", err)
		return nil, err
	}
	if err := c.record(by, auditShadow, g, "beside version %d for %v", c.active.image.Version, lasting); err != nil {
		return nil, err
	}
	c.endShadow(by, "another one takes its place")
	c.keepClaims(g)
	if err := c.install(g, change{shadow: lasting}); err != nil {
		_ = c.record(by, auditFailed, g, "shadow: %v", err)
		return nil, err
	}
	return c.status(), nil
}

// cast begins a shadow with a generation that is filled and tested. The epoch grows, so
// that live connections are judged again, once, and told of if they would be cut.
func (c *Core) cast(g *generation, state abi.State, lasting time.Duration) error {
	g.epoch, g.flags, g.since, g.came = state.NextEpoch(), activeFlags(g.image), time.Now(), nil
	c.active.epoch, c.active.flags = g.epoch, c.active.flags|abi.ActiveShadow
	state.Active, state.Shadow, state.Shadowed = c.active.word(), g.word(), g.clock.now()+uint64(lasting)
	if err := writeState(c.objects, state); err != nil {
		c.active.flags &^= abi.ActiveShadow
		return err
	}
	c.shadow = g
	if c.prepared == g { // and is nothing to be put in force soon
		c.prepared = nil
		c.store.unstage()
	}
	c.log.Info("policy in shadow", "policy", g.image.Name, "version", g.image.Version, "slot", g.slot)
	return nil
}

// stopShadow ends a shadow before its time is over.
func (c *Core) stopShadow(by string) (*proto.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settle()
	if c.shadow == nil {
		return nil, proto.Refuse("see `demarc status`", "no policy is in shadow")
	}
	c.endShadow(by, "it was stopped")
	return c.status(), nil
}

// endShadow frees what is in shadow, if anything is. A program that has seen the word
// may still look into its tables: putting one where it is waits for that.
func (c *Core) endShadow(by, why string) {
	g := c.shadow
	if g == nil {
		return
	}
	c.shadow = nil
	c.active.flags &^= abi.ActiveShadow
	state, err := readState(c.objects)
	if err == nil {
		state.Active, state.Shadow, state.Shadowed = c.active.word(), 0, 0
		state.Filling &^= 1 << g.slot
		err = writeState(c.objects, state)
	}
	if err == nil {
		err = c.objects.Maps["units"].Put(g.slot, g.tables["units"])
	}
	if err == nil {
		err = emptySlot(c.objects, g.slot)
	}
	g.close()
	c.attend("shadow", err)
	_ = c.record(by, auditShadowEnd, g, "%s", why)
}

// shadowed says what is in shadow, and until when.
func (c *Core) shadowed(state abi.State) *proto.Shadow {
	return &proto.Shadow{Generation: *c.shadow.describe(), Until: time.Unix(0, int64(state.Shadowed)+c.active.clock.offset).UTC()}
}
