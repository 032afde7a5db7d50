package flow

import (
	"context"
	"slices"
	"time"

	"github.com/demarc/demarc/bpf/abi/record"
)

// Query is one question for flows, of those that are kept and, with Follow, of those
// that come.
type Query struct {
	Match  func(*Flow) bool // nil = all; it must not keep the flow
	Last   int              // only the newest that match, of what is kept; -1 = all of it
	First  int              // end after so many; 0 = do not
	Follow bool
	Since  time.Time // zero = no bound
	Until  time.Time
}

// Sink takes what a query finds. An error of any method ends the query.
type Sink interface {
	// Flow takes a flow, which it must not keep.
	Flow(*Flow) error
	// Lost takes a loss of flows at this place.
	Lost(Loss) error
	// Flush is called when there is nothing more to send just now, and between two
	// batches of what there is.
	Flush() error
}

// History is what was kept of flows before those in a store. It hands on the flows
// between two times (zero = no bound), oldest first, with what is missing among them,
// and returns a cursor at the first event that it does not hold.
type History interface {
	Read(ctx context.Context, since, until time.Time, take func(*Flow) error, lose func(Loss) error) (*Cursor, error)
}

// batch is how many events are taken off the store at a time.
const batch = 512

// Run answers a query from a store, and from a history, which may be nil, where the
// query asks for a time. It returns at the answer's end, or when ctx ends, or with the
// sink's or the history's error.
func (q *Query) Run(ctx context.Context, store *Store, history History, resolver *Resolver, sink Sink) error {
	if err := sink.Flush(); err != nil {
		return err
	}
	a := answer{Query: q, resolver: resolver, sink: sink, events: make([]record.Event, batch)}
	lost := Loss{}
	lose := func(l Loss) error {
		lost.add(l)
		return nil
	}
	cursor := store.Oldest()
	if history != nil && (!q.Since.IsZero() || !q.Until.IsZero()) {
		var err error
		if cursor, err = history.Read(ctx, q.Since, q.Until, a.kept, lose); err != nil {
			return err
		}
	}
	if err := a.drain(cursor, a.kept, lose); err != nil {
		return err
	}
	if err := a.lost(lost); err != nil {
		return err
	}
	if q.Last >= 0 && len(a.newest) > q.Last {
		a.newest = a.newest[len(a.newest)-q.Last:]
	}
	for i := range a.newest {
		if err := a.send(&a.newest[i]); err != nil {
			return err
		}
	}
	a.newest = nil
	if err := sink.Flush(); err != nil {
		return err
	}
	if !q.Until.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, q.Until)
		defer cancel()
	}
	for q.Follow && !a.done() && cursor.Wait(ctx) {
		if err := a.drain(cursor, a.send, a.lost); err != nil {
			return err
		}
		if err := sink.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// answer is a query while it is answered.
type answer struct {
	*Query
	resolver *Resolver
	sink     Sink
	sent     int
	newest   []Flow         // with Last: twice as many as asked for, at most
	events   []record.Event // used again for each batch
}

// kept takes a flow of those that there are already.
func (a *answer) kept(f *Flow) error {
	if !a.selects(f) || a.done() {
		return nil
	}
	if a.Last < 0 {
		return a.send(f)
	}
	if a.newest = append(a.newest, *f); len(a.newest) > 2*a.Last {
		a.newest = slices.Delete(a.newest, 0, len(a.newest)-a.Last)
	}
	return nil
}

// drain hands on everything in the store that the query selects.
func (a *answer) drain(c *Cursor, take func(*Flow) error, lose func(Loss) error) error {
	var f Flow
	for !a.done() {
		n, lost := c.Read(a.events)
		if lost.Total() > 0 {
			if err := lose(lost); err != nil {
				return err
			}
		}
		if n == 0 {
			return nil
		}
		for i := range n {
			a.resolver.Resolve(&a.events[i], &f)
			if a.selects(&f) && !a.done() {
				if err := take(&f); err != nil {
					return err
				}
			}
		}
		// A reader of much history gets its time for each batch.
		if err := a.sink.Flush(); err != nil {
			return err
		}
	}
	return nil
}

func (a *answer) selects(f *Flow) bool {
	return (a.Since.IsZero() || !f.Time.Before(a.Since)) && (a.Until.IsZero() || !f.Time.After(a.Until)) && (a.Match == nil || a.Match(f))
}

func (a *answer) done() bool { return a.First > 0 && a.sent >= a.First }

func (a *answer) send(f *Flow) error {
	a.sent++
	return a.sink.Flow(f)
}

func (a *answer) lost(l Loss) error {
	if l.Total() == 0 {
		return nil
	}
	return a.sink.Lost(l)
}
