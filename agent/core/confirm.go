package core

import (
	"fmt"
	"time"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
)

// Bounds of the time that a change waits for its confirmation.
const (
	minTrial = time.Second
	maxTrial = 24 * time.Hour
)

// word is what programs read while a generation is in force.
func (g *generation) word() uint64 { return abi.MakeActive(g.slot, g.flags, g.epoch) }

// fallbackWord is what the kernel reads once the deadline has passed: what is in
// force now. There is nothing before the first policy, and going back to no
// enforcement at all would have to take programs off, which the kernel cannot do
// alone: the first policy then only observes.
func (g *generation) fallbackWord(before abi.State) uint64 {
	if abi.ActiveFlags(before.Active)&abi.ActiveOn == 0 {
		return abi.MakeActive(g.slot, g.flags|abi.ActiveObserve, g.epoch+1)
	}
	return abi.MakeActive(abi.ActiveSlot(before.Active), abi.ActiveFlags(before.Active), g.epoch+1)
}

// checkTime refuses times that cannot be meant.
func checkTime(what string, given, least, most time.Duration) error {
	if given < least || given > most {
		return proto.Refuse(fmt.Sprintf("give a time from %v to %v", least, most), "%s %v is out of bounds", what, given)
	}
	return nil
}

// confirm keeps the change that waits for it.
func (c *Core) confirm(by string) (*proto.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settle()
	if c.fallback == nil {
		return nil, proto.Refuse("see `demarc status` for what is in force", "no change waits to be confirmed")
	}
	if err := c.record(by, auditConfirm, c.active, ""); err != nil {
		return nil, err
	}
	// The disk first: were the deadline taken away and the disk full, the next boot
	// would bring back what was confirmed to be replaced.
	if err := c.store.commit(); err != nil {
		return nil, err
	}
	if err := changeState(c.objects, func(s *abi.State) { s.Deadline = 0 }); err != nil {
		return nil, err
	}
	c.keep(c.fallback)
	c.fallback = nil
	c.upkeepImage()
	c.log.Info("change confirmed", "policy", c.active.image.Name, "version", c.active.image.Version)
	return c.status(), nil
}

// keep makes what was in force the previous image, and closes it. What came after it
// is there for good now, so nothing older comes again.
func (c *Core) keep(former *generation) {
	c.raiseFloor(c.active.floor())
	c.previous = nil
	if former != nil && former != c.active {
		c.previous = former.describe()
		c.previous.Slot, c.previous.Epoch = 0, 0
		former.close()
	}
}

// settle makes this core agree with the kernel when a deadline has passed.
// Everything that looks at what is in force begins with it.
func (c *Core) settle() {
	if c.fallback == nil && c.shadow == nil {
		return
	}
	state, err := readState(c.objects)
	if err == nil && c.shadow != nil && c.active.clock.now() >= state.Shadowed {
		c.endShadow("kernel", "its time is over")
		return // nothing waits to be confirmed beside it
	}
	if err == nil && state.Deadline != 0 && c.active.clock.now() >= state.Deadline {
		err = c.fallBack("kernel", "nobody confirmed it in time")
	}
	c.attend("fallback", err)
}

// fallBack ends an unconfirmed change: what was in force before it is in force
// again.
func (c *Core) fallBack(by, why string) error {
	var word uint64
	if err := changeState(c.objects, func(s *abi.State) {
		word = s.Fallback
		s.Active, s.Deadline = word, 0
	}); err != nil {
		return err
	}
	tried, g := c.active, c.fallback
	c.active, c.fallback = g, nil
	c.retired = int(tried.slot)
	if g == tried {
		c.retired = -1
		c.stand("the first policy is only observed: %s; apply it again", why)
	} else {
		tried.close()
	}
	g.epoch, g.flags = abi.ActiveEpoch(word), abi.ActiveFlags(word)
	_ = c.record(by, auditFallback, g, "version %d was taken back: %s", tried.image.Version, why)
	c.log.Warn("change taken back", "why", why, "policy", tried.image.Name, "version", tried.image.Version)
	return nil
}

// abandon ends a change that a former core left unconfirmed. Its operator talked to
// that core; the safe answer to not knowing is to go back now.
func (c *Core) abandon() error {
	state, err := readState(c.objects)
	if err == nil && state.Shadow != 0 {
		slot, flags, epoch := abi.ActiveSlot(state.Active), abi.ActiveFlags(state.Active), abi.ActiveEpoch(state.Active)
		state.Active, state.Shadow, state.Shadowed = abi.MakeActive(slot, flags&^abi.ActiveShadow, epoch), 0, 0
		_ = c.record("core", auditShadowEnd, nil, "the core was started anew")
		err = writeState(c.objects, state)
	}
	if err != nil || state.Deadline == 0 {
		return err
	}
	state.Active, state.Deadline = state.Fallback, 0
	_ = c.record("core", auditFallback, nil, "the core was started anew before anybody confirmed the change")
	c.log.Warn("change taken back", "why", "the core was started anew before anybody confirmed it")
	return writeState(c.objects, state)
}

// unconfirmed says until when, and what comes back then.
func (c *Core) unconfirmed(state abi.State) *proto.Unconfirmed {
	u := &proto.Unconfirmed{Until: time.Unix(0, int64(state.Deadline)+c.active.clock.offset).UTC()}
	if c.fallback != c.active {
		u.Fallback = c.fallback.describe()
	}
	return u
}
