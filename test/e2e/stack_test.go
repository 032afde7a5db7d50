package e2e_test

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// bound makes a socket with a source port of its own choice.
func bound(p *netlab.Probe, name, kind string, at netlab.Place) {
	p.Socket(name, kind)
	p.Must(probe.Call{Op: "set", Socket: name, Level: unix.SOL_SOCKET, Option: unix.SO_REUSEADDR, Value: 1})
	p.Must(probe.Call{Op: "bind", Socket: name, Address: at.String()})
}

// A new connection on an old tuple is a new connection.
func TestF01SameTuple(t *testing.T) {
	w := enforced(t)
	w.control()
	for _, kind := range []string{"tcp4", "udp4"} {
		bound(w.p, kind, kind, w.web.At4(5000))
		w.p.Connect(kind, w.decoy.At4(7000).String())
		w.p.Echoed(kind, "declared")
	}
	// So that no TIME_WAIT keeps the tuple: a reset in place of a FIN.
	w.p.Must(probe.Call{Op: "settext", Socket: "tcp4", Level: unix.SOL_SOCKET, Option: unix.SO_LINGER, Data: []byte{1, 0, 0, 0, 0, 0, 0, 0}})
	w.p.Must(probe.Call{Op: "close", Socket: "tcp4"})
	w.p.Must(probe.Call{Op: "close", Socket: "udp4"})
	bound(w.p, "again", "tcp4", w.web.At4(5000))
	w.p.Connect("again", w.decoy.At4(7000).String()) // control: the tuple can be used again
	w.p.Must(probe.Call{Op: "settext", Socket: "again", Level: unix.SOL_SOCKET, Option: unix.SO_LINGER, Data: []byte{1, 0, 0, 0, 0, 0, 0, 0}})
	w.p.Must(probe.Call{Op: "close", Socket: "again"})

	w.node.Apply(revoked)
	w.wire.Forget()
	bound(w.p, "t", "tcp4", w.web.At4(5000))
	w.p.Refused(connect("t", w.decoy.At4(7000)), "EPERM")
	w.denied(abi.NoCrossingFor, tcp, w.decoy.At4(7000))
	bound(w.p, "u", "udp4", w.web.At4(5000))
	w.p.Refused(send("u", w.decoy.At4(7000)), "EPERM")
	w.node.AwaitFlow("the datagram", func(f netlab.Flow) bool {
		return f.Verdict == abi.Deny && f.Protocol == "udp" && f.Source.Port == 5000
	})
	w.nothing(netlab.ToAddress(w.decoy.IP4))
	w.silent()
}

// An established connection ends when its crossing does, in both directions.
func TestF02Revoked(t *testing.T) {
	for _, sender := range []string{"web", "decoy"} {
		t.Run(sender+" sends", func(t *testing.T) {
			w := enforced(t)
			w.control()
			server := w.serverAt(7100)
			w.p.Socket("s", "tcp4")
			w.node.Apply(policyText(2, strings.ReplaceAll(webDecoy, "7002", "7100")))
			w.p.Connect("s", w.decoy.At4(7100).String())
			server.Must(probe.Call{Op: "accept", Socket: "l", New: "s"})
			from, to, wire := w.p, server, w.wire
			if sender == "decoy" {
				from, to, wire = server, w.p, w.decoy.Wire()
			}
			from.Must(probe.Call{Op: "send", Socket: "s", Data: []byte("declared")})
			to.Must(probe.Call{Op: "recv", Socket: "s"})
			from.Send(probe.Call{Op: "sendfile", Socket: "s", Size: 1 << 34, Timeout: 500})
			to.Send(probe.Call{Op: "swallow", Socket: "s", Timeout: 1000})
			wire.Await(func(p netlab.Packet) bool { return p.Sent && p.Proto == tcp && p.Payload > 1000 })
			w.node.Apply(policyText(3))
			wire.Forget()
			if r := from.Result(); r.Error != probe.Timeout || r.N == 0 {
				t.Errorf("cut transfer of %d bytes: %q", r.N, r.Error)
			}
			if r := to.Result(); r.Error != probe.Timeout || r.N == 0 {
				t.Errorf("cut transfer, %d bytes received: %q", r.N, r.Error)
			}
			w.node.AwaitDenied(abi.Revoked, tcp, w.decoy.At4(7100))
			if got := wire.Packets(func(p netlab.Packet) bool { return p.Sent && p.Proto == tcp }); len(got) > 0 {
				t.Errorf("%d packets after the end, the first: %v", len(got), got[0])
			}
			w.silent()
		})
	}
}

