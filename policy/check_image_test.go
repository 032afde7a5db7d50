package policy_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/policytest"
)

// A mutation is one way in which the tables of an image can be wrong. It reports false
// for an image that has nothing to break that way.
type mutation struct {
	name  string
	spoil func(r *rand.Rand, img *image.Image) bool
	shape bool // refused for its shape alone, whatever it answers
}

// some picks a place at which it holds.
func some(r *rand.Rand, n int, holds func(int) bool) int {
	for _, i := range r.Perm(n) {
		if holds(i) {
			return i
		}
	}
	return -1
}

// rule changes one rule.
func rule(change func(*rand.Rand, *image.Image, *image.Rule), holds func(*image.Rule) bool) func(*rand.Rand, *image.Image) bool {
	return func(r *rand.Rand, img *image.Image) bool {
		i := some(r, len(img.Rules), func(i int) bool { return holds == nil || holds(&img.Rules[i]) })
		if i < 0 {
			return false
		}
		img.Rules[i].Crossings = slices.Clone(img.Rules[i].Crossings)
		change(r, img, &img.Rules[i])
		return true
	}
}

// of says whether a rule's peer is of a kind.
func of(kind image.PeerKind) func(*image.Rule) bool {
	return func(r *image.Rule) bool { return r.Peer.Kind() == kind }
}

// ports moves the border between two neighbouring ranges.
func ports(change func(a, b *image.PortRange) bool) func(*rand.Rand, *image.Image) bool {
	return func(r *rand.Rand, img *image.Image) bool {
		i := some(r, len(img.Ports)-1, func(i int) bool {
			return img.Ports[i].Proto == img.Ports[i+1].Proto && change(&img.Ports[i], &img.Ports[i+1])
		})
		return i >= 0
	}
}

// prefix changes one whose class a rule names.
func prefix(change func(*image.Image, *image.Prefix) bool) func(*rand.Rand, *image.Image) bool {
	return func(r *rand.Rand, img *image.Image) bool {
		ruled := map[uint16]bool{}
		for i := range img.Rules {
			if p := img.Rules[i].Peer; p.Kind() == image.PeerAddress {
				ruled[uint16(p.Value())] = true
			}
		}
		return some(r, len(img.Addresses), func(i int) bool { return ruled[img.Addresses[i].Class] && change(img, &img.Addresses[i]) }) >= 0
	}
}

func crossing(change func(*image.Crossing), holds func(*image.Crossing) bool) func(*rand.Rand, *image.Image) bool {
	return func(r *rand.Rand, img *image.Image) bool {
		i := some(r, len(img.Crossings), func(i int) bool { return holds == nil || holds(&img.Crossings[i]) })
		if i >= 0 {
			change(&img.Crossings[i])
		}
		return i >= 0
	}
}

func workload(change func(*image.Image, *image.Workload)) func(*rand.Rand, *image.Image) bool {
	return func(r *rand.Rand, img *image.Image) bool {
		if len(img.Workloads) == 0 || len(img.Zones) < 2 {
			return false
		}
		change(img, &img.Workloads[r.IntN(len(img.Workloads))])
		return true
	}
}

func limited(c *image.Crossing) bool { return c.Until != 0 || c.Since != 0 }

func dropRule(kind image.PeerKind) func(*rand.Rand, *image.Image) bool {
	return func(r *rand.Rand, img *image.Image) bool {
		i := some(r, len(img.Rules), func(i int) bool { return img.Rules[i].Peer.Kind() == kind })
		if i >= 0 {
			img.Rules = slices.Delete(slices.Clone(img.Rules), i, i+1)
		}
		return i >= 0
	}
}

// addRule adds a rule for a subject that has rules, and somebody else.
func addRule(peer func(*rand.Rand, *image.Image) image.Peer) func(*rand.Rand, *image.Image) bool {
	return func(r *rand.Rand, img *image.Image) bool {
		if len(img.Rules) == 0 {
			return false
		}
		have := map[image.RuleKey]bool{}
		for _, old := range img.Rules {
			have[old.RuleKey] = true
		}
		for range 10_000 {
			added := img.Rules[r.IntN(len(img.Rules))]
			if added.Peer = peer(r, img); !have[added.RuleKey] {
				img.Rules = append(slices.Clone(img.Rules), added)
				return true
			}
		}
		return false
	}
}

