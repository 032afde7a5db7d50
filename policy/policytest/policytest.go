// Package policytest makes policies and questions for tests: one worth reading,
// random ones that reach into every corner of the language, and large ones.
package policytest

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

// Epoch is the time that windows of random policies and times of random queries
// lie around.
var Epoch = time.Unix(1_800_000_000, 0).UTC()

// Shop is the policy that the documentation tells its examples with.
func Shop() *policy.Policy {
	crossing := func(line int, name, purpose string, from, to policy.Term, ports ...image.Span) policy.Crossing {
		return policy.Crossing{
			Pos: policy.Pos{Line: line, Column: 5}, Name: name, Purpose: purpose,
			From: []policy.Term{from}, To: []policy.Term{to}, Ports: ports,
			Rate: 3600 * 100, Burst: 100,
		}
	}
	p := &policy.Policy{
		File: "shop.yaml", Source: []byte("shop"), Name: "shop", Version: 7, TrustDomain: "shop.example",
		Zones: []policy.Zone{
			{Name: "app", Trust: 20}, {Name: "data", Trust: 30}, {Name: "edge", Trust: 10}, {Name: "internet", Trust: 0},
		},
		Workloads: []policy.Workload{
			{Name: "api", Zone: "app", Match: []policy.Selector{{Kind: image.SelectUnit, Path: "api@*.service"}}},
			{Name: "bastion", Zone: "edge", Match: []policy.Selector{{Kind: image.SelectCgroup, Path: "/lab/bastion"}},
				Roles: []policy.Role{{Name: "bastion"}}},
			{Name: "postgres", Zone: "data", Match: []policy.Selector{
				{Kind: image.SelectUnit, Path: "postgresql@*.service"}, {Kind: image.SelectCgroup, Path: "/lab/postgres"}}},
			{Name: "web", Zone: "edge", Match: []policy.Selector{{Kind: image.SelectUnit, Path: "nginx.service"}}},
		},
		Networks: []policy.Network{
			{Name: "anywhere", Zone: "internet", CIDRs: []netip.Prefix{
				netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}},
			{Name: "office", Zone: "internet", CIDRs: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}},
		},
		Crossings: []policy.Crossing{
			crossing(22, "public-web", "public site", Network("anywhere"), Workload("web"), TCP(80), TCP(443)),
			crossing(23, "web-api", "", Workload("web"), Workload("api"), TCP(8080)),
			crossing(24, "api-db", "", Workload("api"), Workload("postgres"), TCP(5432)),
			crossing(25, "break-glass", "repairs", Workload("bastion"), Zone("data"), TCP(22)),
			crossing(26, "office-ssh", "", Network("office"), Workload("bastion"), TCP(22)),
		},
		Unmanaged: policy.Unmanaged{Zone: "edge", Outbound: true, Inbound: true},
	}
	p.Crossings[0].Need = image.NoProof
	p.Crossings[3].Until = Epoch.Add(time.Hour)
	p.Crossings[4].Need = image.NoProof
	return p
}

// Workload, Zone, Network, Unmanaged and Any are terms.
func Workload(name string) policy.Term { return policy.Term{Kind: image.TermWorkload, Name: name} }
func Zone(name string) policy.Term     { return policy.Term{Kind: image.TermZone, Name: name} }
func Network(name string) policy.Term  { return policy.Term{Kind: image.TermNetwork, Name: name} }
func Unmanaged() policy.Term           { return policy.Term{Kind: image.TermUnmanaged} }
func Any() policy.Term                 { return policy.Term{Kind: image.TermAny} }

// TCP is one TCP port.
func TCP(n uint16) image.Span { return image.Span{Proto: image.TCP, Low: n, High: n} }

// Size bounds a random policy.
type Size struct{ Zones, Workloads, Networks, Crossings int }

// Small is a size at which everything in a policy is likely to meet.
var Small = Size{Zones: 4, Workloads: 6, Networks: 5, Crossings: 12}

// blocks are the address blocks of random networks: nested, equal, apart, whole
// families and single addresses.
var blocks = []string{
	"0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/16", "10.0.0.0/24", "10.0.0.1/32", "10.0.0.128/25", "10.1.0.0/16",
	"10.0.255.255/32", "127.0.0.0/8", "128.0.0.0/1", "169.254.0.0/16", "192.0.2.0/24", "224.0.0.0/4", "255.255.255.255/32",
	"::/0", "::1/128", "2001:db8::/32", "2001:db8::/48", "2001:db8:0:1::/64", "2001:db8::1/128", "8000::/1", "fe80::/10", "ff00::/8",
}

