// Package packet_test runs packets through the loaded programs, without sockets
// and without a network (BPF_PROG_TEST_RUN).
package packet_test

import (
	"encoding/binary"
	"math/rand/v2"
	"net"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/demarc/demarc/bpf/abi"
)

const (
	subject = 100
	pass    = 1
	drop    = 0
)

// load gives the kernel a generation in which subject may do everything: what is
// dropped then is dropped for what it is.
func load(t *testing.T) map[abi.Direction]*ebpf.Program {
	t.Helper()
	spec, err := ebpf.LoadCollectionSpec("../../agent/core/demarc_bpfel.o")
	if err != nil {
		t.Fatal(err)
	}
	c, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	table := func(name string, key, value any) {
		m, err := ebpf.NewMap(spec.Maps[name].InnerMap)
		if err != nil {
			t.Fatalf("make table %s: %v", name, err)
		}
		t.Cleanup(func() { m.Close() })
		if err := m.Put(key, value); err != nil {
			t.Fatalf("fill table %s: %v", name, err)
		}
		if err := c.Maps[name].Put(uint32(0), m); err != nil {
			t.Fatalf("insert table %s: %v", name, err)
		}
	}
	table("subjects", uint32(subject), abi.Subject{Flags: ^uint16(abi.SubjectOutbound | abi.SubjectInbound)})
	table("crossings", uint32(0), abi.Crossing{Number: 1})
	rules := spec.Maps["rules"].InnerMap
	rules.MaxEntries = 2
	open := abi.Rule{Crossing: [abi.Alternatives]uint32{0, abi.NoCrossing, abi.NoCrossing, abi.NoCrossing}}
	m, err := ebpf.NewMap(rules)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	for _, d := range []abi.Direction{abi.Egress, abi.Ingress} {
		if err := m.Put(abi.RuleKey{Subject: subject, Peer: 4 << 24, Direction: d}, open); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Maps["rules"].Put(uint32(0), m); err != nil {
		t.Fatal(err)
	}
	if err := c.Maps["selftest"].Put(uint32(0), []uint32{subject, 0, 0, uint32(abi.ProofNone)}); err != nil {
		t.Fatal(err)
	}
	return map[abi.Direction]*ebpf.Program{abi.Egress: c.Programs["selftest_egress"], abi.Ingress: c.Programs["selftest_ingress"]}
}

func run(t *testing.T, p *ebpf.Program, frame []byte) uint32 {
	t.Helper()
	verdict, err := p.Run(&ebpf.RunOptions{Data: frame})
	if err != nil {
		t.Fatalf("run: %v", err)
	}
	return verdict
}

// frame builds an Ethernet frame around network-layer bytes.
func frame(etherType layers.EthernetType, l3 []byte) []byte {
	b := make([]byte, 12, 14+len(l3))
	b = binary.BigEndian.AppendUint16(b, uint16(etherType))
	return append(b, l3...)
}

func serialize(t *testing.T, l ...gopacket.SerializableLayer) []byte {
	t.Helper()
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true}, l...); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func ip4(proto layers.IPProtocol) *layers.IPv4 {
	return &layers.IPv4{Version: 4, TTL: 64, Protocol: proto, SrcIP: net.IPv4(10, 0, 0, 1).To4(), DstIP: net.IPv4(10, 0, 0, 2).To4()}
}

func ip6(next layers.IPProtocol) *layers.IPv6 {
	return &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: next, SrcIP: net.ParseIP("fd00::1"), DstIP: net.ParseIP("fd00::2")}
}

func tcp() *layers.TCP { return &layers.TCP{SrcPort: 40000, DstPort: 80, SYN: true} }
func udp() *layers.UDP { return &layers.UDP{SrcPort: 40000, DstPort: 53} }

var payload = gopacket.Payload("0123456789abcdef")

