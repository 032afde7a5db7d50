package e2e_test

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// raw makes a raw socket; Proto 255 expects whole IPv4 packets.
func raw(name string, domain, proto int) probe.Call {
	return probe.Call{Op: "socket", New: name, Domain: domain, Type: unix.SOCK_RAW, Proto: proto}
}

// withRaw is a world where web has raw sockets from before there was a policy, as
// the only way to have one: "udp4", "tcp4", "udp6", "header4" (IP_HDRINCL) and
// "header6" (IPV6_HDRINCL). The sends show that they work until then.
func withRaw(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.p.Must(raw("udp4", unix.AF_INET, udp))
	w.p.Must(raw("tcp4", unix.AF_INET, tcp))
	w.p.Must(raw("udp6", unix.AF_INET6, udp))
	w.p.Must(raw("header4", unix.AF_INET, unix.IPPROTO_RAW))
	w.p.Must(raw("header6", unix.AF_INET6, unix.IPPROTO_RAW))
	w.p.Must(rawSend("udp4", w.peer.IP4, datagram(5000, 7009)))
	w.wire.Await(netlab.To(udp, w.peer.IP4, 7009))
	w.enforce()
	w.wire.Forget()
	return w
}

// rawSend sends through a raw socket, where addresses have no port.
func rawSend(socket string, to netip.Addr, b []byte) probe.Call {
	return probe.Call{Op: "send", Socket: socket, Address: netlab.Place{Address: to}.String(), Data: b}
}

// Raw sockets cannot be made, and those that exist are mute.
func TestB01RawSocket(t *testing.T) {
	w := withRaw(t)
	w.control()
	for _, c := range []probe.Call{
		raw("no", unix.AF_INET, udp), raw("no", unix.AF_INET, tcp), raw("no", unix.AF_INET, unix.IPPROTO_ICMP), raw("no", unix.AF_INET, unix.IPPROTO_RAW),
		raw("no", unix.AF_INET6, udp), raw("no", unix.AF_INET6, unix.IPPROTO_ICMPV6),
	} {
		w.p.Refused(c, "EPERM")
		w.denied(abi.RawSocket, uint8(c.Proto), anywhere)
		w.node.Forget()
	}
	syn := segment(w.web.At4(5000), w.peer.At4(7001), 1, 0, 2)
	for _, c := range []probe.Call{
		rawSend("udp4", w.peer.IP4, datagram(5000, 7001)), rawSend("tcp4", w.peer.IP4, syn),
		rawSend("udp6", w.peer.IP6, datagram(5000, 7001)), rawSend("udp4", w.decoy.IP4, datagram(5000, 7000)),
	} {
		w.p.Refused(c, "EPERM")
		to := netip.MustParseAddrPort(c.Address).Addr()
		proto := uint8(udp)
		if c.Socket == "tcp4" {
			proto = tcp
		}
		w.denied(abi.RawSocket, proto, netlab.Place{Address: to})
		w.nothing(netlab.And(netlab.ToAddress(to), func(p netlab.Packet) bool { return p.Src.Port() == 5000 }))
		w.node.Forget()
	}
	w.silent()
}

// What the header says counts, not what the call says, and neither leaves.
func TestB02OwnHeader(t *testing.T) {
	w := withRaw(t)
	w.control()
	for _, at := range []struct{ call, header netip.Addr }{{w.decoy.IP4, w.peer.IP4}, {w.peer.IP4, w.decoy.IP4}, {w.peer.IP4, w.peer.IP4}} {
		packet := ipv4(w.web.IP4, at.header, udp, 0, datagram(5000, 7001))
		w.p.Refused(rawSend("header4", at.call, packet), "EPERM")
		w.denied(abi.RawSocket, udp, netlab.Place{Address: at.header, Port: 7001})
		w.node.Forget()
	}
	w.nothing(func(p netlab.Packet) bool { return p.Sent && p.Src.Port() == 5000 })
	w.silent()
}

// ipv6 is a packet with extension headers in front of a transport.
func ipv6(from, to netip.Addr, next uint8, payload []byte) []byte {
	b := []byte{0x60, 0, 0, 0, 0, 0, next, 64}
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	b = append(append(b, from.AsSlice()...), to.AsSlice()...)
	return append(b, payload...)
}

