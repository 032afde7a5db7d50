package image

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/demarc/demarc/policy/image/layout"
)

// Decode reads an encoded image. It accepts exactly the bytes that package encode writes
// for the image it returns, never panics, and allocates no more than a small
// multiple of len(b): the sections must fill the image before anything is made
// for them. It does not judge the content; that is Verify's.
func Decode(b []byte) (*Image, error) {
	img, _, err := DecodeDigest(b)
	return img, err
}

// DecodeDigest is Decode, and the SHA-256 of b.
func DecodeDigest(b []byte) (_ *Image, digest [sha256.Size]byte, err error) {
	body, digest, err := open(b)
	if err != nil {
		return nil, digest, fmt.Errorf("decode image: %w", err)
	}
	img := &Image{}
	d, rest := decoder{section: body}, decoder{section: body}
	done := make(chan struct{})
	go func() { rest.tables(img); close(done) }() // which name no strings
	d.strings()
	d.policy(img)
	d.declarations(img)
	<-done
	for _, i := range [...]int{layout.Ports, layout.Addresses, layout.Alternatives, layout.Rules} {
		d.section[i] = rest.section[i]
	}
	if d.err == nil {
		d.err = rest.err
	}
	d.finish()
	if d.err != nil {
		return nil, digest, fmt.Errorf("decode image: %w", d.err)
	}
	return img, digest, nil
}

// open checks header, table and checksum, and returns the sections, and the digest of all.
func open(b []byte) (body [layout.Sections]cursor, digest [sha256.Size]byte, err error) {
	const first = layout.HeaderSize + layout.Sections*layout.EntrySize
	if len(b) < first+layout.SumSize {
		return body, digest, fmt.Errorf("%d bytes are too few", len(b))
	}
	if len(b) > MaxSize {
		return body, digest, fmt.Errorf("%d bytes, at most %d are allowed", len(b), MaxSize)
	}
	if string(b[:8]) != Magic {
		return body, digest, errors.New("not a policy image")
	}
	header := cursor(b[8:first])
	if v := header.u32(); v != layout.Format {
		return body, digest, fmt.Errorf("format %d, this program reads %d", v, layout.Format)
	}
	if n := header.u32(); n != layout.Sections {
		return body, digest, fmt.Errorf("%d sections, want %d", n, layout.Sections)
	}
	if n := header.u64(); n != uint64(len(b)) {
		return body, digest, fmt.Errorf("header says %d bytes, there are %d", n, len(b))
	}
	content, sum := b[:len(b)-layout.SumSize], b[len(b)-layout.SumSize:]
	hash := sha256.New()
	hash.Write(content)
	if string(hash.Sum(nil)) != string(sum) {
		return body, digest, errors.New("checksum does not match")
	}
	hash.Write(sum)
	hash.Sum(digest[:0])
	offset := uint64(first)
	for i := range body {
		start, count := header.u32(), header.u32()
		end := offset + uint64(count)*uint64(layout.RecordSize[i])
		if uint64(start) != offset || end > uint64(len(content)) {
			return body, digest, fmt.Errorf("section %d: %d records at %d do not fit", i, count, start)
		}
		body[i] = cursor(content[offset:end])
		offset = end
	}
	if offset != uint64(len(content)) {
		return body, digest, fmt.Errorf("%d bytes after the last section", uint64(len(content))-offset)
	}
	return body, digest, nil
}

// decoder takes records off the sections. The first error sticks.
type decoder struct {
	section [layout.Sections]cursor
	table   []string
	used    []bool
	terms   []Term // not taken by a crossing yet
	spans   []Span // the same
	err     error
}

// strings reads the string table: strictly ascending, together all of the text.
func (d *decoder) strings() {
	d.table = make([]string, d.left(layout.Strings))
	d.used = make([]bool, len(d.table))
	text := string(d.section[layout.Text])
	for i := range d.table {
		n := int(d.section[layout.Strings].u16())
		if n > len(text) {
			d.fail("string %d: %d bytes, %d are left", i, n, len(text))
			return
		}
		d.table[i], text = text[:n], text[n:]
		if i > 0 && d.table[i-1] >= d.table[i] {
			d.fail("string %d: out of order", i)
			return
		}
	}
	d.section[layout.Text] = d.section[layout.Text][len(d.section[layout.Text])-len(text):]
}

