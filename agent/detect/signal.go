package detect

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/demarc/demarc/agent/flow"
)

// SignalKind is what the kernel saw. The zero value is no signal.
type SignalKind uint8

const (
	// Contact is the first attempt of an identity to reach an address and port in a
	// while (Window). Count is 1.
	Contact SignalKind = 1
	// Failed is a contact that came to nothing; Cause says how. What the policy
	// denied is told once for each address and port in a while, other failures too.
	Failed SignalKind = 2
	// Ports says that the distinct ports that an identity tried at one peer reached
	// a step: Distinct, about, within Window. Failures alone count.
	Ports SignalKind = 3
	// Peers says the same of distinct peers on one port.
	Peers SignalKind = 4
	// Edge is a contact that no crossing declares: it was denied, or would have been.
	Edge SignalKind = 5
	// Chain is a connection opened by a task that goes back to an accepted one: Hops
	// of them that this kernel knows of, the last from Origin.
	Chain SignalKind = 6
	// Relay is a process whose accepted and opened connections carried about the same,
	// in a few seconds: Received from who is relayed (Origin) and Answered to him, Bytes
	// sent on to Peer and Back from there, in so many segments (Parts, in this order). The
	// kernel tells it up to a difference of half. Between says what two connections of one
	// kind are joined, if it is not one that came in and one that went out: then the larger
	// one counts as that of who is relayed. SSH says that one of them is SSH.
	Relay SignalKind = 7
	// Raw is a raw or packet socket; Cause "refused" if it was not made.
	Raw SignalKind = 8
	// Tun is a process that holds a tun or tap device.
	Tun SignalKind = 9
	// Setns is a process that is in another network namespace than before.
	Setns SignalKind = 10
	// Migrate is a process that came into another identity's cgroup. Subject is the
	// identity that it left, Peer.Identity the new one. Cause "manager": a process of no
	// workload moved it.
	Migrate SignalKind = 11
	// Shell is a program that was started with a connection as its standard input,
	// output or error: Exe, and Peer the other end. It may be an interpreter or not.
	Shell SignalKind = 12
	// Metadata is an attempt to reach a cloud's metadata address.
	Metadata SignalKind = 13
	// Listen is a listener on a port that no crossing to its workload declares.
	Listen SignalKind = 14
	// Proof is a tag that did not hold: Cause is the reason of the denial, and
	// Peer.Claimed says that its identity is not to be believed.
	Proof SignalKind = 15
	// Transfer is a connection that ended after many bytes: Bytes from the opener,
	// Back to it.
	Transfer SignalKind = 16
	// DNS is a query for a name of more than 30 bytes, after Count of them, all different,
	// since the last: Name or its end, its Length and Labels. ICMP is a ping of Bytes,
	// more than ping sends by itself, after Count of them since the last.
	DNS  SignalKind = 17
	ICMP SignalKind = 18
	// Banner is a connection whose first bytes from here are SSH's. Peer is the server;
	// where the workload itself serves, that is this end.
	Banner SignalKind = 19
	// Decoy is a touch of a decoy crossing. Crossing names it.
	Decoy SignalKind = 20
	// Blind says that a source of signals cannot be had on this host: Cause.
	Blind SignalKind = 21
	// Lost says that Count signals were lost, of Subject if that is known: Cause.
	Lost SignalKind = 22

	signalKinds = 23
)

var signalNames = [signalKinds]string{
	"", "contact", "failed", "ports", "peers", "edge", "chain", "relay", "raw", "tun", "setns", "migrate", "shell",
	"metadata", "listen", "proof", "transfer", "dns", "icmp", "banner", "decoy", "blind", "lost",
}

func (k SignalKind) String() string {
	if int(k) < len(signalNames) && k != 0 {
		return signalNames[k]
	}
	return fmt.Sprintf("signal(%d)", int(k))
}

