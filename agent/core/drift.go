package core

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/keyring"
	"github.com/demarc/demarc/bpf/abi"
)

// programsOnly are the maps that nobody but the programs writes. They are frozen, so
// that nobody else can.
var programsOnly = []string{
	"replays", "pending_syns", "young", "sockets", "endpoints", "talks", "turned", "flows", "port_owners", "bound_ports", "clock",
	"ring_state", "counts", "faults", "pending_seed", "scratch", "refusals_due",
	"tellings", "seen", "marks", "hops", "lineages", "families", "surveyed_at",
}

// freeze may be done again: a former core did.
func freeze(o *objects) error {
	for _, name := range programsOnly {
		info, err := o.Maps[name].Info()
		if err == nil && !info.Frozen() {
			err = o.Maps[name].Freeze()
		}
		if err != nil {
			return fmt.Errorf("freeze map %s: %w", name, err)
		}
	}
	return nil
}

// incident is something that was not as this core left it. Problem is why it still
// is not.
type incident struct {
	found   string
	problem error
}

func (i incident) String() string {
	if i.problem != nil {
		return fmt.Sprintf("%s, and could not be mended: %v", i.found, i.problem)
	}
	return i.found + ": mended"
}

// watch is one look at whether the kernel holds what this core put there, and nothing
// else. What does not is put back, what decides first; nothing is taken away before
// its successor is there. An incident is a problem until the next look finds none,
// and in the audit log for good.
func (c *Core) watch() {
	if c.journal.spare < auditSpare {
		c.journal.spare++
	}
	if n := c.journal.lost; n > 0 && c.record("core", auditHealthy, c.active, "the audit log can be written again") != nil {
		c.journal.lost = n // this one says nothing new
	}
	if err := c.journal.drift(); err != nil {
		c.log.Error("degraded", "problem", err)
		_ = c.record("core", auditDrift, c.active, "%v", err)
	}
	if c.active == nil {
		return
	}
	var all []incident
	for _, look := range []func() []incident{c.watchState, c.watchQuarantines, c.watchTables, c.watchLinks, c.watchKeys, c.watchBindings, c.watchGuard} {
		all = append(all, look()...)
	}
	all = append(all, c.devices.changed()...)
	c.drifts += uint64(len(all))
	now := time.Now()
	var err error
	if len(all) > 0 {
		lines := make([]string, len(all))
		for i := range all {
			lines[i] = all[i].String()
		}
		slices.Sort(lines)
		err = errors.New(strings.Join(lines, "; "))
		if "drift: "+err.Error() != c.troubles["drift"] || now.Sub(c.told) > time.Minute { // who goes on does not fill the log
			c.told = now
			_ = c.record("core", auditDrift, c.active, "%v; for at most %v", err, now.Sub(c.looked).Round(time.Millisecond))
		}
	} else {
		c.looked = now
	}
	c.attend("drift", err)
	c.attend("canary", c.prove())
	c.watchOthers()
}

// watchState puts the state word back. Verdicts may have been cached under whatever
// stood there, so it comes back under an epoch that is later than both.
func (c *Core) watchState() []incident {
	want, err := readState(c.objects)
	if err != nil {
		return []incident{{"the state cannot be read", err}}
	}
	found, err := kernelState(c.objects)
	if err != nil {
		return []incident{{"the state cannot be read", err}}
	}
	if found == want {
		return nil
	}
	what := fmt.Sprintf("somebody else wrote the state: %+v instead of %+v", found, want)
	c.active.epoch = want.NextEpoch()
	if theirs := found.NextEpoch(); theirs-c.active.epoch < 1<<31 { // not a leap to where it would overflow
		c.active.epoch = theirs
	}
	c.renew(&want)
	return []incident{{what, writeState(c.objects, want)}}
}

// watchTables looks whether the slot in force holds the tables that were filled for
// it. They are frozen, so it is enough that they are the same.
func (c *Core) watchTables() (all []incident) {
	for _, g := range c.decisive() {
		for _, name := range g.misplaced(c.objects) {
			all = append(all, incident{fmt.Sprintf("table %s of slot %d was replaced", name, g.slot), c.objects.Maps[name].Put(g.slot, g.tables[name])})
		}
	}
	return all
}

// misplaced are the tables of a generation that are not in its slot.
func (g *generation) misplaced(o *objects) (all []string) {
	for _, name := range tableNames {
		var id uint32
		if err := o.Maps[name].Lookup(g.slot, &id); err != nil || ebpf.MapID(id) != g.ids[name] {
			all = append(all, name)
		}
	}
	return all
}

func newPins(dir string) pins { return pins{dir: dir, seen: &sync.Map{}} }

// saw notes that a pin leads where it should: another one in its place would be
// another inode.
func (p pins) saw(path string) {
	if p.seen != nil {
		p.seen.Store(path, inode(path))
	}
}

// intact says whether a pin is the one that was seen last.
func (p pins) intact(path string) bool {
	seen, _ := p.seen.Load(path)
	return seen != uint64(0) && seen == inode(path)
}

// inode is 0 where there is none.
func inode(path string) uint64 {
	var stat unix.Stat_t
	if err := unix.Lstat(path, &stat); err != nil {
		return 0
	}
	return stat.Ino
}

// pinnable is a map or a link.
type pinnable interface {
	Pin(string) error
	Unpin() error
}

