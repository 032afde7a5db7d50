package journal

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"github.com/demarc/demarc/agent/flow"
)

// flushWithin is how long a reader waits for what is not on disk yet. Without it there
// is a little more in the store to read, no gap.
const flushWithin = 2 * time.Second

// Read implements flow.History. What is missing is told where it is missing: what was
// lost before it was written with the block behind it, and what is damaged by the
// numbers of the blocks around it.
func (j *Journal) Read(ctx context.Context, since, until time.Time, take func(*flow.Flow) error, lose func(flow.Loss) error) (*flow.Cursor, error) {
	asked := make(chan struct{})
	wait, cancel := context.WithTimeout(ctx, flushWithin)
	defer cancel()
	select {
	case j.flush <- asked:
		select {
		case <-asked:
		case <-wait.Done():
		}
	case <-wait.Done():
	}
	j.mu.Lock()
	names, err := j.segments()
	live, size, next, all, done := j.name, j.size, j.next, j.ever, *j.done
	j.mu.Unlock()
	if err != nil {
		return nil, err
	}
	var expected uint64 // number of the next flow
	known := false      // whether it is
	var ever uint64     // flows that were missing before it
	counted := false    // whether that is known
	// What is missing tells with the flows behind it, if those are asked for.
	missing := func(n uint64) error {
		if n == 0 {
			return nil
		}
		return lose(flow.Loss{Journal: n})
	}
	for _, name := range names {
		limit := int64(-1)
		if name == live {
			limit = size
		}
		if !known {
			expected, known = number(name), true
		}
		err := j.blocks(name, limit, func(b *block) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			if b.Count == 0 || b.Index < expected || b.Index+uint64(b.Count) > next {
				return nil // places only, or of a journal that was here before
			}
			lost := b.Lost + b.Index - expected
			if counted && b.Ever >= ever {
				lost = b.Ever - ever + b.Index - expected
			}
			expected, ever, counted = b.Index+uint64(b.Count), b.Ever, true
			first, last := b.times()
			if !since.IsZero() && last.Before(since) || !until.IsZero() && first.After(until) {
				return nil
			}
			if err := missing(lost); err != nil {
				return err
			}
			taken := uint32(0)
			err := b.flows(func(f *flow.Flow) error { taken++; return take(f) })
			if errors.Is(err, errDamaged) { // though its checksum is right
				return missing(uint64(b.Count - min(taken, b.Count)))
			}
			return err
		})
		if errors.Is(err, fs.ErrNotExist) { // it was the oldest, and made room
			known, counted = false, false
			continue
		}
		if err != nil {
			return nil, err
		}
	}
	if known && expected < next {
		lost := next - expected
		if counted && all > ever {
			lost += all - ever
		}
		if err := missing(lost); err != nil {
			return nil, err
		}
	}
	return &done, nil
}
