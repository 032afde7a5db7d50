// Package encode writes images in their one canonical form. Nobody trusts it: what it
// writes is decoded and verified.
package encode

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"slices"

	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/image/layout"
)

// Image writes an image in its one canonical form. It fails for an image that
// the form cannot hold; image.Verify says whether the image means anything.
func Image(img *image.Image) ([]byte, error) {
	table, refs := stringsOf(img)
	e := encoder{refs: refs}
	e.policy(img)
	e.declarations(img)
	e.tables(img)
	for _, s := range table {
		if len(s) > math.MaxUint16 {
			return nil, fmt.Errorf("encode image: string of %d bytes", len(s))
		}
		e.to(layout.Strings).u16(uint16(len(s)))
		e.to(layout.Text).raw([]byte(s))
	}
	if e.err != nil {
		return nil, fmt.Errorf("encode image: %w", e.err)
	}
	return e.join()
}

// stringsOf returns the string table and the place of each string in it.
func stringsOf(img *image.Image) ([]string, map[string]uint32) {
	all := []string{img.Name, img.TrustDomain}
	for i := range img.Zones {
		all = append(all, img.Zones[i].Name)
	}
	for i := range img.Workloads {
		all = append(all, img.Workloads[i].Name)
		for _, r := range img.Workloads[i].Roles {
			all = append(all, r.Name)
		}
	}
	for i := range img.Networks {
		all = append(all, img.Networks[i].Name)
	}
	for i := range img.Crossings {
		all = append(all, img.Crossings[i].Name, img.Crossings[i].Purpose)
	}
	for i := range img.Selectors {
		s := &img.Selectors[i]
		all = append(all, s.Path, s.Namespace, s.ServiceAccount, s.Name, s.Image)
		for _, l := range s.Labels {
			all = append(all, l.Key, l.Value)
		}
	}
	slices.Sort(all)
	all = slices.Compact(all)
	refs := make(map[string]uint32, len(all))
	for i, s := range all {
		refs[s] = uint32(i)
	}
	return all, refs
}

// encoder collects the sections. The first error sticks.
type encoder struct {
	body [layout.Sections]buffer
	refs map[string]uint32
	err  error
}

func (e *encoder) policy(img *image.Image) {
	var flags uint8
	if img.UnmanagedOutbound {
		flags |= layout.FlagOutbound
	}
	if img.UnmanagedInbound {
		flags |= layout.FlagInbound
	}
	b := e.to(layout.Policy)
	b.u32(e.refs[img.Name])
	b.u64(img.Version)
	b.u32(e.refs[img.TrustDomain])
	b.raw(img.Digest[:])
	b.u64(uint64(img.NotAfter))
	b.u8(uint8(img.Mode))
	b.u16(img.UnmanagedZone)
	b.u8(flags)
}

func (e *encoder) declarations(img *image.Image) {
	for i := range img.Zones {
		b := e.to(layout.Zones)
		b.u32(e.refs[img.Zones[i].Name])
		b.u16(img.Zones[i].Trust)
	}
	for i := range img.Workloads {
		w := &img.Workloads[i]
		b := e.to(layout.Workloads)
		b.u32(e.refs[w.Name])
		b.u32(uint32(w.ID))
		b.u16(w.Zone)
		b.u16(uint16(e.count(len(w.Roles), math.MaxUint16)))
		for _, r := range w.Roles {
			b := e.to(layout.Roles)
			b.u32(e.refs[r.Name])
			b.u64(uint64(r.Until))
		}
	}
	for i := range img.Networks {
		n := &img.Networks[i]
		b := e.to(layout.Networks)
		b.u32(e.refs[n.Name])
		b.u16(n.Zone)
		b.u32(e.count(len(n.CIDRs), math.MaxUint32))
		for _, p := range n.CIDRs {
			e.prefix(e.to(layout.CIDRs), p)
		}
	}
	for i := range img.Crossings {
		e.crossing(&img.Crossings[i])
	}
	for i := range img.Selectors {
		s := &img.Selectors[i]
		b := e.to(layout.Selectors)
		b.u32(s.Workload)
		b.u8(uint8(s.Kind))
		for _, text := range [...]string{s.Path, s.Namespace, s.ServiceAccount, s.Name, s.Image} {
			b.u32(e.refs[text])
		}
		b.u16(uint16(e.count(len(s.Labels), math.MaxUint16)))
		for _, l := range s.Labels {
			b := e.to(layout.Labels)
			b.u32(e.refs[l.Key])
			b.u32(e.refs[l.Value])
		}
	}
}

