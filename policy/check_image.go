package policy

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// Bounds of Check. A visit is one crossing that the evaluator looks at.
const (
	maxComparisons = 5_000_000 // of an exhaustive check
	maxSampled     = 1_000_000 // of a sample, which must not make applying a large policy slow
	maxVisits      = 100_000_000
)

// Coverage says what Check compared.
type Coverage struct {
	// Exhaustive: every subject with every peer and range of ports. Otherwise the
	// subjects were taken in a shuffled order, always the same, as far as the bounds
	// reach; each with what its crossings name and a sample of the rest.
	Exhaustive  bool
	Subjects    int // compared, of Identities
	Identities  int
	Comparisons int
}

func (c Coverage) String() string {
	if c.Exhaustive {
		return fmt.Sprintf("%d comparisons, exhaustive", c.Comparisons)
	}
	return fmt.Sprintf("%d comparisons, %d of %d subjects", c.Comparisons, c.Subjects, c.Identities)
}

// Check compares the tables of an image with Evaluate: every subject, direction,
// range of one port class, kind of proof, peer, class of addresses, and instant at
// which a window opens or closes. Where that would be more than some five million
// comparisons it takes a sample, and Coverage says so. It returns an error with
// the first difference.
func Check(p *Policy, img *image.Image) (Coverage, error) {
	c := checker{
		policy: p, evaluator: p.Evaluator(), index: img.Index(), ids: p.IDs(),
		identities: p.identities(), addresses: p.representativeAddresses(), instants: p.instants(),
	}
	for _, r := range img.Ports {
		c.ports = append(c.ports, image.Port{Proto: r.Proto, Number: r.Low})
	}
	n := len(c.identities)
	total := n * 2 * len(c.ports) * len(c.addresses) * len(c.instants) * (n + 3)
	c.cover = Coverage{Identities: n, Exhaustive: total <= min(maxComparisons, maxVisits/(1+len(p.Crossings)))}
	order := c.identities
	if !c.cover.Exhaustive {
		order = shuffled(c.identities)
	}
	for _, subject := range order {
		for _, direction := range [...]abi.Direction{abi.Egress, abi.Ingress} {
			if err := c.compare(subject, direction); err != nil {
				return c.cover, err
			}
			if !c.cover.Exhaustive && (c.cover.Comparisons >= maxSampled || c.visits >= maxVisits) {
				return c.cover, nil
			}
		}
		c.cover.Subjects++
	}
	return c.cover, nil
}

type checker struct {
	policy    *Policy
	evaluator *Evaluator
	index     *image.Index
	ids       map[string]image.ID
	visits    int
	cover     Coverage

	identities []image.ID
	ports      []image.Port
	addresses  []netip.Addr
	instants   []time.Time
}

// compare asks everything about one subject in one direction. Only crossings that
// have the subject on its side can matter to it, so the evaluator is given only
// those.
func (c *checker) compare(subject image.ID, direction abi.Direction) error {
	base := Query{Subject: subject, Direction: direction}
	facing := *c.policy
	facing.Crossings = nil
	var original []int // index in facing -> index in the policy
	for i := range c.policy.Crossings {
		if x := &c.policy.Crossings[i]; c.evaluator.has(subjectSide(x, base), subject) {
			facing.Crossings = append(facing.Crossings, *x)
			original = append(original, i)
		}
	}
	c.visits += len(c.policy.Crossings)
	evaluator := *c.evaluator
	evaluator.policy = &facing

	ports, peers := c.ports, c.identities
	if !c.cover.Exhaustive {
		ports, peers = c.near(&facing, base)
	}
	ask := func(q Query) error {
		c.cover.Comparisons++
		c.visits += 1 + len(facing.Crossings)
		want, got := evaluator.Evaluate(q), c.index.Decide(q)
		if want.Crossing >= 0 {
			want.Crossing = original[want.Crossing]
		}
		if want == got {
			return nil
		}
		return fmt.Errorf("image and policy differ: subject %d, %s, port %d/%d, address %s, proof %s %d, at %s: "+
			"the policy says %s, the image %s", q.Subject, q.Direction, q.Port.Proto, q.Port.Number, q.Address, q.Proof,
			q.Peer, q.Now.UTC().Format(time.RFC3339), c.policy.decision(want), c.policy.decision(got))
	}
	for _, port := range ports {
		for _, address := range c.addresses {
			for _, now := range c.instants {
				q := base
				q.Port, q.Address, q.Now = port, address, now
				for _, proof := range [...]abi.Proof{abi.ProofNone, abi.ProofUnknown, abi.ProofBad} {
					q.Proof, q.Bad = proof, abi.TagBadMAC
					if err := ask(q); err != nil {
						return err
					}
				}
				q.Proof, q.Bad = abi.ProofIdentity, abi.Undecided
				for _, q.Peer = range peers {
					if err := ask(q); err != nil {
						return err
					}
				}
			}
		}
	}
	return nil
}

