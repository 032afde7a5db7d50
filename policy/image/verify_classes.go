package image

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// portClasses checks that the ranges part each protocol without a gap, and that
// no crossing covers a class in part: then a class answers for all its ports.
func (v *verifier) portClasses() error {
	ranges := v.img.Ports
	size := []int{} // class -> ranges
	i := 0
	for _, proto := range Protos {
		last, _ := proto.Last()
		for low := uint32(0); low <= uint32(last); i++ {
			if i == len(ranges) {
				return fmt.Errorf("ports: %d of protocol %d has no class", low, proto)
			}
			r := ranges[i]
			if r.Proto != proto || uint32(r.Low) != low || r.High < r.Low || r.High > last {
				return fmt.Errorf("ports: range %d does not continue protocol %d at %d", i, proto, low)
			}
			if low > 0 && ranges[i-1].Class == r.Class {
				return fmt.Errorf("ports: range %d continues its class", i)
			}
			switch {
			case int(r.Class) > len(size), int(r.Class) >= MaxPortClasses:
				return fmt.Errorf("ports: range %d has class %d, the next is %d", i, r.Class, len(size))
			case int(r.Class) == len(size):
				size = append(size, 1)
			default:
				size[r.Class]++
			}
			low = uint32(r.High) + 1
		}
	}
	if i != len(ranges) {
		return fmt.Errorf("ports: %d ranges too many", len(ranges)-i)
	}
	return v.cover(size)
}

// cover finds the classes of each crossing. size is how many ranges a class has.
func (v *verifier) cover(size []int) error {
	v.classesOf = make([][]uint16, len(v.img.Crossings))
	found := make([]int, len(size))
	var all []uint16 // those of many crossings, one behind the other
	for i := range v.img.Crossings {
		c := &v.img.Crossings[i]
		classes := all[len(all):]
		for _, s := range c.Ports {
			at, _ := slices.BinarySearchFunc(v.img.Ports, s, func(r PortRange, s Span) int {
				return cmp.Or(cmp.Compare(r.Proto, s.Proto), cmp.Compare(r.Low, s.Low))
			})
			for low := uint32(s.Low); low <= uint32(s.High); at++ {
				if at == len(v.img.Ports) || uint32(v.img.Ports[at].Low) != low || v.img.Ports[at].High > s.High {
					return fmt.Errorf("crossing %q covers a part of a port range", c.Name)
				}
				classes = append(classes, v.img.Ports[at].Class)
				low = uint32(v.img.Ports[at].High) + 1
			}
		}
		if err := v.spend(len(classes)); err != nil {
			return err
		}
		for _, class := range classes {
			found[class]++
		}
		for _, class := range classes {
			if found[class] != 0 && found[class] != size[class] {
				return fmt.Errorf("crossing %q covers a part of port class %d", c.Name, class)
			}
			found[class] = 0
		}
		slices.Sort(classes)
		classes = slices.Compact(classes)
		v.classesOf[i] = classes[:len(classes):len(classes)]
		all = classes
	}
	return nil
}

// addressClasses checks that the prefixes are the blocks of the networks, each
// once, and that prefixes of one class lie in the same networks.
func (v *verifier) addressClasses() error {
	type block struct {
		prefix  netip.Prefix
		network uint32
	}
	var blocks []block
	for i := range v.img.Networks {
		for _, p := range v.img.Networks[i].CIDRs {
			blocks = append(blocks, block{p, uint32(i)})
		}
	}
	slices.SortFunc(blocks, func(a, b block) int {
		return cmp.Or(comparePrefixes(a.prefix, b.prefix), cmp.Compare(a.network, b.network))
	})

	// Inside is a prefix with all networks that contain it. The enclosing ones are
	// those of an IPv4 and an IPv6 chain, because ::/0 does not contain IPv4.
	type inside struct {
		prefix   netip.Prefix
		networks []uint32
	}
	var chains [2][]inside
	members := [][]uint32{nil} // class -> networks
	at := 0
	for len(blocks) > 0 {
		p := blocks[0].prefix
		chain := &chains[0]
		if p.Addr().Is6() {
			chain = &chains[1]
		}
		for n := len(*chain); n > 0 && !(*chain)[n-1].prefix.Contains(p.Addr()); n-- {
			*chain = (*chain)[:n-1]
		}
		var networks []uint32
		if n := len(*chain); n > 0 {
			networks = slices.Clone((*chain)[n-1].networks)
		}
		for ; len(blocks) > 0 && blocks[0].prefix == p; blocks = blocks[1:] {
			networks = append(networks, blocks[0].network)
		}
		slices.Sort(networks)
		networks = slices.Compact(networks)
		*chain = append(*chain, inside{p, networks})
		if err := v.spend(len(networks)); err != nil {
			return err
		}

		if at == len(v.img.Addresses) || v.img.Addresses[at].Prefix != p {
			return fmt.Errorf("addresses: %s is not entry %d", p, at)
		}
		class := int(v.img.Addresses[at].Class)
		switch {
		case class == 0, class > len(members), class >= MaxAddrClasses:
			return fmt.Errorf("addresses: %s has class %d, the next is %d", p, class, len(members))
		case class == len(members):
			members = append(members, networks)
		case !slices.Equal(members[class], networks):
			return fmt.Errorf("addresses: %s is not in the networks of class %d", p, class)
		}
		at++
	}
	if at != len(v.img.Addresses) {
		return fmt.Errorf("addresses: %s is in no network", v.img.Addresses[at].Prefix)
	}

	v.addressesOf = make([][]uint16, len(v.img.Networks))
	for class, networks := range members {
		for _, n := range networks {
			v.addressesOf[n] = append(v.addressesOf[n], uint16(class))
		}
	}
	return nil
}
