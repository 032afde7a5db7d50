package policy

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/demarc/demarc/policy/image"
)

// parted reads the image's classes of ports, which must part each protocol without a
// gap, as Verify demands; and checks that crossings keep to ports that there are.
func (c *checker) parted() error {
	at := 0
	for _, proto := range image.Protos {
		last, _ := proto.Last()
		for low := uint32(0); low <= uint32(last); at++ {
			if at == len(c.img.Ports) {
				return fmt.Errorf("image and policy differ: port %d/%d has no class", proto, low)
			}
			r := c.img.Ports[at]
			if r.Proto != proto || uint32(r.Low) != low || r.High < r.Low || r.High > last {
				return fmt.Errorf("image and policy differ: ports %d-%d of protocol %d do not continue protocol %d at %d",
					r.Low, r.High, r.Proto, proto, low)
			}
			c.ranges[r.Class] = append(c.ranges[r.Class], r.Span)
			low = uint32(r.High) + 1
		}
	}
	if at != len(c.img.Ports) {
		return fmt.Errorf("image and policy differ: %d ranges of ports too many", len(c.img.Ports)-at)
	}
	for i := range c.policy.Crossings {
		for _, s := range c.policy.Crossings[i].Ports {
			if last, known := s.Proto.Last(); !known || s.Low > s.High || s.High > last {
				return fmt.Errorf("crossing %s: ports %d-%d of protocol %d are not valid", c.policy.Crossings[i].Name, s.Low, s.High, s.Proto)
			}
		}
	}
	return nil
}

// pieces finds a port for each pair of a set of facing crossings that cover it and a
// class with rules; all classes without rules count as one. ruled are the subject's
// rules by class.
func (c *checker) pieces(facing []int32, ruled map[uint16][]*image.Rule) []piece {
	var out []piece
	seen := map[string]bool{}
	var key []byte
	add := func(port image.Port, class uint16, crossings []int32) {
		rules := ruled[class]
		key = key[:0]
		if rules != nil {
			key = append(key, byte(class), byte(class>>8))
		}
		for _, i := range crossings {
			key = binary.LittleEndian.AppendUint32(key, uint32(i))
		}
		if !seen[string(key)] { // a class takes two bytes and a crossing four, so no two pairs look alike
			seen[string(key)] = true
			out = append(out, piece{port, crossings, rules})
		}
	}

	// From one edge of a span to the next, the same crossings cover each port.
	type edge struct {
		proto    image.Proto
		port     uint32 // 65536 = behind the last
		crossing int32
		begins   bool
	}
	var edges []edge
	for _, i := range facing {
		for _, s := range c.policy.Crossings[i].Ports {
			edges = append(edges, edge{s.Proto, uint32(s.Low), i, true}, edge{s.Proto, uint32(s.High) + 1, i, false})
		}
	}
	slices.SortFunc(edges, func(a, b edge) int { return cmp.Or(cmp.Compare(a.proto, b.proto), cmp.Compare(a.port, b.port)) })
	spans := map[int32]int{} // crossing -> spans of it that cover the port; a policy may write them twice
	var covered []image.Span // ascending, disjoint
	for n := 0; n < len(edges); {
		proto, low := edges[n].proto, edges[n].port
		for ; n < len(edges) && edges[n].proto == proto && edges[n].port == low; n++ {
			if edges[n].begins {
				spans[edges[n].crossing]++
			} else if spans[edges[n].crossing]--; spans[edges[n].crossing] == 0 {
				delete(spans, edges[n].crossing)
			}
		}
		if len(spans) == 0 {
			continue
		}
		high := edges[n].port - 1 // what begins has an end
		covered = append(covered, image.Span{Proto: proto, Low: uint16(low), High: uint16(high)})
		crossings := make([]int32, 0, len(spans))
		for i := range spans {
			crossings = append(crossings, i)
		}
		slices.Sort(crossings)
		for at := c.rangeOf(image.Port{Proto: proto, Number: uint16(low)}); ; at++ {
			r := c.img.Ports[at]
			add(image.Port{Proto: proto, Number: max(r.Low, uint16(low))}, r.Class, crossings)
			if uint32(r.High) >= high {
				break
			}
		}
	}

	// A port of each class with rules that no crossing covers.
	for class := range ruled {
		for _, s := range c.ranges[class] {
			if port, found := uncovered(covered, s); found {
				add(port, class, nil)
				break
			}
		}
	}
	// And one of all other classes together.
	for _, r := range c.img.Ports {
		if ruled[r.Class] != nil {
			continue
		}
		if port, found := uncovered(covered, r.Span); found {
			add(port, r.Class, nil)
			break
		}
	}
	return out
}

// rangeOf is the place of the range that a port lies in.
func (c *checker) rangeOf(p image.Port) int {
	i, _ := slices.BinarySearchFunc(c.img.Ports, p, func(r image.PortRange, p image.Port) int {
		return cmp.Or(cmp.Compare(r.Proto, p.Proto), cmp.Compare(r.High, p.Number))
	})
	return i
}

