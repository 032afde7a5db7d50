package policy

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// Compile makes the image of a policy. It is pure: the same policy gives the same
// image on every machine. It fails for a policy that would not fit the kernel's
// maps, so that nothing has to be left out when the image is loaded.
//
// The result is not trusted: Build and the agent compare it with Evaluate, and
// the core verifies it.
func Compile(p *Policy) (*image.Image, error) {
	c := compiler{policy: p, ids: p.IDs(), left: image.MaxExpansion, img: &image.Image{
		Name:              p.Name,
		Version:           p.Version,
		TrustDomain:       p.TrustDomain,
		Digest:            sha256.Sum256(p.Source),
		Mode:              p.Mode,
		UnmanagedOutbound: p.Unmanaged.Outbound,
		UnmanagedInbound:  p.Unmanaged.Inbound,
	}}
	for _, step := range []func() error{c.fit, c.units, c.declarations, c.crossings, c.classes, c.rules} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("compile policy %s: %w", p.Name, err)
		}
	}
	return c.img, nil
}

type compiler struct {
	policy *Policy
	img    *image.Image
	ids    map[string]image.ID
	left   budget

	zones, workloads, networks map[string]uint32 // name -> index

	portsOf     [][]uint16 // crossing -> port classes, ascending
	addressesOf [][]uint16 // network -> address classes, ascending
}

// fit checks the sizes that are known before anything is made.
func (c *compiler) fit() error {
	selectors, blocks := 0, 0
	for i := range c.policy.Workloads {
		selectors += len(c.policy.Workloads[i].Match)
	}
	for i := range c.policy.Networks {
		blocks += len(c.policy.Networks[i].CIDRs)
	}
	for _, b := range []struct {
		what     string
		n, limit int
	}{
		{"zones", len(c.policy.Zones), image.MaxZones},
		{"workloads", len(c.policy.Workloads), image.MaxWorkloads},
		{"networks", len(c.policy.Networks), image.MaxNetworks},
		{"crossings", len(c.policy.Crossings), image.MaxCrossings},
		{"selectors", selectors, image.MaxSelectors},
		{"address blocks", blocks, image.MaxPrefixes},
	} {
		if b.n > b.limit {
			return fmt.Errorf("%d %s, at most %d fit", b.n, b.what, b.limit)
		}
	}
	return nil
}

// units checks that the unit names fit their map. The kernel looks only at the
// entry of the longest beginning that a name has before its '*', so names with a
// shorter one take room in that entry too.
func (c *compiler) units() error {
	beginnings := map[string][]*Selector{}
	for i := range c.policy.Workloads {
		for j := range c.policy.Workloads[i].Match {
			s := &c.policy.Workloads[i].Match[j]
			if before, _, star := strings.Cut(s.Path, "*"); star && s.Kind == image.SelectUnit {
				beginnings[before] = append(beginnings[before], s)
			}
		}
	}
	for _, longest := range slices.Sorted(maps.Keys(beginnings)) {
		var all []string
		for i := range len(longest) + 1 {
			for _, s := range beginnings[longest[:i]] {
				all = append(all, fmt.Sprintf("%s (%s)", s.Path, c.policy.place(s.Pos)))
			}
		}
		if len(all) > abi.UnitAlternatives {
			return fmt.Errorf("a unit whose name begins with %q is looked up among %s; at most %d fit",
				longest, strings.Join(all, ", "), abi.UnitAlternatives)
		}
	}
	return nil
}

