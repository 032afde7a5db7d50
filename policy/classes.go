package policy

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/demarc/demarc/policy/image"
)

// budget is how many combinations of subject, peer, ports and crossing may still
// be made. One budget bounds the whole compilation, as it bounds Verify.
type budget int

func (b *budget) spend(n int) error {
	if *b -= budget(n); *b < 0 {
		return fmt.Errorf("more than %d combinations of subject, peer, ports and crossing; "+
			"name zones instead of many workloads, or declare fewer different ports", image.MaxExpansion)
	}
	return nil
}

// normalSpans sorts spans and joins what overlaps or touches.
func normalSpans(spans []image.Span) []image.Span {
	sorted := slices.Clone(spans)
	slices.SortFunc(sorted, func(a, b image.Span) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Low, b.Low))
	})
	out := sorted[:0]
	for _, s := range sorted {
		if n := len(out); n > 0 && out[n-1].Proto == s.Proto && uint32(s.Low) <= uint32(out[n-1].High)+1 {
			out[n-1].High = max(out[n-1].High, s.High)
		} else {
			out = append(out, s)
		}
	}
	return out
}

// portClasses parts all ports into classes: two ports share one when the same
// crossings cover both. The result is the ranges, and for each crossing its
// classes, ascending.
//
// The sweep keeps one 128-bit sum of the crossings that cover the current port:
// each port list adds its hash where a span begins and takes it away behind the
// end, so equal sums mean equal sets without ever writing a set down. Verify,
// which does write them down, would refuse the image if two sets had one sum.
func portClasses(crossings []image.Crossing, left *budget) ([]image.PortRange, [][]uint16, error) {
	type edge struct {
		port uint32 // 65536 = behind the last
		list int32
	}
	var (
		edges  [256][]edge // by protocol
		lists  [][]image.Span
		sums   [][2]uint64
		listOf = make([]int32, len(crossings))
		known  = map[string]int32{}
		key    []byte
	)
	for i := range crossings {
		key = key[:0]
		for _, s := range crossings[i].Ports {
			key = append(key, byte(s.Proto), byte(s.Low>>8), byte(s.Low), byte(s.High>>8), byte(s.High))
		}
		list, seen := known[string(key)]
		if !seen {
			list = int32(len(lists))
			known[string(key)] = list
			lists = append(lists, crossings[i].Ports)
			sum := sha256.Sum256(key)
			sums = append(sums, [2]uint64{binary.BigEndian.Uint64(sum[:]), binary.BigEndian.Uint64(sum[8:])})
			for _, s := range crossings[i].Ports {
				edges[s.Proto] = append(edges[s.Proto], edge{uint32(s.Low), list}, edge{uint32(s.High) + 1, list})
			}
		}
		listOf[i] = list
	}

	var ranges []image.PortRange
	classes := map[[2]uint64]uint16{}
	for _, proto := range image.Protos {
		last, _ := proto.Last()
		edges := edges[proto]
		slices.SortFunc(edges, func(a, b edge) int { return cmp.Compare(a.port, b.port) })
		first := len(ranges)
		var sum [2]uint64
		for low := uint32(0); low <= uint32(last); {
			for ; len(edges) > 0 && edges[0].port == low; edges = edges[1:] {
				sum[0] ^= sums[edges[0].list][0]
				sum[1] ^= sums[edges[0].list][1]
			}
			high := uint32(last)
			if len(edges) > 0 {
				high = min(high, edges[0].port-1)
			}
			class, seen := classes[sum]
			if !seen {
				if len(classes) == image.MaxPortClasses {
					return nil, nil, fmt.Errorf("crossings tell more than %d classes of ports apart", image.MaxPortClasses)
				}
				class = uint16(len(classes))
				classes[sum] = class
			}
			if n := len(ranges); n > first && ranges[n-1].Class == class {
				ranges[n-1].High = uint16(high)
			} else {
				ranges = append(ranges, image.PortRange{
					Span: image.Span{Proto: proto, Low: uint16(low), High: uint16(high)}, Class: class,
				})
			}
			low = high + 1
		}
	}

	ofList := make([][]uint16, len(lists))
	sizes := make([]int, len(lists))
	for i, list := range lists {
		var covered []uint16
		for _, s := range list {
			at, _ := slices.BinarySearchFunc(ranges, s, func(r image.PortRange, s image.Span) int {
				return cmp.Or(cmp.Compare(r.Proto, s.Proto), cmp.Compare(r.Low, s.Low))
			})
			for ; at < len(ranges) && ranges[at].Proto == s.Proto && ranges[at].Low <= s.High; at++ {
				covered = append(covered, ranges[at].Class)
			}
		}
		if sizes[i] = len(covered); sizes[i] > int(*left) {
			return nil, nil, left.spend(sizes[i])
		}
		slices.Sort(covered)
		ofList[i] = slices.Compact(covered)
	}
	out := make([][]uint16, len(crossings))
	for i, list := range listOf {
		if err := left.spend(sizes[list]); err != nil {
			return nil, nil, err
		}
		out[i] = ofList[list]
	}
	return ranges, out, nil
}

