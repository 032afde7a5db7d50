package e2e_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// A tag that the kernel did not write does not leave the host, whoever wrote it, also
// where he knows the key: a process of no workload with a raw socket or a packet
// socket, or one that is not under the managed root at all. It is told with the host that
// it came from: this one.
func TestE01ForeignTagsLeave(t *testing.T) {
	w, client, server := connected(t)
	w.control(client, 7000)
	own := openCable(t, w.web)
	p := w.web.Probe(w.caller.Cgroup("/elsewhere"))
	p.Must(raw("4", unix.AF_INET, unix.IPPROTO_RAW))
	p.Must(raw("6", unix.AF_INET6, unix.IPPROTO_RAW))
	wire := w.web.Wire()
	hardwareOf := hardware(t, w.web)
	port := uint16(20000)
	for i, to := range w.both(7000) {
		from := []netip.Addr{w.web.IP4, w.web.IP6}[i]
		family := []string{"4", "6"}[i]
		s := func() segmentOf {
			port++
			return segmentOf{from: netip.AddrPortFrom(from, port), to: to, seq: 1000, flags: flagSYN}
		}
		d := func() datagramOf {
			port++
			return datagramOf{from: netip.AddrPortFrom(from, port), to: to, when: 1, nonce: 1}
		}
		tagged := func(tag func(s segmentOf) []byte) func() tcpFrame {
			return func() tcpFrame { one := s(); return w.tagged(one, tag(one)) }
		}
		answer := func() tcpFrame {
			one := s()
			one.flags, one.ack = flagSYN|flagACK, 7
			return w.tagged(one, w.tag(one, w.id["web"], tagAnswer))
		}
		for _, c := range []struct {
			name  string
			frame func() tcpFrame
			leave bool // a control: without a tag it does
		}{
			{"OK a SYN without a tag", tagged(func(segmentOf) []byte { return nil }), true},
			{"OK another option of kind 253", tagged(func(segmentOf) []byte { return []byte{253, 8, 0xd3, 0xad, 1, 2, 3, 4} }), true},
			{"OK a datagram without a tag", func() tcpFrame { return w.datagramFrame(d(), nil) }, true},
			{"OK a datagram with an option of another kind", func() tcpFrame { return w.datagramFrame(d(), append([]byte{0, 0, 126, 24}, make([]byte, 22)...)) }, true},
			{"bad a true tag of a workload's", tagged(func(s segmentOf) []byte { return w.tag(s, w.id["web"], 0) }), false},
			{"bad a tag of chance", tagged(func(s segmentOf) []byte { return append(w.tag(s, w.id["other"], 0)[:8:8], "perhaps."...) }), false},
			{"bad two tags", tagged(func(s segmentOf) []byte { return append(w.tag(s, 16, 0), w.tag(s, 16, 0)...) }), false},
			{"bad a short one", tagged(func(s segmentOf) []byte { return []byte{253, 8, 0xd3, 0xac, 1, 2, 3, 4} }), false},
			{"bad an answer's", answer, false},
			{"bad a datagram's that is old", func() tcpFrame {
				one := d()
				return w.datagramFrame(one, append(w.datagramTag(one, w.id["web"], w.epoch, tagDatagram)[:18:18], "perhaps."...))
			}, false},
		} {
			for _, by := range []string{"a raw socket", "a packet socket"} {
				t.Run(fmt.Sprintf("IPv%s, %s, by %s", family, c.name, by), func(t *testing.T) {
					f := c.frame()
					before := w.caller.Denied(abi.TagBadIdentity)
					if by == "a packet socket" {
						copy(f.frame[6:], hardwareOf)
						if _, err := unix.Write(own.fd, f.frame); err != nil && c.leave {
							t.Fatalf("send: %v", err)
						}
					} else if r := p.Do(rawSend(family, to.Addr(), f.frame[14:])); r.Error != "" && c.leave {
						t.Fatalf("send: %s", r.Error)
					}
					sent := func(q netlab.Packet) bool { return q.Sent && q.Src == f.src && q.Dst == to }
					if c.leave {
						wire.Await(sent)
						return
					}
					eventually(t, timeToAnswer, "denial of a foreign tag", func() bool { return w.caller.Denied(abi.TagBadIdentity) > before })
					if n := wire.Count(sent); n > 0 {
						t.Errorf("%d on the wire", n)
					}
				})
			}
		}
	}
	if got := server.served("tcp", 7000).Count; got != 2 {
		t.Errorf("the listener got %d connections, want the two honest ones", got)
	}
	w.control(client, 7000)
}

