// Package abi is what the kernel programs and Go agree on: every number, layout,
// byte order and unit that both sides read. abi.h says the same in C; a test
// compares the two field by field through BTF.
//
// Addresses are 16 bytes in network order, IPv4 as v4-mapped IPv6. Ports are in
// host order. Times are nanoseconds of CLOCK_BOOTTIME.
package abi

import (
	"fmt"
	"net/netip"
)

// Version of the layouts. Pinned maps of another version are not adopted.
const Version = 4

// Sizes shared with abi.h.
const (
	Slots            = 4
	Epochs           = 16
	Alternatives     = 4
	NoCrossing       = 0xffffffff // as an index
	TablesAlone      = 0xfffffffe // of a question: what the tables say, quarantined or not
	PathMax          = 252
	UnitSuffix       = 28
	UnitAlternatives = 4
	TagKind          = 253
	TagLength        = 16
	TagExID          = 0xD3AC
	TagSlotShift     = 36 // a SYN's tag is bound to Unix time in ns >> 36
	TagAnswer        = 1  // flag of a claim: on a SYN-ACK
)

// Verdict is what was decided. The zero value denies.
type Verdict uint8

const (
	Deny        Verdict = 0
	Allow       Verdict = 1
	Provisional Verdict = 2 // may open; decided when the peer's proof is known
	Audit       Verdict = 3 // would be denied, let pass by mode observe
	WouldDeny   Verdict = 4 // passes, and the generation in shadow denies it
	WouldAllow  Verdict = 5 // is denied, and the generation in shadow lets it pass
)

var verdictNames = Names{"deny", "allow", "provisional", "audit", "would-deny", "would-allow"}

// OfShadow says whether it is none of the policy in force, but what the one in shadow
// would have decided otherwise. Nothing came of it.
func (v Verdict) OfShadow() bool { return v == WouldDeny || v == WouldAllow }

func (v Verdict) String() string                { return verdictNames.Name("verdict", int(v)) }
func (v Verdict) MarshalText() ([]byte, error)  { return []byte(v.String()), nil }
func (v *Verdict) UnmarshalText(b []byte) error { return Unmarshal(verdictNames, "verdict", b, v) }

// Reason is why. It travels with every verdict; the zero value means that
// nothing was decided.
type Reason uint8

const (
	Undecided      Reason = 0
	ByCrossing     Reason = 1
	ByUnmanaged    Reason = 2
	ByReply        Reason = 3
	ByKernel       Reason = 4
	Unproven       Reason = 5
	NoCrossingFor  Reason = 6
	NotInWindow    Reason = 7
	OverLimit      Reason = 8
	TagMissing     Reason = 9
	TagMalformed   Reason = 10
	TagBadMAC      Reason = 11
	TagWrongEpoch  Reason = 12
	TagBadIdentity Reason = 13
	TagNoRoom      Reason = 14
	PendingSubject Reason = 15
	Unbound        Reason = 16
	TaskMismatch   Reason = 17
	RawSocket      Reason = 18
	Protocol       Reason = 19
	Malformed      Reason = 20
	Fragment       Reason = 21
	IPOptions      Reason = 22
	NoState        Reason = 23
	Revoked        Reason = 24
	UnprovenLimit  Reason = 25
	PortOwned      Reason = 26
	Spoof          Reason = 27
	Quarantined    Reason = 28
	NoPolicy       Reason = 29
	MapFull        Reason = 30
	TagStale       Reason = 31
	TagUnbound     Reason = 32
	TagReplayed    Reason = 33
	NoSocket       Reason = 34
	ICMPType       Reason = 35
	DecoyTouched   Reason = 36
	Reasons               = 37
)

var reasonNames = Names{
	"undecided", "crossing", "unmanaged", "reply", "kernel", "unproven", "no-crossing", "not-in-window", "over-limit",
	"tag-missing", "tag-malformed", "tag-bad-mac", "tag-wrong-epoch", "tag-bad-identity", "tag-no-room", "pending",
	"unbound", "task-mismatch", "raw-socket", "protocol", "malformed", "fragment", "ip-options", "no-state", "revoked",
	"unproven-limit", "port-owned", "spoof", "quarantined", "no-policy", "map-full", "tag-stale", "tag-unbound",
	"tag-replayed", "no-socket", "icmp-type", "decoy",
}

func (r Reason) String() string                { return reasonNames.Name("reason", int(r)) }
func (r Reason) MarshalText() ([]byte, error)  { return []byte(r.String()), nil }
func (r *Reason) UnmarshalText(b []byte) error { return Unmarshal(reasonNames, "reason", b, r) }