// uncovered finds a port of a span outside of spans that are ascending and disjoint.
func uncovered(covered []image.Span, s image.Span) (image.Port, bool) {
	i, _ := slices.BinarySearchFunc(covered, s, func(c, s image.Span) int {
		return cmp.Or(cmp.Compare(c.Proto, s.Proto), cmp.Compare(c.High, s.Low))
	})
	low := uint32(s.Low)
	for ; i < len(covered) && covered[i].Proto == s.Proto && uint32(covered[i].Low) <= low; i++ {
		low = max(low, uint32(covered[i].High)+1)
	}
	return image.Port{Proto: s.Proto, Number: uint16(low)}, low <= uint32(s.High)
}

// A cell is an address that stands for all of its class that lie in the same networks
// of the policy.
type cell struct {
	address  netip.Addr // the zero Addr: no address, in no network
	class    uint16
	networks []string
	inside   map[string]bool // networks, for the evaluator; not nil
}

// addresses finds the cells. Where blocks begin and right behind their ends, and
// nowhere else, an address can come into or leave a network of the policy or a prefix
// of the image. IPv4 addresses lie before all others, and those that IPv6 maps to them
// are the same addresses: what follows behind those is asked about by itself.
func (c *checker) addresses() {
	type block struct {
		prefix  netip.Prefix
		network int32
	}
	var blocks []block
	edges := []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified(), netip.MustParseAddr("::1:0:0:0")}
	bound := func(p netip.Prefix) {
		edges = append(edges, p.Addr())
		if next := LastAddress(p).Next(); next.IsValid() {
			edges = append(edges, next)
		}
	}
	for i := range c.policy.Networks {
		for _, p := range c.policy.Networks[i].CIDRs {
			if p = p.Masked(); p.IsValid() && !p.Addr().Is4In6() {
				blocks = append(blocks, block{p, int32(i)})
				bound(p)
			}
		}
	}
	for _, p := range c.img.Addresses {
		if p := p.Prefix.Masked(); p.IsValid() {
			bound(p)
		}
	}
	edges = slices.DeleteFunc(edges, netip.Addr.Is4In6)
	slices.SortFunc(edges, netip.Addr.Compare)
	slices.SortFunc(blocks, func(a, b block) int {
		return cmp.Or(a.prefix.Addr().Compare(b.prefix.Addr()), cmp.Compare(a.prefix.Bits(), b.prefix.Bits()))
	})

	c.inClass, c.inside = map[uint16][]int{}, map[string][]int{}
	c.cells = []cell{{inside: map[string]bool{}}}
	c.inClass[0] = []int{0}
	seen := map[string]bool{}
	var around []block // that contain the edge, the widest first: blocks never overlap in part
	var key []byte
	for _, edge := range slices.Compact(edges) {
		for len(around) > 0 && !around[len(around)-1].prefix.Contains(edge) {
			around = around[:len(around)-1]
		}
		for ; len(blocks) > 0 && blocks[0].prefix.Addr() == edge; blocks = blocks[1:] {
			around = append(around, blocks[0])
		}
		class := c.index.AddressClass(edge)
		networks := make([]int32, 0, len(around))
		for _, b := range around {
			networks = append(networks, b.network)
		}
		slices.Sort(networks)
		networks = slices.Compact(networks)
		key = binary.LittleEndian.AppendUint16(key[:0], class)
		for _, n := range networks {
			key = binary.LittleEndian.AppendUint32(key, uint32(n))
		}
		if seen[string(key)] {
			continue
		}
		seen[string(key)] = true
		cell := cell{address: edge, class: class, inside: make(map[string]bool, len(networks))}
		for _, n := range networks {
			name := c.policy.Networks[n].Name
			cell.networks = append(cell.networks, name)
			cell.inside[name] = true
			c.inside[name] = append(c.inside[name], len(c.cells))
		}
		c.inClass[class] = append(c.inClass[class], len(c.cells))
		c.cells = append(c.cells, cell)
	}
}

// placesOf are the cells in networks that crossings of a piece name, those of classes
// that its rules name, and one that is in none of them.
func (c *checker) placesOf(p piece) []int {
	c.places = append(c.places[:0], 0)
	for i, s := range c.sides {
		if s.kind == meet(image.TermNetwork) && (i == 0 || c.sides[i-1].kind != s.kind || c.sides[i-1].name != s.name) {
			c.places = append(c.places, c.inside[s.name]...)
		}
	}
	unlisted := false // class 0, which has no prefix, has a rule all the same
	for _, r := range p.rules {
		if r.Peer.Kind() == image.PeerAddress && r.Peer.Value() <= 0xffff {
			c.places = append(c.places, c.inClass[uint16(r.Peer.Value())]...)
			unlisted = unlisted || r.Peer.Value() == 0
		}
	}
	slices.Sort(c.places)
	c.places = slices.Compact(c.places)
	if unlisted { // then no address at all is not like the others
		for place := range c.cells {
			if _, taken := slices.BinarySearch(c.places, place); !taken {
				return append(c.places, place)
			}
		}
	}
	return c.places
}

// maxRepresented bounds how often representativeAddresses looks at a block.
const maxRepresented = 100_000_000

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
	if most := maxRepresented / blocks; len(edges) > most {
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