// Extension headers do not hide what they are in front of, lead elsewhere, or tire
// the parser.
func TestB03ExtensionHeaders(t *testing.T) {
	w := withRaw(t)
	w.control()
	options := func(next uint8, rest ...byte) []byte { return append([]byte{next, 0, 1, 4, 0, 0, 0, 0}, rest...) } // PadN
	payload := datagram(5000, 7001)
	deep := options(udp, payload...)
	for range 7 {
		deep = options(60, deep...)
	}
	segments := append([]byte{udp, 2, 4, 1, 0, 0, 0, 0}, w.peer.IP6.AsSlice()...) // SRH, one segment left
	home := append([]byte{udp, 2, 2, 1, 0, 0, 0, 0}, w.peer.IP6.AsSlice()...)     // type 2
	fragment := []byte{udp, 0, 0, 1, 0, 0, 0, 1}
	for _, c := range []struct {
		name   string
		next   uint8
		packet []byte
		reason abi.Reason
	}{
		{"one header", 60, options(udp, payload...), abi.RawSocket},
		{"eight headers", 60, deep, abi.IPOptions},
		{"segment routing", 43, append(segments, payload...), abi.IPOptions},
		{"routing type 2", 43, append(home, payload...), abi.IPOptions},
		{"fragment", 44, append(fragment, payload...), abi.Fragment},
		{"header beyond the end", 60, []byte{udp, 200, 1, 4, 0, 0, 0, 0}, abi.Malformed},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.p.Refused(rawSend("header6", w.peer.IP6, ipv6(w.web.IP6, w.peer.IP6, c.next, c.packet)), "EPERM")
			f := w.node.AwaitFlow(c.reason.String(), func(f netlab.Flow) bool {
				return f.Reason == c.reason && f.Verdict == abi.Deny && f.Direction == abi.Egress
			})
			if f.Source.Workload != "web" {
				t.Errorf("denied %s", netlab.Describe(f))
			}
			w.node.Forget()
		})
	}
	// The same by options of an ordinary socket, to where it may send.
	w.p.Socket("u", "udp6")
	w.p.Must(probe.Call{Op: "settext", Socket: "u", Level: unix.IPPROTO_IPV6, Option: unix.IPV6_DSTOPTS, Data: options(0)})
	w.p.Must(send("u", w.decoy.At6(7000))) // control: harmless options in front are fine
	w.p.Must(probe.Call{Op: "recv", Socket: "u"})
	w.p.Refused(send("u", w.peer.At6(7001)), "EPERM")
	w.denied(abi.NoCrossingFor, udp, w.peer.At6(7001))
	// Source routes: the first hop may be reached, the last may not.
	w.p.Socket("o", "udp4")
	route := append([]byte{131, 7, 4}, w.peer.IP4.AsSlice()...)
	w.p.Must(probe.Call{Op: "settext", Socket: "o", Level: unix.IPPROTO_IP, Option: unix.IP_OPTIONS, Data: append(route, 0)})
	w.p.Refused(send("o", w.decoy.At4(7000)), "EPERM")
	w.node.AwaitFlow("IPv4 options", func(f netlab.Flow) bool { return f.Reason == abi.IPOptions && f.Verdict == abi.Deny })
	w.silent()
}

// Hand-made fragments leave in no order and of no size.
func TestB04Fragments(t *testing.T) {
	w := withRaw(t)
	w.control()
	body := append(datagram(5000, 7001), make([]byte, 20)...)
	const more = 0x2000
	for name, fragments := range map[string][][]byte{
		"in order":    {ipv4(w.web.IP4, w.peer.IP4, udp, more, body[:16]), ipv4(w.web.IP4, w.peer.IP4, udp, 2, body[16:])},
		"reversed":    {ipv4(w.web.IP4, w.peer.IP4, udp, 2, body[16:]), ipv4(w.web.IP4, w.peer.IP4, udp, more, body[:16])},
		"tiny first":  {ipv4(w.web.IP4, w.peer.IP4, udp, more, body[:8]), ipv4(w.web.IP4, w.peer.IP4, udp, 1, body[8:])},
		"overlapping": {ipv4(w.web.IP4, w.peer.IP4, udp, more, body[:16]), ipv4(w.web.IP4, w.peer.IP4, udp, 1, body[8:])},
		"to decoy":    {ipv4(w.web.IP4, w.decoy.IP4, udp, more, body[:16]), ipv4(w.web.IP4, w.decoy.IP4, udp, 2, body[16:])},
	} {
		t.Run(name, func(t *testing.T) {
			for _, b := range fragments {
				w.p.Refused(rawSend("header4", netip.AddrFrom4([4]byte(b[16:])), b), "EPERM")
				w.node.AwaitFlow("fragment", func(f netlab.Flow) bool { return f.Reason == abi.Fragment && f.Verdict == abi.Deny })
				w.node.Forget()
			}
			w.nothing(func(p netlab.Packet) bool { return p.Sent && p.Fragment })
		})
	}
	// Control: what the kernel itself cuts is judged before it is cut, and passes.
	w.p.Socket("u", "udp4")
	w.p.Must(probe.Call{Op: "send", Socket: "u", Address: w.decoy.At4(7000).String(), Size: 4000})
	if r := w.p.Must(probe.Call{Op: "recv", Socket: "u"}); r.N != 4000 {
		t.Errorf("echo of %d bytes", r.N)
	}
	w.p.Refused(probe.Call{Op: "send", Socket: "u", Address: w.peer.At4(7001).String(), Size: 4000}, "EPERM")
	w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
	w.silent()
}

// A raw socket is no ear for what others are sent.
func TestB10RawReceive(t *testing.T) {
	w := newWorld(t)
	w.p.Must(raw("ear", unix.AF_INET, udp))
	w.p.Socket("addressee", "udp4") // without one, the kernel would answer that there is none
	w.p.Must(probe.Call{Op: "bind", Socket: "addressee", Address: "0.0.0.0:7777"})
	sender := w.peer.Probe(w.lab.Cgroup("peer"))
	sender.Socket("u", "udp4")
	sender.Must(probe.Call{Op: "bind", Socket: "u", Address: "0.0.0.0:5555"})
	sender.Must(send("u", w.web.At4(7777)))
	w.p.Must(probe.Call{Op: "recv", Socket: "ear"}) // control: without a policy it hears
	w.enforce()
	w.control()
	for {
		if r := w.p.Do(probe.Call{Op: "recv", Socket: "ear", Timeout: 1}); r.Error != "" {
			break // what came before the policy
		}
	}
	// A datagram that web may have: its own answer.
	w.p.Socket("u", "udp4")
	w.p.Connect("u", w.decoy.At4(7000).String())
	w.p.Echoed("u", "for the socket, not for the ear")
	sender.Must(send("u", w.web.At4(7777)))
	w.node.AwaitFlow("raw-socket ingress", func(f netlab.Flow) bool {
		return f.Verdict == abi.Deny && f.Reason == abi.RawSocket && f.Direction == abi.Ingress
	})
	w.p.Refused(probe.Call{Op: "recv", Socket: "ear", Timeout: 1}, probe.Timeout)
	w.p.Refused(raw("no", unix.AF_INET, udp), "EPERM")
	w.silent()
}
