// Package core is the trusted part of demarc: it verifies images, writes them to
// the kernel, attaches the programs and names cgroups. It believes neither the
// compiler nor the agent.
//
// Enforcement lives in pinned programs and maps and goes on without the core. A
// core that starts adopts them without a gap, or refuses them and changes
// nothing.
package core

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
)

// Core is one running core. Open makes it, Close ends it.
type Core struct {
	// Beat is called each second, as long as the core does its work; nil = nobody
	// wants to know. It is set before Serve.
	Beat func()

	found
	config    Config
	log       *slog.Logger
	lock      *os.File // held while this core runs
	pins      pins
	store     store
	links     *links
	devices   *boundary
	donated   *proto.Descriptors
	stop      func() // ends the upkeep; nil = it never began
	canary    *canary
	observers *observers // nil = none yet
	flipped   func()     // for tests

	mu          sync.Mutex
	active      *generation       // what this core put in force; nil = nothing
	fallback    *generation       // what comes back unless active is confirmed; active itself if nothing was before; nil = confirmed
	previous    *proto.Generation // what rollback returns to; nil = nothing
	shadow      *generation       // what live traffic is judged by beside active; nil = nothing
	prepared    *generation       // what was previewed last: filled, tested, and in no use; nil = nothing
	retired     int               // slot that packets may still be judged in; -1 = none
	standing    []string          // problems that last until the core is started again
	troubles    map[string]string // problems that the upkeep found, by part
	keys        keys
	floor       floor
	journal     *journal
	quarantines map[uint32]quarantined
	foreign     []string  // programs of others at our hooks
	looked      time.Time // when everything was last as it should be
	proved      time.Time // when the canary last did
	drifts      uint64    // incidents found
	told        time.Time // when the audit log was last told of some
	swept       time.Time // when to walk over all cgroups again
	walled      uint64    // when the kernel was last told the time, ns of CLOCK_BOOTTIME; 0 = not by this core
}

// hooks let tests break a start. The zero value breaks nothing.
type hooks struct {
	load      func() error            // before the programs are loaded
	tcx       func() error            // in the place of probeTCX
	attaching func(name string) error // before each program is attached
	flipped   func()                  // when an image has come into force
}

// Open checks what enforcement needs, adopts what a former core left in the
// kernel, and puts the stored image in force. Nothing runs beside the caller until
// Serve. On an error the kernel decides as it did before.
func Open(config Config, log *slog.Logger) (*Core, error) { return open(config, log, hooks{}) }

func open(config Config, log *slog.Logger, h hooks) (_ *Core, err error) {
	c := &Core{config: config, log: log, pins: newPins(config.BPFFS), store: store{dir: config.StateDir, log: log}, retired: -1, flipped: h.flipped,
		troubles: map[string]string{}, quarantines: map[uint32]quarantined{}}
	if c.flipped == nil {
		c.flipped = func() {}
	}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	if c.lock, err = lockState(config.StateDir); err != nil {
		return nil, err
	}
	t := &trial{config: config, hooks: h}
	defer t.close()
	if err := t.passed(); err != nil {
		return nil, err
	}
	c.found, t.found = t.found, found{}
	c.links, t.links = newLinks(c.objects, t.links), nil
	taps := newLinks(c.objects, t.taps)
	for _, l := range []*links{c.links, taps} {
		l.tree, l.pins, l.attaching = c.tree, c.pins, h.attaching
	}
	if c.devices, err = newBoundary(config.Devices, taps, log); err != nil {
		return nil, err
	}
	t.taps = nil
	for _, step := range []func() error{
		c.begin, c.begun, func() error { return freeze(c.objects) }, func() error { return makeCanary(c.tree) }, c.donate,
		c.useKeys, c.setWall, c.resumeQuarantines, c.resume, c.adopt, func() error { return c.watchers(&t.types) },
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	for path := range c.pinned() {
		c.pins.saw(path)
	}
	c.pins.saw(c.pins.abi())
	c.looked = time.Now()
	return c, nil
}

// lockState makes the state directory and keeps a second core out of it.
func lockState(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make state_dir: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock state_dir: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, proto.Refuse("stop the other one first", "another demarc-core uses %s", dir)
	}
	return f, nil
}

// begin takes away what an interrupted start left, and pins new maps, unless there are
// those of a former core.
func (c *Core) begin() error {
	if c.committed {
		return nil
	}
	if err := c.pins.clear(c.objects.spec); err != nil {
		return err
	}
	return c.pins.pinMaps(c.objects)
}

// adopt puts this core's programs in the place of a former one's.
func (c *Core) adopt() error {
	if !c.committed {
		return nil
	}
	return errors.Join(c.links.update(), c.devices.adopt())
}

// watchers begin what proves that the kernel enforces, what observes, and what guards.
func (c *Core) watchers(types *btf.Cache) (err error) {
	if c.canary, err = openCanary(c.tree); err != nil {
		c.stand("no canary, which would prove that the kernel enforces: %v", err)
	}
	c.observers = observe(c.objects, c.tree.dir, !c.config.Sealed, types)
	if c.committed {
		if err := c.observers.resumed(c.objects); err != nil {
			return err
		}
	}
	if c.guard == nil {
		return nil
	}
	return errors.Join(c.guard.raise(c.tree, c.pins), c.guard.cover(c.guarded()))
}

