package agent

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/ring"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/policy/image"
)

// kernel is what the agent reads of the kernel's state. donated is the real one; the
// reading methods may be used at the same time, but not during or after Close.
type kernel interface {
	// Next waits for the next record of a ring, record.RingSignals among them, and says whether more were there when it
	// came. It returns os.ErrClosed once the kernel is closed. One goroutine reads each
	// ring; the bytes hold until its next call.
	Next(ring int) (event []byte, more bool, err error)
	// Drained says whether every event made before this call was returned by Next,
	// and its reader asks for another.
	Drained() bool
	// RingID tells one ring from another that takes its place.
	RingID(ring int) uint64
	// Positions are the numbers of the last event that each CPU made in a ring, and
	// whether all of them were read.
	Positions(ring int) (last []uint64, read bool, err error)
	Counts() (map[abi.CountKey]uint64, error)
	Rings() ([record.AllRings]record.RingState, error)
	Faults() ([record.Faults]uint64, error)
	// Bindings returns the identity of every bound cgroup in the active generation.
	Bindings() (map[uint64]uint32, error)
	// Room says how many entries there may be.
	Room() room
	// Close ends the waiting readers; it may be called while they wait.
	Close() error
}

// room is how many entries maps have place for.
type room struct{ Counts, Bindings int }

// donated are the maps behind the descriptors that the core donated.
type donated struct {
	rings    [record.AllRings]*ring.Reader
	records  [record.AllRings][]byte        // owned by the ring's reader
	empty    [record.AllRings]bool          // nothing was left behind the last record; the reader's, too
	timers   [record.AllRings]*time.Timer   // of rests; the reader's, too
	hurry    [record.AllRings]chan struct{} // ends a rest
	waited   [record.AllRings]atomic.Uint64 // how often Next did
	waiting  [record.AllRings]atomic.Bool   // in Next
	ids      [record.AllRings]uint64
	counts   *ebpf.Map
	states   *ebpf.Map
	faults   *ebpf.Map
	bindings *ebpf.Map
	active   *ebpf.Map
}

// openMaps takes over the descriptors: it closes them, also when it fails.
func openMaps(d *proto.Descriptors) (_ kernel, err error) {
	defer d.Close()
	m := &donated{}
	for i := range m.hurry {
		m.hurry[i] = make(chan struct{}, 1)
	}
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	for i, f := range []*os.File{record.RingDenied: d.Denied, record.RingAllowed: d.Allowed, record.RingSignals: d.Signals} {
		if err := m.openRing(i, f); err != nil {
			return nil, fmt.Errorf("open %s ring: %w", ringNames[i], err)
		}
	}
	for _, o := range []struct {
		name string
		file *os.File
		kind ebpf.MapType
		to   **ebpf.Map
	}{
		{"counts", d.Counts, ebpf.PerCPUHash, &m.counts},
		{"ring states", d.Rings, ebpf.PerCPUArray, &m.states},
		{"faults", d.Faults, ebpf.PerCPUArray, &m.faults},
		{"bindings", d.Bindings, ebpf.Hash, &m.bindings},
		{"state", d.State, ebpf.Array, &m.active},
	} {
		if *o.to, err = openMap(o.file, o.kind); err != nil {
			return nil, fmt.Errorf("open %s: %w", o.name, err)
		}
	}
	return m, nil
}

func (m *donated) openRing(i int, f *os.File) error {
	buffer, err := openMap(f, ebpf.RingBuf)
	if err != nil {
		return err
	}
	defer buffer.Close()
	info, err := buffer.Info()
	if err != nil {
		return err
	}
	id, _ := info.ID() // 0 where the kernel tells none
	m.ids[i] = uint64(id)
	fd, err := unix.FcntlInt(uintptr(buffer.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("duplicate descriptor: %w", err)
	}
	m.rings[i], err = ring.Open(fd, buffer.MaxEntries())
	return err
}

var ringNames = [record.AllRings]string{record.RingDenied: "denied", record.RingAllowed: "allowed", record.RingSignals: "signals"}

func openMap(f *os.File, kind ebpf.MapType) (*ebpf.Map, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate descriptor: %w", err)
	}
	m, err := ebpf.NewMapFromFD(fd)
	if err != nil {
		return nil, err
	}
	if m.Type() != kind {
		m.Close()
		return nil, fmt.Errorf("the core sent a map of type %s, want %s", m.Type(), kind)
	}
	return m, nil
}

// rests are how long a ring that was read empty is left alone. An event that wakes its
// reader costs the packet that made it several microseconds; those that come
// meanwhile cost nothing more, and each time that the agent wakes takes the CPU from who
// works. The rings hold far more than comes in that time: the one for what was allowed,
// which alarms nobody, 600,000 events a second.
var rests = [record.AllRings]time.Duration{
	record.RingDenied: 25 * time.Millisecond, record.RingAllowed: longestRest, record.RingSignals: 25 * time.Millisecond,
}

const longestRest = 50 * time.Millisecond