// near is what the crossings that face a subject name, and a sample of the rest.
func (c *checker) near(facing *Policy, base Query) ([]image.Port, []image.ID) {
	const rest = 8
	ports := shuffled(c.ports)
	ports = ports[:min(rest, len(ports))]
	peers := shuffled(c.identities)
	peers = append(peers[:min(rest, len(peers))], image.Unmanaged)
	for i := range facing.Crossings {
		x := &facing.Crossings[i]
		for _, s := range x.Ports {
			ports = append(ports, image.Port{Proto: s.Proto, Number: s.Low}, image.Port{Proto: s.Proto, Number: s.High})
		}
		for _, t := range peerSide(x, base) {
			if t.Kind == image.TermWorkload {
				peers = append(peers, c.ids[t.Name])
			}
		}
	}
	slices.SortFunc(ports, func(a, b image.Port) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Number, b.Number))
	})
	slices.Sort(peers)
	return slices.Compact(ports), slices.Compact(peers)
}

// shuffled is a copy in an order that depends only on the length: any beginning
// of it is a fair sample, the same each time.
func shuffled[T any](all []T) []T {
	out := slices.Clone(all)
	r := rand.New(rand.NewPCG(uint64(len(all)), 0))
	r.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

func (p *Policy) decision(d Decision) string {
	if d.Crossing < 0 || d.Crossing >= len(p.Crossings) {
		return fmt.Sprintf("%s (%s)", d.Verdict, d.Reason)
	}
	return fmt.Sprintf("%s (%s %s)", d.Verdict, d.Reason, p.Crossings[d.Crossing].Name)
}

// identities are all that a question can name: the workloads, the reserved ones,
// and one that is nobody's.
func (p *Policy) identities() []image.ID {
	out := []image.ID{image.None, image.Unmanaged, image.Kernel, image.Pending, image.FirstID}
	for _, id := range p.IDs() {
		out = append(out, id)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// representativeAddresses is one address of each set of networks that contain an
// address together, and none at all. A set can only change where a block begins
// and behind its end, so those addresses are enough. Of very many it takes a
// sample.
func (p *Policy) representativeAddresses() []netip.Addr {
	out := []netip.Addr{{}}
	seen := map[string]bool{"": true}
	blocks := 1
	for i := range p.Networks {
		blocks += len(p.Networks[i].CIDRs)
	}
	edges := p.edges()
	if most := maxVisits / blocks; len(edges) > most {
		edges = shuffled(edges)[:most]
	}
	for _, a := range edges {
		var set strings.Builder
		for i := range p.Networks {
			if p.Networks[i].contains(a) {
				fmt.Fprintf(&set, "%d,", i)
			}
		}
		if key := set.String(); !seen[key] {
			seen[key] = true
			out = append(out, a)
		}
	}
	return out
}

// edges are the addresses at which a block of a network begins, or right behind
// its end.
func (p *Policy) edges() []netip.Addr {
	var out []netip.Addr
	for i := range p.Networks {
		for _, block := range p.Networks[i].CIDRs {
			out = append(out, block.Masked().Addr())
			if next := LastAddress(block).Next(); next.IsValid() && !next.Is4In6() {
				out = append(out, next)
			}
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// instants are the seconds at which a window opens or closes, those right before,
// and a time before all of them.
func (p *Policy) instants() []time.Time {
	out := []time.Time{time.Unix(1, 0)}
	for i := range p.Crossings {
		for _, t := range [...]time.Time{p.Crossings[i].Since, p.Crossings[i].Until} {
			if !t.IsZero() {
				out = append(out, t.Add(-time.Second), t)
			}
		}
	}
	slices.SortFunc(out, time.Time.Compare)
	return slices.CompactFunc(out, time.Time.Equal)
}