// resume puts the stored image in force. If it cannot be, what the kernel enforces
// goes on; if that is nothing, the image before it is better than none.
func (c *Core) resume() error {
	if err := c.abandon(); err != nil {
		return err
	}
	c.readFloor()
	g, err := c.stored(activeImage)
	switch {
	case err != nil && c.committed:
		c.stand("%v; what was in force goes on: apply an image", err)
	case err != nil:
		if g = c.storedPrevious(); g == nil {
			return proto.Refuse(fmt.Sprintf("remove %s and .b to start without a policy", c.store.file(activeImage, "a")), "%w", err)
		}
		c.stand("%v; the image before it is in force", err)
	case g == nil && c.committed:
		c.stand("the image in force is not on disk: apply one")
	}
	if g != nil {
		c.raiseFloor(g.floor())
		if c.committed {
			c.recoverClaims(g)
		}
		if bad := c.install(g, change{boot: !c.committed}); bad != nil {
			return bad
		}
	}
	if err == nil || c.committed { // whatever is enforced is by now
		if previous := c.storedPrevious(); previous != nil {
			c.previous = previous.describe()
		}
	}
	return nil
}

// storedPrevious is what rollback would return to; nil = nothing that can be used.
func (c *Core) storedPrevious() *generation {
	g, err := c.stored(previousImage)
	if err != nil {
		c.log.Warn("previous image cannot be used", "problem", err)
	} else if g != nil {
		c.raiseFloor(g.floor())
	}
	return g
}

// stored reads and verifies an image as if it came now: the keys may be others.
func (c *Core) stored(name string) (*generation, error) {
	b, err := c.store.load(name)
	var g *generation
	if b != nil && err == nil {
		g, err = openImage(b, c.trusted)
	}
	if err != nil {
		return nil, fmt.Errorf("stored %s image: %w", name, err)
	}
	return g, nil
}

func (c *Core) stand(format string, args ...any) {
	c.standing = append(c.standing, fmt.Sprintf(format, args...))
	c.log.Error("degraded", "problem", c.standing[len(c.standing)-1])
}

// Status asks the kernel what is attached and in force.
func (c *Core) Status() *proto.Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settle()
	return c.status()
}

func (c *Core) status() *proto.Status {
	s := &proto.Status{State: proto.StateIdle, Previous: c.previous, Links: c.links.status(), Limits: append(c.limits[:len(c.limits):len(c.limits)], c.foreign...),
		Problems: append([]string(nil), c.standing...), Quarantines: c.listQuarantines(), Blind: c.observers.blindness()}
	if c.active != nil {
		s.Active, s.State, s.Claims = c.active.describe(), proto.StateEnforcing, len(c.active.selectors.claims)
		if c.active.flags&abi.ActiveObserve != 0 {
			s.State = proto.StateObserving
		}
		state, err := kernelState(c.objects)
		switch {
		case err != nil:
			s.Problems = append(s.Problems, err.Error())
		case state.Active != c.active.word() || (state.Deadline != 0) != (c.fallback != nil):
			s.Problems = append(s.Problems, fmt.Sprintf("the kernel's state is %#x, not %#x: somebody else wrote it", state.Active, c.active.word()))
		case c.fallback != nil:
			s.Unconfirmed = c.unconfirmed(state)
		case c.shadow != nil:
			s.Shadow = c.shadowed(state)
		}
		if len(s.Links) != len(attachOrder) {
			s.Problems = append(s.Problems, fmt.Sprintf("%d of %d programs are attached", len(s.Links), len(attachOrder)))
		}
	}
	c.attend("canary", c.prove())
	s.Keys, s.Proved, s.Drifts = c.keys.describe(), c.proved, c.drifts
	taps, problems := c.devices.state()
	s.Links, s.Problems = append(s.Links, taps...), append(s.Problems, problems...)
	for _, l := range s.Links {
		if l.Problem != "" {
			s.Problems = append(s.Problems, l.Problem)
		}
	}
	for _, part := range sortedKeys(c.troubles) {
		s.Problems = append(s.Problems, c.troubles[part])
	}
	if len(s.Problems) > 0 {
		s.State = proto.StateDegraded
	}
	return s
}

// Close gives up the descriptors. What is in force stays in force; if nothing is,
// nothing stays.
func (c *Core) Close() error {
	if c.stop != nil {
		c.stop()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	if c.donated != nil {
		c.donated.Close()
	}
	if !c.looked.IsZero() { // it was opened whole
		_ = c.record("core", auditStop, c.active, "")
	}
	c.canary.close()
	c.observers.close()
	c.journal.close()
	c.canary, c.journal = nil, nil
	if c.objects != nil {
		c.unprepare()
		if c.links != nil && len(c.links.open) == 0 {
			err = c.pins.clear(c.objects.spec)
		}
		if c.links != nil {
			closeAll(c.links.open)
		}
		c.devices.close()
		for _, g := range []*generation{c.active, c.fallback, c.shadow} {
			if g != nil {
				g.close()
			}
		}
		c.found.close()
	}
	if c.lock != nil {
		err = errors.Join(err, c.lock.Close())
	}
	return err
}

// Detach ends enforcement: it removes every pin. No core may be running.
func Detach(config Config) error {
	lock, err := lockState(config.StateDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	spec, err := loadDemarc()
	if err != nil {
		return fmt.Errorf("read programs: %w", err)
	}
	p := pins{dir: config.BPFFS}
	committed, err := p.check(spec)
	if err != nil {
		return err
	}
	unrecorded := detachRecord(config.StateDir, p, committed)
	return errors.Join(p.clear(spec), removeCanary(config.CgroupRoot), unrecorded)
}