// serverAt is a probe of decoy with a listener "l".
func (w *world) serverAt(port uint16) *netlab.Probe {
	w.t.Helper()
	p := w.decoy.Probe(w.node.Cgroup("/lab/decoy"))
	p.Socket("l", "tcp4")
	p.Must(probe.Call{Op: "bind", Socket: "l", Address: w.decoy.At4(port).String()})
	p.Must(probe.Call{Op: "listen", Socket: "l"})
	return p
}

// What a process left in the kernel's hands when it ended is still its own.
func TestF03Orphan(t *testing.T) {
	w := enforced(t)
	w.control()
	server := w.serverAt(7002 + 100)
	w.node.Apply(policyText(2, strings.ReplaceAll(webDecoy, "7002", "7102")))
	w.p.Socket("s", "tcp4")
	w.p.Connect("s", w.decoy.At4(7102).String())
	server.Must(probe.Call{Op: "accept", Socket: "l", New: "s"})
	// Nobody reads, so that the rest has to wait here.
	if r := w.p.Do(probe.Call{Op: "sendfile", Socket: "s", Size: 1 << 30, Timeout: 300}); r.Error != probe.Timeout {
		t.Fatalf("the connection takes %d bytes: %q", r.N, r.Error)
	}
	w.p.Kill()
	w.node.Apply(policyText(3))
	w.wire.Forget()
	server.Must(probe.Call{Op: "swallow", Socket: "s", Timeout: 2000, Value: 1}) // opens the window: the rest may come
	w.node.AwaitDenied(abi.Revoked, tcp, w.decoy.At4(7102))
	w.nothing(netlab.ToAddress(w.decoy.IP4))
	w.silent()
}

// Whoever takes a port that an allowed flow has just left inherits nothing.
func TestF07PortRace(t *testing.T) {
	w := enforced(t)
	w.control()
	other := w.web.Probe(w.node.Cgroup("/lab/other"))
	for i := range 200 {
		at := w.web.At4(uint16(20000 + i))
		bound(w.p, "u", "udp4", at)
		w.p.Connect("u", w.decoy.At4(7000).String())
		w.p.Echoed("u", "declared")
		w.p.Must(probe.Call{Op: "close", Socket: "u"})
		w.wire.Forget()
		bound(other, "u", "udp4", at)
		other.Refused(send("u", w.decoy.At4(7000)), "EPERM")
		w.nothing(netlab.To(udp, w.decoy.IP4, 7000))
		other.Must(probe.Call{Op: "close", Socket: "u"})
	}
	f := w.node.AwaitFlow("other", func(f netlab.Flow) bool { return f.Verdict == abi.Deny && f.Source.Workload == "other" })
	if f.Reason != abi.NoCrossingFor {
		t.Errorf("denied %s", netlab.Describe(f))
	}
	w.silent()
}

// Packets that are not what they say do not leave, nor arrive.
func TestF08Malformed(t *testing.T) {
	w := withRaw(t)
	w.control()
	short := datagram(5000, 7000)
	long := datagram(5000, 7000)
	binary.BigEndian.PutUint16(short[4:], 4)   // shorter than its header
	binary.BigEndian.PutUint16(long[4:], 4000) // longer than the packet
	thin := segment(w.web.At4(5000), w.decoy.At4(7000), 1, 0, 2)
	thin[12] = 1 << 4 // a header of 4 bytes
	for name, b := range map[string][]byte{
		"UDP length too short":  ipv4(w.web.IP4, w.decoy.IP4, udp, 0, short),
		"UDP length too long":   ipv4(w.web.IP4, w.decoy.IP4, udp, 0, long),
		"UDP header cut":        ipv4(w.web.IP4, w.decoy.IP4, udp, 0, short[:6]),
		"UDP nothing":           ipv4(w.web.IP4, w.decoy.IP4, udp, 0, nil),
		"TCP header too short":  ipv4(w.web.IP4, w.decoy.IP4, tcp, 0, thin),
		"TCP header cut":        ipv4(w.web.IP4, w.decoy.IP4, tcp, 0, thin[:10]),
		"ICMP header cut":       ipv4(w.web.IP4, w.decoy.IP4, unix.IPPROTO_ICMP, 0, []byte{8, 0}),
		"SCTP header cut":       ipv4(w.web.IP4, w.decoy.IP4, unix.IPPROTO_SCTP, 0, []byte{8, 0}),
		"IPv6 in an IPv4 place": ipv4(w.web.IP4, w.decoy.IP4, 0, 0, nil),
	} {
		t.Run(name, func(t *testing.T) {
			w.wire.Forget()
			w.p.Do(rawSend("header4", w.decoy.IP4, b)) // the kernel may know better than to send it
			w.nothing(netlab.ToAddress(w.decoy.IP4))
			// The other way, where the network sends it.
			w.peer.SendIP(ipv4(w.peer.IP4, w.web.IP4, b[9], 0, b[20:]))
		})
	}
	w.node.AwaitFlow("malformed", func(f netlab.Flow) bool {
		return f.Verdict == abi.Deny && f.Reason == abi.Malformed && f.Direction == abi.Egress && f.Source.Workload == "web"
	})
	// An empty datagram is none of those.
	w.p.Socket("u", "udp4")
	w.p.Must(probe.Call{Op: "send", Socket: "u", Address: w.decoy.At4(7000).String()})
	if r := w.p.Must(probe.Call{Op: "recv", Socket: "u"}); r.N != 0 {
		t.Errorf("echo of %d bytes", r.N)
	}
	w.p.Refused(probe.Call{Op: "send", Socket: "u", Address: w.peer.At4(7001).String()}, "EPERM")
	w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
	if n := w.echo.Received.Load(); n > 0 {
		t.Errorf("the peer received %d bytes", n)
	}
}