// Direction is the side of a flow that the subject is on.
type Direction uint8

const (
	Egress  Direction = 0
	Ingress Direction = 1
)

var directionNames = Names{"egress", "ingress"}

func (d Direction) String() string               { return directionNames.Name("direction", int(d)) }
func (d Direction) MarshalText() ([]byte, error) { return []byte(d.String()), nil }
func (d *Direction) UnmarshalText(b []byte) error {
	return Unmarshal(directionNames, "direction", b, d)
}

// Proof is what is known of the peer.
type Proof uint8

const (
	ProofNone     Proof = 0 // it proved nothing
	ProofIdentity Proof = 1 // it proved the identity that travels with this
	ProofBad      Proof = 2 // it tried and failed
	ProofUnknown  Proof = 3 // it was not asked yet: the flow is being opened
)

var proofNames = Names{"none", "identity", "bad", "unknown"}

func (p Proof) String() string                { return proofNames.Name("proof", int(p)) }
func (p Proof) MarshalText() ([]byte, error)  { return []byte(p.String()), nil }
func (p *Proof) UnmarshalText(b []byte) error { return Unmarshal(proofNames, "proof", b, p) }

// Names maps small numbers to the words users see, and back.
type Names []string

// Name is the word of a number, whose kind is told where it has none.
func (n Names) Name(kind string, i int) string {
	if i < len(n) && n[i] != "" {
		return n[i]
	}
	return fmt.Sprintf("%s(%d)", kind, i)
}

// Unmarshal finds the number of a word.
func Unmarshal[T ~uint8](n Names, kind string, text []byte, out *T) error {
	for i, name := range n {
		if name != "" && name == string(text) {
			*out = T(i)
			return nil
		}
	}
	return fmt.Errorf("unknown %s %q", kind, text)
}

// RuleKey, Rule: the rules map of one generation.
type RuleKey struct {
	Subject   uint32
	Peer      uint32
	Class     uint16
	Direction Direction
	_         uint8
}

type Rule struct{ Crossing [Alternatives]uint32 }

// Crossing is one crossing as the kernel needs it.
type Crossing struct {
	Number   uint32
	Need     uint8
	NAT      uint8
	Log      uint8
	Flags    uint8
	Since    uint64
	Until    uint64
	Interval uint64
	Slack    uint64
}

const (
	CrossingDecoy    = 1
	CrossingDrop     = 2
	CrossingForensic = 4
)

// Subject is what an image knows of an identity.
type Subject struct {
	Zone  uint16
	Flags uint16
}

const (
	SubjectOutbound = 1
	SubjectInbound  = 2
)

// SubjectMeets is the flag of a subject that has rules in a direction for peers of a
// kind, which is the upper byte of a rule's peer.
func SubjectMeets(d Direction, kind uint8) uint16 { return 1 << (3 + uint(d)*5 + uint(kind)) }

// Rows of port classes.
const (
	RowTCP   = 0
	RowUDP   = 1
	RowSCTP  = 2
	RowOther = 3 // ICMP types at 0, ICMPv6 types at 256, everything else at 512
	Rows     = 4
)

// PortClasses is one row.
type PortClasses struct{ Class [65536]uint16 }

// PrefixKey is a network trie key. The family comes first, so that ::/0 does not
// contain IPv4 addresses.
type PrefixKey struct {
	Length  uint32 // bits: 8 + that of the prefix, IPv4 96 more
	Family  uint8  // 4 or 6
	Address [16]byte
	_       [3]uint8
}

// PathKey is a selector trie key; Length in bits.
type PathKey struct {
	Length uint32
	Path   [PathMax]byte
}

// Unit lists what a unit name's prefix leads to.
type Unit struct{ Match [UnitAlternatives]UnitMatch }

// UnitMatch is one suffix and its identity; identity 0 ends the list. An exact
// name has an empty suffix.
type UnitMatch struct {
	Identity uint32
	Length   uint16 // bytes of Suffix
	Least    uint16 // bytes of the shortest name that matches
	Suffix   [UnitSuffix]byte
}

// Binding is a cgroup and who lives in it, one identity a slot.
type Binding struct {
	Identity [Slots]uint32
	Flags    uint32
	_        uint32
	Since    uint64
}

const (
	BindingSlices = 1
	BindingRoot   = 2
)

