package netlab

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
)

// Packet is what a wire saw of one frame. Fields that it does not have are zero.
type Packet struct {
	Sent      bool   // by the namespace; otherwise to it
	EtherType uint16 // unix.ETH_P_IP, ...
	Proto     uint8  // of the transport, behind IPv6 extension headers
	Src, Dst  netip.AddrPort
	Flags     uint8 // TCP
	ICMP      uint8 // type
	Fragment  bool  // any fragment; ports are known in the first one only
	Payload   int   // bytes behind the transport header
	Surplus   int   // bytes behind the end of a UDP datagram (RFC 9868)
	Tagged    bool  // has demarc's TCP option
}

func (p Packet) String() string {
	way := "to"
	if p.Sent {
		way = "from"
	}
	return fmt.Sprintf("%s: ethertype %#x proto %d %s > %s flags %#x icmp %d fragment %t payload %d",
		way, p.EtherType, p.Proto, p.Src, p.Dst, p.Flags, p.ICMP, p.Fragment, p.Payload)
}

// Match says which packets are meant.
type Match func(Packet) bool

// To matches packets that the namespace sent to a port of an address; port 0 is
// any port.
func To(proto uint8, to netip.Addr, port uint16) Match {
	return func(p Packet) bool {
		return p.Sent && p.Proto == proto && p.Dst.Addr() == to && (port == 0 || p.Dst.Port() == port)
	}
}

// ToAddress matches everything that the namespace sent to an address, whatever
// the protocol; neighbour discovery is the kernel's and does not count.
func ToAddress(to netip.Addr) Match {
	return func(p Packet) bool {
		discovery := p.Proto == unix.IPPROTO_ICMPV6 && p.ICMP >= 133 && p.ICMP <= 137
		return p.Sent && p.Dst.Addr() == to && !discovery
	}
}

// And matches what all matches match.
func And(all ...Match) Match {
	return func(p Packet) bool {
		for _, m := range all {
			if !m(p) {
				return false
			}
		}
		return true
	}
}

// WithPayload matches packets that carry data.
func WithPayload(p Packet) bool { return p.Payload > 0 }

// parseFrame reads an Ethernet frame of which the beginning was captured.
func parseFrame(b []byte) (p Packet) {
	if len(b) < 14 {
		return p
	}
	p.EtherType = binary.BigEndian.Uint16(b[12:])
	b = b[14:]
	switch p.EtherType {
	case unix.ETH_P_IP:
		parseIPv4(b, &p)
	case unix.ETH_P_IPV6:
		parseIPv6(b, &p)
	}
	return p
}

func parseIPv4(b []byte, p *Packet) {
	if len(b) < 20 {
		return
	}
	header, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	offset := binary.BigEndian.Uint16(b[6:])
	p.Fragment = offset&0x3fff != 0
	p.Proto = b[9]
	src, dst := netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	p.Src, p.Dst = netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0)
	if offset&0x1fff == 0 && header >= 20 && len(b) >= header {
		parseTransport(b[header:], total-header, p)
	}
}

func parseIPv6(b []byte, p *Packet) {
	if len(b) < 40 {
		return
	}
	left := int(binary.BigEndian.Uint16(b[4:]))
	p.Proto = b[6]
	p.Src = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:])), 0)
	p.Dst = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[24:])), 0)
	b = b[40:]
	for len(b) >= 8 {
		length := 8
		switch p.Proto {
		case 0, 43, 60: // hop-by-hop, routing, destination options
			length = (int(b[1]) + 1) * 8
		case 44:
			p.Fragment = true
			if binary.BigEndian.Uint16(b[2:])&0xfff8 != 0 {
				p.Proto = b[0]
				return
			}
		default:
			parseTransport(b, left, p)
			return
		}
		p.Proto = b[0]
		if length > len(b) {
			return
		}
		b, left = b[length:], left-length
	}
}

// hasTag walks TCP options.
func hasTag(options []byte) bool {
	for len(options) > 1 && options[0] != 0 {
		if options[0] == 1 {
			options = options[1:]
			continue
		}
		size := int(options[1])
		if size < 2 || size > len(options) {
			return false
		}
		if options[0] == abi.TagKind && size >= 4 && binary.BigEndian.Uint16(options[2:]) == abi.TagExID {
			return true
		}
		options = options[size:]
	}
	return false
}

func parseTransport(b []byte, left int, p *Packet) {
	ports := func() {
		p.Src = netip.AddrPortFrom(p.Src.Addr(), binary.BigEndian.Uint16(b))
		p.Dst = netip.AddrPortFrom(p.Dst.Addr(), binary.BigEndian.Uint16(b[2:]))
	}
	switch {
	case p.Proto == unix.IPPROTO_TCP && len(b) >= 20:
		ports()
		p.Flags = b[13]
		header := int(b[12]>>4) * 4
		p.Payload = max(left-header, 0)
		p.Tagged = hasTag(b[20:max(20, min(header, len(b)))]) // tests send headers that lie
	case (p.Proto == unix.IPPROTO_UDP || p.Proto == unix.IPPROTO_UDPLITE) && len(b) >= 8:
		ports()
		p.Payload = max(left-8, 0)
		if length := int(binary.BigEndian.Uint16(b[4:])); p.Proto == unix.IPPROTO_UDP && length >= 8 && length < left {
			p.Payload, p.Surplus = length-8, left-length
		}
	case (p.Proto == unix.IPPROTO_ICMP || p.Proto == unix.IPPROTO_ICMPV6) && len(b) >= 8:
		p.ICMP = b[0]
		p.Payload = max(left-8, 0)
	default:
		p.Payload = left
	}
}
