package core

import (
	"errors"
	"os"
	"time"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
)

// maxSpare bounds the time that live connections go on that a change cuts.
const maxSpare = 24 * time.Hour

// apply puts an image in force: it is verified, written beside what is in force,
// tested there, and takes over in one step. On an error nothing has changed.
func (c *Core) apply(b []byte, how change, by string) (_ *proto.Status, err error) {
	if how.within != 0 {
		if err := checkTime("confirm within", how.within, minTrial, maxTrial); err != nil {
			return nil, err
		}
	}
	g, err := c.offered(b, how.previewed)
	c.mu.Lock()
	defer c.mu.Unlock()
	begun := false
	defer func() {
		if err != nil && !begun {
			c.peerRecord(by, auditRefused, g, "apply: %v", err)
		}
	}()
	if err != nil {
		return nil, err
	}
	c.settle()
	if !c.stands(g) {
		if err := c.mayChange(g); err != nil {
			return nil, err
		}
		if err := c.record(by, auditApply, g, "%s", how); err != nil {
			return nil, err
		}
		begun = true
		c.endShadow(by, "a policy is applied")
		c.keepClaims(g)
		how.durable = true
		err := c.install(g, how)
		c.outcome(by, g, err)
		if err != nil {
			return nil, err
		}
	}
	return c.status(), nil
}

// stands says whether an image is in force for good already.
func (c *Core) stands(g *generation) bool {
	return c.active != nil && c.active.digest == g.digest && c.active.signer == g.signer &&
		c.active.flags&^abi.ActiveShadow == activeFlags(c.active.image) && c.fallback == nil
}

// mayChange says whether an image may take over now.
func (c *Core) mayChange(g *generation) error {
	if c.fallback != nil {
		return proto.Refuse("`demarc confirm` keeps it, `demarc rollback` takes it back", "version %d waits to be confirmed", c.active.image.Version)
	}
	return c.admissible(g)
}

// admissible refuses images that would turn time back.
func (c *Core) admissible(g *generation) error {
	if g.expired(time.Now()) {
		return proto.Refuse("build it again", "image expired at %s", time.Unix(g.image.NotAfter, 0).UTC().Format(time.RFC3339))
	}
	switch {
	case g.image.Version > c.floor.Version, g.floor() == c.floor.Floor:
		return nil
	case g.image.Version < c.floor.Version:
		return proto.Refuse("raise metadata.version, or use rollback",
			"image has version %d, and version %d was in force already", g.image.Version, c.floor.Version)
	}
	return proto.Refuse("raise metadata.version", "version %d was in force already with other content", c.floor.Version)
}

// rollback goes back to the previous image; the present one becomes the previous.
// What waits to be confirmed is taken back at once.
func (c *Core) rollback(by string) (*proto.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settle()
	if c.fallback != nil {
		if err := c.fallBack(by, "it was rolled back"); err != nil {
			return nil, err
		}
		return c.status(), nil
	}
	g, err := c.stored(previousImage)
	if err != nil {
		return nil, err
	}
	if g == nil || c.active == nil {
		return nil, proto.Refuse("apply a policy", "there is no previous image")
	}
	if g.expired(time.Now()) {
		return nil, proto.Refuse("apply a newer policy", "previous image has expired")
	}
	if err := c.record(by, auditRollback, g, ""); err != nil {
		return nil, err
	}
	c.endShadow(by, "a policy is rolled back to")
	c.keepClaims(g)
	err = c.install(g, change{durable: true})
	c.outcome(by, g, err)
	if err != nil {
		return nil, err
	}
	return c.status(), nil
}

// change says how an image comes into force.
type change struct {
	durable   bool                    // on disk, too: it is not from there
	boot      bool                    // it is from there, and until it is in force nothing is
	previewed string                  // its digest, in hex, in the place of its bytes; "" = they are there
	within    time.Duration           // somebody has to confirm it; 0 = it is for good
	ahead     bool                    // it only becomes ready, for the moment at which it is wanted
	preview   func(slot uint32) error // runs when everything is ready, and that is all; nil = none
	spare     time.Duration           // live connections that it cuts go on; 0 = they do not
	shadow    time.Duration           // it does not: it is asked beside what is; 0 = it does
}