func (m *donated) Next(ring int) ([]byte, bool, error) {
	if m.empty[ring] {
		m.rest(ring)
	}
	r := m.rings[ring]
	record, more, found, err := r.Take(m.records[ring])
	if !found && err == nil {
		m.waiting[ring].Store(true)
		record, more, err = r.Read(m.records[ring])
		m.waiting[ring].Store(false)
		m.waited[ring].Add(1)
	}
	m.empty[ring] = err == nil && !more
	if err == nil {
		m.records[ring] = record
	}
	return record, more, err
}

// rest returns after a time, or when somebody is in a hurry.
func (m *donated) rest(ring int) {
	t := m.timers[ring]
	if t == nil {
		t = time.NewTimer(rests[ring])
		m.timers[ring] = t
	} else {
		t.Reset(rests[ring])
	}
	select {
	case <-t.C:
	case <-m.hurry[ring]:
		t.Stop()
	}
}

// wake ends a ring's rest, or makes the next one none.
func (m *donated) wake(ring int) {
	select {
	case m.hurry[ring] <- struct{}{}:
	default:
	}
}

func (m *donated) Drained() bool {
	var before [record.AllRings]uint64
	all := true
	for i := range m.rings {
		before[i] = m.waited[i].Load()
		if !m.waiting[i].Load() || m.rings[i].Available() > 0 {
			m.wake(i)
			all = false
		}
	}
	if !all {
		return false
	}
	// What was just taken out is on its way through Next.
	time.Sleep(time.Millisecond)
	for i := range m.rings {
		if !m.waiting[i].Load() || m.waited[i].Load() != before[i] {
			return false
		}
	}
	return true
}

func (m *donated) RingID(ring int) uint64 { return m.ids[ring] }

// Counts sums the counters over the CPUs. Keys that come and go during the walk may
// restart it; a key is counted once all the same. What the core's canary tries, once a
// second and more, is no traffic of anybody and left out.
func (m *donated) Counts() (map[abi.CountKey]uint64, error) {
	counts := make(map[abi.CountKey]uint64)
	var key abi.CountKey
	var cpus []uint64
	walk := m.counts.Iterate()
	for walk.Next(&key, &cpus) {
		if key.Subject != uint32(image.Canary) {
			counts[key] = sum(cpus)
		}
	}
	if err := walk.Err(); err != nil {
		return nil, fmt.Errorf("read counts: %w", err)
	}
	return counts, nil
}

func (m *donated) Rings() (states [record.AllRings]record.RingState, err error) {
	for i := range states {
		var cpus []record.RingState
		if err := m.states.Lookup(uint32(i), &cpus); err != nil {
			return states, fmt.Errorf("read ring states: %w", err)
		}
		for _, s := range cpus {
			states[i].Seq += s.Seq
			states[i].Lost += s.Lost
		}
	}
	return states, nil
}

func (m *donated) Positions(ring int) (last []uint64, read bool, err error) {
	var cpus []record.RingState
	if err := m.states.Lookup(uint32(ring), &cpus); err != nil {
		return nil, false, fmt.Errorf("read ring states: %w", err)
	}
	for _, s := range cpus {
		last = append(last, s.Seq)
	}
	return last, m.rings[ring].Available() == 0, nil
}

func (m *donated) Faults() (faults [record.Faults]uint64, err error) {
	for i := range faults {
		var cpus []uint64
		if err := m.faults.Lookup(uint32(i), &cpus); err != nil {
			return faults, fmt.Errorf("read faults: %w", err)
		}
		faults[i] = sum(cpus)
	}
	return faults, nil
}

func (m *donated) Bindings() (map[uint64]uint32, error) {
	var state abi.State
	if err := m.active.Lookup(uint32(0), &state); err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	slot := abi.ActiveSlot(state.Active)
	if slot >= abi.Slots {
		return nil, fmt.Errorf("read state: slot %d of %d", slot, abi.Slots)
	}
	bound := make(map[uint64]uint32)
	var id uint64
	var b abi.Binding
	walk := m.bindings.Iterate()
	for walk.Next(&id, &b) {
		if b.Identity[slot] != uint32(image.Canary) { // the core's own
			bound[id] = b.Identity[slot]
		}
	}
	if err := walk.Err(); err != nil {
		return nil, fmt.Errorf("read bindings: %w", err)
	}
	return bound, nil
}

func (m *donated) Room() room {
	return room{Counts: int(m.counts.MaxEntries()), Bindings: int(m.bindings.MaxEntries())}
}

func (m *donated) Close() error {
	var errs []error
	for i, r := range m.rings {
		if r != nil {
			errs = append(errs, r.Close())
			m.wake(i)
		}
	}
	for _, o := range []*ebpf.Map{m.counts, m.states, m.faults, m.bindings, m.active} {
		errs = append(errs, o.Close())
	}
	return errors.Join(errs...)
}

func sum(cpus []uint64) (total uint64) {
	for _, n := range cpus {
		total += n
	}
	return total
}
