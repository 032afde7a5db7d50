package e2e_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

var datagramFamilies = []struct {
	name            string
	of              func(*netlab.Namespace) netip.Addr
	whole, fragment int // bytes that fit into a frame as they are; those of a datagram in each of its fragments
}{
	{"udp4", func(ns *netlab.Namespace) netip.Addr { return ns.IP4 }, 1500 - 20 - 8, 1480},
	{"udp6", func(ns *netlab.Namespace) netip.Addr { return ns.IP6 }, 1500 - 40 - 8, 1448},
}

// What cannot carry a tag, because it is as large as the path, goes in fragments or is
// segmented by the device, is refused in a new flow, by the sender's host and for that
// reason, and carried by a flow that has proved itself.
func TestLargeDatagrams(t *testing.T) {
	f := newFleet(t, "")
	f.serve()
	wire := f.hosts["web"].Wire()
	port := 41000
	for _, family := range datagramFamilies {
		at := netip.AddrPortFrom(family.of(f.hosts["api"]), 8080)
		for _, c := range []struct {
			name           string
			bytes, segment int // 0 = one datagram, however large
			came           int // datagrams
		}{
			{"OK with room", family.whole - 27, 0, 1},
			{"bad one byte more", family.whole - 25, 0, 1},
			{"bad as large as the path", family.whole, 0, 1},
			{"bad in fragments", family.whole + 1, 0, 1},
			{"bad in many fragments", 20_000, 0, 1},
			{"bad segmented by the device", 2000, 500, 4},
		} {
			t.Run(fmt.Sprintf("%s, %s", family.name, c.name), func(t *testing.T) {
				port++
				p := f.hosts["web"].Probe(f.nodes["web"].Cgroup("/lab/web"))
				p.Socket("u", family.name)
				p.Must(probe.Call{Op: "bind", Socket: "u", Address: netip.AddrPortFrom(family.of(f.hosts["web"]), uint16(port)).String()})
				p.Connect("u", at.String())
				segment := func(size int) {
					p.Must(probe.Call{Op: "set", Socket: "u", Level: unix.SOL_UDP, Option: unix.UDP_SEGMENT, Value: size})
				}
				large := func() {
					segment(c.segment)
					p.Do(probe.Call{Op: "send", Socket: "u", Data: make([]byte, c.bytes)}) // which may be told of the refusal
					segment(0)
				}
				denied := func() uint64 { return f.nodes["web"].Denied(abi.TagNoRoom) }
				came := func() int { return f.actors["api"].served("udp", 8080).Count }
				fits := strings.HasPrefix(c.name, "OK")
				before, had := denied(), came()
				wire.Forget()
				large()
				if fits {
					p.Must(probe.Call{Op: "recv", Socket: "u"})
				} else {
					eventually(t, timeToAnswer, "refusal for want of room", func() bool { return denied() > before })
					f.nodes["web"].AwaitDenied(abi.TagNoRoom, unix.IPPROTO_UDP, netlab.Place{Address: at.Addr(), Port: 8080})
					if sent := wire.Packets(func(q netlab.Packet) bool {
						return q.Sent && q.Dst.Addr() == at.Addr() && q.Proto != unix.IPPROTO_ICMPV6
					}); len(sent) > 0 {
						t.Errorf("%d packets on the wire, the first: %s", len(sent), sent[0])
					}
				}
				p.Must(probe.Call{Op: "send", Socket: "u", Data: []byte("small")})
				p.Must(probe.Call{Op: "recv", Socket: "u"})
				proven, still := came(), denied()
				if want := had + 1; !fits && proven != want {
					t.Errorf("the server got %d datagrams, want the small one", proven-had)
				}
				large()
				eventually(t, timeToAnswer, "the large one in a proven flow", func() bool { return came() == proven+c.came })
				for range c.came {
					p.Must(probe.Call{Op: "recv", Socket: "u"})
				}
				if n := denied() - still; n != 0 {
					t.Errorf("%d refusals in a proven flow", n)
				}
			})
		}
	}
}