// addressClasses parts all addresses into classes: two addresses share one when
// they lie in the same networks. The result is the prefixes, and for each network
// the classes inside it, ascending.
func addressClasses(networks []image.Network, left *budget) ([]image.Prefix, [][]uint16, error) {
	owners := map[netip.Prefix][]uint32{}
	var blocks []netip.Prefix
	for i := range networks {
		for _, p := range networks[i].CIDRs {
			if owners[p] == nil {
				blocks = append(blocks, p)
			}
			owners[p] = append(owners[p], uint32(i))
		}
	}
	slices.SortFunc(blocks, comparePrefixes)

	inside := make([][]uint16, len(networks))
	classes := map[string]uint16{} // networks, four bytes each -> class
	sets := make(map[netip.Prefix][]uint32, len(blocks))
	prefixes := make([]image.Prefix, 0, len(blocks))
	var key []byte
	for _, p := range blocks {
		set := slices.Clone(owners[p])
		for length := p.Bits() - 1; length >= 0; length-- {
			// The nearest block around this one already knows all that are farther out.
			if around, listed := sets[netip.PrefixFrom(p.Addr(), length).Masked()]; listed {
				set = append(set, around...)
				break
			}
		}
		slices.Sort(set)
		set = slices.Compact(set)
		sets[p] = set
		if err := left.spend(len(set)); err != nil {
			return nil, nil, err
		}

		key = key[:0]
		for _, n := range set {
			key = binary.BigEndian.AppendUint32(key, n)
		}
		class, seen := classes[string(key)]
		if !seen {
			class = uint16(len(classes) + 1) // class 0 is no network
			if int(class) >= image.MaxAddrClasses {
				return nil, nil, fmt.Errorf("networks tell more than %d classes of addresses apart", image.MaxAddrClasses-1)
			}
			classes[string(key)] = class
			for _, n := range set {
				inside[n] = append(inside[n], class)
			}
		}
		prefixes = append(prefixes, image.Prefix{Prefix: p, Class: class})
	}
	if len(prefixes) == 0 {
		prefixes = nil
	}
	return prefixes, inside, nil
}

// comparePrefixes orders by address, IPv4 as v4-mapped, then by length.
func comparePrefixes(a, b netip.Prefix) int {
	x, y := a.Addr().As16(), b.Addr().As16()
	return cmp.Or(slices.Compare(x[:], y[:]), cmp.Compare(a.Bits(), b.Bits()))
}

// LastAddress is the highest address of a block.
func LastAddress(block netip.Prefix) netip.Addr {
	b := block.Addr().AsSlice()
	for bit := block.Bits(); bit < 8*len(b); bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}