// State is what is in force.
type State struct {
	Active   uint64
	Filling  uint64
	TagEpoch uint64 // epoch whose key tags what we send
	Wall     uint64 // Unix time minus CLOCK_BOOTTIME, ns
	Fallback uint64 // takes the place of Active at Deadline; its epoch is the later one
	Deadline uint64 // CLOCK_BOOTTIME, ns; 0 = Active is confirmed

	Quarantines uint64 // entries of the map of that name

	Shadow   uint64 // word of the generation in shadow; 0 = none
	Shadowed uint64 // until when it is asked, CLOCK_BOOTTIME, ns
	Spared   uint64 // until when the last change kept what it would have cut, the same
}

// Floor is the highest version that was ever in force, and the SHA-256 of that image.
type Floor struct {
	Version uint64
	Digest  [32]byte
}

// InForce is the word that programs read at a time, ns of CLOCK_BOOTTIME.
func (s *State) InForce(now uint64) uint64 {
	if s.Deadline != 0 && now >= s.Deadline {
		return s.Fallback
	}
	return s.Active
}

// NextEpoch is one that no verdict was ever kept under.
func (s *State) NextEpoch() uint32 { return max(ActiveEpoch(s.Active), ActiveEpoch(s.Fallback)) + 1 }

const (
	ActiveOn        = 1
	ActiveObserve   = 2
	ActiveUnmanaged = 4
	ActiveDecoy     = 8
	ActiveShadow    = 16
)

// MakeActive joins slot, flags and epoch into the word that programs read.
func MakeActive(slot uint32, flags uint32, epoch uint32) uint64 {
	return uint64(slot)&0xff | uint64(flags&0xff)<<8 | uint64(epoch)<<32
}

// ActiveSlot, ActiveFlags, ActiveEpoch take it apart.
func ActiveSlot(w uint64) uint32  { return uint32(w & 0xff) }
func ActiveFlags(w uint64) uint32 { return uint32(w>>8) & 0xff }
func ActiveEpoch(w uint64) uint32 { return uint32(w >> 32) }

// Key is a tag key: SipHash key as two little-endian words.
type Key struct {
	Key   [2]uint64
	Since uint64
	Until uint64
	Valid uint32
	_     uint32
}

// LodgerBridge is the lodger of an entry that is no door itself: a bridge of several.
const LodgerBridge = 3

// Door is the host's end of a workload's veth.
type Door struct {
	Via    uint32 // index of the device that routes to it name
	Lodger uint32 // what was seen to live there
	Cgroup uint64 // of the workload that sent last
}

// Refusal is a caller that is to learn that it was refused.
type Refusal struct {
	Tuple Tuple
	Ack   uint32 // TCP: what the reset acknowledges
	_     uint32
}

// Tuple is a flow, opener first.
type Tuple struct {
	Source          [16]byte
	Destination     [16]byte
	SourcePort      uint16
	DestinationPort uint16
	Proto           uint8
	_               [3]uint8
}

// SourceAddr and DestinationAddr as addresses, IPv4 unmapped.
func (t Tuple) SourceAddr() netip.Addr      { return netip.AddrFrom16(t.Source).Unmap() }
func (t Tuple) DestinationAddr() netip.Addr { return netip.AddrFrom16(t.Destination).Unmap() }

// CountKey is what verdicts are counted by.
type CountKey struct {
	Subject   uint32
	Peer      uint32
	Crossing  uint32
	Direction Direction
	Verdict   Verdict
	Reason    Reason
	_         uint8
}

// Query is one question to the verdict function, and its answer.
type Query struct {
	Slot      uint32
	Subject   uint32
	Peer      uint32
	Port      uint16
	Proto     uint8
	Direction Direction
	Proof     Proof
	Bad       Reason
	Verdict   Verdict // out
	Reason    Reason  // out
	Crossing  uint32  // out: index; in: TablesAlone or anything
	Now       uint64
	Address   [16]byte
}

// Quarantines is how many identities may be quarantined at once.
const Quarantines = 256

// Questions is how many are asked at once.
const Questions = 4096

// Cut is a live connection that a change would cut.
type Cut struct {
	Tuple     Tuple  // this end first
	Cookie    uint64 // of the socket
	Subject   uint32
	Peer      uint32
	PID       uint32 // of a process that holds it
	Direction Direction
	Reason    Reason
	_         [2]uint8
	Comm      [16]byte
}

// Seal is what the self-test wants a tag for.
type Seal struct {
	Sender   Tuple
	Identity uint32
	Seq      uint32
	Acked    uint32
	Claim    uint32 // in: flags; out: the claim, 0 = there is no key or no clock
	MAC      uint64 // out
}