// Whoever is pinged through a host: machines that are not its own answer as before, a
// container as the workload that lives there, whatever unmanaged processes are allowed.
//
//	partner -> web declared; -> api, peer -> web not; -> outside, a third network, is not the host's business
func TestInboundICMPForwarded(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		e.enforce()
		outside := beyond(e)
		partner, peer := startActor(t, e.partner, e.lab.Cgroup("partner")), startActor(t, e.peer, e.lab.Cgroup("peer"))
		for i, inbound := range []string{"deny", "allow"} {
			e.node.Apply(document(2+i, fmt.Sprintf(estatePolicy, e.partner.IP4, e.partner.IP6)+fmt.Sprintf(
				"  - {name: pings, from: [network/partner], to: [workload/web], ports: [icmp/echo], identity: none}\nunmanaged: {zone: app, outbound: allow, inbound: %s}\n", inbound)))
			for _, c := range []struct {
				name    string
				from    *actor
				to      *netlab.Namespace
				answers bool
			}{
				{"declared", partner, e.web.Namespace, true},
				{"not declared, of its neighbour", partner, e.api.Namespace, false},
				{"not declared, from another", peer, e.web.Namespace, false},
				{"what the host forwards", peer, outside, true},
				{"the host itself", peer, e.host.Namespace, inbound == "allow"},
			} {
				for _, to := range []netip.Addr{c.to.IP4, c.to.IP6} {
					e.forget()
					wait := "0.2" // the wires and the reason tell more than that nobody answers
					if c.answers {
						wait = "5"
					}
					if got := !c.from.tries("ping -n -c 1 -W " + wait + " " + to.String()).Failed; got != c.answers {
						t.Errorf("inbound: %s: %s: a ping to %s is answered: %v", inbound, c.name, to, got)
					}
					if c.answers {
						continue
					}
					e.told(c.name, "no-crossing")
					for _, d := range e.doors {
						if n := d.Count(func(p netlab.Packet) bool { return !p.Sent && p.Dst.Addr() == to && (p.ICMP == 8 || p.ICMP == 128) }); n > 0 {
							t.Errorf("inbound: %s: %s: %d pings to %s went through a door", inbound, c.name, n, to)
						}
					}
				}
			}
		}
	})
}

