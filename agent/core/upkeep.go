package core

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// upkeepInterval is how often the core looks whether what it wrote is still right.
const upkeepInterval = time.Second

// start keeps up what time and the machine change, until stop is called, which
// waits for it to end.
func (c *Core) start() {
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() { c.run(ctx) })
	all.Go(func() { c.devices.run(ctx) })
	c.stop = func() {
		cancel()
		all.Wait()
	}
}

func (c *Core) run(ctx context.Context) {
	ticker := time.NewTicker(upkeepInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			c.upkeep()
		}
	}
}

// upkeep is one look. What goes wrong stays a problem until it goes well.
func (c *Core) upkeep() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.attend("clock", c.setWall())
	c.attend("keyring", c.upkeepKeys())
}

// attend notes how a part of the upkeep went: a problem for as long as err is not
// nil, logged when it changes.
func (c *Core) attend(part string, err error) {
	text := ""
	if err != nil {
		text = fmt.Sprintf("%s: %v", part, err)
	}
	if text != "" && text != c.troubles[part] {
		c.log.Error("degraded", "problem", text)
	}
	if text == "" {
		delete(c.troubles, part)
		return
	}
	c.troubles[part] = text
}

// wallTolerance is how far the kernel's idea of the time may be off before it is
// written again. Tags carry whole seconds and allow for half a minute.
const wallTolerance = 10 * time.Millisecond

// setWall tells the programs what time it is, so that a clock step does not make
// tags of datagrams stale. All writers of the state hold mu: it is written whole.
func (c *Core) setWall() error {
	clock, err := readBootClock()
	if err != nil {
		return err
	}
	state, err := readState(c.objects)
	if err != nil {
		return err
	}
	off := time.Duration(clock.offset - int64(state.Wall))
	if off.Abs() < wallTolerance {
		return nil
	}
	state.Wall = uint64(clock.offset)
	return writeState(c.objects, state)
}