func (c *compiler) declarations() error {
	p, img := c.policy, c.img
	var err error
	if img.NotAfter, err = unixSeconds(p.NotAfter); err != nil {
		return fmt.Errorf("notAfter: %w", err)
	}
	c.zones = make(map[string]uint32, len(p.Zones))
	for i, z := range p.Zones {
		c.zones[z.Name] = uint32(i)
		img.Zones = append(img.Zones, image.Zone{Name: z.Name, Trust: z.Trust})
	}
	img.UnmanagedZone = uint16(c.zones[p.Unmanaged.Zone])

	c.workloads = make(map[string]uint32, len(p.Workloads))
	for i := range p.Workloads {
		w := &p.Workloads[i]
		c.workloads[w.Name] = uint32(i)
		compiled := image.Workload{Name: w.Name, ID: c.ids[w.Name], Zone: uint16(c.zones[w.Zone])}
		if compiled.ID == image.None {
			return fmt.Errorf("%s: workload %s: every number its name gives is taken; rename it", p.at(w.Pos), w.Name)
		}
		for _, r := range w.Roles {
			until, err := unixSeconds(r.Until)
			if err != nil {
				return fmt.Errorf("%s: role %s until: %w", p.at(r.Pos), r.Name, err)
			}
			compiled.Roles = append(compiled.Roles, image.Role{Name: r.Name, Until: until})
		}
		slices.SortFunc(compiled.Roles, func(a, b image.Role) int { return strings.Compare(a.Name, b.Name) })
		img.Workloads = append(img.Workloads, compiled)
		for j := range w.Match {
			img.Selectors = append(img.Selectors, compileSelector(uint32(i), &w.Match[j]))
		}
	}

	c.networks = make(map[string]uint32, len(p.Networks))
	for i := range p.Networks {
		n := &p.Networks[i]
		c.networks[n.Name] = uint32(i)
		compiled := image.Network{Name: n.Name, Zone: uint16(c.zones[n.Zone])}
		for _, block := range n.CIDRs {
			if !block.IsValid() || block.Addr().Is4In6() {
				return fmt.Errorf("%s: network %s: %s is not an IPv4 or plain IPv6 block", p.at(n.Pos), n.Name, block)
			}
			compiled.CIDRs = append(compiled.CIDRs, block.Masked())
		}
		slices.SortFunc(compiled.CIDRs, comparePrefixes)
		compiled.CIDRs = slices.CompactFunc(compiled.CIDRs, func(a, b netip.Prefix) bool { return a == b })
		img.Networks = append(img.Networks, compiled)
	}
	return nil
}

func compileSelector(workload uint32, s *Selector) image.Selector {
	out := image.Selector{
		Workload: workload, Kind: s.Kind, Path: s.Path, Namespace: s.Namespace,
		ServiceAccount: s.ServiceAccount, Name: s.Name, Image: s.Image,
	}
	for k, v := range s.Labels {
		out.Labels = append(out.Labels, image.Label{Key: k, Value: v})
	}
	slices.SortFunc(out.Labels, func(a, b image.Label) int { return strings.Compare(a.Key, b.Key) })
	return out
}

func (c *compiler) crossings() error {
	p := c.policy
	number := numbers(p.Crossings)
	if len(p.Crossings) > 0 {
		c.img.Crossings = make([]image.Crossing, len(p.Crossings))
	}
	for i := range p.Crossings {
		x := &p.Crossings[i]
		if number[i] == 0 {
			return fmt.Errorf("%s: crossing %s: every number its name gives is taken; rename it", p.at(x.Pos), x.Name)
		}
		since, err := unixSeconds(x.Since)
		if err != nil {
			return fmt.Errorf("%s: crossing %s: since: %w", p.at(x.Pos), x.Name, err)
		}
		until, err := unixSeconds(x.Until)
		if err != nil {
			return fmt.Errorf("%s: crossing %s: until: %w", p.at(x.Pos), x.Name, err)
		}
		c.img.Crossings[i] = image.Crossing{
			Name: x.Name, Number: number[i], Line: uint32(x.Pos.Line),
			From: c.terms(x.From), To: c.terms(x.To), Ports: normalSpans(x.Ports),
			Need: x.Need, NAT: x.NAT, Side: x.Side, Log: x.Log, Refuse: x.Refuse, Decoy: x.Decoy, Forensic: x.Forensic,
			Rate: x.Rate, Burst: x.Burst, Since: since, Until: until, Purpose: x.Purpose,
		}
	}
	return nil
}