// Random makes a valid policy of at most the given size. It has every kind of
// term, port and proof, overlapping networks of both families, and at most
// image.MaxAlternatives-1 crossings with a window, so that it always compiles.
// It follows the rules of the language's grammar, but not its trust rules.
func Random(r *rand.Rand, size Size) *policy.Policy {
	p := &policy.Policy{
		File: "random.yaml", Name: "random", Version: 1 + r.Uint64N(9), TrustDomain: "random.example",
		Source: fmt.Appendf(nil, "random %d", r.Uint64()),
	}
	for i := range 1 + r.IntN(size.Zones) {
		p.Zones = append(p.Zones, policy.Zone{Name: fmt.Sprintf("z%d", i), Trust: uint16(r.IntN(5) * 10)})
	}
	zone := func() string { return p.Zones[r.IntN(len(p.Zones))].Name }
	for i := range r.IntN(size.Workloads + 1) {
		name := fmt.Sprintf("w%d", i)
		p.Workloads = append(p.Workloads, policy.Workload{
			Name: name, Zone: zone(), Match: []policy.Selector{{Kind: image.SelectCgroup, Path: "/random/" + name}},
		})
	}
	for i := range r.IntN(size.Networks + 1) {
		n := policy.Network{Name: fmt.Sprintf("n%d", i), Zone: zone()}
		for range 1 + r.IntN(4) {
			n.CIDRs = append(n.CIDRs, netip.MustParsePrefix(blocks[r.IntN(len(blocks))]))
		}
		p.Networks = append(p.Networks, n)
	}
	p.Unmanaged = policy.Unmanaged{Zone: zone(), Outbound: r.IntN(2) == 0, Inbound: r.IntN(2) == 0}
	windows := r.IntN(image.MaxAlternatives)
	for i := range r.IntN(size.Crossings + 1) {
		c := policy.Crossing{
			Pos: policy.Pos{Line: i + 1, Column: 1}, Name: fmt.Sprintf("c%d", i),
			From: randomTerms(r, p), To: randomTerms(r, p), Ports: randomSpans(r),
			Decoy: r.IntN(8) == 0, Side: []image.Side{0, 0, 0, 1, 2}[r.IntN(5)], Forensic: r.IntN(4) == 0, Log: image.Log(r.IntN(3)), Refuse: image.Refuse(r.IntN(2)),
		}
		c.Need = randomNeed(r, &c)
		if windows > 0 && r.IntN(3) == 0 {
			windows--
			if start := r.IntN(3); start > 0 {
				c.Since = Epoch.Add(time.Duration(start*10) * time.Second)
			}
			if length := r.IntN(3); length > 0 || c.Since.IsZero() {
				c.Until = Epoch.Add(time.Duration(30+length*10) * time.Second)
			}
		}
		p.Crossings = append(p.Crossings, c)
	}
	return p
}

func randomTerms(r *rand.Rand, p *policy.Policy) []policy.Term {
	var out []policy.Term
	for len(out) == 0 || r.IntN(4) == 0 {
		var t policy.Term
		switch n := r.IntN(12); {
		case n < 5 && len(p.Workloads) > 0:
			t = Workload(p.Workloads[r.IntN(len(p.Workloads))].Name)
		case n < 7:
			t = Zone(p.Zones[r.IntN(len(p.Zones))].Name)
		case n < 10 && len(p.Networks) > 0:
			t = Network(p.Networks[r.IntN(len(p.Networks))].Name)
		case n == 10:
			t = Unmanaged()
		case n == 11:
			t = Any()
		default:
			continue
		}
		if !slices.Contains(out, t) {
			out = append(out, t)
		}
	}
	return out
}

// ports that random crossings and queries meet at.
var ports = []uint16{0, 1, 22, 53, 80, 443, 1023, 1024, 5432, 8000, 8080, 8999, 65534, 65535}

