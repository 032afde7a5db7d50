// Package audit is the form of the core's audit log: lines of JSON, each of which
// holds the hash of the line before it and ends with its own.
package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// MaxLine bounds a line, in bytes.
const MaxLine = 8 << 10

// Record is one line. Its order is that of the log.
type Record struct {
	Seq     uint64    `json:"seq"` // grows by one, from 1
	Time    time.Time `json:"time"`
	What    string    `json:"what"`
	Who     string    `json:"who"` // "core", or the socket's peer
	Policy  string    `json:"policy,omitempty"`
	Version uint64    `json:"version,omitempty"`
	Digest  string    `json:"digest,omitempty"` // hex SHA-256 of the encoded image
	Detail  string    `json:"detail,omitempty"`
	Removed uint64    `json:"removed,omitempty"` // records up to this one are not kept any more
	Prev    string    `json:"prev"`              // hex hash of the line before; zeros in the first
}

// Head is where a log ends. The zero value is an empty one's.
type Head struct {
	Seq  uint64
	Hash [sha256.Size]byte
}

// The hash covers everything before this. Quotes in text are escaped, so it is
// nowhere else in a line.
const seal = `,"hash":"`

// Line is the record as the next line, and where the log ends with it. The record's
// Seq and Prev are those that follow.
func (h Head) Line(r Record) ([]byte, Head, error) {
	r.Seq, r.Prev = h.Seq+1, hex.EncodeToString(h.Hash[:])
	b, err := json.Marshal(r)
	if err != nil {
		return nil, h, err
	}
	b = b[:len(b)-1]
	sum := sha256.Sum256(b)
	b = append(b, seal+hex.EncodeToString(sum[:])+"\"}\n"...)
	if len(b) > MaxLine {
		return nil, h, fmt.Errorf("audit record of %d bytes, at most %d", len(b), MaxLine)
	}
	return b, Head{Seq: r.Seq, Hash: sum}, nil
}

// Parse reads a line, without the newline, and checks its own hash.
func Parse(line []byte) (r Record, h Head, err error) {
	at := bytes.LastIndex(line, []byte(seal))
	if at < 0 {
		return r, h, errors.New("not an audit record")
	}
	d := json.NewDecoder(bytes.NewReader(append(line[:at:at], '}')))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return r, h, fmt.Errorf("not an audit record: %w", err)
	}
	h = Head{Seq: r.Seq, Hash: sha256.Sum256(line[:at])}
	if string(line[at:]) != seal+hex.EncodeToString(h.Hash[:])+`"}` {
		return r, h, errors.New("its hash does not match its content")
	}
	return r, h, nil
}
