package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
)

// request is one request for flows.
type request struct {
	filter *flow.Filter
	last   int // only the newest that match, of what is kept; -1 = all of it
	first  int // end after so many; 0 = do not
	follow bool
	since  time.Time // zero = no bound
	until  time.Time
}

// parseRequest reads the query parameters strictly: a misspelt filter must not
// show everything.
func parseRequest(v url.Values, now time.Time) (*request, error) {
	filter, err := flow.ParseFilter(v)
	if err != nil {
		return nil, badRequest("%s", err)
	}
	q := &request{filter: filter, last: -1}
	for name, values := range v {
		value := values[len(values)-1]
		switch name {
		case "last":
			q.last, err = count(value)
		case "first":
			q.first, err = count(value)
		case "follow":
			q.follow, err = strconv.ParseBool(value)
		case "since":
			q.since, err = moment(value, now)
		case "until":
			q.until, err = moment(value, now)
		default:
			return nil, badRequest("unknown parameter %q", name)
		}
		if err != nil {
			return nil, badRequest("%s: %q is no %s", name, value, kindOf(name))
		}
	}
	if q.last > 0 && q.first > 0 {
		return nil, badRequest("last and first exclude each other")
	}
	return q, nil
}

func badRequest(format string, args ...any) error {
	return &api.Error{Code: http.StatusBadRequest, Message: fmt.Sprintf(format, args...)}
}

func kindOf(parameter string) string {
	switch parameter {
	case "last", "first":
		return "count"
	case "follow":
		return "truth value"
	}
	return "time (RFC 3339) or duration"
}

func count(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	return int(n), err
}

// moment takes a time, or a duration before now.
func moment(s string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	return time.Parse(time.RFC3339Nano, s)
}

// flows streams flows as JSON lines.
func (s *service) flows(w http.ResponseWriter, r *http.Request) {
	q, err := parseRequest(r.URL.Query(), time.Now())
	if err != nil {
		refuse(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.WriteHeader(http.StatusOK)
	rc := http.NewResponseController(w)
	encoder := json.NewEncoder(w)
	out := stream{
		request:  q,
		resolver: s.resolver(),
		send:     func(l api.Line) error { return encoder.Encode(l) },
		flush: func() error {
			if err := rc.Flush(); err != nil {
				return err
			}
			return rc.SetWriteDeadline(time.Now().Add(writeTimeout))
		},
	}
	ctx := r.Context()
	if !q.until.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, q.until)
		defer cancel()
	}
	s.link.catchUp(ctx)
	_ = out.run(ctx, s.link.store) // the reader has gone
}

func (s *service) resolver() *flow.Resolver {
	return &flow.Resolver{
		Node: s.node, Book: s.link.book, Wall: s.link.clock.Wall,
		Cgroup: func(id uint64) string { return s.cgroups.Path(s.link.view().Root, id) },
	}
}

// stream sends what a request asks for. send and flush end it with an error.
type stream struct {
	*request
	resolver *flow.Resolver
	send     func(api.Line) error
	flush    func() error
	sent     int
}

// batch is how many events are taken off the store at a time.
const batch = 256

func (s *stream) run(ctx context.Context, store *flow.Store) error {
	if err := s.flush(); err != nil {
		return err
	}
	cursor := store.Oldest()
	var kept []flow.Flow
	lost := flow.Loss{}
	err := s.drain(cursor, func(f flow.Flow) error {
		if s.last < 0 {
			return s.flow(f)
		}
		if kept = append(kept, f); len(kept) > 2*s.last {
			kept = slices.Delete(kept, 0, len(kept)-s.last)
		}
		return nil
	}, func(l flow.Loss) error {
		lost.Kernel += l.Kernel
		lost.Agent += l.Agent
		return nil
	})
	if err != nil {
		return err
	}
	if err := s.loss(lost); err != nil {
		return err
	}
	if s.last >= 0 && len(kept) > s.last {
		kept = kept[len(kept)-s.last:]
	}
	for _, f := range kept {
		if err := s.flow(f); err != nil {
			return err
		}
	}
	if err := s.flush(); err != nil {
		return err
	}
	for s.follow && !s.done() && cursor.Wait(ctx) {
		if err := s.drain(cursor, s.flow, s.loss); err != nil {
			return err
		}
		if err := s.flush(); err != nil {
			return err
		}
	}
	return nil
}

// drain hands on everything in the store that the request selects.
func (s *stream) drain(c *flow.Cursor, take func(flow.Flow) error, lose func(flow.Loss) error) error {
	var events [batch]abi.Event
	for !s.done() {
		n, lost := c.Read(events[:])
		if lost.Total() > 0 {
			if err := lose(lost); err != nil {
				return err
			}
		}
		if n == 0 {
			return nil
		}
		for i := range events[:n] {
			f := s.resolver.Flow(&events[i])
			if s.selects(&f) && !s.done() {
				if err := take(f); err != nil {
					return err
				}
			}
		}
		// A reader of much history gets its time for each batch.
		if err := s.flush(); err != nil {
			return err
		}
	}
	return nil
}

func (s *stream) selects(f *flow.Flow) bool {
	return (s.since.IsZero() || !f.Time.Before(s.since)) && (s.until.IsZero() || !f.Time.After(s.until)) && s.filter.Match(f)
}

func (s *stream) done() bool { return s.first > 0 && s.sent >= s.first }

func (s *stream) flow(f flow.Flow) error {
	s.sent++
	return s.send(api.Line{Flow: &f})
}

func (s *stream) loss(l flow.Loss) error {
	if l.Total() == 0 {
		return nil
	}
	return s.send(api.Line{Lost: l.Total(), Where: &l})
}