// limitedBefore puts a crossing with a window before the only one that a rule has.
func limitedBefore(kind image.PeerKind) func(*rand.Rand, *image.Image) bool {
	return func(r *rand.Rand, img *image.Image) bool {
		first := slices.IndexFunc(img.Crossings, func(c image.Crossing) bool { return limited(&c) })
		i := some(r, len(img.Rules), func(i int) bool {
			x := &img.Rules[i]
			return first >= 0 && x.Peer.Kind() == kind && len(x.Crossings) == 1 && int(x.Crossings[0]) > first && !limited(&img.Crossings[x.Crossings[0]])
		})
		if i >= 0 {
			img.Rules[i].Crossings = []uint32{uint32(first), img.Rules[i].Crossings[0]}
		}
		return i >= 0
	}
}

func anyWorkload(r *rand.Rand, img *image.Image) image.Peer {
	if len(img.Workloads) == 0 {
		return image.MakePeer(image.PeerIdentity, uint32(image.Unmanaged))
	}
	return image.MakePeer(image.PeerIdentity, uint32(img.Workloads[r.IntN(len(img.Workloads))].ID))
}

var mutations = []mutation{
	{name: "rule for an identity dropped", spoil: dropRule(image.PeerIdentity)},
	{name: "rule for a zone dropped", spoil: dropRule(image.PeerZone)},
	{name: "rule for an address dropped", spoil: dropRule(image.PeerAddress)},
	{name: "rule for anyone dropped", spoil: dropRule(image.PeerAny)},
	{name: "rule for somebody provable dropped", spoil: dropRule(image.PeerProven)},
	{name: "rule for an identity added", spoil: addRule(anyWorkload)},
	{name: "rule for nobody's identity added", spoil: addRule(func(r *rand.Rand, _ *image.Image) image.Peer {
		return image.MakePeer(image.PeerIdentity, 16+r.Uint32N(1<<20))
	})},
	{name: "rule for the kernel added", spoil: addRule(func(*rand.Rand, *image.Image) image.Peer {
		return image.MakePeer(image.PeerIdentity, uint32(image.Kernel))
	})},
	{name: "rule for a zone added", spoil: addRule(func(r *rand.Rand, img *image.Image) image.Peer {
		return image.MakePeer(image.PeerZone, r.Uint32N(uint32(len(img.Zones))))
	})},
	{name: "rule for an address class added", spoil: addRule(func(r *rand.Rand, img *image.Image) image.Peer {
		return image.MakePeer(image.PeerAddress, r.Uint32N(uint32(len(img.Addresses)+1)))
	})},
	{name: "rule for addresses in no network added", spoil: addRule(func(*rand.Rand, *image.Image) image.Peer {
		return image.MakePeer(image.PeerAddress, 0)
	})},
	{name: "rule for anyone added", spoil: addRule(func(*rand.Rand, *image.Image) image.Peer { return image.MakePeer(image.PeerAny, 0) })},
	{name: "rule for somebody provable added", spoil: addRule(func(*rand.Rand, *image.Image) image.Peer { return image.MakePeer(image.PeerProven, 0) })},
	{name: "rule of another peer", spoil: rule(func(r *rand.Rand, img *image.Image, x *image.Rule) {
		for range 100 {
			if p := anyWorkload(r, img); p != x.Peer {
				x.Peer = p
				return
			}
		}
	}, of(image.PeerIdentity))},
	{name: "rule of another subject", spoil: rule(func(r *rand.Rand, img *image.Image, x *image.Rule) {
		for range 100 {
			if id := image.ID(anyWorkload(r, img).Value()); id != x.Subject {
				x.Subject = id
				return
			}
		}
	}, nil)},
	{name: "rule of another port class", spoil: rule(func(r *rand.Rand, img *image.Image, x *image.Rule) {
		x.Class = img.Ports[r.IntN(len(img.Ports))].Class
	}, nil)},
	{name: "rule of the next port class", spoil: rule(func(_ *rand.Rand, _ *image.Image, x *image.Rule) { x.Class++ }, nil)},
	{name: "rule of the other direction", spoil: rule(func(_ *rand.Rand, _ *image.Image, x *image.Rule) { x.Direction ^= 1 }, nil)},
	{name: "rule of another crossing", spoil: rule(func(r *rand.Rand, img *image.Image, x *image.Rule) {
		x.Crossings[0] = (x.Crossings[0] + 1) % uint32(len(img.Crossings))
	}, nil)},
	{name: "rule without its last crossing", spoil: rule(func(_ *rand.Rand, _ *image.Image, x *image.Rule) {
		x.Crossings = x.Crossings[:len(x.Crossings)-1]
	}, func(x *image.Rule) bool { return len(x.Crossings) > 1 })},
	{name: "rule without its last crossing, which opens when the one before it closes", spoil: func(r *rand.Rand, img *image.Image) bool {
		i := some(r, len(img.Rules), func(i int) bool {
			x := img.Rules[i].Crossings
			return len(x) > 1 && limited(&img.Crossings[x[len(x)-1]])
		})
		if i >= 0 {
			img.Rules[i].Crossings = img.Rules[i].Crossings[:len(img.Rules[i].Crossings)-1]
		}
		return i >= 0
	}},
	{name: "rule for an identity with a limited crossing before its own", spoil: limitedBefore(image.PeerIdentity)},
	{name: "rule for a zone with a limited crossing before its own", spoil: limitedBefore(image.PeerZone)},
	{name: "rule for an address with a limited crossing before its own", spoil: limitedBefore(image.PeerAddress)},
	{name: "rule for anyone with a limited crossing before its own", spoil: limitedBefore(image.PeerAny)},
	{name: "rule for somebody provable with a limited crossing before its own", spoil: limitedBefore(image.PeerProven)},
	{name: "rule with its crossings in another order", spoil: func(r *rand.Rand, img *image.Image) bool {
		i := some(r, len(img.Rules), func(i int) bool {
			x := img.Rules[i].Crossings
			return img.Rules[i].Peer.Kind() == image.PeerIdentity && len(x) > 1 && !limited(&img.Crossings[x[len(x)-1]])
		})
		if i >= 0 {
			img.Rules[i].Crossings = slices.Clone(img.Rules[i].Crossings)
			slices.Reverse(img.Rules[i].Crossings)
		}
		return i >= 0
	}},
	{name: "workload of another zone", spoil: workload(func(img *image.Image, w *image.Workload) { w.Zone = (w.Zone + 1) % uint16(len(img.Zones)) })},
	{name: "workload of another identity", spoil: workload(func(_ *image.Image, w *image.Workload) { w.ID ^= 1 << 20 })},
	{name: "zones in another order", spoil: func(_ *rand.Rand, img *image.Image) bool {
		slices.Reverse(img.Zones)
		return len(img.Zones) > 1
	}},
	{name: "range of ports begins one later", spoil: ports(func(a, b *image.PortRange) bool {
		if b.Low == b.High {
			return false
		}
		a.High, b.Low = a.High+1, b.Low+1
		return true
	})},
	{name: "range of ports ends one earlier", spoil: ports(func(a, b *image.PortRange) bool {
		if a.Low == a.High {
			return false
		}
		a.High, b.Low = a.High-1, b.Low-1
		return true
	})},
	{name: "range of ports with a gap before it", spoil: ports(func(a, b *image.PortRange) bool {
		if b.Low == b.High {
			return false
		}
		b.Low++
		return true
	}), shape: true},
	{name: "ranges of ports that swap classes", spoil: ports(func(a, b *image.PortRange) bool {
		a.Class, b.Class = b.Class, a.Class
		return true
	})},
	{name: "two classes of ports joined", spoil: ports(func(a, b *image.PortRange) bool {
		a.Class = b.Class
		return true
	})},
	{name: "prefix of another class", spoil: prefix(func(img *image.Image, p *image.Prefix) bool {
		p.Class++
		return true
	})},
	{name: "prefix of the class of another", spoil: prefix(func(img *image.Image, p *image.Prefix) bool {
		for _, other := range img.Addresses {
			if other.Class != p.Class {
				p.Class = other.Class
				return true
			}
		}
		return false
	})},
	{name: "prefix shortened by a bit", spoil: prefix(func(img *image.Image, p *image.Prefix) bool {
		if p.Prefix.Bits() == 0 {
			return false
		}
		wider := netip.PrefixFrom(p.Prefix.Addr(), p.Prefix.Bits()-1).Masked()
		listed := func(q image.Prefix) bool {
			return q.Prefix == wider || q.Prefix != p.Prefix && q.Prefix.Bits() == p.Prefix.Bits() && wider.Contains(q.Prefix.Addr())
		}
		if slices.ContainsFunc(img.Addresses, listed) { // then nothing would change
			return false
		}
		p.Prefix = wider
		return true
	})},
	{name: "prefix lengthened by a bit", spoil: prefix(func(img *image.Image, p *image.Prefix) bool {
		if p.Prefix.Bits() == p.Prefix.Addr().BitLen() {
			return false
		}
		p.Prefix = netip.PrefixFrom(p.Prefix.Addr(), p.Prefix.Bits()+1)
		return true
	})},
	{name: "prefix dropped", spoil: func(r *rand.Rand, img *image.Image) bool {
		if len(img.Addresses) == 0 {
			return false
		}
		i := r.IntN(len(img.Addresses))
		img.Addresses = slices.Delete(slices.Clone(img.Addresses), i, i+1)
		return true
	}},
	{name: "block of a network", spoil: func(r *rand.Rand, img *image.Image) bool {
		for i := range img.Networks {
			if n := &img.Networks[i]; len(n.CIDRs) > 0 {
				n.CIDRs = append(slices.Clone(n.CIDRs[1:]), netip.MustParsePrefix("203.0.113.0/24"))
				return true
			}
		}
		return false
	}},
	{name: "crossing that ends later", spoil: crossing(func(c *image.Crossing) { c.Until++ }, limited)},
	{name: "crossing that begins later", spoil: crossing(func(c *image.Crossing) { c.Since++ }, limited)},
	{name: "crossing without its window", spoil: crossing(func(c *image.Crossing) { c.Since, c.Until = 0, 0 }, limited)},
	{name: "crossing that needs another proof", spoil: crossing(func(c *image.Crossing) { c.Need = (c.Need + 1) % 3 }, nil)},
	{name: "crossing with address translation", spoil: crossing(func(c *image.Crossing) { c.NAT ^= image.NATSource }, nil)},
	{name: "crossing logged otherwise", spoil: crossing(func(c *image.Crossing) { c.Log = (c.Log + 1) % 3 }, nil)},
	{name: "crossing refused otherwise", spoil: crossing(func(c *image.Crossing) { c.Refuse ^= image.RefuseDrop }, nil)},
	{name: "crossing that is a decoy", spoil: crossing(func(c *image.Crossing) { c.Decoy = !c.Decoy }, nil)},
	{name: "crossing with another limit", spoil: crossing(func(c *image.Crossing) { c.Rate, c.Burst = c.Rate+1, c.Burst+1 }, nil)},
	{name: "crossing from somebody else", spoil: crossing(func(c *image.Crossing) { c.From = []image.Term{{Kind: image.TermUnmanaged}, {Kind: image.TermAny}} }, nil)},
	{name: "crossing to a term of no kind", spoil: crossing(func(c *image.Crossing) { c.To = []image.Term{{Kind: 9}} }, nil)},
	{name: "crossing with one port more", spoil: crossing(func(c *image.Crossing) {
		c.Ports = append(slices.Clone(c.Ports), image.Span{Proto: image.SCTP, Low: 7, High: 7})
	}, nil)},
	{name: "crossing of another name", spoil: crossing(func(c *image.Crossing) { c.Name += "x" }, nil)},
	{name: "crossing dropped", spoil: func(_ *rand.Rand, img *image.Image) bool {
		if len(img.Crossings) == 0 {
			return false
		}
		img.Crossings = img.Crossings[:len(img.Crossings)-1]
		return true
	}},
	{name: "unmanaged may not open", spoil: func(_ *rand.Rand, img *image.Image) bool {
		img.UnmanagedOutbound = !img.UnmanagedOutbound
		return true
	}},
	{name: "unmanaged may not accept", spoil: func(_ *rand.Rand, img *image.Image) bool {
		img.UnmanagedInbound = !img.UnmanagedInbound
		return true
	}},
	{name: "observing instead of enforcing", spoil: func(_ *rand.Rand, img *image.Image) bool {
		img.Mode ^= image.Observe
		return true
	}},
}

