package policy

import (
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"slices"

	"github.com/demarc/demarc/policy/image"
)

// A Memory remembers of which subjects an image was found to decide as it declares, so
// that the next image is asked only about those for whom something is different. The
// zero value remembers nobody. It is not for concurrent use.
//
// What both judges answer about a subject depends on who and what there is (workloads,
// zones, networks, classes of addresses, what unmanaged processes may do), on the
// crossings that face it, in their order, and on its rules with the ports that their
// classes stand for. All that is kept is one number made of that; who does not know the
// seed cannot look for two policies of the same number.
type Memory struct {
	seed   maphash.Seed
	common uint64              // of what all subjects depend on
	passed map[image.ID]uint64 // of what each depends on
}

// Check compares the answers of an image's tables with those of the policy that the
// image declares, as the package's Check does with a policy's text.
func (m *Memory) Check(img *image.Image) (Coverage, error) {
	declared, err := Declared(img)
	if err != nil {
		return Coverage{}, fmt.Errorf("read the declared policy: %w", err)
	}
	c, err := newChecker(declared, img)
	if err != nil {
		return Coverage{}, err
	}
	if m.passed == nil {
		m.seed = maphash.MakeSeed()
	}
	d := newDependence(c, m.seed)
	before := m.passed
	if d.common() != m.common {
		before = nil
	}
	now := make(map[image.ID]uint64, len(declared.Workloads)+1)
	cover, err := c.all(d, len(declared.Workloads) > everySubject, func(id image.ID, number uint64) bool {
		now[id] = number
		was, passed := before[id]
		return passed && was == number
	})
	if err != nil {
		return cover, err
	}
	m.common, m.passed = d.common(), now
	return cover, nil
}

// dependence makes numbers of what answers depend on.
type dependence struct {
	*checker
	seed      maphash.Seed
	crossings []uint64
	classes   map[uint16]uint64 // of ports
	all       uint64
	buffer    []byte
}

func newDependence(c *checker, seed maphash.Seed) *dependence {
	d := &dependence{checker: c, seed: seed, crossings: make([]uint64, len(c.img.Crossings)), classes: make(map[uint16]uint64, len(c.ranges))}
	for i := range c.img.Crossings {
		x := &c.img.Crossings[i]
		d.begin()
		d.text(x.Name)
		d.numbers(uint64(x.Since), uint64(x.Until), uint64(x.Need))
		for _, terms := range [][]image.Term{x.From, x.To} {
			d.numbers(uint64(len(terms)))
			for _, t := range terms {
				d.numbers(uint64(t.Kind)<<32 | uint64(t.Index))
			}
		}
		d.spans(x.Ports)
		d.crossings[i] = d.end()
	}
	for class, spans := range c.ranges {
		d.begin()
		d.spans(spans)
		d.classes[class] = d.end()
	}
	return d
}

// common is the number of what all subjects depend on.
func (d *dependence) common() uint64 {
	if d.all != 0 {
		return d.all
	}
	img := d.img
	d.begin()
	d.text(fmt.Sprint(img.TrustDomain, img.UnmanagedZone, img.UnmanagedOutbound, img.UnmanagedInbound))
	for _, z := range img.Zones {
		d.text(z.Name)
	}
	d.numbers(uint64(len(img.Workloads)))
	for i := range img.Workloads {
		d.text(img.Workloads[i].Name)
		d.numbers(uint64(img.Workloads[i].ID)<<16 | uint64(img.Workloads[i].Zone))
	}
	for i := range img.Networks {
		d.text(img.Networks[i].Name)
		d.text(fmt.Sprint(img.Networks[i].CIDRs))
	}
	d.numbers(uint64(len(img.Addresses)))
	for _, p := range img.Addresses {
		address := p.Prefix.Addr().As16()
		d.buffer = append(d.buffer, address[:]...)
		d.numbers(uint64(p.Prefix.Bits())<<16 | uint64(p.Class))
	}
	d.all = max(d.end(), 1)
	return d.all
}

// subject is the number of what a subject depends on besides. It is not known where a
// rule lists a crossing that does not face the subject.
func (d *dependence) subject(id image.ID, sides []Term) (number uint64, known bool) {
	var facing [2][]int32
	d.begin()
	for side := range facing {
		for _, t := range sides {
			facing[side] = append(facing[side], d.facing[side][t]...)
		}
		slices.Sort(facing[side])
		facing[side] = slices.Compact(facing[side])
		d.numbers(uint64(len(facing[side])))
		for _, i := range facing[side] {
			d.numbers(d.crossings[i])
		}
	}
	number = d.end()
	for _, r := range d.rules[id] { // a sum: classes have other numbers next time, and rules another order
		d.begin()
		d.numbers(uint64(r.Direction)<<32|uint64(r.Peer), d.classes[r.Class])
		for _, x := range r.Crossings {
			at, faces := slices.BinarySearch(facing[r.Direction&1], int32(x))
			if !faces {
				return 0, false
			}
			d.numbers(uint64(at))
		}
		number += d.end()
	}
	return number, true
}

func (d *dependence) begin()        { d.buffer = d.buffer[:0] }
func (d *dependence) end() uint64   { return maphash.Bytes(d.seed, d.buffer) }
func (d *dependence) text(s string) { d.buffer = append(append(d.buffer, s...), 0) }
func (d *dependence) numbers(all ...uint64) {
	for _, n := range all {
		d.buffer = binary.LittleEndian.AppendUint64(d.buffer, n)
	}
}

func (d *dependence) spans(all []image.Span) {
	d.numbers(uint64(len(all)))
	for _, s := range all {
		d.numbers(uint64(s.Proto)<<32 | uint64(s.Low)<<16 | uint64(s.High))
	}
}