// IPv6 has many ways to write a place; none is forgotten.
func TestF09IPv6(t *testing.T) {
	w := enforced(t)
	w.control()
	w.web.Address(netip.MustParsePrefix("2002:a42:1::1/16"))
	w.web.Address(netip.MustParsePrefix("64:ff9b::1/96"))
	local := w.peer.LinkLocal()
	for _, to := range []netlab.Place{
		w.peer.At6(7001), {Address: local.WithZone("eth0"), Port: 7001}, {Address: netip.MustParseAddr("2002:a42:3::1"), Port: 7001},
		{Address: netip.MustParseAddr("64:ff9b::a42:3"), Port: 7001}, {Address: netip.MustParseAddr("::10.66.0.3"), Port: 7001},
	} {
		plain := netlab.Place{Address: to.Address.WithZone(""), Port: to.Port}
		w.p.Socket("t", "tcp6")
		w.p.Refused(connect("t", to), "EPERM")
		w.denied(abi.NoCrossingFor, tcp, plain)
		w.p.Socket("u", "udp6")
		if r := w.p.Do(send("u", to)); r.Error != "EPERM" && r.Error != "ENETUNREACH" {
			t.Errorf("send to %v: %q", to, r.Error)
		} else if r.Error == "EPERM" {
			w.denied(abi.NoCrossingFor, udp, plain)
		}
		w.nothing(netlab.ToAddress(plain.Address))
	}
	w.silent()
}

// A filter that cuts what a socket receives cuts nothing of what is judged.
func TestF10SocketFilter(t *testing.T) {
	w := enforced(t)
	w.control()
	w.p.Socket("u", "udp4")
	w.p.Must(probe.Call{Op: "bind", Socket: "u", Address: w.web.At4(7005).String()})
	w.p.Must(probe.Call{Op: "filter", Socket: "u", Size: 9}) // UDP header and one byte
	w.p.Must(send("u", w.decoy.At4(7000)))
	if r := w.p.Must(probe.Call{Op: "recv", Socket: "u"}); string(r.Data) != "u" { // control: it does cut
		t.Errorf("received %q", r.Data)
	}
	sender := w.peer.Probe(w.lab.Cgroup("peer"))
	sender.Socket("u", "udp4")
	sender.Must(send("u", w.web.At4(7005)))
	w.node.AwaitDenied(abi.NoCrossingFor, udp, w.web.At4(7005))
	w.p.Refused(probe.Call{Op: "recv", Socket: "u", Timeout: 1}, probe.Timeout)
	// On a listener: what is left of a SYN would have no options.
	server := w.serverAt(7002 + 100)
	w.node.Apply(policyText(2, strings.ReplaceAll(webDecoy, "7002", "7102")))
	server.Must(probe.Call{Op: "filter", Socket: "l", Size: 20})
	w.p.Socket("t", "tcp4")
	w.p.Connect("t", w.decoy.At4(7102).String())
	caller := w.decoy.Probe(w.node.Cgroup("/lab/other"))
	caller.Socket("t", "tcp4")
	caller.Refused(connect("t", w.decoy.At4(7102)), "EPERM")
	stranger := w.peer.Probe(w.lab.Cgroup("peer"))
	stranger.Socket("t", "tcp4")
	stranger.Refused(connect("t", w.decoy.At4(7102)), probe.Timeout)
	w.node.AwaitDenied(abi.TagMissing, tcp, w.decoy.At4(7102))
	w.silent()
}
