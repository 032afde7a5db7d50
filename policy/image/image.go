// Package image is the compiled form of a boundary policy: flat, canonical,
// bounded, the same bytes on every node. It is what is signed, stored and
// loaded, and the only form of a policy that the trusted core ever reads.
//
// An Image holds everything a node needs and nothing it must trust: the tables
// the kernel looks verdicts up in (Rules, Ports, Addresses, Subjects), and the
// crossings they were derived from, so that Verify can check the tables against
// the declarations without the compiler.
package image

import (
	"net/netip"

	"github.com/demarc/demarc/policy/image/layout"
)

// Magic is what every encoded image starts with.
const Magic = layout.Magic

// Bounds of an image. They are also the sizes of the kernel's maps, so an image
// that keeps them always fits. A policy beyond them is a compile error.
const (
	MaxSize        = 256 << 20 // bytes of an encoded image
	MaxZones       = 1 << 10
	MaxWorkloads   = 1 << 16
	MaxNetworks    = 1 << 14
	MaxCrossings   = 1 << 20
	MaxRules       = 1 << 22
	MaxSelectors   = 1 << 17
	MaxPortClasses = 1 << 15
	MaxAddrClasses = 1 << 15
	MaxPrefixes    = 1 << 20
	MaxName        = 63  // bytes of a zone, workload, network or crossing name
	MaxText        = 512 // bytes of a purpose
	MaxPath        = 250 // bytes of a cgroup selector
	// MaxAlternatives bounds the crossings one Rule lists. More than one is needed
	// only where a crossing limited in time comes before another for the same
	// subject, peer and port class.
	MaxAlternatives = 4
	// MaxRate is the highest limit, in flows per hour: one every nanosecond. An
	// hour is the unit because it holds a whole number for /s, /m and /h alike.
	MaxRate = 3_600_000_000_000
	// MaxExpansion bounds the work of compiling and verifying: the combinations of
	// subject, peer, port class and crossing before they merge into rules, and the
	// memberships of address classes in networks.
	MaxExpansion = 1 << 24
)

// ID is a workload's number: 24 bits, from the SHA-256 of its SPIFFE ID. Zero is
// never valid.
type ID uint32

// Reserved identities. Policy compilation never hands these out.
const (
	None      ID = 0        // no identity; matches nothing
	Unmanaged ID = 1        // every local process that no workload selects
	Kernel    ID = 2        // sockets of the kernel itself
	Pending   ID = 3        // a workload whose metadata is not known yet: may do nothing
	Canary    ID = 4        // a socket of the core that shows that nobody's packets leave
	FirstID   ID = 16       // below are reserved
	MaxID     ID = 0xffffff // 24 bits
)

// Direction is the side of a flow that the subject is on.
type Direction uint8

const (
	Egress  Direction = 0 // the subject opens the flow
	Ingress Direction = 1 // the subject accepts the flow
)

// Proto is an IP protocol as the policy language names them. Its values are IANA
// protocol numbers.
type Proto uint8

const (
	Other Proto = 0 // every protocol not named below; its ports are all 0
	ICMP  Proto = 1
	TCP   Proto = 6
	UDP   Proto = 17
	ICMP6 Proto = 58
	SCTP  Proto = 132
)

// Port is a protocol with a port (TCP, UDP, SCTP), a type (ICMP, ICMP6), or zero
// (every other protocol).
type Port struct {
	Proto  Proto
	Number uint16 // host byte order
}

// Mode says what the kernel does with a denial.
type Mode uint8

const (
	Enforce Mode = 0 // drop it
	Observe Mode = 1 // let it pass, count and report it as an audit
)

// Need says who must prove an identity before a crossing admits a flow between
// workloads or zones.
type Need uint8

const (
	Required Need = 0 // each side proves itself
	Sender   Need = 1 // only the side that opens the flow does
	NoProof  Need = 2 // nobody: networks, unmanaged peers, any
)

// NAT says which addresses the tag of a crossing may leave out.
type NAT uint8

const (
	NATNone        NAT = 0
	NATSource      NAT = 1 // the tag covers only the destination
	NATDestination NAT = 2 // the tag covers only the source
)

// Side says at which end of a flow a crossing holds. Each end judges for itself, so
// a flow that one crossing admits at one end only needs another at the other end.
type Side uint8

const (
	BothSides   Side = 0
	EgressSide  Side = 1 // at the end that opens the flow
	IngressSide Side = 2 // at the end that accepts it
)

// HoldsAt says whether the side includes the end with that direction.
func (s Side) HoldsAt(d Direction) bool { return s == BothSides || s == EgressSide+Side(d) }

// Log says which flows of a crossing are reported.
type Log uint8

const (
	LogDenied Log = 0
	LogAll    Log = 1
	LogNone   Log = 2
)

// Refuse says how a refused caller learns of it.
type Refuse uint8

const (
	RefuseReject Refuse = 0
	RefuseDrop   Refuse = 1
)

// Image is one compiled policy. Slices are sorted as their element says; package encode
// writes exactly one byte sequence for one Image and Decode accepts no other.
type Image struct {
	Name        string // metadata.name
	Version     uint64 // metadata.version; the core refuses an older one
	TrustDomain string
	Digest      [32]byte // SHA-256 of the policy's source text
	NotAfter    int64    // Unix seconds after which the image must not be loaded; 0 = never
	Mode        Mode

	UnmanagedZone     uint16 // index into Zones
	UnmanagedOutbound bool   // unmanaged processes may open flows that no crossing declares
	UnmanagedInbound  bool   // unmanaged processes may accept flows that no crossing declares

	Zones     []Zone      // by name
	Workloads []Workload  // by name
	Networks  []Network   // by name
	Crossings []Crossing  // in the order of the policy, which decides between them
	Selectors []Selector  // by workload, then in the order of the policy
	Ports     []PortRange // by protocol, then Low; for each Proto above gapless from 0 to its last (65535, types 255, Other 0)
	Addresses []Prefix    // by address (16 bytes), then length
	Rules     []Rule      // by RuleKey
}