func randomSpans(r *rand.Rand) []image.Span {
	var out []image.Span
	for len(out) == 0 || r.IntN(3) == 0 {
		proto := []image.Proto{image.TCP, image.TCP, image.UDP, image.SCTP}[r.IntN(4)]
		low, high := ports[r.IntN(len(ports))], ports[r.IntN(len(ports))]
		switch r.IntN(10) {
		case 0: // any
			for _, proto := range image.Protos {
				last, _ := proto.Last()
				out = append(out, image.Span{Proto: proto, High: last})
			}
		case 1: // tcp/*
			out = append(out, image.Span{Proto: proto, High: 65535})
		case 2: // icmp/echo
			out = append(out, image.Span{Proto: image.ICMP, Low: 8, High: 8}, image.Span{Proto: image.ICMP6, Low: 128, High: 128})
		case 3: // icmp6/N
			n := uint16(r.IntN(256))
			out = append(out, image.Span{Proto: image.ICMP6, Low: n, High: n})
		case 4: // icmp/*
			out = append(out, image.Span{Proto: image.ICMP, High: 255}, image.Span{Proto: image.ICMP6, High: 255})
		case 5, 6:
			out = append(out, image.Span{Proto: proto, Low: min(low, high), High: max(low, high)})
		default:
			out = append(out, image.Span{Proto: proto, Low: low, High: low})
		}
	}
	return out
}

// randomNeed chooses among the needs that the language allows for the crossing.
func randomNeed(r *rand.Rand, c *policy.Crossing) image.Need {
	provable := func(t policy.Term) bool { return t.Kind == image.TermWorkload || t.Kind == image.TermZone }
	isTCP := func(s image.Span) bool { return s.Proto == image.TCP }
	from, to := slices.ContainsFunc(c.From, provable), slices.ContainsFunc(c.To, provable)
	switch {
	case !from && !to:
		return image.NoProof
	case from && to && !slices.ContainsFunc(c.Ports, isTCP) && r.IntN(3) == 0:
		return image.Sender
	case !(from && to) && r.IntN(3) == 0:
		return image.NoProof
	}
	return image.Required
}

// RandomQuery asks something that the policy is likely to have an opinion on:
// mostly built around one of its crossings, with one thing or another amiss.
func RandomQuery(r *rand.Rand, p *policy.Policy) policy.Query {
	ids := p.IDs()
	q := policy.Query{
		Subject:   randomIdentity(r, p, ids),
		Direction: abi.Direction(r.IntN(2)),
		Port:      randomPort(r),
		Address:   randomAddress(r, p),
		Proof:     []abi.Proof{abi.ProofNone, abi.ProofIdentity, abi.ProofIdentity, abi.ProofUnknown}[r.IntN(4)],
		Peer:      randomIdentity(r, p, ids),
		Now:       Epoch.Add(time.Duration(r.IntN(7)*10-1+r.IntN(3)) * time.Second),
	}
	if r.IntN(50) == 0 {
		q.Proof, q.Bad = abi.ProofBad, abi.TagMalformed+abi.Reason(r.IntN(5))
	}
	if len(p.Crossings) == 0 || r.IntN(10) == 0 {
		return q
	}
	c := &p.Crossings[r.IntN(len(p.Crossings))]
	mine, theirs := c.From, c.To
	if q.Direction == abi.Ingress {
		mine, theirs = c.To, c.From
	}
	if id := identityOf(r, p, ids, mine[r.IntN(len(mine))]); id != image.None {
		q.Subject = id
	}
	if r.IntN(8) > 0 {
		s := c.Ports[r.IntN(len(c.Ports))]
		q.Port = image.Port{Proto: s.Proto, Number: s.Low + uint16(r.IntN(int(s.High-s.Low)+1))}
		switch r.IntN(6) {
		case 0:
			q.Port.Number = s.High
		case 1:
			q.Port.Number = s.High + 1
		case 2:
			q.Port.Number = s.Low
		case 3:
			q.Port.Number = s.Low - 1
		}
		if last, _ := s.Proto.Last(); q.Port.Number > last {
			q.Port.Number = last
		}
	}
	if id := identityOf(r, p, ids, theirs[r.IntN(len(theirs))]); id != image.None && r.IntN(4) > 0 {
		q.Peer = id
	}
	return q
}

func randomPort(r *rand.Rand) image.Port {
	proto := image.Protos[r.IntN(len(image.Protos))]
	number := ports[r.IntN(len(ports))]
	if last, _ := proto.Last(); number > last {
		number = uint16(r.IntN(int(last) + 1))
	}
	return image.Port{Proto: proto, Number: number}
}

func randomIdentity(r *rand.Rand, p *policy.Policy, ids map[string]image.ID) image.ID {
	switch n := r.IntN(16); {
	case n == 0:
		return image.Pending
	case n == 1:
		return image.Kernel
	case n == 2:
		return image.ID(r.IntN(int(image.MaxID) + 1))
	case n < 6 || len(p.Workloads) == 0:
		return image.Unmanaged
	}
	return ids[p.Workloads[r.IntN(len(p.Workloads))].Name]
}

