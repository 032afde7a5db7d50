// Package policy is the boundary policy: its language, its meaning, and its
// compilation to an image.
//
// Parse decodes and Validate checks a document; Evaluate says what it means,
// slowly and obviously; Compile makes the image that the kernel enforces, which
// must agree with Evaluate on every question.
package policy

import (
	"net/netip"
	"time"

	"github.com/demarc/demarc/policy/image"
)

// Policy is a valid policy. Values of this type come from Parse only, and cannot
// hold a reference to something undeclared.
type Policy struct {
	File        string // where it was read from, for messages
	Source      []byte // the exact text; its SHA-256 is the policy's digest
	Name        string
	Version     uint64
	TrustDomain string
	Zones       []Zone     // by name
	Workloads   []Workload // by name
	Networks    []Network  // by name
	Crossings   []Crossing // in the order of the document
	Unmanaged   Unmanaged
	Mode        image.Mode
	NotAfter    time.Time // zero = never
	Assertions  []Assertion
}

// Pos is a place in the source; lines and columns count from 1.
type Pos struct{ Line, Column int }

// Zone is a named trust zone; trust 0 is the least trusted.
type Zone struct {
	Pos   Pos
	Name  string
	Trust uint16
}

// Workload is a named set of processes in one zone.
type Workload struct {
	Pos   Pos
	Name  string
	Zone  string
	Match []Selector
	Roles []Role
}

// Selector finds processes. Exactly the fields of its kind are set.
type Selector struct {
	Pos  Pos
	Kind image.SelectorKind

	Path           string // cgroup path or unit name
	Namespace      string
	ServiceAccount string
	Name           string
	Image          string
	Labels         map[string]string
}

// Role is a declared purpose that detectors and containment heed.
type Role struct {
	Pos   Pos
	Name  string    // scanner, bastion, proxy, monitor or management
	Until time.Time // zero = for ever
}

// Network is a named set of address blocks; its peers have no proven identity.
type Network struct {
	Pos   Pos
	Name  string
	Zone  string
	CIDRs []netip.Prefix // masked
}

// Crossing is a declared flow.
type Crossing struct {
	Pos    Pos
	Name   string
	From   []Term
	To     []Term
	Ports  []image.Span // as declared, icmp/echo already in both families
	Need   image.Need   // what terms naming workloads or zones must prove; see NeedFor
	NAT    image.NAT
	Side   image.Side // at which ends it holds
	Log    image.Log
	Refuse image.Refuse
	Decoy  bool
	// Forensic crossings are what a quarantined workload keeps.
	Forensic bool
	Rate     uint64 // new flows per hour, so that 1/m is exact; at most image.MaxRate; 0 = unlimited
	Burst    uint64
	Since    time.Time // zero = always
	Until    time.Time // zero = for ever; exclusive
	Purpose  string
	Waive    []Waiver
}

// Term is one end of a crossing.
type Term struct {
	Pos  Pos
	Kind image.TermKind
	Name string // of the workload, zone or network; "" for unmanaged and any
}

// Waiver accepts the breach of one trust rule, with a reason.
type Waiver struct {
	Pos    Pos
	Rule   string
	Reason string
}

// Unmanaged says what processes that no workload selects may do among themselves.
type Unmanaged struct {
	Pos      Pos
	Zone     string
	Outbound bool
	Inbound  bool
}

// Assertion is proved at compile time, or the policy is refused.
type Assertion struct {
	Pos   Pos
	Never bool // never: no such crossing; otherwise it must be allowed
	From  Term
	To    Term
	Port  *image.Port // nil = any port
	Hops  int         // never: paths of up to this many crossings; >= 1
}