// Zone is a named trust zone. Trust 0 is the least trusted.
type Zone struct {
	Name  string
	Trust uint16
}

// Role is a declared purpose of a workload that detectors and containment heed.
type Role struct {
	Name  string // scanner, bastion, proxy, monitor, management
	Until int64  // Unix seconds; 0 = for ever
}

// Workload is one identity.
type Workload struct {
	Name  string
	ID    ID
	Zone  uint16 // index into Zones
	Roles []Role // by name
}

// Network is a named set of address blocks whose peers have no proven identity.
type Network struct {
	Name  string
	Zone  uint16         // index into Zones
	CIDRs []netip.Prefix // masked, sorted; IPv4 as IPv4
}

// Crossing is a declared flow.
type Crossing struct {
	Name   string
	Number uint32 // stable number of the name, for counters and events; never 0
	Line   uint32 // line in the policy's source, for explanations
	From   []Term // sorted
	To     []Term // sorted
	Ports  []Span // sorted, disjoint, not adjacent within one protocol
	Need   Need   // what terms that name workloads or zones must prove
	NAT    NAT
	Side   Side
	Log    Log
	Refuse Refuse
	Decoy  bool
	// Forensic crossings are what a quarantined workload keeps.
	Forensic bool
	Rate     uint64 // new flows per hour for each direction on each host, at most MaxRate; 0 = unlimited
	Burst    uint64 // flows that may come at once; >= 1 where Rate > 0
	Since    int64  // Unix seconds; 0 = always
	Until    int64  // Unix seconds, exclusive; 0 = for ever
	Purpose  string
}

// Span is an inclusive range of ports of one protocol.
type Span struct {
	Proto     Proto
	Low, High uint16
}

// TermKind is what one end of a crossing names.
type TermKind uint8

const (
	TermWorkload  TermKind = 1 // Index into Workloads
	TermZone      TermKind = 2 // Index into Zones
	TermNetwork   TermKind = 3 // Index into Networks
	TermUnmanaged TermKind = 4
	TermAny       TermKind = 5
)

// Term is one end of a crossing.
type Term struct {
	Kind  TermKind
	Index uint32
}

// SelectorKind is how processes are found.
type SelectorKind uint8

const (
	SelectCgroup     SelectorKind = 1 // Path: below the managed root, whole subtree
	SelectUnit       SelectorKind = 2 // Path: a systemd unit name, at most one '*'
	SelectKubernetes SelectorKind = 3
	SelectContainer  SelectorKind = 4
)

// Selector finds the processes of one workload.
type Selector struct {
	Workload       uint32 // index into Workloads
	Kind           SelectorKind
	Path           string  // SelectCgroup ("/lab/web", no trailing slash), SelectUnit
	Namespace      string  // SelectKubernetes; "" = not asked for
	ServiceAccount string  // SelectKubernetes
	Name           string  // SelectKubernetes (of the pod; then with its namespace), SelectContainer
	Image          string  // SelectContainer
	Labels         []Label // SelectKubernetes, SelectContainer; sorted by Key
}

// Label is one key and value that must be present.
type Label struct{ Key, Value string }

// PortRange gives each port of [Low, High] its class. Ports that no crossing
// tells apart share a class.
type PortRange struct {
	Span
	Class uint16
}

// Prefix gives the addresses below it, as far as no longer Prefix says otherwise,
// their class: the set of networks that contain them. Class 0 is no network, and
// then the Prefix is not listed.
type Prefix struct {
	Prefix netip.Prefix // IPv4 is kept as IPv4; the kernel map holds it as v4-mapped
	Class  uint16
}

// PeerKind is how a Rule names a peer.
type PeerKind uint8

const (
	PeerIdentity PeerKind = 1 // Value: ID (also Unmanaged)
	PeerZone     PeerKind = 2 // Value: index into Zones; a proven workload of that zone
	PeerAddress  PeerKind = 3 // Value: address class
	PeerAny      PeerKind = 4 // Value: 0
	// PeerProven stands for "somebody who can prove an identity": it lists the
	// crossings on this port class whose peer is a workload or a zone. It says
	// whether a SYN carries a tag, whether an unproven flow may open
	// provisionally, and whether a refused peer lacked only proof.
	PeerProven PeerKind = 5
)

// Peer is a kind and a value in one word: kind in the upper 8 bits, value in the
// lower 24.
type Peer uint32

// MakePeer joins a kind and its value.
func MakePeer(k PeerKind, v uint32) Peer { return Peer(uint32(k)<<24 | v&0xffffff) }

// Kind of the peer.
func (p Peer) Kind() PeerKind { return PeerKind(p >> 24) }

// Value of the peer.
func (p Peer) Value() uint32 { return uint32(p) & 0xffffff }

// RuleKey is what the kernel looks a verdict up by.
type RuleKey struct {
	Subject   ID // a workload's ID, or Unmanaged
	Peer      Peer
	Class     uint16 // port class
	Direction Direction
}

// Rule lists the crossings that admit a subject, a peer and a port class: at most
// MaxAlternatives indexes into Crossings, ascending. The first whose window is
// open decides; only the last may be without a window.
type Rule struct {
	RuleKey
	Crossings []uint32
}