func (c *compiler) terms(terms []Term) []image.Term {
	out := make([]image.Term, 0, len(terms))
	for _, t := range terms {
		compiled := image.Term{Kind: t.Kind}
		switch t.Kind {
		case image.TermWorkload:
			compiled.Index = c.workloads[t.Name]
		case image.TermZone:
			compiled.Index = c.zones[t.Name]
		case image.TermNetwork:
			compiled.Index = c.networks[t.Name]
		}
		out = append(out, compiled)
	}
	slices.SortFunc(out, func(a, b image.Term) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Index, b.Index))
	})
	return slices.Compact(out)
}

func (c *compiler) classes() (err error) {
	if c.img.Ports, c.portsOf, err = portClasses(c.img.Crossings, &c.left); err != nil {
		return err
	}
	c.img.Addresses, c.addressesOf, err = addressClasses(c.img.Networks, &c.left)
	return err
}

// An entry is one crossing that admits one key of a subject, packed so that
// sorting entries sorts them as image.RuleKey and then by crossing: peer kind in
// 3 bits, its value in 24, port class in 15, direction in 1, crossing in 20.
const (
	crossingBits  = 20
	directionBits = 1
	classBits     = 15
)

// rules makes the rules one subject after the other, so that only one subject's
// entries are in memory and each sort is small.
func (c *compiler) rules() error {
	facing := c.facing()
	peers := [2][][]uint64{image.Egress: c.peers(image.Egress), image.Ingress: c.peers(image.Ingress)}
	var entries []uint64
	var mine []uint32
	for _, s := range c.subjects() {
		entries = entries[:0]
		for d := range facing {
			mine = mine[:0]
			for _, list := range s.lists {
				mine = append(mine, facing[d][list]...)
			}
			slices.Sort(mine)
			mine = slices.Compact(mine)
			for _, i := range mine {
				terms := len(c.img.Crossings[i].From) + len(c.img.Crossings[i].To)
				if err := c.left.spend(terms + len(peers[d][i])*len(c.portsOf[i])); err != nil {
					return err
				}
				for _, class := range c.portsOf[i] {
					low := uint64(class)<<(directionBits+crossingBits) | uint64(d)<<crossingBits | uint64(i)
					for _, p := range peers[d][i] {
						entries = append(entries, p<<(classBits+directionBits+crossingBits)|low)
					}
				}
			}
		}
		slices.Sort(entries)
		if err := c.reduce(s.id, entries); err != nil {
			return err
		}
	}
	return nil
}

// reduce turns the sorted entries of one subject into rules. A crossing behind
// one that is always open can never decide, and is left out.
func (c *compiler) reduce(subject image.ID, entries []uint64) error {
	alternatives := make([]uint32, 0, len(entries))
	for len(entries) > 0 {
		key := entries[0] >> crossingBits
		start, open := len(alternatives), false
		for ; len(entries) > 0 && entries[0]>>crossingBits == key; entries = entries[1:] {
			i := uint32(entries[0] & (1<<crossingBits - 1))
			if !open {
				alternatives = append(alternatives, i)
				open = c.img.Crossings[i].Since == 0 && c.img.Crossings[i].Until == 0
			}
		}
		list := alternatives[start:len(alternatives):len(alternatives)]
		if len(list) > image.MaxAlternatives {
			return fmt.Errorf("crossings %s are limited in time and declare the same flow; at most %d can", c.list(list), image.MaxAlternatives)
		}
		if len(c.img.Rules) == image.MaxRules {
			return fmt.Errorf("more than %d rules; name zones instead of many workloads, or fewer ports", image.MaxRules)
		}
		peer := key >> (classBits + directionBits)
		c.img.Rules = append(c.img.Rules, image.Rule{
			RuleKey: image.RuleKey{
				Subject:   subject,
				Peer:      image.MakePeer(image.PeerKind(peer>>24), uint32(peer)),
				Class:     uint16(key>>directionBits) & (1<<classBits - 1),
				Direction: image.Direction(key & 1),
			},
			Crossings: list,
		})
	}
	return nil
}

// subject is an identity with the lists of crossings that face it.
type subject struct {
	id    image.ID
	lists []int // see facing
}