func (d *decoder) policy(img *Image) {
	if n := d.left(layout.Policy); n != 1 {
		d.fail("%d policy records, want 1", n)
		return
	}
	c := &d.section[layout.Policy]
	img.Name = d.str(c)
	img.Version = c.u64()
	img.TrustDomain = d.str(c)
	copy(img.Digest[:], c.take(len(img.Digest)))
	img.NotAfter = int64(c.u64())
	img.Mode = Mode(c.u8())
	img.UnmanagedZone = c.u16()
	flags := c.u8()
	if flags&^(layout.FlagOutbound|layout.FlagInbound) != 0 {
		d.fail("policy flags %#x are unknown", flags)
	}
	img.UnmanagedOutbound = flags&layout.FlagOutbound != 0
	img.UnmanagedInbound = flags&layout.FlagInbound != 0
}

func (d *decoder) declarations(img *Image) {
	img.Zones = list(d, layout.Zones, d.left(layout.Zones), func(c *cursor) Zone {
		return Zone{Name: d.str(c), Trust: c.u16()}
	})
	img.Workloads = list(d, layout.Workloads, d.left(layout.Workloads), func(c *cursor) Workload {
		w := Workload{Name: d.str(c), ID: ID(c.u32()), Zone: c.u16()}
		w.Roles = list(d, layout.Roles, int(c.u16()), func(c *cursor) Role {
			return Role{Name: d.str(c), Until: int64(c.u64())}
		})
		return w
	})
	img.Networks = list(d, layout.Networks, d.left(layout.Networks), func(c *cursor) Network {
		n := Network{Name: d.str(c), Zone: c.u16()}
		n.CIDRs = list(d, layout.CIDRs, int(c.u32()), d.prefix)
		return n
	})
	// All crossings share one array of terms and one of spans.
	d.terms = list(d, layout.Terms, d.left(layout.Terms), func(c *cursor) Term { return Term{Kind: TermKind(c.u8()), Index: c.u32()} })
	d.spans = list(d, layout.Spans, d.left(layout.Spans), span)
	img.Crossings = list(d, layout.Crossings, d.left(layout.Crossings), d.crossing)
	if len(d.terms)+len(d.spans) > 0 {
		d.fail("%d terms and %d spans belong to no crossing", len(d.terms), len(d.spans))
	}
	img.Selectors = list(d, layout.Selectors, d.left(layout.Selectors), func(c *cursor) Selector {
		s := Selector{
			Workload: c.u32(), Kind: SelectorKind(c.u8()), Path: d.str(c),
			Namespace: d.str(c), ServiceAccount: d.str(c), Name: d.str(c), Image: d.str(c),
		}
		s.Labels = list(d, layout.Labels, int(c.u16()), func(c *cursor) Label {
			return Label{Key: d.str(c), Value: d.str(c)}
		})
		return s
	})
}

func (d *decoder) crossing(c *cursor) Crossing {
	x := Crossing{Name: d.str(c), Number: c.u32(), Line: c.u32()}
	from, to, ports := int(c.u32()), int(c.u32()), int(c.u32())
	x.Need, x.NAT, x.Log, x.Refuse = Need(c.u8()), NAT(c.u8()), Log(c.u8()), Refuse(c.u8())
	flags := c.u8()
	x.Decoy, x.Forensic, x.Side = flags&layout.FlagDecoy != 0, flags&layout.FlagForensic != 0, Side(flags>>layout.FlagsSide)
	x.Rate, x.Burst = c.u64(), c.u64()
	x.Since, x.Until = int64(c.u64()), int64(c.u64())
	x.Purpose = d.str(c)
	x.From, x.To, x.Ports = part(d, "terms", &d.terms, from), part(d, "terms", &d.terms, to), part(d, "spans", &d.spans, ports)
	return x
}

