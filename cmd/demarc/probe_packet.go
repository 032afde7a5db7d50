package main

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
)

// segment is what a probe looks at in a TCP segment.
type segment struct {
	from, to netip.AddrPort
	seq, ack uint32
	flags    uint8
	tag      []byte // the whole option; nil = none among the options that are there
	whole    bool   // all options are there: a quoted segment may be cut
}

const (
	tcpSYN = 0x02
	tcpRST = 0x04
	tcpACK = 0x10
)

func (s *segment) is(flags uint8) bool { return s.flags&(tcpSYN|tcpRST|tcpACK) == flags }

// identity is the one that the tag claims; 0 = no tag.
func (s *segment) identity() uint32 {
	if len(s.tag) < abi.TagLength {
		return 0
	}
	return binary.BigEndian.Uint32(s.tag[4:]) >> 8
}

// Flags of a claim: what its MAC leaves out.
const (
	noSource      = 2
	noDestination = 4
)

// covers says whether the MAC covers an end, by the flag that would leave it out.
func (s *segment) covers(flag byte) bool { return len(s.tag) < abi.TagLength || s.tag[7]&flag == 0 }

// complaint is an ICMP error, and the segment that it is about.
type complaint struct {
	from  netip.Addr
	says  string // in words, such as "port unreachable"
	kind  complaintKind
	about segment
}

// complaintKind is what an ICMP error means for a connection.
type complaintKind int

const (
	expired     complaintKind = iota // its hops were used up
	refusing                         // somebody said no
	unreachable                      // it cannot get there
)

// sighting is one packet of interest: a segment or a complaint.
type sighting struct {
	outgoing  bool
	segment   *segment
	complaint *complaint
}

// readPacket reads an IP packet. It returns nil for what a probe does not look at,
// and for what does not add up: anybody may have sent it.
func readPacket(b []byte, outgoing bool) *sighting {
	h, ok := readHeader(b)
	if !ok {
		return nil
	}
	switch h.proto {
	case unix.IPPROTO_TCP:
		if s, ok := readSegment(h); ok && s.whole {
			return &sighting{outgoing: outgoing, segment: &s}
		}
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		if c, ok := readComplaint(h); ok {
			return &sighting{outgoing: outgoing, complaint: &c}
		}
	}
	return nil
}

// ipHeader is an IP header, and what is there of the packet behind it.
type ipHeader struct {
	from, to netip.Addr
	proto    uint8
	rest     []byte
}

func readHeader(b []byte) (h ipHeader, ok bool) {
	if len(b) < 20 {
		return h, false
	}
	var start, end int
	switch b[0] >> 4 {
	case 4:
		start, end = int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
		if start < 20 || binary.BigEndian.Uint16(b[6:])&0x1fff != 0 {
			return h, false
		}
		h.from, h.to, h.proto = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:])), b[9]
	case 6:
		if len(b) < 40 {
			return h, false
		}
		start, end = 40, 40+int(binary.BigEndian.Uint16(b[4:]))
		h.from, h.to, h.proto = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:])), b[6]
	default:
		return h, false
	}
	end = min(end, len(b))
	if start > end {
		return h, false
	}
	h.rest = b[start:end]
	return h, true
}

// readSegment needs the ports and the sequence number, which every ICMP error
// quotes (RFC 792).
func readSegment(h ipHeader) (s segment, ok bool) {
	b := h.rest
	if len(b) < 8 {
		return s, false
	}
	s.from = netip.AddrPortFrom(h.from, binary.BigEndian.Uint16(b))
	s.to = netip.AddrPortFrom(h.to, binary.BigEndian.Uint16(b[2:]))
	s.seq = binary.BigEndian.Uint32(b[4:])
	if len(b) < 20 {
		return s, true
	}
	s.ack, s.flags = binary.BigEndian.Uint32(b[8:]), b[13]
	end := int(b[12]>>4) * 4
	if end < 20 {
		return s, false
	}
	s.whole = end <= len(b)
	s.tag = findTag(b[20:max(20, min(end, len(b)))])
	return s, true
}

