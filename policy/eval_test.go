package policy_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/policytest"
)

// TestEvaluate says the rules of the language one by one. Zones: a with w1 and w2,
// b with w3; network n is 10.0.0.0/8.
func TestEvaluate(t *testing.T) {
	var (
		w1, w2, w3 = policytest.Workload("w1"), policytest.Workload("w2"), policytest.Workload("w3")
		a, b, n    = policytest.Zone("a"), policytest.Zone("b"), policytest.Network("n")
		unmanaged  = policytest.Unmanaged()
		anybody    = policytest.Any()
		inside     = netip.MustParseAddr("10.1.2.3")
		outside    = netip.MustParseAddr("192.0.2.1")
	)
	crossing := func(from, to policy.Term) policy.Crossing {
		return policy.Crossing{From: []policy.Term{from}, To: []policy.Term{to}, Ports: []image.Span{policytest.TCP(80)}}
	}
	during := func(c policy.Crossing, since, until time.Duration) policy.Crossing {
		c.Since, c.Until = policytest.Epoch.Add(since), policytest.Epoch.Add(until)
		return c
	}
	past := func(c policy.Crossing) policy.Crossing { return during(c, -time.Hour, 0) }
	p := &policy.Policy{
		TrustDomain: "test", Zones: []policy.Zone{{Name: "a"}, {Name: "b"}},
		Workloads: []policy.Workload{{Name: "w1", Zone: "a"}, {Name: "w2", Zone: "a"}, {Name: "w3", Zone: "b"}},
		Networks:  []policy.Network{{Name: "n", Zone: "a", CIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}},
		Unmanaged: policy.Unmanaged{Zone: "a", Outbound: true},
	}
	ids := p.IDs()
	id1, id2, id3 := ids["w1"], ids["w2"], ids["w3"]

	egress := func(subject, peer image.ID) policy.Query {
		return policy.Query{Subject: subject, Peer: peer, Proof: abi.ProofIdentity, Address: outside,
			Port: image.Port{Proto: image.TCP, Number: 80}, Now: policytest.Epoch}
	}
	ingress := func(subject, peer image.ID) policy.Query {
		q := egress(subject, peer)
		q.Direction = abi.Ingress
		return q
	}
	proof := func(q policy.Query, proof abi.Proof) policy.Query { q.Proof, q.Peer = proof, image.None; return q }
	at := func(q policy.Query, address netip.Addr) policy.Query { q.Address = address; return q }
	port := func(q policy.Query, proto image.Proto, n uint16) policy.Query {
		q.Port = image.Port{Proto: proto, Number: n}
		return q
	}
	bad := func(q policy.Query) policy.Query { q.Proof, q.Bad = abi.ProofBad, abi.TagBadMAC; return q }
	allow := func(i int) policy.Decision {
		return policy.Decision{Verdict: abi.Allow, Reason: abi.ByCrossing, Crossing: i}
	}
	maybe := func(i int) policy.Decision {
		return policy.Decision{Verdict: abi.Provisional, Reason: abi.Unproven, Crossing: i}
	}
	deny := func(r abi.Reason) policy.Decision { return policy.Decision{Reason: r, Crossing: -1} }
	free := policy.Decision{Verdict: abi.Allow, Reason: abi.ByUnmanaged, Crossing: -1}
	type list = []policy.Crossing

	for _, tt := range []struct {
		name      string
		crossings list
		query     policy.Query
		want      policy.Decision
	}{
		{"bad nothing declared", nil, egress(id1, id2), deny(abi.NoCrossingFor)},
		{"bad proof wins over any crossing", list{crossing(anybody, anybody)}, bad(egress(id1, id2)), deny(abi.TagBadMAC)},
		{"bad proof of an unknown subject", nil, bad(egress(99, id2)), deny(abi.TagBadMAC)},
		{"bad unbound", list{crossing(anybody, anybody)}, egress(99, id2), deny(abi.Unbound)},
		{"bad kernel as subject", list{crossing(anybody, anybody)}, egress(image.Kernel, id2), deny(abi.Unbound)},
		{"bad pending", list{crossing(anybody, anybody)}, egress(image.Pending, id2), deny(abi.PendingSubject)},

		{"OK workload out", list{crossing(w1, w3)}, egress(id1, id3), allow(0)},
		{"OK workload in", list{crossing(w1, w3)}, ingress(id3, id1), allow(0)},
		{"bad the other way", list{crossing(w1, w3)}, egress(id3, id1), deny(abi.NoCrossingFor)},
		{"bad another peer", list{crossing(w1, w3)}, egress(id1, id2), deny(abi.NoCrossingFor)},
		{"OK zone", list{crossing(a, b)}, egress(id2, id3), allow(0)},
		{"OK zone of the peer", list{crossing(a, a)}, ingress(id2, id1), allow(0)},
		{"bad unmanaged is of no zone", list{crossing(w1, a)}, egress(id1, image.Unmanaged), deny(abi.NoCrossingFor)},
		{"OK unmanaged peer", list{crossing(w1, unmanaged)}, egress(id1, image.Unmanaged), allow(0)},
		{"OK any peer", list{crossing(anybody, anybody)}, egress(id1, 99), allow(0)},
		{"OK any peer without proof", list{crossing(anybody, w1)}, proof(ingress(id1, 0), abi.ProofNone), allow(0)},
		{"OK network without proof", list{crossing(w1, n)}, at(proof(egress(id1, 0), abi.ProofNone), inside), allow(0)},
		{"OK network with proof", list{crossing(w1, n)}, at(egress(id1, id3), inside), allow(0)},
		{"OK network before proof", list{crossing(w1, n)}, at(proof(egress(id1, 0), abi.ProofUnknown), inside), allow(0)},
		{"OK network, address v4-mapped", list{crossing(w1, n)},
			at(proof(egress(id1, 0), abi.ProofNone), netip.MustParseAddr("::ffff:10.1.2.3")), allow(0)},
		{"bad beside the network", list{crossing(w1, n)}, proof(egress(id1, 0), abi.ProofNone), deny(abi.NoCrossingFor)},
		{"bad no subject is of a network", list{crossing(n, w3)}, at(egress(id1, id3), inside), deny(abi.NoCrossingFor)},
		{"bad port", list{crossing(w1, w3)}, port(egress(id1, id3), image.TCP, 81), deny(abi.NoCrossingFor)},
		{"bad protocol", list{crossing(w1, w3)}, port(egress(id1, id3), image.UDP, 80), deny(abi.NoCrossingFor)},
		{"OK the first decides", list{crossing(w1, w2), crossing(a, b), crossing(w1, w3)}, egress(id1, id3), allow(1)},

		{"bad window over", list{past(crossing(w1, w3))}, egress(id1, id3), deny(abi.NotInWindow)},
		{"bad window ahead", list{during(crossing(w1, w3), time.Second, time.Hour)}, egress(id1, id3), deny(abi.NotInWindow)},
		{"OK window", list{during(crossing(w1, w3), 0, time.Second)}, egress(id1, id3), allow(0)},
		{"OK next after a window", list{past(crossing(w1, w3)), crossing(w1, w3)}, egress(id1, id3), allow(1)},

		{"OK opens toward proof", list{crossing(w1, w3)}, proof(egress(id1, 0), abi.ProofUnknown), maybe(0)},
		{"OK opens toward unmanaged", list{crossing(w1, unmanaged)}, proof(egress(id1, 0), abi.ProofUnknown), maybe(0)},
		{"OK a match before a maybe", list{crossing(w1, w3), crossing(w1, anybody)}, proof(egress(id1, 0), abi.ProofUnknown), allow(1)},
		{"bad opens into a closed window", list{past(crossing(w1, w3))}, proof(egress(id1, 0), abi.ProofUnknown), deny(abi.NotInWindow)},
		{"bad accepts before proof", list{crossing(w1, w3)}, proof(ingress(id3, 0), abi.ProofUnknown), deny(abi.NoCrossingFor)},

		{"bad without proof out", list{crossing(w1, w3)}, proof(egress(id1, 0), abi.ProofNone), deny(abi.TagMissing)},
		{"bad without proof in", list{crossing(a, w3)}, proof(ingress(id3, 0), abi.ProofNone), deny(abi.TagMissing)},
		{"bad without proof in a closed window", list{past(crossing(w1, w3))}, proof(egress(id1, 0), abi.ProofNone), deny(abi.NoCrossingFor)},
		{"bad closed network wins over missing proof", list{past(crossing(w1, n)), crossing(w1, w3)},
			at(proof(egress(id1, 0), abi.ProofNone), inside), deny(abi.NotInWindow)},
		{"bad without proof, nobody could prove", list{crossing(w1, unmanaged)}, proof(egress(id1, 0), abi.ProofNone), deny(abi.NoCrossingFor)},

		{"OK unmanaged out", nil, egress(image.Unmanaged, id3), free},
		{"bad unmanaged in", nil, ingress(image.Unmanaged, id3), deny(abi.NoCrossingFor)},
		{"OK unmanaged out, though a window is closed", list{past(crossing(unmanaged, w3))}, egress(image.Unmanaged, id3), free},
		{"OK unmanaged by a crossing", list{crossing(unmanaged, w3)}, egress(image.Unmanaged, id3), allow(0)},
		{"OK unmanaged before proof", list{crossing(unmanaged, w3)}, proof(egress(image.Unmanaged, 0), abi.ProofUnknown), maybe(0)},
		{"OK unmanaged is of any", list{crossing(anybody, unmanaged)}, ingress(image.Unmanaged, id3), allow(0)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := *p
			p.Crossings = tt.crossings
			if got := p.Evaluate(tt.query); got != tt.want {
				t.Errorf("evaluator: got %+v, want %+v", got, tt.want)
			}
			for i := range p.Crossings {
				p.Crossings[i].Name = string(rune('a' + i))
			}
			img, err := policy.Compile(&p)
			if err != nil {
				t.Fatal(err)
			}
			if got := img.Index().Decide(tt.query); got != tt.want {
				t.Errorf("tables: got %+v, want %+v", got, tt.want)
			}
		})
	}
}

// TestUnnamedProtocols: a protocol that the language does not name is covered by
// `any` alone.
func TestUnnamedProtocols(t *testing.T) {
	p := policytest.Shop()
	p.Crossings[1].Ports = []image.Span{{Proto: image.TCP, High: 65535}}
	p.Crossings[2].Ports = []image.Span{{Proto: image.Other}}
	ids := p.IDs()
	img, err := policy.Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		subject string
		peer    string
		want    abi.Verdict
	}{
		{"OK any", "api", "postgres", abi.Allow},
		{"bad every TCP port", "web", "api", abi.Deny},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := policy.Query{
				Subject: ids[tt.subject], Peer: ids[tt.peer], Proof: abi.ProofIdentity,
				Port: image.Port{Proto: 47, Number: 3}, Now: policytest.Epoch,
			}
			if got := p.Evaluate(q); got.Verdict != tt.want || got != img.Index().Decide(q) {
				t.Errorf("evaluator %+v, tables %+v, want %s", got, img.Index().Decide(q), tt.want)
			}
		})
	}
}
