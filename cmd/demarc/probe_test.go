package main

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

func packet(t *testing.T, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(text), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Parts of packets, in hex.
const (
	// 10.0.1.2:40000 -> 10.0.2.2:8080, seq 0x11223344, MSS and a tag.
	syn4    = "45000040 00004000 40060000 0a000102 0a000202"
	syn6    = "60000000 002c0640 20010db8000100000000000000000002 20010db8000200000000000000000002"
	fixed   = "9c401f90 11223344 00000000 a002faf0 00000000"
	options = "020405b4 fd10d3ac 43458900 b5b40959 ed687af4"
	error4  = "45000060 00000000 40010000 0a000101 0a000102"
	error6  = "60000000 00643a40 20010db8000100000000000000000001 20010db8000100000000000000000002"
)

func TestReadPacket(t *testing.T) {
	tag := packet(t, "fd10d3ac 43458900 b5b40959 ed687af4")
	syn := segment{
		from: netip.MustParseAddrPort("10.0.1.2:40000"), to: netip.MustParseAddrPort("10.0.2.2:8080"),
		seq: 0x11223344, flags: tcpSYN, tag: tag, whole: true,
	}
	six := syn
	six.from, six.to = netip.MustParseAddrPort("[2001:db8:1::2]:40000"), netip.MustParseAddrPort("[2001:db8:2::2]:8080")
	bare := syn
	bare.tag = nil
	cut := bare
	cut.flags, cut.whole = 0, false
	half := bare
	half.whole = false
	router, router6 := netip.MustParseAddr("10.0.1.1"), netip.MustParseAddr("2001:db8:1::1")
	for _, c := range []struct {
		name, packet string
		want         *sighting
	}{
		{"OK SYN", syn4 + fixed + options, &sighting{segment: &syn}},
		{"OK SYN, IPv6", syn6 + fixed + options, &sighting{segment: &six}},
		{"OK SYN with NOPs for a tag", syn4 + fixed + "020405b4 01010101 01010101 01010101 01010101", &sighting{segment: &bare}},
		{"OK SYN with another experiment", syn4 + fixed + "020405b4 fd10dead 43458900 b5b40959 ed687af4", &sighting{segment: &bare}},
		{"OK options end before the tag", syn4 + fixed + "00000000 fd10d3ac 43458900 b5b40959 ed687af4", &sighting{segment: &bare}},
		{"OK expired, whole", error4 + "0b000000 00000000" + syn4 + fixed + options, &sighting{complaint: &complaint{router, "hop limit exceeded", expired, syn}}},
		{"OK expired, IPv6", error6 + "03000000 00000000" + syn6 + fixed + options, &sighting{complaint: &complaint{router6, "hop limit exceeded", expired, six}}},
		{"OK expired, 8 bytes quoted", error4 + "0b000000 00000000" + syn4 + "9c401f90 11223344", &sighting{complaint: &complaint{router, "hop limit exceeded", expired, cut}}},
		{"OK expired, cut in the tag", error4 + "0b000000 00000000" + syn4 + fixed + "020405b4 fd10d3ac 4345", &sighting{complaint: &complaint{router, "hop limit exceeded", expired, half}}},
		{"OK quote ends before extensions", error4 + "0b000000 00070000" + syn4 + "9c401f90 11223344 20000000 00000000", &sighting{complaint: &complaint{router, "hop limit exceeded", expired, cut}}},
		{"OK port unreachable", error4 + "03030000 00000000" + syn4 + fixed + options, &sighting{complaint: &complaint{router, "port unreachable", refusing, syn}}},
		{"OK host unreachable", error4 + "03010000 00000000" + syn4 + fixed + options, &sighting{complaint: &complaint{router, "host unreachable", unreachable, syn}}},
		{"OK unknown code", error4 + "03c80000 00000000" + syn4 + fixed + options, &sighting{complaint: &complaint{router, "unreachable", unreachable, syn}}},
		{"OK prohibited, IPv6", error6 + "01010000 00000000" + syn6 + fixed + options, &sighting{complaint: &complaint{router6, "administratively prohibited", refusing, six}}},
		{"bad nothing", "", nil},
		{"bad cut IP header", "45000040 00004000", nil},
		{"bad version", "55000040 00004000 40060000 0a000102 0a000202" + fixed + options, nil},
		{"bad header length", "41000040 00004000 40060000 0a000102 0a000202" + fixed + options, nil},
		{"bad header beyond the packet", "4f000028 00004000 40060000 0a000102 0a000202" + fixed, nil},
		{"bad later fragment", "45000040 00002001 40060000 0a000102 0a000202" + fixed + options, nil},
		{"bad cut segment on a device", syn4 + fixed, nil},
		{"bad TCP header length", syn4 + "9c401f90 11223344 00000000 1002faf0 00000000" + options, nil},
		{"bad echo", error4 + "08000000 00000000" + syn4 + fixed + options, nil},
		{"bad redirect", error4 + "05010000 0a000103" + syn4 + fixed + options, nil},
		{"bad quote of a datagram", error4 + "0b000000 00000000 45000040 00004000 40110000 0a000102 0a000202" + fixed, nil},
		{"bad quote cut before the ports", error4 + "0b000000 00000000" + syn4 + "9c40", nil},
		{"bad other protocol", "45000040 00004000 402f0000 0a000102 0a000202" + fixed + options, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := readPacket(packet(t, c.packet), false)
			all := cmp.AllowUnexported(sighting{}, segment{}, complaint{}, netip.AddrPort{}, netip.Addr{})
			if diff := cmp.Diff(c.want, got, all, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzReadPacket(f *testing.F) {
	for _, text := range []string{syn4 + fixed + options, syn6 + fixed + options, error4 + "0b000000 00000000" + syn4 + fixed, error6 + "01010000 00000000" + syn6 + fixed} {
		b, _ := hex.DecodeString(strings.Join(strings.Fields(text), ""))
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s := readPacket(b, true)
		if s == nil {
			return
		}
		if (s.segment == nil) == (s.complaint == nil) {
			t.Fatalf("%+v", s)
		}
		seen := s.segment
		if seen == nil {
			seen = &s.complaint.about
		}
		if len(seen.tag) > 0 && !bytes.Contains(b, seen.tag) {
			t.Fatalf("a tag %x that is nowhere in %x", seen.tag, b)
		}
		seen.identity()
		fateOf([]*segment{seen}, seen)
	})
}

func TestFate(t *testing.T) {
	sent := func(change func(*segment)) *segment {
		s := &segment{
			from: netip.MustParseAddrPort("10.0.1.2:40000"), to: netip.MustParseAddrPort("10.0.2.2:8080"), seq: 1, whole: true,
			tag: packet(t, "fd10d3ac 43458900 b5b40959 ed687af4"),
		}
		change(s)
		return s
	}
	same := func(*segment) {}
	elsewhere := func(s *segment) { s.from = netip.MustParseAddrPort("192.0.2.1:61000") }
	for _, c := range []struct {
		name       string
		sent, seen func(*segment)
		want       fate
	}{
		{"as sent", same, same, tagIntact},
		{"cut behind the tag", same, func(s *segment) { s.whole = false }, tagIntact},
		{"cut before the tag", same, func(s *segment) { s.whole, s.tag = false, nil }, tagUnknown},
		{"taken out", same, func(s *segment) { s.tag = nil }, tagRemoved},
		{"one bit", same, func(s *segment) { s.tag[15] ^= 1 }, tagChanged},
		{"other sequence number", same, func(s *segment) { s.seq = 2 }, tagRenumbered},
		{"other source", same, elsewhere, tagTranslated},
		{"other source, which it leaves out", func(s *segment) { s.tag[7] |= noSource }, func(s *segment) { elsewhere(s); s.tag[7] |= noSource }, tagIntact},
		{"other source, and it leaves the other end out", func(s *segment) { s.tag[7] |= noDestination }, func(s *segment) { elsewhere(s); s.tag[7] |= noDestination }, tagTranslated},
	} {
		// What was sent again has another tag.
		again := sent(func(s *segment) { s.tag[12]++ })
		if got := fateOf([]*segment{sent(c.sent), again}, sent(c.seen)); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// The filter takes what a probe looks at and nothing else.
func TestHandshakeFilter(t *testing.T) {
	for i, in := range handshakes {
		if in.Code&7 != unix.BPF_JMP {
			continue
		}
		for _, to := range []int{i + 1 + int(in.Jt), i + 1 + int(in.Jf)} {
			if to >= len(handshakes) {
				t.Errorf("instruction %d jumps to %d", i, to)
			}
		}
	}
	for _, c := range []struct {
		name, packet string
		want         bool
	}{
		{"OK SYN", syn4 + fixed + options, true},
		{"OK SYN, IPv6", syn6 + fixed + options, true},
		{"OK reset", syn4 + "9c401f90 11223344 00000000 5004faf0 00000000", true},
		{"OK expired", error4 + "0b000000 00000000" + syn4, true},
		{"OK unreachable", error4 + "03000000 00000000" + syn4, true},
		{"OK unreachable, IPv6", error6 + "01000000 00000000" + syn6, true},
		{"OK expired, IPv6", error6 + "03000000 00000000" + syn6, true},
		{"bad data", syn4 + "9c401f90 11223344 00000000 5018faf0 00000000", false},
		{"bad data, IPv6", syn6 + "9c401f90 11223344 00000000 5018faf0 00000000", false},
		{"bad echo", error4 + "08000000 00000000" + syn4, false},
		{"bad echo, IPv6", error6 + "80000000 00000000" + syn6, false},
		{"bad datagram", "45000040 00004000 40110000 0a000102 0a000202" + fixed, false},
		{"bad datagram, IPv6", "60000000 002c1140 20010db8000100000000000000000002 20010db8000200000000000000000002" + fixed, false},
		{"bad fragment", "45000040 00000001 40060000 0a000102 0a000202" + fixed, false},
		{"bad ARP", "00010800 06040001 02000000 0001 0a000102 00000000 0000 0a000101", false},
	} {
		if got := filtered(packet(t, c.packet)); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// filtered runs the filter, for the few instructions that it has.
func filtered(b []byte) bool {
	load := func(at, size int) (v uint32, ok bool) {
		if at+size > len(b) {
			return 0, false
		}
		for _, c := range b[at : at+size] {
			v = v<<8 | uint32(c)
		}
		return v, true
	}
	var a, x uint32
	for pc := 0; ; pc++ {
		in := handshakes[pc]
		ok := true
		switch in.Code {
		case unix.BPF_LD | unix.BPF_B | unix.BPF_ABS:
			a, ok = load(int(in.K), 1)
		case unix.BPF_LD | unix.BPF_H | unix.BPF_ABS:
			a, ok = load(int(in.K), 2)
		case unix.BPF_LD | unix.BPF_B | unix.BPF_IND:
			a, ok = load(int(x+in.K), 1)
		case unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH:
			x, ok = load(int(in.K), 1)
			x = x & 15 * 4
		case unix.BPF_ALU | unix.BPF_RSH | unix.BPF_K:
			a >>= in.K
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			is := a == in.K
			if in.Code&0xf0 == unix.BPF_JSET {
				is = a&in.K != 0
			}
			if is {
				pc += int(in.Jt)
			} else {
				pc += int(in.Jf)
			}
		case unix.BPF_RET | unix.BPF_K:
			return in.K > 0
		}
		if !ok {
			return false
		}
	}
}

func TestSplitTarget(t *testing.T) {
	for _, c := range []struct {
		in, host string
		port     uint16
		bad      bool
	}{
		{in: "192.0.2.1:80", host: "192.0.2.1", port: 80},
		{in: "192.0.2.1", host: "192.0.2.1"},
		{in: "db.example:5432", host: "db.example", port: 5432},
		{in: "db.example", host: "db.example"},
		{in: "2001:db8::1", host: "2001:db8::1"},
		{in: "[2001:db8::1]", host: "2001:db8::1"},
		{in: "[2001:db8::1]:80", host: "2001:db8::1", port: 80},
		{in: "fe80::1%eth0", host: "fe80::1%eth0"},
		{in: "", bad: true},
		{in: ":80", bad: true},
		{in: "host:", bad: true},
		{in: "host:0", bad: true},
		{in: "host:http", bad: true},
		{in: "host:65536", bad: true},
		{in: "host:1:2", bad: true},
		{in: "[host]", bad: true},
	} {
		host, port, err := splitTarget(c.in)
		var usage usageError
		if (err != nil) != c.bad || err != nil && !errors.As(err, &usage) {
			t.Errorf("%q: error %v", c.in, err)
		}
		if err == nil && (host != c.host || port != c.port) {
			t.Errorf("%q: %q %d", c.in, host, port)
		}
	}
}

func TestUnescape(t *testing.T) {
	for _, s := range []string{"/lab/web", `/system.slice/a\x2db.service`, "/\x01\xff", `\`, `\x`, ""} {
		if got := unescape(flow.Escape(s)); got != s {
			t.Errorf("%q became %q", s, got)
		}
	}
	if got := unescape(`/a\xzz\x4`); got != `/a\xzz\x4` {
		t.Errorf("%q", got)
	}
}

func TestProvableSpans(t *testing.T) {
	web, zone, db, net := image.Term{Kind: image.TermWorkload, Index: 0}, image.Term{Kind: image.TermZone}, image.Term{Kind: image.TermWorkload, Index: 1}, image.Term{Kind: image.TermNetwork}
	tcp := func(low, high uint16) image.Span { return image.Span{Proto: image.TCP, Low: low, High: high} }
	img := &image.Image{
		Workloads: []image.Workload{{Name: "web"}, {Name: "db", Zone: 1}},
		Crossings: []image.Crossing{
			{From: []image.Term{web}, To: []image.Term{db}, Ports: []image.Span{tcp(443, 443), {Proto: image.UDP, Low: 53, High: 53}}},
			{From: []image.Term{zone}, To: []image.Term{net, db}, Ports: []image.Span{tcp(80, 81)}},
			{From: []image.Term{{Kind: image.TermAny}}, To: []image.Term{zone}, Ports: []image.Span{tcp(443, 443)}},
			{From: []image.Term{web}, To: []image.Term{net}, Ports: []image.Span{tcp(1, 1)}, Need: image.NoProof},
			{From: []image.Term{web}, To: []image.Term{net}, Ports: []image.Span{tcp(2, 2)}},
			{From: []image.Term{db}, To: []image.Term{web}, Ports: []image.Span{tcp(3, 3)}},
		},
	}
	if diff := cmp.Diff([]image.Span{tcp(80, 81), tcp(443, 443)}, provableSpans(img, "web")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Every verdict, as people read it.
func TestPrintProbe(t *testing.T) {
	p := &prober{target: netip.MustParseAddrPort("192.0.2.7:5432"), workload: api.Identity{Identity: 0x434589, Workload: "web", Zone: "edge"}}
	tag := packet(t, "fd10d3ac 43458900 b5b40959 ed687af4")
	far := p.target.Addr()
	sent := []*segment{{from: netip.MustParseAddrPort("10.0.1.2:40000"), to: p.target, seq: 1, flags: tcpSYN, tag: tag, whole: true}}
	answer := func(tag []byte) *segment {
		return &segment{from: p.target, to: sent[0].from, ack: 2, flags: tcpSYN | tcpACK, tag: tag, whole: true}
	}
	reset := &segment{from: p.target, to: sent[0].from, ack: 2, flags: tcpRST | tcpACK, whole: true}
	hops := []hop{{1, netip.MustParseAddr("10.0.1.1"), tagIntact}, {2, netip.Addr{}, tagNoHop}, {3, netip.MustParseAddr("198.51.100.1"), tagUnknown}}
	says := func(kind complaintKind, words string) *complaint {
		return &complaint{from: netip.MustParseAddr("198.51.100.1"), says: words, kind: kind}
	}
	const head = "Probe:      edge/web, 10.0.1.2:40000 -> 192.0.2.7:5432\nSent:       SYN with its tag\n"
	const along = "Hop 1:      10.0.1.1, tag as sent\nHop 2:      silent\nHop 3:      198.51.100.1, too little quoted to say\n"
	for _, c := range []struct {
		name string
		f    findings
		exit int
		want string
	}{
		{"proven", findings{attempt: &attempt{sent: sent, answer: answer(tag), result: callConnected}}, 0, head +
			"Answer:     SYN-ACK with a tag, from 192.0.2.7\nVerdict:    proven: the tag of edge/web was taken there, and the answer's tag here\n"},
		{"only observed", findings{observes: true, attempt: &attempt{sent: sent, answer: answer(tag), result: callConnected}}, 0, head +
			"Answer:     SYN-ACK with a tag, from 192.0.2.7\nVerdict:    proven: the tag of edge/web was taken there, and the answer has one; this host only observes, and would not have refused a bad one\n"},
		{"stripped", findings{attempt: &attempt{sent: sent, reset: reset, result: "ECONNREFUSED"}, hops: []hop{hops[0], hops[1], {3, far, tagRemoved}}}, 1, head +
			"Answer:     reset, from 192.0.2.7\nHop 1:      10.0.1.1, tag as sent\nHop 2:      silent\nHop 3:      192.0.2.7, tag removed\n" +
			"Verdict:    stripped: the tag is gone at hop 3 (192.0.2.7); it was as sent up to hop 1 (10.0.1.1)\nHint:       what stands there must pass TCP option 253 (ExID d3ac) as it is\n"},
		{"changed", findings{attempt: &attempt{sent: sent, result: callStopped}, hops: []hop{{1, far, tagTranslated}}}, 1, head +
			"Answer:     none\nHop 1:      192.0.2.7, address or port changed\n" +
			"Verdict:    changed: an address or a port is another at hop 1 (192.0.2.7); it was as sent up to this host\nHint:       say so in the crossing: nat: source or nat: destination\n"},
		{"unproven", findings{attempt: &attempt{sent: sent, answer: answer(nil), result: "ECONNREFUSED"}, hops: hops}, 1, head +
			"Answer:     SYN-ACK without a tag, from 192.0.2.7\n" + along +
			"Verdict:    unproven: the answer has no tag: no demarc tags it there, or the tag is taken out; up to hop 1 (10.0.1.1) the tag was as sent\n" +
			"Hint:       on the far host: demarc flows --verdict deny\n"},
		{"answer refused", findings{attempt: &attempt{sent: sent, answer: answer(tag), result: callStopped}, denied: abi.NoCrossingFor}, 2, head +
			"Answer:     SYN-ACK with a tag, from 192.0.2.7\nVerdict:    refused: this host refused the answer: no-crossing\nHint:       demarc flows --verdict deny\n"},
		{"answer changed", findings{attempt: &attempt{sent: sent, answer: answer(tag), result: callStopped}, denied: abi.TagBadMAC}, 1, head +
			"Answer:     SYN-ACK with a tag, from 192.0.2.7\nVerdict:    changed: the answer's tag does not fit the answer (tag-bad-mac): it is changed on the way back\nHint:       demarc flows --verdict deny\n"},
		{"reset", findings{attempt: &attempt{sent: sent, reset: reset, result: "ECONNREFUSED"}}, 2, head +
			"Answer:     reset, from 192.0.2.7\nVerdict:    refused: 192.0.2.7 resets it: nobody listens there, or demarc there says no\nHint:       on the far host: demarc flows --verdict deny\n"},
		{"prohibited", findings{attempt: &attempt{sent: sent, complaint: says(refusing, "port unreachable"), result: "ECONNREFUSED"}}, 2, head +
			"Answer:     port unreachable, from 198.51.100.1\nVerdict:    refused: 198.51.100.1 says: port unreachable\nHint:       on the far host: demarc flows --verdict deny\n"},
		{"unreachable", findings{attempt: &attempt{sent: sent, complaint: says(unreachable, "host unreachable"), result: "EHOSTUNREACH"}}, 3, head +
			"Answer:     host unreachable, from 198.51.100.1\nVerdict:    no answer: 198.51.100.1 says: host unreachable\n"},
		{"silence", findings{attempt: &attempt{sent: sent, result: callStopped}, hops: hops}, 3, head + "Answer:     none\n" + along +
			"Verdict:    no answer: nothing came back; up to hop 1 (10.0.1.1) the tag was as sent\nHint:       on the far host: demarc flows --verdict deny\n"},
		{"not declared", findings{attempt: &attempt{result: "EPERM"}, denied: abi.NoCrossingFor}, 2, "Probe:      edge/web, this host -> 192.0.2.7:5432\nSent:       nothing\nAnswer:     none\n" +
			"Verdict:    refused: this host refused it: no-crossing\nHint:       demarc flows --verdict deny\n"},
		{"no way", findings{attempt: &attempt{result: "ENETUNREACH"}}, 3, "Probe:      edge/web, this host -> 192.0.2.7:5432\nSent:       nothing\nAnswer:     none\n" +
			"Verdict:    no answer: nothing left this host: ENETUNREACH\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := c.f.report(p)
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			if err := printProbe(&b, r); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, b.String()); diff != "" || r.Exit != c.exit {
				t.Errorf("exit %d, want %d (-want +got):\n%s", r.Exit, c.exit, diff)
			}
		})
	}
	// Without a tag nothing was asked; with another's, something is wrong here.
	for _, bad := range [][]byte{nil, packet(t, "fd10d3ac 43458a00 b5b40959 ed687af4")} {
		s := *sent[0]
		s.tag = bad
		f := findings{attempt: &attempt{sent: []*segment{&s}, result: callConnected}}
		if r, err := f.report(p); err == nil {
			t.Errorf("tag %x: %+v", bad, r)
		}
	}
}