// again pins what is open where something else may be by now.
func (p pins) again(path string, what pinnable) error {
	if err := remove(path); err != nil {
		return err
	}
	_ = what.Unpin() // it still believes to be pinned
	if err := what.Pin(path); err != nil {
		return err
	}
	p.saw(path)
	return nil
}

// pinned lists the maps that have to be pinned, by their path.
func (c *Core) pinned() map[string]pinnable {
	all := map[string]pinnable{c.pins.audit(): c.journal.kernel}
	for _, name := range keptMaps(c.objects.spec) {
		all[c.pins.maps(name)] = c.objects.Maps[name]
	}
	return all
}

// watchLinks puts links back, and pins again what is not pinned any more: without pins,
// enforcement would end with this core. `abi` comes last, as at a start.
func (c *Core) watchLinks() []incident {
	what := pinning{pins: c.pins}
	all := c.links.drift(&what)
	if c.guard != nil {
		all = append(all, c.guard.links.drift(&what)...)
	}
	maps := c.pinned()
	for _, path := range sortedKeys(maps) {
		what.look(path, maps[path])
	}
	if !c.pins.intact(c.pins.abi()) {
		what.failed(c.pins.abi(), c.pins.commit(c.objects.spec, c.tree))
	}
	return append(all, what.incidents()...)
}

// pinning sums up what is wrong with pins: where one is gone, mostly all are.
type pinning struct {
	pins   pins
	gone   []string
	reason error
}

func (p *pinning) look(path string, what pinnable) {
	if p.pins.intact(path) {
		return
	}
	if p.gone == nil {
		p.reason = checkBPFFS(filepath.Dir(p.pins.dir))
		if p.reason == nil {
			p.reason = p.pins.makeDirectories()
		}
	}
	if p.reason == nil {
		p.reason = p.pins.again(path, what)
	}
	p.gone = append(p.gone, path)
}

func (p *pinning) failed(path string, err error) {
	p.gone = append(p.gone, path)
	p.reason = errors.Join(p.reason, err)
}

func (p *pinning) incidents() []incident {
	switch len(p.gone) {
	case 0:
		return nil
	case 1:
		return []incident{{fmt.Sprintf("pin %s was gone, or led elsewhere", p.gone[0]), p.reason}}
	}
	return []incident{{fmt.Sprintf("%d pins were gone, or led elsewhere, the first %s", len(p.gone), p.gone[0]), p.reason}}
}

// watchKeys reads the tag keys back. Here are only their fingerprints; the keys are
// read from the file again.
func (c *Core) watchKeys() (all []incident) {
	entry := new(abi.Key) // on the heap, and wiped: see writeKey
	defer func() { *entry = abi.Key{} }()
	for epoch, want := range c.keys.entries {
		if err := c.objects.Maps["keys"].Lookup(uint32(epoch), unsafe.Pointer(entry)); err != nil {
			return append(all, incident{"tag keys cannot be read", err})
		}
		var found keyEntry
		if entry.Valid != 0 {
			secret := (*[keyring.KeySize]byte)(unsafe.Pointer(&entry.Key)) // its bytes are in their order here, too
			found = keyEntry{valid: true, print: keyring.Print(secret), since: entry.Since, until: entry.Until}
		}
		if found != want {
			c.keys.entries[epoch] = keyEntry{valid: true} // equal to nothing: it is written anew
			all = append(all, incident{fmt.Sprintf("the tag key of epoch %d was changed", epoch), nil})
		}
	}
	if len(all) > 0 {
		all[0].problem = c.followKeys(theClock())
	}
	return all
}

// sweepShare is the part of the time that walks over all cgroups may take.
const sweepShare = 100

// watchBindings walks the managed tree and puts every cgroup's identity right. Nobody
// but the programs and this core gives one. The walk is as long as the tree is large,
// so in a large one it is seldom.
func (c *Core) watchBindings() (all []incident) {
	start := time.Now()
	if start.Before(c.swept) {
		return nil
	}
	for _, g := range c.decisive() {
		s := scanner{objects: c.objects, tree: c.tree, slot: g.slot, selectors: g.selectors}
		_, _, err := s.scan("/")
		if len(s.wrong) > 0 {
			all = append(all, incident{fmt.Sprintf("%d cgroups had another identity, the first %s", len(s.wrong), s.wrong[0]), err})
		} else if err != nil {
			all = append(all, incident{"cgroups cannot be looked at", err})
		}
	}
	end := time.Now()
	c.swept = end.Add(end.Sub(start) * sweepShare)
	return all
}

// watchOthers looks for programs of others at our hooks: on the managed root and
// above it, and on devices. They are a limit, and noted when they come and go.
func (c *Core) watchOthers() {
	others, err := c.links.others(c.observers)
	more, first := c.devices.strangers(c.observers)
	others = append(others, more...)
	for _, o := range others {
		if !slices.Contains(c.foreign, o) {
			c.log.Warn("somebody else's program is at our hooks", "program", o)
			_ = c.record("core", auditDrift, c.active, "%s came", o)
		}
	}
	for _, o := range c.foreign {
		if !slices.Contains(others, o) {
			_ = c.record("core", auditDrift, c.active, "%s went", o)
		}
	}
	c.foreign = others
	c.attend("hooks", errors.Join(err, first))
}
