package core

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
)

// programsOnly are the maps that nobody but the programs writes. They are frozen, so
// that nobody else can.
var programsOnly = []string{
	"replays", "pending_syns", "young", "sockets", "endpoints", "turns", "flows", "port_owners", "bound_ports", "clock",
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
	for _, look := range []func() []incident{c.watchState, c.watchQuarantines, c.watchTables, c.watchLinks, c.watchPins, c.watchKeys, c.watchBindings, c.watchGuard} {
		all = append(all, look()...)
	}
	all = append(all, c.devices.drift()...)
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
		if "drift: "+err.Error() != c.troubles["drift"] {
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

// watchLinks attaches again what was detached, and gives links their program back.
func (c *Core) watchLinks() (all []incident) {
	l := c.links
	for _, name := range attachOrder {
		err := leadsTo(l.open[name], l.objects.spec.Programs[name], l.tree)
		if err != nil {
			all = append(all, incident{fmt.Sprintf("link %s %v", name, err), l.again(name)})
			continue
		}
		info, err := l.open[name].Info()
		if err == nil && info.Program != l.running[name] {
			err = l.open[name].Update(l.objects.Programs[name])
			if err == nil {
				err = l.note(name)
			}
			all = append(all, incident{fmt.Sprintf("link %s ran program %d, which is not ours", name, info.Program), err})
		}
	}
	return all
}

// again attaches a program beside a link that leads nowhere. The new link is pinned
// by whoever looks at the pins: it must hold even where that is impossible.
func (l *links) again(name string) error {
	fresh, err := attachProgram(l.objects.Programs[name], l.objects.spec.Programs[name], l.tree.dir)
	if err != nil {
		return err
	}
	l.open[name].Close()
	l.open[name] = fresh
	if err := l.note(name); err != nil {
		return err
	}
	l.pins.seen.Store(l.pins.links(name), uint64(0)) // what is there leads to the old one
	return nil
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
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	_ = what.Unpin() // it still believes to be pinned
	if err := what.Pin(path); err != nil {
		return err
	}
	p.saw(path)
	return nil
}

// pinned lists what has to be pinned, by its path.
func (c *Core) pinned() map[string]pinnable {
	all := map[string]pinnable{c.pins.audit(): c.journal.kernel}
	for _, name := range keptMaps(c.objects.spec) {
		all[c.pins.maps(name)] = c.objects.Maps[name]
	}
	for name, l := range c.links.open {
		all[c.pins.links(name)] = l
	}
	if c.guard != nil {
		for name, l := range c.guard.links {
			all[c.pins.links(name)] = l
		}
	}
	return all
}

// watchPins pins again what is not pinned any more: without pins, enforcement would
// end with this core. `abi` comes last, as at a start.
func (c *Core) watchPins() []incident {
	what := pinning{pins: c.pins}
	all := c.pinned()
	for _, path := range sortedKeys(all) {
		what.look(path, all[path])
	}
	if !c.pins.intact(c.pins.abi()) {
		what.failed(c.pins.abi(), c.recommit())
	}
	return what.incidents()
}

func (c *Core) recommit() error {
	if err := os.Remove(c.pins.abi()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return c.pins.commit(c.objects.spec, c.tree)
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
			secret := make([]byte, 16)
			binary.LittleEndian.PutUint64(secret, entry.Key[0])
			binary.LittleEndian.PutUint64(secret[8:], entry.Key[1])
			found = keyEntry{valid: true, print: sha256.Sum256(secret), since: entry.Since, until: entry.Until}
			clear(secret)
		}
		if found != want {
			c.keys.entries[epoch] = keyEntry{valid: true} // equal to nothing: it is written anew
			all = append(all, incident{fmt.Sprintf("the tag key of epoch %d was changed", epoch), nil})
		}
	}
	if len(all) > 0 {
		all[0].problem = c.upkeepKeys()
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

// drift is the same of device links. Those that were detached are attached again by
// follow, which looks at the same time; here it is told.
func (b *boundary) drift() (all []incident) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.on {
		return nil
	}
	err := b.follow()
	for _, name := range b.taken {
		all = append(all, incident{fmt.Sprintf("link %s was detached", name), err})
	}
	b.taken = nil
	what := pinning{pins: b.pins}
	for _, h := range slices.SortedFunc(maps.Keys(b.open), func(x, y hook) int { return strings.Compare(x.String(), y.String()) }) {
		a := b.open[h]
		if info, err := a.Info(); err == nil && info.Program != a.program {
			err := a.Update(b.programs[h.program])
			if err == nil {
				err = b.note(h, a.Link)
			}
			all = append(all, incident{fmt.Sprintf("link %s ran program %d, which is not ours", b.label(h), info.Program), err})
		}
		what.look(b.pins.links(h.String()), a.Link)
	}
	return append(all, what.incidents()...)
}

// queryEffective asks for what runs at a cgroup, and not only for what is attached to
// it (BPF_F_QUERY_EFFECTIVE).
const queryEffective = 1

// watchOthers looks for programs of others at our hooks: on the managed root and
// above it, and on devices. They cannot let pass what ours refuse, but may refuse more
// or rewrite addresses; so they are a limit, and noted when they come and go. At a
// device one that runs first decides alone, which is a problem.
func (c *Core) watchOthers() {
	others, err := c.others()
	first, more := c.devices.others()
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

func (c *Core) others() (all []string, err error) {
	root, err := os.Open(c.tree.dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	for _, name := range attachOrder[namers:] {
		found, err := link.QueryPrograms(link.QueryOptions{
			Target: int(root.Fd()), Attach: c.objects.spec.Programs[name].AttachType, QueryFlags: queryEffective})
		if err != nil {
			return nil, fmt.Errorf("look for programs at %s: %w", name, err)
		}
		for _, p := range found.Programs {
			if p.ID != c.links.running[name] && !c.observers.owns(p.ID) {
				all = append(all, foreign(p.ID, name))
			}
		}
	}
	return all, nil
}

func foreign(id ebpf.ProgramID, place string) string {
	return fmt.Sprintf("program %d at %s is not ours (bpftool prog show id %d)", id, place, id)
}

// others lists other programs at guarded devices. The error is one that runs before
// ours.
func (b *boundary) others() (first error, all []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for h, a := range b.open {
		found, err := link.QueryPrograms(link.QueryOptions{Target: h.device, Attach: b.specs[h.program].AttachType})
		if err != nil { // the device may have gone just now
			continue
		}
		ours := false
		for _, p := range found.Programs {
			if p.ID == a.program {
				ours = true
				continue
			}
			all = append(all, foreign(p.ID, b.label(h)))
			if !ours {
				first = fmt.Errorf("program %d runs before ours at %s, and may let pass what it likes", p.ID, b.label(h))
			}
		}
	}
	slices.Sort(all)
	return first, all
}
