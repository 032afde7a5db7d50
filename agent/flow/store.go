package flow

import (
	"context"
	"sync"

	"github.com/demarc/demarc/bpf/abi/record"
)

// StoreSize is how many events of each ring a Store keeps by default.
const StoreSize = 65536

// Store keeps the last events of each ring in bounded memory. Each ring has its own
// room, so a flood of allowed flows pushes no denial out. Readers are cursors: the
// writer never waits for one, and a cursor that falls behind is told how many events
// it lost. Safe for concurrent use.
type Store struct {
	mu      sync.Mutex
	rings   [record.Rings]buffer
	changed chan struct{} // closed at the next change; nil while nobody waits
	closed  bool
}

// buffer is one ring's events; number n is at kept[n % len].
type buffer struct {
	kept   []record.Event
	next   uint64 // number of the next event; numbers count from 0
	missed uint64 // events that the kernel lost, ever
}

func (b *buffer) oldest() uint64 {
	if n := uint64(len(b.kept)); b.next > n {
		return b.next - n
	}
	return 0
}

// add keeps events; what there is no room for is pushed out, oldest first.
func (b *buffer) add(events []record.Event) {
	for len(events) > 0 {
		n := copy(b.kept[b.next%uint64(len(b.kept)):], events)
		b.next += uint64(n)
		events = events[n:]
	}
}

// read copies events from a number on, and returns how many there were.
func (b *buffer) read(from uint64, events []record.Event) (n int) {
	for n < len(events) && from != b.next {
		at := from % uint64(len(b.kept))
		end := min(uint64(len(b.kept)), at+b.next-from)
		copied := copy(events[n:], b.kept[at:end])
		n += copied
		from += uint64(copied)
	}
	return n
}

// NewStore makes a store for size events a ring.
func NewStore(size int) *Store {
	s := &Store{}
	for i := range s.rings {
		s.rings[i].kept = make([]record.Event, size)
	}
	return s
}

// Add keeps an event, and pushes out the ring's oldest one if there is no room.
func (s *Store) Add(ring int, e *record.Event) {
	s.mu.Lock()
	b := &s.rings[ring]
	b.kept[b.next%uint64(len(b.kept))] = *e
	b.next++
	s.wake()
	s.mu.Unlock()
}

// AddAll keeps events of one ring, in their order.
func (s *Store) AddAll(ring int, events []record.Event) {
	if len(events) == 0 {
		return
	}
	s.mu.Lock()
	s.rings[ring].add(events)
	s.wake()
	s.mu.Unlock()
}

// Missed notes events that never arrived; a negative number takes some back.
func (s *Store) Missed(ring int, n int64) {
	s.mu.Lock()
	s.rings[ring].missed += uint64(n)
	s.wake()
	s.mu.Unlock()
}

// Close ends all waiting cursors.
func (s *Store) Close() {
	s.mu.Lock()
	s.closed = true
	s.wake()
	s.mu.Unlock()
}

func (s *Store) wake() {
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// Counts of one ring since the store was made.
type Counts struct {
	Received uint64 `json:"received"` // events that arrived
	Missed   uint64 `json:"missed"`   // gaps in their numbers
}

// Counts returns the counts of every ring.
func (s *Store) Counts() [record.Rings]Counts {
	s.mu.Lock()
	defer s.mu.Unlock()
	var c [record.Rings]Counts
	for i, b := range s.rings {
		c[i] = Counts{Received: b.next, Missed: b.missed}
	}
	return c
}

// Kept returns how many events are kept, and for how many there is room.
func (s *Store) Kept() (kept, room uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.rings {
		b := &s.rings[i]
		kept += b.next - b.oldest()
		room += uint64(len(b.kept))
	}
	return kept, room
}

// Loss is what a cursor did not get to see.
type Loss struct {
	Kernel uint64 `json:"kernel,omitempty"` // found no room in a kernel ring
	Agent  uint64 `json:"agent,omitempty"`  // pushed out of the store before it was read
	// Journal counts what is missing on disk: whatever was lost before it got there,
	// and what is damaged.
	Journal uint64 `json:"journal,omitempty"`
}

// Total of all.
func (l Loss) Total() uint64 { return l.Kernel + l.Agent + l.Journal }

func (l *Loss) add(m Loss) {
	l.Kernel += m.Kernel
	l.Agent += m.Agent
	l.Journal += m.Journal
}

// Cursor reads a store from some place on. It belongs to one goroutine and needs
// no closing.
type Cursor struct {
	store  *Store
	at     [record.Rings]uint64
	missed [record.Rings]uint64
}

// Oldest returns a cursor at the oldest events that are still kept.
func (s *Store) Oldest() *Cursor { return s.cursor((*buffer).oldest) }

// Newest returns a cursor behind the newest events.
func (s *Store) Newest() *Cursor { return s.cursor(func(b *buffer) uint64 { return b.next }) }

func (s *Store) cursor(from func(*buffer) uint64) *Cursor {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := &Cursor{store: s}
	for i := range s.rings {
		c.at[i], c.missed[i] = from(&s.rings[i]), s.rings[i].missed
	}
	return c
}

// Read fills events with what is there, by time across the rings, and returns how
// many it wrote and what was lost before them. It does not wait; 0 events and no
// loss mean that nothing is new.
func (c *Cursor) Read(events []record.Event) (int, Loss) {
	s := c.store
	s.mu.Lock()
	defer s.mu.Unlock()
	var loss Loss
	for i := range s.rings {
		b := &s.rings[i]
		if first := b.oldest(); c.at[i] < first {
			loss.Agent += first - c.at[i]
			c.at[i] = first
		}
		// A late event takes a loss back; what was told stays told.
		if b.missed > c.missed[i] {
			loss.Kernel += b.missed - c.missed[i]
			c.missed[i] = b.missed
		}
	}
	ring, several := -1, false
	for i := range s.rings {
		if c.at[i] != s.rings[i].next {
			ring, several = i, ring >= 0
		}
	}
	if !several {
		if ring < 0 {
			return 0, loss
		}
		n := s.rings[ring].read(c.at[ring], events)
		c.at[ring] += uint64(n)
		return n, loss
	}
	n := 0
	for ; n < len(events); n++ {
		var first *record.Event
		ring := 0
		for i := range s.rings {
			b := &s.rings[i]
			if c.at[i] == b.next {
				continue
			}
			if e := &b.kept[c.at[i]%uint64(len(b.kept))]; first == nil || e.Time < first.Time {
				first, ring = e, i
			}
		}
		if first == nil {
			break
		}
		events[n] = *first
		c.at[ring]++
	}
	return n, loss
}

// already is closed.
var already = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// Changed is closed when something is new, or when the store is closed.
func (c *Cursor) Changed() <-chan struct{} {
	s := c.store
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.rings {
		if s.closed || c.at[i] != s.rings[i].next || c.missed[i] < s.rings[i].missed {
			return already
		}
	}
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return s.changed
}

// Closed says whether the store was closed: nothing more comes.
func (c *Cursor) Closed() bool {
	c.store.mu.Lock()
	defer c.store.mu.Unlock()
	return c.store.closed
}

// Wait returns when something is new, with false when ctx or the store ended.
func (c *Cursor) Wait(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-c.Changed():
	}
	return !c.Closed()
}
