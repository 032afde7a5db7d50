package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/agent/hubble"
)

// parseRequest reads the query parameters strictly: a misspelt filter must not
// show everything.
func parseRequest(v url.Values, now time.Time) (*flow.Query, error) {
	filter, err := flow.ParseFilter(v)
	if err != nil {
		return nil, badRequest("%s", err)
	}
	q := &flow.Query{Match: filter.Match, Last: -1}
	for _, not := range []bool{false, true} {
		name := api.Expression
		if not {
			name = flow.Negated + name
		}
		holds, err := hubble.Expressions(v[name], not)
		if err != nil {
			return nil, badRequest("%s", err)
		}
		if before := q.Match; holds != nil {
			q.Match = func(f *flow.Flow) bool { return before(f) && holds(f) }
		}
		delete(v, name)
	}
	for name, values := range v {
		value := values[len(values)-1]
		switch name {
		case "last":
			q.Last, err = count(value)
		case "first":
			q.First, err = count(value)
		case "follow":
			q.Follow, err = strconv.ParseBool(value)
		case "since":
			q.Since, err = moment(value, now)
		case "until":
			q.Until, err = moment(value, now)
		default:
			return nil, badRequest("unknown parameter %q", name)
		}
		if err != nil {
			return nil, badRequest("%s: %q is no %s", name, value, kindOf(name))
		}
	}
	if q.Last > 0 && q.First > 0 {
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
	out := &lines{to: w, control: http.NewResponseController(w)}
	_ = s.Flows(r.Context(), q, out) // the reader has gone
}

// Flows answers a query from what this agent knows.
func (s *service) Flows(ctx context.Context, q *flow.Query, out flow.Sink) error {
	s.link.catchUp(ctx)
	var history flow.History
	if s.journal != nil {
		history = s.journal
	}
	return q.Run(ctx, s.link.store, history, s.resolver(), out)
}

func (s *service) resolver() *flow.Resolver {
	r := &flow.Resolver{
		Node: s.node, Book: s.link.book, Wall: s.link.clock.Wall,
		Cgroup: func(id uint64) string { return s.cgroups.Path(s.link.cgroupRoot(), id) },
	}
	if s.binder != nil {
		r.Container = s.binder.containers.Of
	}
	return r
}

// lines is a stream of JSON lines to one reader.
type lines struct {
	to      io.Writer
	control *http.ResponseController
	buffer  []byte
	json    flow.JSON
}

// fullBuffer is how much is written at a time, in bytes.
const fullBuffer = 64 << 10

func (l *lines) Flow(f *flow.Flow) error {
	l.buffer = append(l.json.Append(l.buffer, f), '\n')
	if len(l.buffer) < fullBuffer {
		return nil
	}
	return l.write()
}

func (l *lines) Lost(loss flow.Loss) error {
	b, err := json.Marshal(api.Line{Lost: loss.Total(), Where: &loss})
	if err != nil {
		return err
	}
	l.buffer = append(append(l.buffer, b...), '\n')
	return nil
}

// write gives a slow reader its time.
func (l *lines) write() error {
	if err := l.control.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err := l.to.Write(l.buffer)
	l.buffer = l.buffer[:0]
	return err
}

func (l *lines) Flush() error {
	if err := l.write(); err != nil {
		return err
	}
	return l.control.Flush()
}