func TestPackets(t *testing.T) {
	programs := load(t)
	v4 := func(l ...gopacket.SerializableLayer) []byte {
		return frame(layers.EthernetTypeIPv4, serialize(t, l...))
	}
	v6 := func(l ...gopacket.SerializableLayer) []byte {
		return frame(layers.EthernetTypeIPv6, serialize(t, l...))
	}
	change := func(b []byte, offset int, v ...byte) []byte {
		b = append([]byte(nil), b...)
		copy(b[14+offset:], v)
		return b
	}
	extension := func(next byte, length byte) []byte {
		return append([]byte{next, length}, make([]byte, 6+8*int(length))...)
	}
	chain := func(headers ...[]byte) []byte {
		var body []byte
		for _, h := range headers {
			body = append(body, h...)
		}
		first := ip6(0)
		return frame(layers.EthernetTypeIPv6, append(serialize(t, first, gopacket.Payload(body))[:40:40], body...))
	}
	udpBytes := serialize(t, udp(), payload)

	for _, c := range []struct {
		name  string
		frame []byte
		want  uint32
	}{
		{"OK v4 TCP", v4(ip4(layers.IPProtocolTCP), tcp()), pass},
		{"OK v4 UDP", v4(ip4(layers.IPProtocolUDP), udp(), payload), pass},
		{"OK v4 UDP empty", v4(ip4(layers.IPProtocolUDP), udp()), pass},
		{"OK v4 ICMP echo", v4(ip4(layers.IPProtocolICMPv4), &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(8, 0)}), pass},
		{"OK v4 SCTP", v4(ip4(layers.IPProtocolSCTP), payload), pass},
		{"OK v4 unknown protocol", v4(ip4(200), payload), pass},
		{"OK v6 TCP", v6(ip6(layers.IPProtocolTCP), tcp()), pass},
		{"OK v6 UDP", v6(ip6(layers.IPProtocolUDP), udp(), payload), pass},
		{"OK v6 hop-by-hop then UDP", chain(extension(17, 0), udpBytes), pass},
		{"OK v6 two options headers", chain(extension(60, 0), extension(17, 1), udpBytes), pass},
		{"bad v4 header length below 5", change(v4(ip4(layers.IPProtocolUDP), udp(), payload), 0, 0x44), drop},
		{"bad v4 options", change(v4(ip4(layers.IPProtocolUDP), udp(), payload), 0, 0x46), drop},
		{"bad v4 says version 6", change(v4(ip4(layers.IPProtocolUDP), udp(), payload), 0, 0x65), drop},
		{"OK v4 UDP cut to its own length", change(v4(ip4(layers.IPProtocolUDP), udp(), payload), 2, 0x40, 0), pass},
		{"bad v4 total length beyond packet", change(v4(ip4(layers.IPProtocolTCP), tcp(), payload), 2, 0x40, 0), drop},
		{"bad v4 UDP total length beyond packet, datagram shorter", change(change(v4(ip4(layers.IPProtocolUDP), udp(), payload), 2, 0x40, 0), 20+4, 0, 9), drop},
		{"bad v4 total length below header", change(v4(ip4(layers.IPProtocolUDP), udp(), payload), 2, 0, 19), drop},
		{"bad v4 total length zero", change(v4(ip4(layers.IPProtocolUDP), udp(), payload), 2, 0, 0), drop},
		{"bad v4 first fragment", change(v4(ip4(layers.IPProtocolUDP), udp(), payload), 6, 0x20, 0), drop},
		{"bad v4 later fragment", change(v4(ip4(layers.IPProtocolUDP), udp(), payload), 6, 0, 1), drop},
		{"bad v4 reserved flag and offset", change(v4(ip4(layers.IPProtocolUDP), udp(), payload), 6, 0xbf, 0xff), drop},
		{"bad v4 TCP cut", v4(ip4(layers.IPProtocolTCP), gopacket.Payload("short")), drop},
		{"bad v4 TCP data offset", change(v4(ip4(layers.IPProtocolTCP), tcp()), 20+12, 0x40), drop},
		{"bad v4 UDP cut", v4(ip4(layers.IPProtocolUDP), gopacket.Payload("1234567")), drop},
		{"bad v4 UDP length below 8", change(v4(ip4(layers.IPProtocolUDP), udp(), payload), 20+4, 0, 7), drop},
		{"bad v4 UDP length beyond packet", change(v4(ip4(layers.IPProtocolUDP), udp(), payload), 20+4, 0x40, 0), drop},
		{"bad v4 UDP length zero", change(v4(ip4(layers.IPProtocolUDP), udp(), payload), 20+4, 0, 0), drop},
		{"bad v4 ICMP cut", v4(ip4(layers.IPProtocolICMPv4), gopacket.Payload("1234")), drop},
		{"bad v6 says version 4", change(v6(ip6(layers.IPProtocolUDP), udp(), payload), 0, 0x40), drop},
		{"OK v6 UDP cut to its own length", change(v6(ip6(layers.IPProtocolUDP), udp(), payload), 4, 0x40, 0), pass},
		{"bad v6 payload length beyond packet", change(v6(ip6(layers.IPProtocolTCP), tcp(), payload), 4, 0x40, 0), drop},
		{"bad v6 fragment header", change(v6(ip6(layers.IPProtocolIPv6Fragment), gopacket.Payload("\x11\x00\x00\x00\x00\x00\x00\x00"), udp(), payload), 6, 44), drop},
		{"bad v6 routing header type 0", change(chain(extension(17, 0), udpBytes), 6, 43), drop},
		{"bad v6 hop-by-hop beyond packet", chain(extension(17, 0)[:2], []byte{0}), drop},
		{"bad v6 extension without end", chain([]byte{60}), drop},
		{"bad v6 eight options headers", chain(extension(60, 0), extension(60, 0), extension(60, 0), extension(60, 0), extension(60, 0), extension(60, 0), extension(60, 0), extension(17, 0), udpBytes), drop},
		{"bad ethertype", frame(layers.EthernetTypeARP, make([]byte, 40)), drop},
	} {
		for direction, program := range programs {
			if got := run(t, program, c.frame); got != c.want {
				t.Errorf("%s, %v: verdict %d, want %d\n% x", c.name, direction, got, c.want, c.frame)
			}
		}
	}
}

