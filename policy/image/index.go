package image

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/demarc/demarc/bpf/abi"
)

// Query is one question: may the subject open (egress) or accept (ingress) a flow
// on this port with this peer?
type Query struct {
	Subject   ID
	Direction abi.Direction
	Port      Port
	Address   netip.Addr // of the peer; the zero Addr is in no network
	Proof     abi.Proof  // what is known of the peer
	Peer      ID         // its identity, with abi.ProofIdentity
	Bad       abi.Reason // what was wrong, with abi.ProofBad
	Now       time.Time

	Quarantined bool // the subject is, now
}

// Decision is a verdict, its reason, and the index of the crossing behind it.
type Decision struct {
	Verdict  abi.Verdict
	Reason   abi.Reason
	Crossing int // index in document order; -1 = none
}

// Index answers queries from the tables of an image, as the kernel does: a port
// class, an address class, and a few exact look-ups.
type Index struct {
	img    *Image
	zones  map[ID]uint16
	rules  map[ID][]Rule // by subject, in the order of the image
	blocks map[netip.Prefix]uint16
	long   [129]bool // lengths that blocks have
}

// Index makes the look-up tables of a verified image. It keeps the image.
func (img *Image) Index() *Index {
	x := &Index{
		img:    img,
		zones:  make(map[ID]uint16, len(img.Workloads)),
		rules:  make(map[ID][]Rule, len(img.Workloads)),
		blocks: make(map[netip.Prefix]uint16, len(img.Addresses)),
	}
	for i := range img.Workloads {
		x.zones[img.Workloads[i].ID] = img.Workloads[i].Zone
	}
	for rest := img.Rules; len(rest) > 0; {
		n, subject := 1, rest[0].Subject
		for n < len(rest) && rest[n].Subject == subject {
			n++
		}
		x.rules[subject], rest = rest[:n], rest[n:]
	}
	for _, p := range img.Addresses {
		x.blocks[p.Prefix] = p.Class
		x.long[p.Prefix.Bits()] = true
	}
	return x
}

// Decide answers a query.
func (x *Index) Decide(q Query) Decision {
	if q.Proof == abi.ProofBad {
		return refuse(q.Bad)
	}
	if q.Subject == Pending {
		return refuse(abi.PendingSubject)
	}
	if _, known := x.zones[q.Subject]; !known && q.Subject != Unmanaged {
		return refuse(abi.Unbound)
	}

	d := x.declared(q)
	if d.Verdict == abi.Allow && d.Crossing >= 0 && x.img.Crossings[d.Crossing].Decoy {
		d.Verdict, d.Reason = abi.Deny, abi.DecoyTouched
	}
	if q.Quarantined && (d.Crossing < 0 || !x.img.Crossings[d.Crossing].Forensic) {
		return refuse(abi.Quarantined)
	}
	return d
}

// declared answers for a subject that is known and not quarantined.
func (x *Index) declared(q Query) Decision {
	best := alternatives{img: x.img, now: q.Now.Unix(), crossing: -1}
	class, known := x.portClass(q.Port)
	if !known {
		return x.undeclared(q, best)
	}
	rules := x.rules[q.Subject]
	rule := func(k PeerKind, v uint32) []uint32 {
		i, found := slices.BinarySearchFunc(rules, RuleKey{q.Subject, MakePeer(k, v), class, Direction(q.Direction)},
			func(r Rule, key RuleKey) int { return r.Compare(key) })
		if !found {
			return nil
		}
		return rules[i].Crossings
	}

	best.add(rule(PeerAny, 0))
	best.add(rule(PeerAddress, uint32(x.AddressClass(q.Address))))
	if q.Proof == abi.ProofIdentity && q.Peer <= MaxID {
		best.add(rule(PeerIdentity, uint32(q.Peer)))
		if zone, known := x.zones[q.Peer]; known {
			best.add(rule(PeerZone, uint32(zone)))
		}
	}
	if best.crossing >= 0 {
		return Decision{abi.Allow, abi.ByCrossing, best.crossing}
	}
	if q.Proof == abi.ProofUnknown && q.Direction == abi.Egress {
		best.add(rule(PeerProven, 0))
		best.add(rule(PeerIdentity, uint32(Unmanaged)))
		if best.crossing >= 0 {
			return Decision{abi.Provisional, abi.Unproven, best.crossing}
		}
	}
	if d := x.undeclared(q, best); d.Reason != abi.NoCrossingFor || q.Proof != abi.ProofNone {
		return d
	}
	if best.add(rule(PeerProven, 0)); best.crossing >= 0 {
		return refuse(abi.TagMissing)
	}
	return refuse(abi.NoCrossingFor)
}

// undeclared decides what no open crossing admits.
func (x *Index) undeclared(q Query, seen alternatives) Decision {
	switch {
	case q.Subject == Unmanaged && q.Direction == abi.Egress && x.img.UnmanagedOutbound,
		q.Subject == Unmanaged && q.Direction == abi.Ingress && x.img.UnmanagedInbound:
		return Decision{abi.Allow, abi.ByUnmanaged, -1}
	case seen.closed:
		return refuse(abi.NotInWindow)
	}
	return refuse(abi.NoCrossingFor)
}

func refuse(r abi.Reason) Decision { return Decision{abi.Deny, r, -1} }

// alternatives finds the first crossing, in the order of the policy, whose window
// is open.
type alternatives struct {
	img      *Image
	now      int64 // Unix seconds
	crossing int   // -1 = none yet
	closed   bool  // a crossing was passed over because of its window
}

func (a *alternatives) add(crossings []uint32) {
	for _, i := range crossings {
		c := &a.img.Crossings[i]
		if c.Since != 0 && a.now < c.Since || c.Until != 0 && a.now >= c.Until {
			a.closed = true
			continue
		}
		if a.crossing < 0 || int(i) < a.crossing {
			a.crossing = int(i)
		}
		return
	}
}

// portClass finds the class of a port. It reports false for a number that the
// protocol does not have; no crossing covers that.
func (x *Index) portClass(p Port) (uint16, bool) {
	if _, named := p.Proto.Last(); !named {
		p = Port{Proto: Other}
	}
	i, _ := slices.BinarySearchFunc(x.img.Ports, p, func(r PortRange, p Port) int {
		return cmp.Or(cmp.Compare(r.Proto, p.Proto), cmp.Compare(r.High, p.Number))
	})
	if i == len(x.img.Ports) || x.img.Ports[i].Proto != p.Proto || x.img.Ports[i].Low > p.Number {
		return 0, false
	}
	return x.img.Ports[i].Class, true
}

// AddressClass is the class of the longest listed prefix that contains the
// address; 0 = none. A v4-mapped address is IPv4.
func (x *Index) AddressClass(a netip.Addr) uint16 {
	a = a.Unmap().WithZone("")
	for length := a.BitLen(); length >= 0; length-- {
		if !x.long[length] {
			continue
		}
		p, err := a.Prefix(length)
		if err != nil {
			return 0
		}
		if class, listed := x.blocks[p]; listed {
			return class
		}
	}
	return 0
}