// varied is a large policy with something of everything: nested networks, windows
// before a crossing that is always open, zones, anyone, unmanaged.
func varied(workloads, crossings int) *policy.Policy {
	p := policytest.Large(workloads, crossings)
	name := func(i int) policy.Term { return policytest.Workload(p.Workloads[i].Name) }
	p.Networks = append(p.Networks,
		policy.Network{Name: "x-inner", Zone: "z0", CIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.5.0/24"), netip.MustParsePrefix("2001:db8::/48")}},
		policy.Network{Name: "x-outer", Zone: "z0", CIDRs: []netip.Prefix{netip.MustParsePrefix("2001:db8::/32")}})
	add := func(from, to policy.Term, port uint16, change func(*policy.Crossing)) {
		c := policy.Crossing{
			Pos: policy.Pos{Line: len(p.Crossings) + 1, Column: 1}, Name: fmt.Sprintf("x%03d", len(p.Crossings)),
			From: []policy.Term{from}, To: []policy.Term{to}, Ports: []image.Span{policytest.TCP(port)},
		}
		if change != nil {
			change(&c)
		}
		p.Crossings = append(p.Crossings, c)
	}
	window := func(c *policy.Crossing) {
		c.Since, c.Until = policytest.Epoch, policytest.Epoch.Add(time.Hour)
	}
	noProof := func(c *policy.Crossing) { c.Need = image.NoProof }
	for i := range 4 {
		add(name(i), name(10+i), 22, window)
		add(name(i), name(10+i), 22, nil)
		add(name(i), name(20+i), 23, window)
		add(name(i), name(30+i), 24, func(c *policy.Crossing) { c.Until = policytest.Epoch })
		add(name(i), name(30+i), 24, func(c *policy.Crossing) { c.Since = policytest.Epoch })
	}
	add(policytest.Network("x-inner"), name(1), 25, noProof)
	add(policytest.Network("x-outer"), name(1), 26, noProof)
	add(name(2), policytest.Network("x-inner"), 25, noProof)
	add(policytest.Any(), name(3), 27, noProof)
	add(policytest.Unmanaged(), name(4), 28, noProof)
	add(policytest.Zone("z3"), policytest.Zone("z4"), 29, nil)
	return p
}

// compiled is the image of a policy, which is to be mutated or not.
func compiled(t testing.TB, p *policy.Policy) *image.Image {
	t.Helper()
	img, err := policy.Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// copied is another image with the same content, none of whose lists of records is
// shared.
func copied(img *image.Image) *image.Image {
	c := *img
	c.Zones, c.Workloads, c.Networks = slices.Clone(img.Zones), slices.Clone(img.Workloads), slices.Clone(img.Networks)
	c.Crossings, c.Ports = slices.Clone(img.Crossings), slices.Clone(img.Ports)
	c.Addresses, c.Rules = slices.Clone(img.Addresses), slices.Clone(img.Rules)
	return &c
}

// TestCheckFindsMutations breaks the image of 2,000 workloads in every way that tables
// can be wrong. Who asks about classes finds the same.
func TestCheckFindsMutations(t *testing.T) {
	p := varied(2000, 4000)
	img := compiled(t, p)
	if c, err := policy.Check(p, img); err != nil || c.Asked != 2001 {
		t.Fatalf("%+v, %v", c, err)
	}
	if c, err := policy.CheckBy(p, img, true); err != nil || c.Alike == 0 || c.Asked+c.Alike != 2001 {
		t.Fatalf("by classes: %+v, %v", c, err)
	}
	for i, m := range mutations {
		t.Run(m.name, func(t *testing.T) {
			mutant := copied(img)
			if !m.spoil(rand.New(rand.NewPCG(uint64(i), 3)), mutant) {
				t.Fatal("there is nothing to break")
			}
			_, err := policy.Check(p, mutant)
			if _, same := policy.CheckBy(p, mutant, true); err == nil || same == nil || err.Error() != same.Error() {
				t.Fatalf("found %v, by classes %v", err, same)
			}
			t.Log(err)
		})
	}
}

// Of many differences the first is named, however many processors look for them.
func TestCheckNamesTheFirst(t *testing.T) {
	p := policytest.Zoned(500, 1, 2)
	img := compiled(t, p)
	from := img.Rules[len(img.Rules)/2].Subject
	img.Rules = slices.DeleteFunc(slices.Clone(img.Rules), func(r image.Rule) bool { return r.Subject >= from })
	ids := p.IDs()
	first := slices.IndexFunc(p.Workloads, func(w policy.Workload) bool { return ids[w.Name] >= from })
	want := fmt.Sprintf("image and policy differ: subject %s, egress, port 6/1024,", p.Workloads[first].Name)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8))
	for range 50 {
		if _, err := policy.Check(p, img); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Fatalf("%v, want %s", err, want)
		}
	}
}