// A first answer that cannot carry a tag leaves all the same, and who asked refuses it.
// Once a small one has proved who answers, large ones pass.
func TestLargeAnswers(t *testing.T) {
	f := newFleet(t, "")
	wire := f.hosts["api"].Wire()
	port := 42000
	for _, family := range datagramFamilies {
		at := netip.AddrPortFrom(family.of(f.hosts["api"]), 8080)
		server := f.hosts["api"].Probe(f.nodes["api"].Cgroup("/lab/api"))
		server.Socket("s", family.name)
		server.Must(probe.Call{Op: "bind", Socket: "s", Address: at.String()})
		for _, c := range []struct {
			name  string
			bytes int
		}{
			{"OK with room", family.whole - 27},
			{"bad one byte more", family.whole - 25},
			{"bad as large as the path", family.whole},
			{"bad in fragments", family.whole + 1},
			{"bad in many fragments", 20_000},
		} {
			t.Run(fmt.Sprintf("%s, %s", family.name, c.name), func(t *testing.T) {
				port++
				p := f.hosts["web"].Probe(f.nodes["web"].Cgroup("/lab/web"))
				p.Socket("u", family.name)
				from := netip.AddrPortFrom(family.of(f.hosts["web"]), uint16(port))
				p.Must(probe.Call{Op: "bind", Socket: "u", Address: from.String()})
				p.Connect("u", at.String())
				p.Must(probe.Call{Op: "send", Socket: "u", Data: []byte("question")})
				server.Must(probe.Call{Op: "recv", Socket: "s"})

				missing := func() uint64 { return f.nodes["web"].Denied(abi.TagMissing) }
				before := missing()
				packets := 1
				if c.bytes > family.whole {
					packets = (8 + c.bytes + family.fragment - 1) / family.fragment
				}
				// answer has the server say that much, and counts what of it leaves.
				answer := func(bytes int) (left, tagged int) {
					wire.Forget()
					server.Must(probe.Call{Op: "send", Socket: "s", Address: from.String(), Size: bytes})
					for _, q := range wire.Packets(func(q netlab.Packet) bool {
						return q.Sent && q.Proto == unix.IPPROTO_UDP && q.Dst.Addr() == from.Addr()
					}) {
						left++
						if q.Surplus > 0 {
							tagged++
						}
					}
					return left, tagged
				}
				took := func(bytes int) {
					if r := p.Must(probe.Call{Op: "recv", Socket: "u"}); r.N != bytes {
						t.Errorf("an answer of %d bytes, want %d", r.N, bytes)
					}
				}

				left, tagged := answer(c.bytes)
				if strings.HasPrefix(c.name, "OK") {
					took(c.bytes)
					if left != 1 || tagged != 1 {
						t.Errorf("%d packets left, %d of them with a tag", left, tagged)
					}
				} else {
					if left != packets || tagged != 0 {
						t.Errorf("%d packets left, %d of them with a tag, want %d without", left, tagged, packets)
					}
					p.Refused(probe.Call{Op: "recv", Socket: "u"}, "ECONNREFUSED")
					f.nodes["web"].AwaitFlow("the answer without a tag", func(flow netlab.Flow) bool {
						return flow.Verdict == abi.Deny && flow.Reason == abi.TagMissing && flow.Direction == abi.Egress && flow.Source.Port == from.Port()
					})
					if n := missing() - before; n != 1 {
						t.Errorf("%d answers refused for want of a tag, want 1", n)
					}
					left, tagged = answer(5)
					if took(5); left != 1 || tagged != 1 {
						t.Errorf("of a small answer %d packets left, %d of them with a tag", left, tagged)
					}
				}
				had := missing()
				for _, bytes := range []int{c.bytes, family.whole, 20_000} {
					if _, tagged := answer(bytes); tagged != 0 {
						t.Errorf("%d tags in a flow that has proved itself", tagged)
					}
					took(bytes)
				}
				if n := missing() - had; n != 0 {
					t.Errorf("%d refusals in a proven flow", n)
				}
				if n := f.nodes["api"].Denied(abi.TagNoRoom); n != 0 {
					t.Errorf("the answering host refused %d", n)
				}
			})
		}
	}
}
