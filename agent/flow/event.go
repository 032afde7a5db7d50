// Package flow is what the agent knows of conversations: kernel events decoded,
// named, kept for a while and handed to whoever follows them.
package flow

import (
	"encoding/binary"
	"fmt"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// EventSize is the length of struct demarc_event in bpf/abi/abi.h, with its
// trailing padding.
const EventSize = 120

// DecodeEvent reads struct demarc_event in the byte order of the machine that
// both the kernel and the agent run on. It allocates nothing.
func DecodeEvent(b []byte, e *record.Event) error {
	if len(b) < EventSize {
		return fmt.Errorf("decode event: %d bytes, want %d", len(b), EventSize)
	}
	b = b[:EventSize]
	n := binary.NativeEndian
	e.Time = n.Uint64(b[0:])
	e.Seq = n.Uint64(b[8:])
	e.Cgroup = n.Uint64(b[16:])
	e.CPU = n.Uint32(b[24:])
	e.PID = n.Uint32(b[28:])
	e.Subject = n.Uint32(b[32:])
	e.Peer = n.Uint32(b[36:])
	e.Crossing = n.Uint32(b[40:])
	e.Epoch = n.Uint32(b[44:])
	e.Kind = b[48]
	e.Hook = record.Hook(b[49])
	e.Verdict = abi.Verdict(b[50])
	e.Reason = abi.Reason(b[51])
	e.Direction = abi.Direction(b[52])
	e.Proof = abi.Proof(b[53])
	e.Slot = b[54]
	e.Tuple.Source = [16]byte(b[56:72])
	e.Tuple.Destination = [16]byte(b[72:88])
	e.Tuple.SourcePort = n.Uint16(b[88:])
	e.Tuple.DestinationPort = n.Uint16(b[90:])
	e.Tuple.Proto = b[92]
	e.Comm = [16]byte(b[96:112])
	return nil
}

// Gaps finds lost events by their sequence numbers, which run from 1 without a
// gap for each CPU of a ring. The zero value is ready. Not for concurrent use.
type Gaps struct {
	near []span          // of the CPUs with low numbers, which are looked at for each event
	far  map[uint32]span // of others
}

// span is what was seen of one CPU.
type span struct {
	first, last uint64
	seen        bool // the zero value is a CPU that nothing is known of
}

// nearCPUs bounds the list: a number may come from a file, too.
const nearCPUs = 1024

func (g *Gaps) set(cpu uint32, s span) {
	if cpu >= nearCPUs {
		if g.far == nil {
			g.far = make(map[uint32]span)
		}
		g.far[cpu] = s
		return
	}
	for int(cpu) >= len(g.near) {
		g.near = append(g.near, span{})
	}
	g.near[cpu] = s
}

// Resume sets that a CPU's events up to a number were seen before.
func (g *Gaps) Resume(cpu uint32, seq uint64) { g.set(cpu, span{first: seq, last: seq, seen: true}) }

// See takes the next event's CPU and number and returns how many events are now
// known to be lost: more than zero at a gap, -1 when an event that was counted as
// lost arrives after all (an interrupt on the same CPU may overtake), 0 otherwise.
// The first event of a CPU sets where counting starts.
func (g *Gaps) See(cpu uint32, seq uint64) int64 {
	if int(cpu) < len(g.near) {
		return g.near[cpu].see(seq)
	}
	s := g.far[cpu]
	lost := s.see(seq)
	g.set(cpu, s)
	return lost
}

func (s *span) see(seq uint64) int64 {
	switch {
	case !s.seen:
		*s = span{first: seq, last: seq, seen: true}
	case seq > s.last:
		lost := int64(seq - s.last - 1)
		s.last = seq
		return lost
	case seq > s.first && seq < s.last:
		return -1
	}
	return 0
}

// Ring is the ring that the kernel tells a verdict in: denials, and what would be one
// if the mode were not observe or if the policy in shadow were in force, have a ring of
// their own.
func Ring(v abi.Verdict) int {
	if v == abi.Deny || v == abi.Audit || v.OfShadow() {
		return record.RingDenied
	}
	return record.RingAllowed
}