// TestCheckIsBruteForce compares Check with asking every question there is, of small
// policies and of images that are right or broken in some way: both find a difference
// or both do not.
func TestCheckIsBruteForce(t *testing.T) {
	size := policytest.Size{Zones: 3, Workloads: 3, Networks: 2, Crossings: 4}
	accepted, refused, alike := 0, 0, 0
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 4))
		p := policytest.Random(r, size)
		img := compiled(t, p)
		m := mutation{name: "nothing"}
		if seed%8 != 0 {
			if m = mutations[int(seed)%len(mutations)]; !m.spoil(r, img) {
				continue
			}
		}
		c, got := policy.Check(p, img)
		byClasses, same := policy.CheckBy(p, img, true)
		if fmt.Sprint(got) != fmt.Sprint(same) {
			t.Fatalf("seed %d, broken: %s: Check %v, by classes %v\n%+v", seed, m.name, got, same, p)
		}
		want := bruteForce(p, img)
		if (got == nil) != (want == nil) && !(m.shape && got != nil) {
			t.Fatalf("seed %d, broken: %s: Check %v, every question %v\n%+v", seed, m.name, got, want, p)
		}
		if got == nil {
			accepted++
			if alike += byClasses.Alike; c.Asked != len(p.Workloads)+1 || byClasses.Asked+byClasses.Alike != c.Asked {
				t.Errorf("seed %d: %s; by classes %s", seed, c, byClasses)
			}
		} else {
			refused++
		}
	}
	if accepted < 40 || refused < 100 || alike < 10 {
		t.Errorf("%d accepted, %d refused, %d alike: too few to tell", accepted, refused, alike)
	}
}

