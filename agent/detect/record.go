package detect

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"slices"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// DecodeRecord reads struct demarc_signal of bpf/abi/abi.h, in the byte order of the
// machine.
func DecodeRecord(b []byte, s *record.Signal) error {
	size := binary.Size(s)
	if len(b) < size {
		return fmt.Errorf("decode signal: %d bytes, want %d: %w", len(b), size, io.ErrUnexpectedEOF)
	}
	_, err := binary.Decode(b[:size], binary.NativeEndian, s)
	return err
}

// SignalOf says a record in words.
func SignalOf(r *flow.Resolver, s *record.Signal) *Signal {
	// The flow's words for its two ends are a signal's, too.
	f := r.Flow(&record.Event{
		Time: s.Time, Cgroup: s.Cgroup, PID: s.PID, Subject: s.Subject, Peer: s.Peer, Crossing: s.Crossing, Epoch: s.Epoch,
		Direction: s.Direction, Proof: s.Proof, Tuple: s.Tuple, Comm: s.Comm,
	})
	local, peer := f.Source, f.Destination
	if s.Direction == abi.Ingress {
		local, peer = peer, local
	}
	out := &Signal{
		Kind: SignalKind(s.Kind), Time: f.Time, Node: f.Node,
		PID: s.PID, StartTime: s.Start, Comm: f.Comm, Exe: flow.Escape(text(s.Exe[:])), Cgroup: local.Cgroup, UID: s.UID,
		Peer: peer, Protocol: f.Protocol, Crossing: f.Crossing,
		Hops: s.Hops, Origin: s.Origin, Cause: causeOf(s.Cause),
		Values: Values{Count: max(s.Count, 1), Bytes: s.Bytes, Back: s.Back, Received: s.Received, Answered: s.Answered, Length: uint32(s.Length), Labels: uint32(s.Labels)},
	}
	out.Local = flow.Endpoint{Address: local.Address, Port: local.Port}
	if s.Direction == abi.Ingress {
		out.Direction = s.Direction.String()
	}
	out.Identify(r, s.Epoch, s.Subject)
	if s.Origin != 0 {
		out.OriginWorkload, out.OriginZone, _ = r.Book.Workload(s.Epoch, s.Origin)
		if out.OriginWorkload == "" {
			out.OriginWorkload = flow.ReservedName(s.Origin)
		}
	}
	switch out.Kind {
	case Ports, Peers:
		out.Distinct, out.Window, out.Count = estimate(256, s.Distinct), record.SignalEpoch, 0
	case Contact, Failed, Edge:
		out.Window = record.SignalEpoch
	case DNS:
		out.Name, out.Exe = out.Exe, ""
		out.Count = uint64(estimate(nameBits, s.Distinct) - estimate(nameBits, s.Distinct-nameStep))
	case Relay:
		out.Parts, out.SSH = s.Parts, s.SSH != 0
		if int(s.Pairing) < len(pairings) {
			out.Between = pairings[s.Pairing]
		}
	case Migrate:
		out.Peer = flow.Endpoint{Identity: s.Peer}
		out.Peer.Workload, out.Peer.Zone, _ = r.Book.Workload(s.Epoch, s.Peer)
		out.Peer.Reserved = flow.ReservedName(s.Peer)
	}
	return out
}

// Identify names the subject as of an epoch.
func (s *Signal) Identify(r *flow.Resolver, epoch, id uint32) {
	s.Subject = id
	if s.Reserved = flow.ReservedName(id); s.Reserved == "unmanaged" {
		s.Zone = r.Book.UnmanagedZone(epoch)
	} else if s.Reserved == "" {
		s.Workload, s.Zone, _ = r.Book.Workload(epoch, id)
	}
}

// Long names are counted by a bitmap of so many bits, and told whenever so many more
// are set (bpf/payload.h).
const nameBits, nameStep = 128, 8

// estimate is how many distinct values most likely set so many bits of a bitmap (linear
// counting).
func estimate(bits, set uint16) uint32 {
	if set >= bits {
		return math.MaxUint16
	}
	return uint32(math.Round(-float64(bits) * math.Log(1-float64(set)/float64(bits))))
}

var pairings = [...]string{record.PairOpened: "opened", record.PairAccepted: "accepted"}

var causes = [...]string{record.CauseRefused: "refused", record.CauseTimeout: "timeout", record.CauseReset: "reset", record.CauseAbandoned: "abandoned", record.CauseUnreachable: "unreachable", record.CauseManager: "manager"}

// causeOf says why; a denial by its reason.
func causeOf(c uint8) string {
	switch {
	case int(c) < len(causes):
		return causes[c]
	case c >= record.CauseDenied:
		return "denied: " + abi.Reason(c-record.CauseDenied).String()
	}
	return fmt.Sprintf("cause(%d)", c)
}

// text is what stands before a NUL.
func text(b []byte) string {
	if i := slices.Index(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
