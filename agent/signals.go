package agent

import (
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/policy/image"
)

// eventBatch is how many of each are taken at a time.
const eventBatch = 256

// signalsKept bounds the signals that wait for their reader.
const signalsKept = 8192

// signalLog keeps the newest signals. A reader that falls behind is told how many it
// lost; the writer waits for nobody.
type signalLog struct {
	mu      sync.Mutex
	kept    []record.Signal // number n is at n % len
	next    uint64
	missed  uint64        // gaps in the kernel's numbers
	changed chan struct{} // closed at the next change; nil while nobody waits
	closed  bool
}

func newSignalLog() *signalLog { return &signalLog{kept: make([]record.Signal, signalsKept)} }

// change runs f with the log locked, and wakes who waits.
func (l *signalLog) change(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

func (l *signalLog) add(s *record.Signal) {
	l.change(func() {
		l.kept[l.next%signalsKept] = *s
		l.next++
	})
}

func (l *signalLog) counts() (received, missed uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.next, l.missed
}

// signalCursor reads a log from its place on. It belongs to one goroutine.
type signalCursor struct {
	log        *signalLog
	at, missed uint64
}

func (l *signalLog) newest() *signalCursor {
	l.mu.Lock()
	defer l.mu.Unlock()
	return &signalCursor{log: l, at: l.next, missed: l.missed}
}

// read returns at most n signals, and how many are missing before them: in the
// kernel's ring, and because the reader was too slow.
func (c *signalCursor) read(n int) (all []record.Signal, kernel, slow uint64) {
	l := c.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.missed > c.missed {
		kernel, c.missed = l.missed-c.missed, l.missed
	}
	if l.next > signalsKept && c.at < l.next-signalsKept {
		slow, c.at = l.next-signalsKept-c.at, l.next-signalsKept
	}
	for ; len(all) < n && c.at < l.next; c.at++ {
		all = append(all, l.kept[c.at%signalsKept])
	}
	return all, kernel, slow
}

// already is closed.
var already = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// change is closed when there is something new, or when the log is.
func (c *signalCursor) change() <-chan struct{} {
	l := c.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || c.at != l.next || l.missed > c.missed {
		return already
	}
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return l.changed
}

// closed says whether nothing more comes.
func (c *signalCursor) closed() bool {
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	return c.log.closed
}

// readSignals takes the ring of signals into the log until the kernel is closed.
func (l *link) readSignals(k kernel) error {
	var s record.Signal
	for {
		b, _, err := k.Next(record.RingSignals)
		if err == nil {
			err = detect.DecodeRecord(b, &s)
		}
		if err != nil {
			return fmt.Errorf("read signals ring: %w", err)
		}
		if n := l.gaps[record.RingSignals].See(s.CPU, s.Seq); n != 0 {
			l.signals.change(func() { l.signals.missed += uint64(n) })
		}
		l.signals.add(&s)
	}
}

// events is what detectors are given, live: flows and signals, by time as far as they
// are there. A flow that was plain, and comes again within a second, is left out.
type events struct {
	link     *link
	resolver *flow.Resolver
	flows    *flow.Cursor
	signals  *signalCursor
	queue    []detect.Event
	rest     []detect.Event  // of the queue
	blind    map[string]bool // told already

	plain   func(*flow.Flow) bool // nil = none is
	repeats repeats               // of plain flows

	read  [eventBatch]record.Event // used again for each batch,
	words [eventBatch]flow.Flow    // and what it says

	lookedFlows, lookedSignals atomic.Uint64 // of those received, how many were handed out and done with
}

// newEvents begins with what happens from now on.
func newEvents(l *link, r *flow.Resolver) *events {
	return &events{link: l, resolver: r, flows: l.store.Newest(), signals: l.signals.newest(), blind: map[string]bool{}}
}

// Next implements detect.Source. It ends with io.EOF when the agent does.
func (e *events) Next(ctx context.Context) (detect.Event, error) {
	for len(e.rest) == 0 {
		flows, signals := e.received()
		if e.fill() {
			continue
		}
		e.lookedFlows.Store(flows)
		e.lookedSignals.Store(signals)
		if !e.wait(ctx) {
			if err := ctx.Err(); err != nil {
				return detect.Event{}, err
			}
			return detect.Event{}, io.EOF
		}
	}
	next := e.rest[0]
	e.rest = e.rest[1:]
	return next, nil
}

// received counts what the kernel told so far.
func (e *events) received() (flows, signals uint64) {
	for _, c := range e.link.store.Counts() {
		flows += c.Received
	}
	signals, _ = e.link.signals.counts()
	return flows, signals
}

// drained says whether everything that was received has been handed out, and the
// reader came back for more. Anybody may ask.
func (e *events) drained() bool {
	flows, signals := e.received()
	return e.lookedFlows.Load() >= flows && e.lookedSignals.Load() >= signals
}

// wait returns when one of the two has something new, with false when ctx or one of them
// ended.
func (e *events) wait(ctx context.Context) bool {
	flows, signals := e.flows.Changed(), e.signals.change()
	select {
	case <-ctx.Done():
		return false
	case <-flows:
	case <-signals:
	}
	return !e.flows.Closed() && !e.signals.closed()
}

// forget has everything looked at anew, as by another policy.
func (e *events) forget() { e.repeats = repeats{} }

// fill queues what is there, and says whether anything was.
func (e *events) fill() bool {
	e.queue = e.queue[:0]
	e.tellBlind()
	n, lost := e.flows.Read(e.read[:])
	e.lose("flows: kernel ring", 0, lost.Kernel)
	e.lose("flows: the reader was too slow", 0, lost.Agent)
	for i := range e.read[:n] {
		if e.plain != nil && e.repeats.seen(&e.read[i]) {
			continue
		}
		f := &e.words[i]
		e.resolver.Resolve(&e.read[i], f)
		if e.plain != nil && e.plain(f) {
			e.repeats.note(&e.read[i])
		}
		e.queue = append(e.queue, detect.Event{Flow: f})
	}
	signals, kernel, slow := e.signals.read(eventBatch)
	e.lose("signals: kernel ring", 0, kernel)
	e.lose("signals: the reader was too slow", 0, slow)
	for i := range signals {
		s := detect.SignalOf(e.resolver, &signals[i])
		if s.Kind == detect.Listen && e.declares(&signals[i]) {
			continue
		}
		if signals[i].Missed > 0 {
			e.lose("signals: the identity's quota", signals[i].Subject, uint64(signals[i].Missed))
		}
		e.queue = append(e.queue, detect.Event{Signal: s})
	}
	slices.SortStableFunc(e.queue, func(a, b detect.Event) int { return a.Time().Compare(b.Time()) })
	e.rest = e.queue
	return n > 0 || len(signals) > 0 || len(e.queue) > 0
}

func (e *events) lose(where string, subject uint32, n uint64) {
	if n == 0 {
		return
	}
	s := &detect.Signal{Kind: detect.Lost, Time: time.Now().UTC(), Node: e.resolver.Node, Cause: where, Values: detect.Values{Count: n}}
	s.Identify(e.resolver, math.MaxUint32, subject)
	e.queue = append(e.queue, detect.Event{Signal: s})
}

// tellBlind says once what this host cannot see.
func (e *events) tellBlind() {
	st := e.link.view().Status
	if st == nil {
		return
	}
	for _, what := range blindness(st.Blind) {
		if !e.blind[what] {
			e.blind[what] = true
			e.queue = append(e.queue, detect.Event{Signal: &detect.Signal{Kind: detect.Blind, Time: time.Now().UTC(), Node: e.resolver.Node, Cause: what}})
		}
	}
}

// declares says whether some crossing leads to a listener's workload on its port.
func (e *events) declares(s *record.Signal) bool {
	names := e.link.view().Names
	if names == nil {
		return true // nothing is declared, and nothing is enforced
	}
	img := names.Image
	for i := range img.Crossings {
		c := &img.Crossings[i]
		if leadsTo(img, c.To, s.Subject) && slices.ContainsFunc(c.Ports, func(span image.Span) bool {
			return span.Proto == image.Proto(s.Tuple.Proto) && span.Low <= s.Tuple.DestinationPort && s.Tuple.DestinationPort <= span.High
		}) {
			return true
		}
	}
	return false
}

// leadsTo says whether a side of a crossing names a workload.
func leadsTo(img *image.Image, side []image.Term, id uint32) bool {
	return slices.ContainsFunc(side, func(t image.Term) bool {
		switch t.Kind {
		case image.TermAny:
			return true
		case image.TermUnmanaged:
			return image.ID(id) == image.Unmanaged
		case image.TermWorkload:
			return uint32(img.Workloads[t.Index].ID) == id
		case image.TermZone:
			return slices.ContainsFunc(img.Workloads, func(w image.Workload) bool { return uint32(w.ID) == id && uint32(w.Zone) == t.Index })
		}
		return false
	})
}

var _ detect.Source = (*events)(nil)