// identityOf is somebody whom the term names; None if it names no identity.
func identityOf(r *rand.Rand, p *policy.Policy, ids map[string]image.ID, t policy.Term) image.ID {
	switch t.Kind {
	case image.TermWorkload:
		return ids[t.Name]
	case image.TermZone:
		var members []image.ID
		for i := range p.Workloads {
			if p.Workloads[i].Zone == t.Name {
				members = append(members, ids[p.Workloads[i].Name])
			}
		}
		if len(members) > 0 {
			return members[r.IntN(len(members))]
		}
	case image.TermUnmanaged:
		return image.Unmanaged
	}
	return image.None
}

// randomAddress is at an edge of one of the policy's blocks, or right beside it.
func randomAddress(r *rand.Rand, p *policy.Policy) netip.Addr {
	if len(p.Networks) == 0 || r.IntN(10) == 0 {
		return netip.MustParsePrefix(blocks[r.IntN(len(blocks))]).Addr()
	}
	n := &p.Networks[r.IntN(len(p.Networks))]
	block := n.CIDRs[r.IntN(len(n.CIDRs))]
	address := block.Addr()
	if r.IntN(2) == 0 {
		address = policy.LastAddress(block)
	}
	beside := address
	switch r.IntN(6) {
	case 0:
		beside = address.Prev()
	case 1:
		beside = address.Next()
	}
	if !beside.IsValid() || beside.Is4In6() {
		return address
	}
	return beside
}

// Large makes a policy of the given numbers: mostly crossings between single
// workloads as a generated policy has them, some between zones and from networks.
// The same numbers make the same policy.
func Large(workloads, crossings int) *policy.Policy {
	r := rand.New(rand.NewPCG(uint64(workloads), uint64(crossings)))
	p := &policy.Policy{
		File: "large.yaml", Source: []byte("large"), Name: "large", Version: 1, TrustDomain: "large.example",
		Unmanaged: policy.Unmanaged{Zone: "z0", Outbound: true, Inbound: true},
	}
	const zones, networks = 8, 64
	for i := range zones {
		p.Zones = append(p.Zones, policy.Zone{Name: fmt.Sprintf("z%d", i), Trust: uint16(i * 10)})
	}
	for i := range workloads {
		name := fmt.Sprintf("w%06d", i)
		p.Workloads = append(p.Workloads, policy.Workload{
			Name: name, Zone: fmt.Sprintf("z%d", i%zones),
			Match: []policy.Selector{{Kind: image.SelectCgroup, Path: "/large/" + name}},
		})
	}
	for i := range networks {
		p.Networks = append(p.Networks, policy.Network{
			Name: fmt.Sprintf("n%02d", i), Zone: "z0",
			CIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i), 0, 0}), 16)},
		})
	}
	workload := func() policy.Term { return Workload(p.Workloads[r.IntN(workloads)].Name) }
	for i := range crossings {
		c := policy.Crossing{
			Pos: policy.Pos{Line: i + 1, Column: 1}, Name: fmt.Sprintf("c%06d", i),
			From: []policy.Term{workload()}, To: []policy.Term{workload()},
			Ports: []image.Span{TCP(uint16(1024 + r.IntN(2000)))},
			Rate:  3600 * 1000, Burst: 1000,
		}
		switch {
		case i%50 == 0:
			c.From, c.Need = []policy.Term{Network(fmt.Sprintf("n%02d", r.IntN(networks)))}, image.NoProof
		case i%10000 == 1:
			c.From = []policy.Term{Zone(fmt.Sprintf("z%d", r.IntN(zones)))}
		case i%100 == 2:
			c.Ports = []image.Span{{Proto: image.UDP, Low: 5000, High: 5099}, TCP(443)}
		}
		p.Crossings = append(p.Crossings, c)
	}
	return p
}

// Zoned makes a policy in which every crossing is between zones, and so is a rule of each
// of their workloads: few crossings with very many questions.
func Zoned(workloads, zones, crossings int) *policy.Policy {
	p := Large(workloads, 0)
	zone := func(i int) string { return p.Zones[i%zones].Name }
	for i := range p.Workloads {
		p.Workloads[i].Zone = zone(i)
	}
	for i := range crossings {
		p.Crossings = append(p.Crossings, policy.Crossing{
			Pos: policy.Pos{Line: i + 1, Column: 1}, Name: fmt.Sprintf("c%06d", i),
			From: []policy.Term{Zone(zone(i))}, To: []policy.Term{Zone(zone(i / zones))},
			Ports: []image.Span{TCP(uint16(1024 + i))},
			Rate:  3600 * 1000, Burst: 1000,
		})
	}
	return p
}