// subjects are the workloads and the unmanaged processes, by identity.
func (c *compiler) subjects() []subject {
	workloads, zones := len(c.img.Workloads), len(c.img.Zones)
	out := []subject{{image.Unmanaged, []int{workloads + zones, workloads + zones + 1}}}
	for i := range c.img.Workloads {
		w := &c.img.Workloads[i]
		out = append(out, subject{w.ID, []int{i, workloads + int(w.Zone), workloads + zones + 1}})
	}
	slices.SortFunc(out, func(a, b subject) int { return cmp.Compare(a.id, b.id) })
	return out
}

// facing lists the crossings by the terms on the subject's side: each workload,
// then each zone, then unmanaged, then any. Networks never name a subject.
func (c *compiler) facing() [2][][]uint32 {
	workloads, zones := len(c.img.Workloads), len(c.img.Zones)
	var out [2][][]uint32
	for d := range out {
		out[d] = make([][]uint32, workloads+zones+2)
		for i := range c.img.Crossings {
			if !c.img.Crossings[i].Side.HoldsAt(image.Direction(d)) {
				continue
			}
			side := c.img.Crossings[i].From
			if image.Direction(d) == image.Ingress {
				side = c.img.Crossings[i].To
			}
			for _, t := range side {
				at := -1
				switch t.Kind {
				case image.TermWorkload:
					at = int(t.Index)
				case image.TermZone:
					at = workloads + int(t.Index)
				case image.TermUnmanaged:
					at = workloads + zones
				case image.TermAny:
					at = workloads + zones + 1
				}
				if at >= 0 {
					out[d][at] = append(out[d][at], uint32(i))
				}
			}
		}
	}
	return out
}

// peers lists for each crossing how its other side is looked up.
func (c *compiler) peers(d image.Direction) [][]uint64 {
	out := make([][]uint64, len(c.img.Crossings))
	var arena []uint64
	for i := range c.img.Crossings {
		side := c.img.Crossings[i].To
		if d == image.Ingress {
			side = c.img.Crossings[i].From
		}
		start := len(arena)
		proven := false
		for _, t := range side {
			switch t.Kind {
			case image.TermWorkload:
				arena, proven = append(arena, peer(image.PeerIdentity, uint32(c.img.Workloads[t.Index].ID))), true
			case image.TermZone:
				arena, proven = append(arena, peer(image.PeerZone, t.Index)), true
			case image.TermNetwork:
				for _, class := range c.addressesOf[t.Index] {
					arena = append(arena, peer(image.PeerAddress, uint32(class)))
				}
			case image.TermUnmanaged:
				arena = append(arena, peer(image.PeerIdentity, uint32(image.Unmanaged)))
			case image.TermAny:
				arena = append(arena, peer(image.PeerAny, 0))
			}
		}
		if proven {
			arena = append(arena, peer(image.PeerProven, 0))
		}
		// Two networks of one crossing can share an address class.
		slices.Sort(arena[start:])
		arena = arena[:start+len(slices.Compact(arena[start:]))]
		out[i] = arena[start:len(arena):len(arena)]
	}
	return out
}

func peer(k image.PeerKind, v uint32) uint64 { return uint64(image.MakePeer(k, v)) }

func (c *compiler) list(crossings []uint32) string {
	var out []string
	for _, i := range crossings {
		x := &c.policy.Crossings[i]
		out = append(out, fmt.Sprintf("%s (%s)", x.Name, c.policy.at(x.Pos)))
	}
	return strings.Join(out, ", ")
}

// at is a place in the policy's file, for messages.
func (p *Policy) at(pos Pos) string {
	return fmt.Sprintf("%s:%d:%d", p.File, pos.Line, pos.Column)
}

// unixSeconds converts a time that an image can hold; the zero time is 0.
func unixSeconds(t time.Time) (int64, error) {
	switch {
	case t.IsZero():
		return 0, nil
	case t.Nanosecond() != 0:
		return 0, fmt.Errorf("%s is not a whole second", t.Format(time.RFC3339Nano))
	case t.Unix() <= 0:
		return 0, fmt.Errorf("%s is before 1970", t.Format(time.RFC3339))
	}
	return t.Unix(), nil
}