func (k SignalKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

func (k *SignalKind) UnmarshalText(b []byte) error {
	for i, name := range signalNames {
		if name != "" && name == string(b) {
			*k = SignalKind(i)
			return nil
		}
	}
	return fmt.Errorf("unknown signal %q", b)
}

// Signal is one thing that the kernel saw a task or a flow do, in words. Strings
// that come from the kernel hold no control characters. What is not known is zero.
type Signal struct {
	Kind SignalKind `json:"kind"`
	Time time.Time  `json:"time"`
	Node string     `json:"node,omitempty"`

	// Who did it. Direction is "ingress" where Subject is the one it was done to;
	// then the process is not known, and Peer is who did it.
	Subject   uint32 `json:"subject,omitempty"` // identity
	Workload  string `json:"workload,omitempty"`
	Zone      string `json:"zone,omitempty"`
	Reserved  string `json:"reserved,omitempty"` // unmanaged, kernel, pending
	Direction string `json:"direction,omitempty"`
	PID       uint32 `json:"pid,omitempty"`
	StartTime uint64 `json:"start,omitempty"` // of the process, ns of CLOCK_BOOTTIME
	Comm      string `json:"comm,omitempty"`
	Exe       string `json:"exe,omitempty"`
	Name      string `json:"name,omitempty"`   // DNS
	Cgroup    string `json:"cgroup,omitempty"` // path below the managed root
	UID       uint32 `json:"uid,omitempty"`

	// With whom. Networks are named only where no identity was proven.
	Peer     flow.Endpoint `json:"peer,omitzero"`
	Local    flow.Endpoint `json:"local,omitzero"`     // this end: address and port, as far as they are known
	Protocol string        `json:"protocol,omitempty"` // as in flow.Flow
	Crossing string        `json:"crossing,omitempty"`

	// Where it comes from.
	Hops           uint8  `json:"hops,omitempty"`
	Between        string `json:"between,omitempty"` // Relay: "opened", "accepted"
	SSH            bool   `json:"ssh,omitempty"`     // Relay
	Origin         uint32 `json:"origin,omitempty"`  // identity that opened the accepted connection; 0 = none, or not proven
	OriginWorkload string `json:"origin_workload,omitempty"`
	OriginZone     string `json:"origin_zone,omitempty"`

	Cause string `json:"cause,omitempty"` // Failed: "denied", "refused", "timeout", "reset", "abandoned"; others as above
	Values
}

// Values are a signal's numbers. Each kind says which it has.
type Values struct {
	Count    uint64        `json:"count,omitempty"`    // of the same since it was last told
	Distinct uint32        `json:"distinct,omitempty"` // about; a bitmap of 256 bits counts them
	Bytes    uint64        `json:"bytes,omitempty"`    // sent by the side that opened
	Back     uint64        `json:"back,omitempty"`     // received by it
	Received uint64        `json:"received,omitempty"` // from who is relayed
	Answered uint64        `json:"answered,omitempty"` // to who is relayed
	Parts    [4]uint32     `json:"parts,omitzero"`     // segments of Received, Answered, Bytes and Back
	Length   uint32        `json:"length,omitempty"`   // of a name
	Labels   uint32        `json:"labels,omitempty"`   // of a name
	Window   time.Duration `json:"window,omitempty"`   // that Count and Distinct are of
}

// Event is what detectors are given. Exactly one of its fields is set.
type Event struct {
	Flow   *flow.Flow `json:"flow,omitempty"`
	Signal *Signal    `json:"signal,omitempty"`
}

// Time is when it happened.
func (e Event) Time() time.Time {
	switch {
	case e.Flow != nil:
		return e.Flow.Time
	case e.Signal != nil:
		return e.Signal.Time
	}
	return time.Time{}
}

// kept is the event for longer than the detectors look at it: a flow's memory is used
// for the next one.
func (e *Event) kept() Event {
	if e.Flow == nil {
		return *e
	}
	f := *e.Flow
	return Event{Flow: &f}
}

// Source gives events in the order they were seen. Next waits for one; io.EOF ends
// a recorded source, and the context's error a live one. A flow holds until the next call.
type Source interface {
	Next(ctx context.Context) (Event, error)
}

// Recording reads events as JSON lines: {"flow": ...} or {"signal": ...}.
type Recording struct {
	decoder *json.Decoder
	line    int
}

// NewRecording reads from r, which the caller closes.
func NewRecording(r io.Reader) *Recording { return &Recording{decoder: json.NewDecoder(r)} }

// Next returns the next event, or io.EOF.
func (r *Recording) Next(ctx context.Context) (e Event, err error) {
	if err := ctx.Err(); err != nil {
		return e, err
	}
	r.line++
	if err := r.decoder.Decode(&e); err != nil {
		if errors.Is(err, io.EOF) {
			return e, io.EOF
		}
		return Event{}, fmt.Errorf("read event %d: %w", r.line, err)
	}
	if (e.Flow == nil) == (e.Signal == nil) {
		return Event{}, fmt.Errorf("read event %d: it is neither a flow nor a signal, or both", r.line)
	}
	return e, nil
}
