package detect

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/demarc/demarc/agent/flow"
)

// maxLine bounds a line of a recording, in bytes.
const maxLine = 1 << 20

// Replay reads a recording: lines of Event, or of what `demarc flows -o json`
// prints. What such a line says was lost is skipped. An error names the line and
// ends it.
func Replay(r io.Reader) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		lines := bufio.NewScanner(r)
		lines.Buffer(make([]byte, 64<<10), maxLine)
		n := 0
		for lines.Scan() {
			n++
			line := bytes.TrimSpace(lines.Bytes())
			if len(line) == 0 {
				continue
			}
			e, ok, err := parseLine(line)
			if err != nil {
				yield(Event{}, fmt.Errorf("%d: %w", n, err))
				return
			}
			if ok && !yield(e, nil) {
				return
			}
		}
		if err := lines.Err(); err != nil {
			if errors.Is(err, bufio.ErrTooLong) {
				err = fmt.Errorf("a line of more than %d bytes", maxLine)
			}
			yield(Event{}, fmt.Errorf("%d: %w", n+1, err))
		}
	}
}

// parseLine reads one line; ok is false for one that says what was lost.
func parseLine(line []byte) (e Event, ok bool, err error) {
	var kind struct {
		Event
		Verdict *json.RawMessage `json:"verdict"`
		Lost    uint64           `json:"lost"`
	}
	if err := json.Unmarshal(line, &kind); err != nil {
		return e, false, fmt.Errorf("not an event: %w", err)
	}
	e = kind.Event
	switch {
	case e.Flow != nil && e.Signal != nil:
		return e, false, errors.New("both a flow and a signal")
	case e.Flow == nil && e.Signal == nil && kind.Verdict != nil:
		e.Flow = new(flow.Flow)
		if err := json.Unmarshal(line, e.Flow); err != nil {
			return Event{}, false, fmt.Errorf("not a flow: %w", err)
		}
	case e.Flow == nil && e.Signal == nil && kind.Lost > 0:
		return e, false, nil
	case e.Flow == nil && e.Signal == nil:
		return e, false, errors.New("neither a flow nor a signal")
	}
	if e.Time().IsZero() {
		return Event{}, false, errors.New("the event has no time")
	}
	return e, true, nil
}