// bruteForce asks for every identity, every port at which anything begins or ends or
// that lies beside it, every such address and every such second.
func bruteForce(p *policy.Policy, img *image.Image) error {
	if err := policy.SameDeclarations(p, img); err != nil {
		return err
	}
	identities := []image.ID{image.None, image.Unmanaged, image.Kernel, image.Pending, image.FirstID}
	for i := range img.Workloads {
		identities = append(identities, img.Workloads[i].ID)
	}
	for i := range img.Rules {
		if p := img.Rules[i].Peer; p.Kind() == image.PeerIdentity {
			identities = append(identities, image.ID(p.Value()))
		}
	}
	slices.Sort(identities)
	identities = slices.Compact(identities)
	numbers := map[image.Port]bool{{Proto: 47}: true}
	port := func(s image.Span) {
		for _, n := range [...]uint16{s.Low - 1, s.Low, s.High, s.High + 1} {
			numbers[image.Port{Proto: s.Proto, Number: n}] = true
		}
	}
	for _, r := range img.Ports {
		port(r.Span)
	}
	instants := map[int64]bool{1: true}
	for i := range p.Crossings {
		c := &p.Crossings[i]
		for _, s := range c.Ports {
			port(s)
		}
		for _, at := range [...]time.Time{c.Since, c.Until} {
			if !at.IsZero() {
				instants[at.Unix()-1], instants[at.Unix()] = true, true
			}
		}
	}
	addresses := map[netip.Addr]bool{{}: true, netip.MustParseAddr("10.0.0.1"): true, netip.MustParseAddr("::ffff:10.0.0.1"): true, netip.MustParseAddr("::1"): true}
	block := func(p netip.Prefix) {
		first, last := p.Addr(), policy.LastAddress(p)
		for _, a := range [...]netip.Addr{first.Prev(), first, last, last.Next()} {
			addresses[a] = true
		}
	}
	for i := range p.Networks {
		for _, p := range p.Networks[i].CIDRs {
			block(p)
		}
	}
	for _, p := range img.Addresses {
		block(p.Prefix)
	}
	evaluator, index := p.Evaluator(), img.Index()
	for _, subject := range identities {
		for _, d := range [...]abi.Direction{abi.Egress, abi.Ingress} {
			for port := range numbers {
				for address := range addresses {
					for at := range instants {
						q := policy.Query{Subject: subject, Direction: d, Port: port, Address: address, Now: time.Unix(at, 0)}
						for _, q.Proof = range [...]abi.Proof{abi.ProofNone, abi.ProofUnknown, abi.ProofBad, abi.ProofIdentity} {
							peers := identities
							if q.Proof != abi.ProofIdentity {
								peers = peers[:1]
							}
							for _, q.Peer = range peers {
								if want, got := evaluator.Evaluate(q), index.Decide(q); want != got {
									return fmt.Errorf("%+v: %+v, %+v", q, want, got)
								}
							}
						}
					}
				}
			}
		}
	}
	return nil
}