func (e *encoder) crossing(c *image.Crossing) {
	b := e.to(layout.Crossings)
	b.u32(e.refs[c.Name])
	b.u32(c.Number)
	b.u32(c.Line)
	b.u32(e.count(len(c.From), math.MaxUint32))
	b.u32(e.count(len(c.To), math.MaxUint32))
	b.u32(e.count(len(c.Ports), math.MaxUint32))
	b.u8(uint8(c.Need))
	b.u8(uint8(c.NAT))
	b.u8(uint8(c.Log))
	b.u8(uint8(c.Refuse))
	flags := uint8(c.Side) << layout.FlagsSide
	if c.Decoy {
		flags |= layout.FlagDecoy
	}
	if c.Forensic {
		flags |= layout.FlagForensic
	}
	b.u8(flags)
	b.u64(c.Rate)
	b.u64(c.Burst)
	b.u64(uint64(c.Since))
	b.u64(uint64(c.Until))
	b.u32(e.refs[c.Purpose])
	for _, side := range [...][]image.Term{c.From, c.To} {
		for _, t := range side {
			b := e.to(layout.Terms)
			b.u8(uint8(t.Kind))
			b.u32(t.Index)
		}
	}
	for _, s := range c.Ports {
		e.span(e.to(layout.Spans), s)
	}
}

func (e *encoder) tables(img *image.Image) {
	for _, r := range img.Ports {
		b := e.to(layout.Ports)
		e.span(b, r.Span)
		b.u16(r.Class)
	}
	for _, p := range img.Addresses {
		b := e.to(layout.Addresses)
		e.prefix(b, p.Prefix)
		b.u16(p.Class)
	}
	for i := range img.Rules {
		r := &img.Rules[i]
		b := e.to(layout.Rules)
		b.u32(uint32(r.Subject))
		b.u32(uint32(r.Peer))
		b.u16(r.Class)
		b.u8(uint8(r.Direction))
		b.u8(uint8(e.count(len(r.Crossings), math.MaxUint8)))
		for _, c := range r.Crossings {
			e.to(layout.Alternatives).u32(c)
		}
	}
}

// join puts header, table, sections and checksum together.
func (e *encoder) join() ([]byte, error) {
	length := layout.HeaderSize + layout.Sections*layout.EntrySize + layout.SumSize
	for i := range e.body {
		length += e.body[i].Len()
	}
	if length > image.MaxSize {
		return nil, fmt.Errorf("encode image: %d bytes, at most %d fit", length, image.MaxSize)
	}
	var b buffer
	b.Grow(length)
	b.raw([]byte(layout.Magic))
	b.u32(layout.Format)
	b.u32(layout.Sections)
	b.u64(uint64(length))
	offset := layout.HeaderSize + layout.Sections*layout.EntrySize
	for i := range e.body {
		b.u32(uint32(offset))
		b.u32(uint32(e.body[i].Len() / layout.RecordSize[i]))
		offset += e.body[i].Len()
	}
	for i := range e.body {
		b.raw(e.body[i].Bytes())
	}
	sum := sha256.Sum256(b.Bytes())
	b.raw(sum[:])
	return b.Bytes(), nil
}

func (e *encoder) to(section int) *buffer { return &e.body[section] }

func (e *encoder) count(n, limit int) uint32 {
	if n > limit {
		e.fail(fmt.Errorf("list of %d, at most %d fit", n, limit))
	}
	return uint32(n)
}

func (e *encoder) span(b *buffer, s image.Span) {
	b.u8(uint8(s.Proto))
	b.u16(s.Low)
	b.u16(s.High)
}

// prefix writes an IPv4 block as v4-mapped. An IPv6 block of v4-mapped addresses
// would read back as IPv4, so it cannot be written.
func (e *encoder) prefix(b *buffer, p netip.Prefix) {
	if !p.IsValid() || p.Addr().Is4In6() {
		e.fail(fmt.Errorf("address block %s: not IPv4 or plain IPv6", p))
		return
	}
	address, length := p.Addr().As16(), p.Bits()
	if p.Addr().Is4() {
		length += 96
	}
	b.raw(address[:])
	b.u8(uint8(length))
}

func (e *encoder) fail(err error) {
	if e.err == nil {
		e.err = err
	}
}

// buffer appends little-endian numbers.
type buffer struct{ bytes.Buffer }

func (b *buffer) u8(v uint8)   { b.WriteByte(v) }
func (b *buffer) u16(v uint16) { b.Write(binary.LittleEndian.AppendUint16(b.AvailableBuffer(), v)) }
func (b *buffer) u32(v uint32) { b.Write(binary.LittleEndian.AppendUint32(b.AvailableBuffer(), v)) }
func (b *buffer) u64(v uint64) { b.Write(binary.LittleEndian.AppendUint64(b.AvailableBuffer(), v)) }
func (b *buffer) raw(v []byte) { b.Write(v) }