// No mutation of a fragment, an options packet or a cut packet is let through by
// accident, and none makes the program fail: whatever passes can be parsed by a
// parser of another hand, and is no fragment.
func TestF08MutatedPackets(t *testing.T) {
	programs := load(t)
	r := rand.New(rand.NewPCG(3, 4))
	seeds := [][]byte{
		frame(layers.EthernetTypeIPv4, serialize(t, ip4(layers.IPProtocolTCP), tcp(), payload)),
		frame(layers.EthernetTypeIPv4, serialize(t, ip4(layers.IPProtocolUDP), udp(), payload)),
		frame(layers.EthernetTypeIPv6, serialize(t, ip6(layers.IPProtocolTCP), tcp(), payload)),
		frame(layers.EthernetTypeIPv6, serialize(t, ip6(layers.IPProtocolUDP), udp(), payload)),
	}
	var passed, dropped int
	for range 20000 {
		b := append([]byte(nil), seeds[r.IntN(len(seeds))]...)
		for range 1 + r.IntN(4) {
			b[14+r.IntN(len(b)-14)] = byte(r.Uint32())
		}
		if r.IntN(4) == 0 {
			b = b[:14+40+r.IntN(len(b)-14-40)] // the kernel runs no test on less than a header
		}
		for direction, program := range programs {
			if run(t, program, b) == drop {
				dropped++
				continue
			}
			passed++
			if problem := suspicious(b); problem != "" {
				t.Errorf("%v: passed although %s\n% x", direction, problem, b)
			}
		}
	}
	if passed < 1000 || dropped < 1000 {
		t.Errorf("%d passed and %d dropped: the mutations test nothing", passed, dropped)
	}
}

// trimmed says whether a packet is a datagram that ends where it says itself: the
// stack cuts what is behind.
func trimmed(proto byte, l3 []byte, header int) bool {
	return proto == 17 && len(l3) >= header+8 && header+int(binary.BigEndian.Uint16(l3[header+4:])) == len(l3)
}

// suspicious says what a strict reader holds against a packet.
func suspicious(b []byte) string {
	l3 := b[14:]
	switch layers.EthernetType(binary.BigEndian.Uint16(b[12:])) {
	case layers.EthernetTypeIPv4:
		total := int(binary.BigEndian.Uint16(l3[2:]))
		switch {
		case l3[0] != 0x45:
			return "its first byte is not 0x45"
		case total < 20 || total > len(l3) && !trimmed(l3[9], l3, 20):
			return "its total length is wrong"
		case binary.BigEndian.Uint16(l3[6:])&0x3fff != 0:
			return "it is a fragment"
		}
	case layers.EthernetTypeIPv6:
		switch {
		case l3[0]>>4 != 6:
			return "its version is not 6"
		case int(binary.BigEndian.Uint16(l3[4:]))+40 > len(l3) && !trimmed(l3[6], l3, 40):
			return "its payload length is wrong"
		case l3[6] == 44 || l3[6] == 43:
			return "it has a fragment or routing header"
		}
	default:
		return "it is not IP"
	}
	return ""
}
