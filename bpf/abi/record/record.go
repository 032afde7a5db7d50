// Package record is what the kernel programs tell the agent, by rings and counters.
// abi.h says the same in C; a test compares the two. The core hands the rings on and
// reads none of it.
package record

import (
	"time"

	"github.com/demarc/demarc/bpf/abi"
)

// Hook is where a verdict was given.
type Hook uint8

const (
	HookSockCreate  Hook = 1
	HookConnect     Hook = 2
	HookSendmsg     Hook = 3
	HookBind        Hook = 4
	HookSockopt     Hook = 5
	HookEgress      Hook = 6
	HookIngress     Hook = 7
	HookEstablished Hook = 8
	HookDevice      Hook = 9
)

var hookNames = abi.Names{"", "sock_create", "connect", "sendmsg", "bind", "setsockopt", "egress", "ingress", "established", "device"}

func (h Hook) String() string                { return hookNames.Name("hook", int(h)) }
func (h Hook) MarshalText() ([]byte, error)  { return []byte(h.String()), nil }
func (h *Hook) UnmarshalText(b []byte) error { return abi.Unmarshal(hookNames, "hook", b, h) }

// Event is one record from a ring.
type Event struct {
	Time      uint64
	Seq       uint64
	Cgroup    uint64
	CPU       uint32
	PID       uint32
	Subject   uint32
	Peer      uint32
	Crossing  uint32
	Epoch     uint32
	Kind      uint8
	Hook      Hook
	Verdict   abi.Verdict
	Reason    abi.Reason
	Direction abi.Direction
	Proof     abi.Proof
	Slot      uint8
	_         uint8
	Tuple     abi.Tuple
	Comm      [16]byte
	_         uint32
}

// EventVerdict is the kind of an event that carries a verdict.
const EventVerdict = 1

// Signal is one record of the ring of signals. Kinds are those of agent/detect.
type Signal struct {
	Time      uint64
	Seq       uint64
	Cgroup    uint64
	Start     uint64 // of the process
	Count     uint64
	Bytes     uint64
	Back      uint64
	Received  uint64
	Answered  uint64
	CPU       uint32
	PID       uint32
	UID       uint32
	Subject   uint32
	Peer      uint32
	Origin    uint32
	Crossing  uint32
	Epoch     uint32
	Missed    uint32
	Parts     [4]uint32 // relay: segments with data, in the order of Received, Answered, Bytes, Back
	Distinct  uint16    // bits of 256 that are set
	Length    uint16
	Labels    uint16
	Kind      uint8
	Cause     uint8 // CauseRefused and its like, or CauseDenied + Reason
	Direction abi.Direction
	Proof     abi.Proof
	Hops      uint8
	Pairing   Pairing
	SSH       uint8 // relay: one of its connections is SSH
	_         [3]uint8
	Tuple     abi.Tuple
	Comm      [16]byte
	Exe       [48]byte
}

// Pairing is between what a relay hands on. Of two connections of one kind the larger one
// counts as the caller's.
type Pairing uint8

// What a relay is between: connections that it accepted and others that it opened, or
// two of one kind.
const (
	PairCallers  Pairing = 0
	PairOpened   Pairing = 1
	PairAccepted Pairing = 2
)

// Why a contact failed.
const (
	CauseRefused     = 1
	CauseTimeout     = 2
	CauseReset       = 3
	CauseAbandoned   = 4
	CauseUnreachable = 5
	CauseManager     = 6
	CauseDenied      = 64
)

// SignalEpoch is after what time the same contact is told again.
const SignalEpoch = 300 * time.Second

// SeenMax is for how many identities signals are remembered.
const SeenMax = 16384

// Rings of events.
const (
	RingDenied  = 0
	RingAllowed = 1
	Rings       = 2 // of events
	RingSignals = 2
	AllRings    = 3
)

// RingState counts a ring's events, lost ones too, and the lost ones.
type RingState struct {
	Seq  uint64
	Lost uint64
}

// Fault is something that went wrong inside the kernel programs.
type Fault uint32

const (
	FaultBindFull   Fault = 0
	FaultCountFull  Fault = 1
	FaultStorage    Fault = 2
	FaultFlow       Fault = 3
	FaultPending    Fault = 4
	FaultLimitRace  Fault = 5
	FaultPortFull   Fault = 6
	FaultReplayFull Fault = 7
	Faults                = 8
)

var faultNames = abi.Names{"binding-full", "counter-full", "socket-storage", "flow-full", "handshake-full", "limit-contended", "port-full", "replay-full"}

func (f Fault) String() string { return faultNames.Name("fault", int(f)) }