// install puts a verified generation in force. Each step is undone if a later one
// fails; what was in force stays in its slot until the next time, because packets may
// still be judged there, or return there.
func (c *Core) install(g *generation, how change) (err error) {
	before, err := readState(c.objects)
	if err != nil {
		return err
	}
	var undo []func()
	defer func() {
		for i := len(undo) - 1; err != nil && i >= 0; i-- {
			undo[i]()
		}
	}()
	on := abi.ActiveFlags(before.Active)&abi.ActiveOn != 0
	ready := c.inPlace(g)
	onDisk := ready && g.staged
	questions := g.left
	switch g.staged, g.left = false, nil; {
	case !ready:
		c.unprepare()
		g.slot = c.freeSlot(before, on)
	case questions != nil: // it does not lie ready any more if an answer is wrong
		c.prepared = nil
	}
	aside := how.ahead || how.preview != nil
	staged := make(chan error, 1) // the disk is slow, and nobody has to wait for it yet
	go func() {
		if (how.durable || aside) && !onDisk {
			staged <- c.store.stage(g.came)
		}
		close(staged)
	}()
	defer func() { <-staged }()
	s := scanner{objects: c.objects, tree: c.tree, slot: g.slot, selectors: g.selectors}
	undo = append(undo, func() {
		if c.prepared != g {
			_ = emptySlot(c.objects, g.slot)
			g.close()
		}
	})
	if !ready {
		if questions, err = c.fill(g, &s, how.boot); err != nil {
			return err
		}
	}

	state := before
	state.Filling = 1 << g.slot
	if on {
		state.Filling |= 1 << abi.ActiveSlot(before.Active)
	}
	if c.shadow != nil {
		state.Filling |= 1 << c.shadow.slot
	}
	undo = append(undo, func() { c.restore(before) })
	if err := writeState(c.objects, state); err != nil {
		return err
	}
	first := len(c.links.open) == 0
	if first {
		if err := c.links.attach(attachOrder[:namers]); err != nil {
			return err
		}
		undo = append(undo, func() { c.links.detach(attachOrder) })
	}
	if g.bindings, _, err = s.scan("/"); err != nil {
		return err
	}
	if !ready {
		if err := questions.before(); err != nil {
			return err
		}
	}
	if how.preview != nil {
		if err := questions.after(); err != nil {
			return err
		}
		if err := how.preview(g.slot); err != nil {
			return err
		}
		questions = nil
	}
	switch {
	case aside:
		if err := <-staged; err != nil {
			return err
		}
		return c.keepPrepared(g, questions)
	case how.shadow > 0:
		if err := questions.after(); err != nil {
			return err
		}
		return c.cast(g, state, how.shadow)
	}
	if err := <-staged; err != nil {
		return err
	}

	if state.Spared = 0; how.spare > 0 {
		state.Spared = g.clock.now() + uint64(how.spare)
		if err := writeState(c.objects, state); err != nil {
			return err
		}
		if _, err := findCuts(c.objects, g.slot, 1); err != nil {
			return err
		}
	}
	g.epoch, g.flags = before.NextEpoch(), activeFlags(g.image)
	state.Active, state.Filling, state.Deadline = g.word(), 1<<g.slot, 0
	if how.within > 0 {
		state.Fallback, state.Deadline = g.fallbackWord(before), g.clock.now()+uint64(how.within)
		state.Filling |= 1 << abi.ActiveSlot(state.Fallback)
	}
	if err := writeState(c.objects, state); err != nil {
		return err
	}
	if first {
		// Proofs are verified at devices before anything asks for them.
		if err := c.devices.begin(); err != nil {
			return err
		}
		undo = append(undo, c.devices.end)
		if err := c.links.attach(attachOrder[namers:]); err != nil {
			return err
		}
		undo = append(undo, func() { _ = os.Remove(c.pins.abi()) })
		if err := c.pins.commit(c.objects.spec, c.tree); err != nil {
			return err
		}
	}
	c.flipped()
	if err := questions.after(); err != nil {
		return err
	}
	if how.durable && how.within == 0 {
		if err := c.store.commit(); err != nil {
			return err
		}
	}
	c.succeed(g, before, on, how)
	if first {
		c.adoptListeners()
	}
	return nil
}

// fill makes the tables of a generation in its slot, which nobody may write any more
// then, and the questions about them.
func (c *Core) fill(g *generation, s *scanner, boot bool) (questions *selftest, err error) {
	if err := s.prepare(); err != nil {
		return nil, err
	}
	asking := make(chan error, 1)
	go func() {
		var err error
		questions, err = newSelftest(c.objects, g, c.active, boot)
		asking <- err
	}()
	if err := errors.Join(g.fill(c.objects), <-asking); err != nil {
		return nil, err
	}
	return questions, g.freeze()
}

// freeSlot is a slot that no packet is judged in.
func (c *Core) freeSlot(s abi.State, on bool) uint32 {
	slot := uint32(0)
	for on && slot == abi.ActiveSlot(s.Active) || int(slot) == c.retired || c.shadow != nil && slot == c.shadow.slot {
		slot++
	}
	return slot
}

// restore takes a flip back. The epoch must still grow: verdicts may have been
// cached under the one in between.
func (c *Core) restore(before abi.State) {
	now, err := readState(c.objects)
	if err == nil && now.Active != before.Active {
		epoch := now.NextEpoch()
		before.Active = abi.MakeActive(abi.ActiveSlot(before.Active), abi.ActiveFlags(before.Active), epoch)
		if c.active != nil {
			c.active.epoch = epoch
		}
	}
	if err := writeState(c.objects, before); err != nil {
		c.stand("take back what failed: %v", err)
	}
}

// succeed notes what is in force and frees what was retired before. Failing to
// free it costs memory until the next time, nothing else.
func (c *Core) succeed(g *generation, before abi.State, on bool, how change) {
	g.since = time.Now()
	retired := -1
	if on {
		retired = int(abi.ActiveSlot(before.Active))
	}
	for slot := range abi.Slots {
		if slot != int(g.slot) && slot != retired {
			if err := emptySlot(c.objects, uint32(slot)); err != nil {
				c.log.Warn("old generation is not freed", "problem", err)
			}
		}
	}
	former := c.active
	c.active, c.retired, c.prepared = g, retired, nil
	g.came = nil
	switch {
	case how.within > 0 && former == nil:
		c.fallback = g
	case how.within > 0:
		c.fallback = former
	case how.durable:
		c.standing = nil
		c.keep(former)
	case former != nil:
		former.close()
	}
	c.upkeepImage()
	for _, i := range c.watchGuard() {
		c.log.Error("degraded", "problem", i)
	}
	c.log.Info("policy in force", "policy", g.image.Name, "version", g.image.Version, "slot", g.slot, "epoch", g.epoch,
		"crossings", len(g.image.Crossings), "bindings", g.bindings)
}
