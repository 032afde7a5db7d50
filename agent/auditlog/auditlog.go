// Package auditlog reads the core's audit log and says whether anything in it was
// changed, taken out or cut off.
package auditlog

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"io"
	"time"

	"github.com/demarc/demarc/agent/core/audit"
)

// File is a piece of the log. Together they are whole, the oldest first.
type File struct {
	Name string
	io.Reader
}

// Summary is what an unbroken log holds.
type Summary struct {
	Records     int       `json:"records"`
	First       uint64    `json:"first"` // number of the first record that is kept
	Last        uint64    `json:"last"`
	From        time.Time `json:"from,omitzero"`
	To          time.Time `json:"to,omitzero"`
	EndIsProven bool      `json:"end_is_proven"` // the kernel knows the last record, so that none is cut off
}

// Broken says where a chain breaks. It is the first place; what comes after may have
// been written by anyone.
type Broken struct {
	Place string // FILE:LINE
	Why   string
}

func (b *Broken) Error() string { return b.Place + ": " + b.Why }

// Read gives each record to a function, in their order, and checks the chain up to
// the head; nil = where the log ends is not known. A *Broken says where it breaks.
func Read(files []File, head *audit.Head, each func(audit.Record)) (Summary, error) {
	c := chain{want: head, each: each}
	for _, f := range files {
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, audit.MaxLine)
		for c.place, c.line = f.Name, 1; lines.Scan(); c.line++ {
			if err := c.add(lines.Bytes()); err != nil {
				return c.sum, err
			}
		}
		if err := lines.Err(); err == bufio.ErrTooLong {
			return c.sum, c.broken("not an audit record: longer than %d bytes", audit.MaxLine)
		} else if err != nil {
			return c.sum, fmt.Errorf("read %s: %w", f.Name, err)
		}
	}
	return c.sum, c.end()
}

// chain is how far a log was followed.
type chain struct {
	want    *audit.Head
	each    func(audit.Record)
	sum     Summary
	at      audit.Head
	missing uint64 // records before the first that nobody has accounted for yet
	start   string // place of the first record
	place   string
	line    int
}

func (c *chain) broken(format string, args ...any) error {
	return &Broken{Place: fmt.Sprintf("%s:%d", c.place, c.line), Why: fmt.Sprintf(format, args...)}
}

func (c *chain) add(line []byte) error {
	r, head, err := audit.Parse(line)
	if err != nil {
		return c.broken("%v", err)
	}
	switch prev := hex.EncodeToString(c.at.Hash[:]); {
	case c.sum.Records == 0 && r.Seq > 1:
		c.missing = r.Seq - 1
	case r.Seq != c.at.Seq+1:
		return c.broken("record %d follows record %d", r.Seq, c.at.Seq)
	case r.Prev != prev:
		return c.broken("record %d does not follow the record before it: that one was changed", r.Seq)
	}
	if c.want != nil && c.want.Seq == r.Seq {
		if c.want.Hash != head.Hash {
			return c.broken("record %d is another one than was written", r.Seq)
		}
		c.sum.EndIsProven = true
	}
	if r.Removed == c.missing {
		c.missing = 0
	}
	if c.sum.Records == 0 {
		c.sum.First, c.sum.From, c.start = r.Seq, r.Time, fmt.Sprintf("%s:%d", c.place, c.line)
	}
	c.sum.Records++
	c.sum.Last, c.sum.To, c.at = r.Seq, r.Time, head
	c.each(r)
	return nil
}

func (c *chain) end() error {
	switch {
	case c.want != nil && c.sum.Last < c.want.Seq:
		return c.broken("the log ends with record %d, but record %d was written", c.sum.Last, c.want.Seq)
	case c.missing != 0:
		return &Broken{Place: c.start, Why: fmt.Sprintf("records 1 to %d are missing before it", c.missing)}
	}
	return nil
}
