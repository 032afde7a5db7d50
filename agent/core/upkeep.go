package core

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// upkeepInterval is how often the core looks whether what it wrote is still right.
const upkeepInterval = time.Second

// start keeps up what time and the machine change, until stop is called, which
// waits for it to end. The core's privileges must have been dropped: that stops all of
// Go for each of some fifty system calls, and a Go (1.26) that stops while a goroutine
// is about to block in the kernel, as the reader of refusals does, may stand for a minute.
func (c *Core) start() {
	if c.stop != nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() { c.run(ctx) })
	all.Go(func() { c.devices.run(ctx) })
	if c.answers != nil {
		all.Go(func() { c.answers.run(c.log) })
	}
	c.stop = func() {
		cancel()
		c.answers.halt()
		all.Wait()
	}
}

func (c *Core) run(ctx context.Context) {
	ticker := time.NewTicker(upkeepInterval)
	defer ticker.Stop()
	for looks := 1; ; looks++ {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			c.upkeep()
			if c.Beat != nil {
				c.Beat()
			}
			if looks%surveyEvery == 0 {
				if err := c.observers.look(); err != nil {
					c.log.Warn("a round of the observers failed", "error", err)
				}
			}
		}
	}
}

// upkeep is one look. What goes wrong stays a problem until it goes well.
func (c *Core) upkeep() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settle()
	if c.prepared != nil && time.Since(c.prepared.since) > preparedFor {
		c.unprepare()
	}
	c.endQuarantines()
	c.watch()
	c.attend("clock", c.setWall())
	c.attend("keyring", c.followKeys(theClock()))
	c.upkeepImage()
}

// upkeepImage looks after the image in force. One that expires stays in force: to
// end it would refuse everything.
func (c *Core) upkeepImage() {
	var err error
	if c.active != nil && c.active.expired(time.Now()) {
		err = fmt.Errorf("it expired at %s and stays in force: apply a newer one", time.Unix(c.active.image.NotAfter, 0).UTC().Format(time.RFC3339))
	}
	c.attend("image", err)
	if err = c.store.problems; err != nil {
		err = fmt.Errorf("a second copy could not be written: %w", err)
	}
	c.attend("state_dir", err)
	c.attend("floor", c.keepFloor())
}

// attend notes how a part of the upkeep went: a problem for as long as err is not
// nil, logged when it changes. Drift and the log itself tell more, and themselves.
func (c *Core) attend(part string, err error) {
	was := c.troubles[part]
	if err == nil {
		if delete(c.troubles, part); was != "" && part != auditTrouble {
			_ = c.record("core", auditHealthy, c.active, "no more %s", was)
		}
		return
	}
	text := fmt.Sprintf("%s: %v", part, err)
	c.troubles[part] = text
	if text != was {
		c.log.Error("degraded", "problem", text)
		if part != "drift" && part != auditTrouble && was == "" {
			_ = c.record("core", auditProblem, c.active, "%s", text)
		}
	}
}

const (
	// wallTolerance is how far the kernel's idea of the time may be off before it is
	// written again. Tags allow for half a minute.
	wallTolerance = 10 * time.Millisecond
	// wallSlew is the part of its pace that the kernel's idea of the time gives up
	// while the wall clock is behind it.
	wallSlew = 10
	// wallGap is how far it may be ahead before that is a problem.
	wallGap = time.Second
)

// theClock is the clock that preflight found to be readable. The kernel does not take it
// back; a core that could not tell the time would end, and not guess.
func theClock() bootClock {
	clock, err := readBootClock()
	if err != nil {
		panic(err)
	}
	return clock
}

// bootTime is what CLOCK_BOOTTIME shows, in ns.
func bootTime() int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic(err)
	}
	return t.Nano()
}

// setWall tells the programs what time it is. A wall clock that went forward is
// followed at once. One that went back is not: tags that were used before would be
// good again, after the memory of them has ended. The kernel's time goes on then,
// only slower, until the wall clock has caught up; the memory allows for that pace.
// A core that starts takes the wall clock's word. All writers of the state hold mu:
// it is written whole.
func (c *Core) setWall() error {
	clock := theClock()
	state, err := readState(c.objects)
	if err != nil {
		return err
	}
	last := c.walled
	c.walled = clock.now()
	off := time.Duration(clock.offset - int64(state.Wall))
	if off.Abs() < wallTolerance {
		return nil
	}
	step := off
	if last != 0 {
		step = max(off, -time.Duration(c.walled-last)/wallSlew)
	}
	state.Wall += uint64(step)
	if err := writeState(c.objects, state); err != nil {
		return err
	}
	if gap := step - off; gap > wallGap {
		return fmt.Errorf("the wall clock went back: tags are %v ahead of it and return to it at a tenth of its pace; restart the core to take it as it is",
			gap.Round(time.Second))
	}
	return nil
}
