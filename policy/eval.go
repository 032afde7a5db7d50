package policy

import (
	"net/netip"
	"slices"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// Query is one question, Decision its answer; see policy/image.
type (
	Query    = image.Query
	Decision = image.Decision
)

// Evaluate answers a query from the policy as it is written. It is slow and
// obvious, shares nothing with the compiler, and defines what a policy means: the
// tables and the kernel must give the same answers.
func (p *Policy) Evaluate(q Query) Decision { return p.Evaluator().Evaluate(q) }

// Evaluator returns an evaluator for many queries. The policy must not change
// while it is used.
func (p *Policy) Evaluator() *Evaluator {
	e := &Evaluator{policy: p, workloads: map[image.ID]*Workload{}, networks: map[string]*Network{}}
	e.crossings = make([]int32, len(p.Crossings))
	for i := range e.crossings {
		e.crossings[i] = int32(i)
	}
	ids := p.IDs()
	for i := range p.Workloads {
		w := &p.Workloads[i]
		if id := ids[w.Name]; id != image.None {
			e.workloads[id] = w
		}
	}
	for i := range p.Networks {
		e.networks[p.Networks[i].Name] = &p.Networks[i]
	}
	return e
}

// Evaluator evaluates one policy.
type Evaluator struct {
	policy    *Policy
	workloads map[image.ID]*Workload
	networks  map[string]*Network

	// crossings are those that are looked at, in the order of the policy: all of them,
	// but for Check, which knows of the others that they cannot matter.
	crossings []int32
	// inside, where it is not nil, names the networks that contain the address of the
	// question: Check has found that out once for all questions.
	inside map[string]bool
}

// Evaluate answers a query. The rules apply in the order they stand here.
func (e *Evaluator) Evaluate(q Query) Decision {
	// A bad proof is denied, whatever else holds.
	if q.Proof == abi.ProofBad {
		return deny(q.Bad)
	}

	// So is everything for a subject that nobody knows, or not yet.
	if q.Subject == image.Pending {
		return deny(abi.PendingSubject)
	}
	if e.workloads[q.Subject] == nil && q.Subject != image.Unmanaged {
		return deny(abi.Unbound)
	}

	d := e.declared(q)
	// What a decoy decides is denied: it is there to be touched, not to let through.
	if d.Verdict == abi.Allow && d.Crossing >= 0 && e.policy.Crossings[d.Crossing].Decoy {
		d.Verdict, d.Reason = abi.Deny, abi.DecoyTouched
	}
	// A quarantined subject has only its forensic crossings: what another one
	// decides, or none, is denied.
	if q.Quarantined && (d.Crossing < 0 || !e.policy.Crossings[d.Crossing].Forensic) {
		return deny(abi.Quarantined)
	}
	return d
}

// declared answers for a subject that is known and not quarantined.
func (e *Evaluator) declared(q Query) Decision {
	// Allowed by the first crossing that has the subject on this side, the port,
	// and the peer on the other, in its window.
	admits := func(c *Crossing) bool { return e.admits(peerSide(c, q), q) }
	i, closed := e.first(q, admits)
	if i >= 0 {
		return Decision{Verdict: abi.Allow, Reason: abi.ByCrossing, Crossing: i}
	}

	// Before the answer the caller knows no proof. It may begin if a proof could
	// still make a crossing match.
	if q.Proof == abi.ProofUnknown && q.Direction == abi.Egress {
		couldAdmit := func(c *Crossing) bool {
			return provable(peerSide(c, q)) || names(peerSide(c, q), image.TermUnmanaged)
		}
		i, passed := e.first(q, couldAdmit)
		if i >= 0 {
			return Decision{Verdict: abi.Provisional, Reason: abi.Unproven, Crossing: i}
		}
		closed = closed || passed
	}

	// Unmanaged processes may do among themselves what the policy says. Toward a
	// workload that is not enough: its own side needs a crossing.
	if q.Subject == image.Unmanaged && e.unmanagedMay(q.Direction) {
		return Decision{Verdict: abi.Allow, Reason: abi.ByUnmanaged, Crossing: -1}
	}

	// Denied; the rest only says why.
	if closed {
		return deny(abi.NotInWindow)
	}
	if q.Proof == abi.ProofNone {
		if i, _ := e.first(q, func(c *Crossing) bool { return provable(peerSide(c, q)) }); i >= 0 {
			return deny(abi.TagMissing)
		}
	}
	return deny(abi.NoCrossingFor)
}

// first finds the first crossing, in the order of the policy, that holds at this
// end, has the subject on its side, covers the port, is accepted by also, and is in its
// window; -1 if there is none. It also says whether one was passed over only
// because of its window.
func (e *Evaluator) first(q Query, also func(*Crossing) bool) (index int, closed bool) {
	for _, i := range e.crossings {
		c := &e.policy.Crossings[i]
		if !c.Side.HoldsAt(image.Direction(q.Direction)) || !e.has(subjectSide(c, q), q.Subject) || !covers(c.Ports, q.Port) || !also(c) {
			continue
		}
		if !c.open(q.Now) {
			closed = true
			continue
		}
		return int(i), closed
	}
	return -1, closed
}

// has says whether a side names the identity of a local process. A network never
// does: no process is recognised by its address.
func (e *Evaluator) has(side []Term, id image.ID) bool {
	w := e.workloads[id]
	for _, t := range side {
		switch t.Kind {
		case image.TermWorkload:
			if w != nil && w.Name == t.Name {
				return true
			}
		case image.TermZone:
			if w != nil && w.Zone == t.Name {
				return true
			}
		case image.TermUnmanaged:
			if id == image.Unmanaged {
				return true
			}
		case image.TermAny:
			return true
		}
	}
	return false
}

// admits says whether a side names the peer: by the identity it proved, or by
// being in a network whatever it proved, or by naming anybody.
func (e *Evaluator) admits(side []Term, q Query) bool {
	if q.Proof == abi.ProofIdentity && e.has(side, q.Peer) {
		return true
	}
	for _, t := range side {
		switch t.Kind {
		case image.TermNetwork:
			if e.inside != nil && e.inside[t.Name] || e.inside == nil && e.networks[t.Name].contains(q.Address) {
				return true
			}
		case image.TermAny:
			return true
		}
	}
	return false
}

func (n *Network) contains(address netip.Addr) bool {
	address = address.Unmap().WithZone("")
	for _, block := range n.CIDRs {
		if block.Contains(address) {
			return true
		}
	}
	return false
}

func (e *Evaluator) unmanagedMay(d abi.Direction) bool {
	if d == abi.Egress {
		return e.policy.Unmanaged.Outbound
	}
	return e.policy.Unmanaged.Inbound
}

// open says whether now is in the crossing's window.
func (c *Crossing) open(now time.Time) bool {
	return !now.Before(c.Since) && (c.Until.IsZero() || now.Before(c.Until))
}

// subjectSide is where the subject of a query must stand, peerSide the other.
func subjectSide(c *Crossing, q Query) []Term {
	if q.Direction == abi.Egress {
		return c.From
	}
	return c.To
}

func peerSide(c *Crossing, q Query) []Term {
	if q.Direction == abi.Egress {
		return c.To
	}
	return c.From
}

// covers says whether one of the spans holds the port. A protocol that the
// language does not name is Other, without ports.
func covers(spans []image.Span, p image.Port) bool {
	if _, named := p.Proto.Last(); !named {
		p = image.Port{Proto: image.Other}
	}
	return slices.ContainsFunc(spans, func(s image.Span) bool {
		return s.Proto == p.Proto && s.Low <= p.Number && p.Number <= s.High
	})
}

// provable says whether a side names somebody who can prove an identity.
func provable(side []Term) bool {
	return names(side, image.TermWorkload) || names(side, image.TermZone)
}

func names(side []Term, kind image.TermKind) bool {
	return slices.ContainsFunc(side, func(t Term) bool { return t.Kind == kind })
}

func deny(r abi.Reason) Decision {
	return Decision{Verdict: abi.Deny, Reason: r, Crossing: -1}
}