// findTag walks TCP options to demarc's own; it returns a copy.
func findTag(options []byte) []byte {
	for len(options) > 1 && options[0] != 0 {
		if options[0] == 1 {
			options = options[1:]
			continue
		}
		size := int(options[1])
		if size < 2 || size > len(options) {
			return nil
		}
		if options[0] == abi.TagKind && size >= 4 && binary.BigEndian.Uint16(options[2:]) == abi.TagExID {
			return bytes.Clone(options[:size])
		}
		options = options[size:]
	}
	return nil
}

// Words for the codes of "destination unreachable"; those that are not here mean
// that the network has no way there.
var (
	refusals4 = map[uint8]string{2: "protocol unreachable", 3: "port unreachable", 9: "network prohibited", 10: "host prohibited", 13: "administratively prohibited"}
	refusals6 = map[uint8]string{1: "administratively prohibited", 4: "port unreachable", 5: "source address prohibited", 6: "route rejected"}
	absences4 = map[uint8]string{0: "network unreachable", 1: "host unreachable", 4: "too large for the path", 6: "network unknown", 7: "host unknown"}
	absences6 = map[uint8]string{0: "no route", 3: "address unreachable"}
)

func readComplaint(h ipHeader) (c complaint, ok bool) {
	b := h.rest
	if len(b) < 8 {
		return c, false
	}
	c.from = h.from
	kind, code := b[0], b[1]
	quoted := b[8:]
	refusals, absences, unit := refusals4, absences4, int(b[5])*4
	switch {
	case h.proto == unix.IPPROTO_ICMP && kind == 11, h.proto == unix.IPPROTO_ICMPV6 && kind == 3:
		c.kind, c.says = expired, "hop limit exceeded"
	case h.proto == unix.IPPROTO_ICMP && kind == 3, h.proto == unix.IPPROTO_ICMPV6 && kind == 1:
		if h.proto == unix.IPPROTO_ICMPV6 {
			refusals, absences = refusals6, absences6
		}
		c.kind, c.says = unreachable, absences[code]
		if words := refusals[code]; words != "" {
			c.kind, c.says = refusing, words
		}
		if c.says == "" {
			c.says = "unreachable"
		}
	default:
		return c, false
	}
	// A quote with extensions behind it says its own length (RFC 4884).
	if h.proto == unix.IPPROTO_ICMPV6 {
		unit = int(b[4]) * 8
	}
	if unit > 0 && unit < len(quoted) {
		quoted = quoted[:unit]
	}
	inner, ok := readHeader(quoted)
	if !ok || inner.proto != unix.IPPROTO_TCP {
		return c, false
	}
	c.about, ok = readSegment(inner)
	return c, ok
}

// fate is what became of a tag up to some hop.
type fate string

const (
	tagIntact     fate = "intact"
	tagRemoved    fate = "removed"
	tagChanged    fate = "changed"
	tagRenumbered fate = "renumbered" // the tag is there, but the sequence number that it covers is another
	tagTranslated fate = "translated" // and the same for the addresses or ports
	tagUnknown    fate = "unknown"    // too little was quoted
	tagNoHop      fate = ""           // nobody said anything
)

// fateOf compares what was seen somewhere with what was sent. A segment that is
// sent again carries another tag.
func fateOf(sent []*segment, seen *segment) fate {
	if seen.tag == nil {
		if seen.whole {
			return tagRemoved
		}
		return tagUnknown
	}
	found := tagChanged
	for _, s := range sent {
		switch {
		case !bytes.Equal(s.tag, seen.tag):
		case s.seq != seen.seq:
			found = tagRenumbered
		case s.covers(noSource) && s.from != seen.from, s.covers(noDestination) && s.to != seen.to:
			found = tagTranslated
		default:
			return tagIntact
		}
	}
	return found
}