func (d *decoder) tables(img *Image) {
	img.Ports = list(d, layout.Ports, d.left(layout.Ports), func(c *cursor) PortRange {
		return PortRange{Span: span(c), Class: c.u16()}
	})
	img.Addresses = list(d, layout.Addresses, d.left(layout.Addresses), func(c *cursor) Prefix {
		return Prefix{Prefix: d.prefix(c), Class: c.u16()}
	})
	// Millions of rules share one array of alternatives.
	all := list(d, layout.Alternatives, d.left(layout.Alternatives), func(c *cursor) uint32 { return c.u32() })
	img.Rules = list(d, layout.Rules, d.left(layout.Rules), func(c *cursor) Rule {
		r := Rule{RuleKey: RuleKey{
			Subject: ID(c.u32()), Peer: Peer(c.u32()), Class: c.u16(), Direction: Direction(c.u8()),
		}}
		r.Crossings = part(d, "alternatives", &all, int(c.u8()))
		return r
	})
	if len(all) > 0 {
		d.fail("%d crossings belong to no rule", len(all))
	}
}

// finish checks that nothing is left over and every string is used.
func (d *decoder) finish() {
	for i := range d.section {
		if n := len(d.section[i]); n > 0 {
			d.fail("section %d: %d bytes belong to nothing", i, n)
		}
	}
	for i, used := range d.used {
		if !used {
			d.fail("string %q is not used", d.table[i])
		}
	}
}

// left is the number of records that a section still has.
func (d *decoder) left(section int) int { return len(d.section[section]) / layout.RecordSize[section] }

// list takes n records off a section; nil for none. After an error it takes none.
func list[T any](d *decoder, section, n int, read func(*cursor) T) []T {
	if n == 0 || d.err != nil {
		return nil
	}
	if n > d.left(section) {
		d.fail("section %d: %d records wanted, %d are left", section, n, d.left(section))
		return nil
	}
	out := make([]T, n)
	var record cursor
	for i := range out {
		record = d.section[section].take(layout.RecordSize[section])
		out[i] = read(&record)
		if d.err != nil {
			return nil
		}
	}
	return out
}

// part takes n elements off a list that several owners share; nil for none.
func part[T any](d *decoder, what string, shared *[]T, n int) []T {
	if n > len(*shared) {
		d.fail("%d %s wanted, %d are left", n, what, len(*shared))
		return nil
	}
	if n == 0 {
		return nil
	}
	out := (*shared)[:n:n]
	*shared = (*shared)[n:]
	return out
}

func (d *decoder) str(c *cursor) string {
	i := c.u32()
	if uint64(i) >= uint64(len(d.table)) {
		d.fail("string %d of %d", i, len(d.table))
		return ""
	}
	d.used[i] = true
	return d.table[i]
}

// prefix reads a block; a v4-mapped address is IPv4.
func (d *decoder) prefix(c *cursor) netip.Prefix {
	address := netip.AddrFrom16([16]byte(c.take(16)))
	length := int(c.u8())
	if address.Is4In6() {
		address, length = address.Unmap(), length-96
	}
	if length < 0 || length > address.BitLen() {
		d.fail("address block %s: length %d", address, length)
		return netip.Prefix{}
	}
	return netip.PrefixFrom(address, length)
}

func span(c *cursor) Span { return Span{Proto: Proto(c.u8()), Low: c.u16(), High: c.u16()} }

func (d *decoder) fail(text string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf(text, args...)
	}
}

// cursor takes little-endian numbers off the front. Its owner has checked that
// they are there.
type cursor []byte

func (c *cursor) take(n int) []byte {
	b := (*c)[:n]
	*c = (*c)[n:]
	return b
}

func (c *cursor) u8() uint8   { return c.take(1)[0] }
func (c *cursor) u16() uint16 { return binary.LittleEndian.Uint16(c.take(2)) }
func (c *cursor) u32() uint32 { return binary.LittleEndian.Uint32(c.take(4)) }
func (c *cursor) u64() uint64 { return binary.LittleEndian.Uint64(c.take(8)) }
