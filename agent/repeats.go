package agent

import (
	"encoding/binary"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// repeatsKept is how many different contacts are known to have just been looked at.
const repeatsKept = 4096

// repeatsWithin is for how long a contact that comes again is not looked at anew.
const repeatsWithin = time.Second

// repeats are the contacts that the detectors have just seen and need not see again so
// soon. Each has one place, which the next that falls there takes: then it is looked at
// more often than it needs to be. The zero value knows none.
type repeats struct{ of [repeatsKept]contact }

// contact is what tells one plain contact from another: all that detectors look at, but
// who within the workload made it.
type contact struct {
	source, destination            [16]byte
	cgroup                         uint64
	subject, peer, crossing, epoch uint32
	port                           uint16
	proto                          uint8
	hook                           record.Hook
	verdict                        abi.Verdict
	reason                         abi.Reason
	direction                      abi.Direction
	proof                          abi.Proof
	at                             uint64 // ns of CLOCK_BOOTTIME; 0 = the place is free
}

func contactOf(e *record.Event) contact {
	return contact{
		source: e.Tuple.Source, destination: e.Tuple.Destination, cgroup: e.Cgroup,
		subject: e.Subject, peer: e.Peer, crossing: e.Crossing, epoch: e.Epoch, port: e.Tuple.DestinationPort, proto: e.Tuple.Proto,
		hook: e.Hook, verdict: e.Verdict, reason: e.Reason, direction: e.Direction, proof: e.Proof,
	}
}

// place is where a contact belongs.
func (r *repeats) place(e *record.Event) *contact {
	n := binary.NativeEndian
	h := uint64(e.Subject)<<32 | uint64(e.Peer)
	for _, more := range [...]uint64{
		uint64(e.Crossing)<<32 | uint64(e.Tuple.DestinationPort)<<16 | uint64(e.Direction)<<8 | uint64(e.Verdict), e.Cgroup,
		n.Uint64(e.Tuple.Source[8:]), n.Uint64(e.Tuple.Destination[8:]),
	} {
		h = (h ^ h>>32 ^ more) * 0x9e3779b97f4a7c15
	}
	return &r.of[h>>32%repeatsKept]
}

// seen says whether the same was noted within repeatsWithin.
func (r *repeats) seen(e *record.Event) bool {
	c := r.place(e)
	if apart := int64(e.Time - c.at); c.at == 0 || apart >= int64(repeatsWithin) || apart <= -int64(repeatsWithin) {
		return false
	}
	now := contactOf(e)
	now.at = c.at
	return now == *c
}

// note remembers that an event was looked at.
func (r *repeats) note(e *record.Event) {
	c := r.place(e)
	*c = contactOf(e)
	c.at = e.Time
}