// TestDeclared reads policies back from their images. What an image does not hold is
// what Declared says it is.
func TestDeclared(t *testing.T) {
	for seed := range uint64(100) {
		p := policytest.Random(rand.New(rand.NewPCG(seed, 5)), policytest.Small)
		img := compiled(t, p)
		d, err := policy.Declared(img)
		if err != nil {
			t.Fatal(err)
		}
		if diff := policy.Diff(p, d); !diff.Empty() {
			t.Fatalf("seed %d: declared is something else:\n%s", seed, diff)
		}
		if _, err := policy.Check(d, img); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		d.Source = p.Source
		again := compiled(t, d)
		if diff := cmp.Diff(img, again, comparePrefix); diff != "" {
			t.Fatalf("seed %d: compiled again (-image +again):\n%s", seed, diff)
		}
	}
	img := compiled(t, policytest.Shop())
	img.Crossings[0].To[0].Index = 99
	if _, err := policy.Declared(img); err == nil || !strings.Contains(err.Error(), "term of kind 1 that names 99") {
		t.Errorf("a term that names nobody: %v", err)
	}
}

func benchmarkCheck(b *testing.B, p *policy.Policy) {
	img := compiled(b, p)
	b.ReportAllocs()
	for b.Loop() {
		c, err := policy.Check(p, img)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(c.Questions), "questions")
	}
}

func BenchmarkCheck2kx20k(b *testing.B)   { benchmarkCheck(b, policytest.Large(2000, 20_000)) }
func BenchmarkCheck10kx100k(b *testing.B) { benchmarkCheck(b, policytest.Large(10_000, 100_000)) }

// 2.4 million rules, of which none is like another, and of 10,000 workloads, of which most are.
func BenchmarkCheck2kZoned(b *testing.B)  { benchmarkCheck(b, policytest.Zoned(2000, 1, 300)) }
func BenchmarkCheck10kZoned(b *testing.B) { benchmarkCheck(b, policytest.Zoned(10_000, 4, 300)) }

func BenchmarkBuild10kx100k(b *testing.B) {
	p := policytest.Large(10_000, 100_000)
	for b.Loop() {
		if _, err := policy.Build(p); err != nil {
			b.Fatal(err)
		}
	}
}