// ICMP that comes in: errors and neighbours pass, a redirect or what nobody needs does
// not, and who may ask for an echo is declared. What is dropped is not answered.
func TestInboundICMP(t *testing.T) {
	w := newWired(t)
	other := w.lab.Namespace("other")
	policy := func(version int, unmanaged string) string {
		return document(version, fmt.Sprintf(`workloads:
  db: {zone: app, match: [{cgroup: /lab/db}]}
networks:
  outside: {zone: app, cidrs: [%s/32, "%s/128"]}
crossings:
  - {name: pings, from: [network/outside], to: [unmanaged], ports: [icmp/echo], identity: none}
  - {name: visit, from: [network/outside], to: [workload/db], ports: [tcp/7100], identity: none}
unmanaged: {zone: app, outbound: allow, inbound: %s}
`, w.outside.IP4, w.outside.IP6, unmanaged))
	}
	w.listener.Apply(policy(1, "deny"))
	frame := func(from, to netip.Addr, kind, code byte, rest ...byte) tcpFrame {
		message := append([]byte{kind, code, 0, 0}, rest...)
		b := append(append([]byte(nil), w.mac.db...), w.mac.outside...)
		if from.Is4() {
			binary.BigEndian.PutUint16(message[2:], checksum(message))
			packet := ipv4(from, to, unix.IPPROTO_ICMP, 0, message)
			binary.BigEndian.PutUint16(packet[10:], internetSum(packet[:20], 0))
			return tcpFrame{frame: append(append(b, 0x08, 0), packet...)}
		}
		pseudo := append(append(from.AsSlice(), to.AsSlice()...), 0, unix.IPPROTO_ICMPV6, 0, byte(len(message)))
		binary.BigEndian.PutUint16(message[2:], checksum(pseudo, message))
		packet := ipv6(from, to, unix.IPPROTO_ICMPV6, message)
		packet[7] = 255 // neighbours
		return tcpFrame{frame: append(append(b, 0x86, 0xdd), packet...)}
	}
	wire := w.db.Wire()
	quote4 := ipv4(w.db.IP4, w.outside.IP4, udp, 0, datagram(1, 2))
	quote6 := ipv6(w.db.IP6, w.outside.IP6, udp, datagram(1, 2))
	redirect6 := append(append(make([]byte, 4), w.outside.IP6.AsSlice()...), nowhere6.AsSlice()...)
	type row struct {
		name   string
		v6     bool
		kind   byte
		code   byte
		rest   []byte
		from   *netlab.Namespace
		reason abi.Reason // Undecided: it passes
		answer bool       // the kernel answers it
	}
	echo := []byte{0, 1, 0, 1, 'e', 'c', 'h', 'o'}
	rows := []row{
		{"OK echo of a declared network", false, 8, 0, echo, w.outside, abi.Undecided, true},
		{"OK echo of a declared network", true, 128, 0, echo, w.outside, abi.Undecided, true},
		{"bad echo of another", false, 8, 0, echo, other, abi.NoCrossingFor, false},
		{"bad echo of another", true, 128, 0, echo, other, abi.NoCrossingFor, false},
		{"OK port unreachable", false, 3, 3, append(make([]byte, 4), quote4...), other, abi.Undecided, false},
		{"OK packet too big", true, 2, 0, append([]byte{0, 0, 5, 0}, quote6...), other, abi.Undecided, false},
		{"bad redirect", false, 5, 1, append(w.outside.IP4.AsSlice(), quote4...), other, abi.ICMPType, false},
		{"bad redirect", true, 137, 0, redirect6, other, abi.ICMPType, false},
		{"bad timestamp", false, 13, 0, make([]byte, 16), w.outside, abi.ICMPType, false},
		{"bad address mask", false, 17, 0, make([]byte, 8), w.outside, abi.ICMPType, false},
		{"bad node information", true, 139, 0, make([]byte, 28), w.outside, abi.ICMPType, false},
		{"bad what is not assigned", false, 77, 0, make([]byte, 4), w.outside, abi.ICMPType, false},
		{"bad what is not assigned", true, 200, 0, make([]byte, 4), w.outside, abi.ICMPType, false},
	}
	try := func(r row) {
		t.Helper()
		from, to := r.from.IP4, w.db.IP4
		if r.v6 {
			from, to = r.from.IP6, w.db.IP6
		}
		name := fmt.Sprintf("%s from %s", r.name, from)
		before := w.listener.Denied(r.reason)
		wire.Forget()
		w.cable.send(frame(from, to, r.kind, r.code, bytes.Clone(r.rest)...))
		if r.reason != abi.Undecided {
			eventually(t, timeToAnswer, name, func() bool { return w.listener.Denied(r.reason) > before })
			if n := w.listener.Denied(r.reason) - before; n != 1 {
				t.Errorf("%s: %d denials", name, n)
			}
		} else {
			wire.Await(func(q netlab.Packet) bool { return !q.Sent && q.Src.Addr() == from && q.ICMP == r.kind })
		}
		isAnswer := func(q netlab.Packet) bool {
			return q.Sent && q.Dst.Addr() == from && (q.Proto == unix.IPPROTO_ICMP || q.Proto == unix.IPPROTO_ICMPV6 && (q.ICMP < 133 || q.ICMP > 136))
		}
		if r.answer {
			wire.Await(isAnswer)
		} else if got := wire.Packets(isAnswer); len(got) > 0 {
			t.Errorf("%s: answered: %s", name, got[0])
		}
	}
	// The kernel may have to find its neighbours first.
	for _, ns := range []*netlab.Namespace{w.outside, other} {
		p := ns.Probe(w.lab.Cgroup("neighbour"))
		p.Socket("u", "udp4")
		p.Do(probe.Call{Op: "send", Socket: "u", Address: w.db.At4(9).String(), Data: []byte("x")})
	}
	for _, r := range rows {
		denied := w.listener.Denied(abi.ICMPType) + w.listener.Denied(abi.NoCrossingFor)
		try(r)
		if now := w.listener.Denied(abi.ICMPType) + w.listener.Denied(abi.NoCrossingFor); r.reason == abi.Undecided && now != denied {
			t.Errorf("%s: denied", r.name)
		}
	}
	// Where processes of no workload may be called by anybody, echoes may, too; the rest is
	// as it was.
	w.listener.Apply(policy(2, "allow"))
	for _, r := range rows {
		if r.reason == abi.NoCrossingFor {
			r.reason, r.answer = abi.Undecided, true
		}
		try(r)
	}
}
