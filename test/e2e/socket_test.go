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

// IPv4 by way of an IPv6 socket is IPv4.
func TestA01MappedConnect(t *testing.T) {
	w := enforced(t)
	w.control()
	w.p.Socket("s", "tcp6")
	w.p.Refused(probe.Call{Op: "connect", Socket: "s", Address: w.peer.At4(7001).Mapped()}, "EPERM")
	w.denied(abi.NoCrossingFor, tcp, w.peer.At4(7001))
	w.p.Connect("s", w.decoy.At4(7000).Mapped())
	w.p.Echoed("s", "declared, mapped")
	w.silent()
}

func TestA02MappedDatagram(t *testing.T) {
	w := enforced(t)
	w.control()
	for _, to := range []string{w.peer.At4(7001).Mapped(), w.peer.At4(7001).String()} {
		w.p.Socket("u", "udp6")
		w.p.Refused(probe.Call{Op: "send", Socket: "u", Address: to, Data: []byte("x")}, "EPERM")
		w.p.Refused(probe.Call{Op: "sendmmsg", Socket: "u", Batch: []string{to, to}, Data: []byte("x")}, "EPERM")
		w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
		w.node.Forget()
	}
	for _, to := range []string{w.decoy.At4(7000).Mapped(), w.decoy.At4(7000).String()} {
		w.p.Socket("u", "udp6")
		w.p.Must(probe.Call{Op: "send", Socket: "u", Address: to, Data: []byte("x")})
		w.p.Must(probe.Call{Op: "recv", Socket: "u"})
	}
	w.silent()
}

// A verdict belongs to a connection, not to a socket that may have several.
func TestA03Reconnect(t *testing.T) {
	w := enforced(t)
	w.control()
	for range 2 {
		w.p.Socket("s", "tcp4")
		w.p.Connect("s", w.decoy.At4(7000).String())
		w.p.Echoed("s", "declared")
		w.p.Must(probe.Call{Op: "disconnect", Socket: "s"})
		w.p.Refused(connect("s", w.peer.At4(7001)), "EPERM")
		w.denied(abi.NoCrossingFor, tcp, w.peer.At4(7001))
		w.p.Must(probe.Call{Op: "disconnect", Socket: "s"})
		w.p.Connect("s", w.decoy.At4(7000).String())
		w.p.Echoed("s", "declared again")
	}
	w.silent()
}

func TestA04UnspecifiedFamily(t *testing.T) {
	w := enforced(t)
	w.control()
	unspecified := unix.AF_UNSPEC
	w.p.Socket("u", "udp4")
	c := send("u", w.peer.At4(7001))
	c.Family = &unspecified
	w.p.Refused(c, "EPERM")
	w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
	c.Address = w.decoy.At4(7000).String()
	w.p.Must(c)
	w.p.Must(probe.Call{Op: "recv", Socket: "u"})
	w.silent()
}

// A connected datagram socket may still send elsewhere.
func TestA05ConnectedSendElsewhere(t *testing.T) {
	w := enforced(t)
	w.control()
	w.p.Socket("u", "udp4")
	w.p.Connect("u", w.decoy.At4(7000).String())
	w.p.Echoed("u", "declared")
	w.p.Refused(send("u", w.peer.At4(7001)), "EPERM")
	w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
	w.p.Echoed("u", "declared again")
	w.silent()
}

// After connect, nothing but the packet hook sees a datagram socket send: it must
// hear of a new policy.
func TestA06ConnectThenSend(t *testing.T) {
	w := enforced(t)
	w.control()
	w.p.Socket("u", "udp4")
	w.p.Connect("u", w.decoy.At4(7000).String())
	w.p.Echoed("u", "declared")
	w.node.Apply(revoked)
	w.wire.Forget()
	w.p.Refused(probe.Call{Op: "send", Socket: "u", Data: []byte("x")}, "EPERM")
	w.denied(abi.Revoked, udp, w.decoy.At4(7000))
	w.nothing(netlab.To(udp, w.decoy.IP4, 7000))
	w.silent()
}

// Of a batch, only the undeclared are refused, and each is counted.
func TestA07Batch(t *testing.T) {
	w := enforced(t)
	w.control()
	w.p.Socket("u", "udp4")
	// The first answer proves who answers; without it, datagrams are rationed.
	w.p.Must(send("u", w.decoy.At4(7000)))
	w.p.Must(probe.Call{Op: "recv", Socket: "u"})
	w.wire.Forget()
	batch := make([]string, 64)
	for i := range batch {
		batch[i] = w.decoy.At4(7000).String()
		if i%2 == 1 {
			batch[i] = w.peer.At4(7001).String()
		}
	}
	before := w.node.Denied(abi.NoCrossingFor)
	r := w.p.Do(probe.Call{Op: "sendmmsg", Socket: "u", Batch: batch, Data: []byte("x")})
	for i, sent := range r.Data {
		if want := byte(1 - i%2); sent != want {
			t.Errorf("message %d to %s: sent %d, want %d", i, batch[i], sent, want)
		}
	}
	if r.N != 32 {
		t.Errorf("sent %d, error %q", r.N, r.Error)
	}
	if got := w.node.Denied(abi.NoCrossingFor) - before; got != 32 {
		t.Errorf("%d denials counted, want 32", got)
	}
	if n := w.wire.Count(netlab.To(udp, w.decoy.IP4, 7000)); n != 32 {
		t.Errorf("%d declared datagrams on the wire, want 32", n)
	}
	w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
	w.silent()
}

const fastOpenConnect = 30 // TCP_FASTOPEN_CONNECT

// withFastOpen is a world where decoy takes data in a SYN, and where web has the
// cookie that it needs for that, from before there was a policy.
func withFastOpen(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.web.Sysctl("ipv4/tcp_fastopen", "3")
	w.decoy.Sysctl("ipv4/tcp_fastopen", "0x402") // every listener
	server := w.serveDecoy(w.decoy)
	for _, to := range both(w.decoy, 7000) {
		w.fast("s", to)
		w.wire.Forget()
		w.fast("s", to)
		if w.wire.Count(dataInSYN) == 0 { // control: it works without a policy
			t.Fatalf("no data in a SYN to %v: this test shows nothing", to)
		}
	}
	server.Kill()
	return w.enforce()
}

func dataInSYN(p netlab.Packet) bool {
	return p.Sent && p.Proto == tcp && p.Flags&2 != 0 && p.Payload > 0
}

func fastOpening(socket string, to netlab.Place) probe.Call {
	return probe.Call{Op: "send", Socket: socket, Address: to.String(), Flags: unix.MSG_FASTOPEN, Data: []byte("fast")}
}

// fast opens a connection with data and wants it back.
func (w *world) fast(socket string, to netlab.Place) {
	w.t.Helper()
	w.p.Socket(socket, streamTo(to))
	if r := w.p.Must(fastOpening(socket, to)); r.N == 0 { // no cookie, so that it only connected
		w.p.Must(probe.Call{Op: "send", Socket: socket, Data: []byte("fast")})
	}
	if r := w.p.Must(probe.Call{Op: "recv", Socket: socket}); string(r.Data) != "fast" {
		w.t.Errorf("echo %q", r.Data)
	}
	w.p.Must(probe.Call{Op: "close", Socket: socket})
}

// Data in a SYN arrives before any proof could, and the cookie leaves no room for
// the tag: such a SYN never leaves, with or without a crossing. With one, the
// stack falls back to a handshake without data.
func TestA08FastOpen(t *testing.T) {
	w := withFastOpen(t)
	w.control()
	w.wire.Forget()
	for _, to := range both(w.decoy, 7000) {
		w.fast("s", to)
		w.nothing(dataInSYN)
		w.denied(abi.TagNoRoom, tcp, to)
	}
	for _, to := range both(w.peer, 7001) {
		w.p.Socket("s", streamTo(to))
		w.p.Refused(fastOpening("s", to), "EPERM")
		w.denied(abi.NoCrossingFor, tcp, to)
	}
	w.node.Apply(revoked)
	w.wire.Forget()
	for _, to := range both(w.decoy, 7000) {
		w.p.Socket("s", streamTo(to))
		w.p.Refused(fastOpening("s", to), "EPERM")
		w.denied(abi.NoCrossingFor, tcp, to)
		w.nothing(netlab.ToAddress(to.Address))
	}
	w.silent()
}

// A connect that waits for the first write is judged when that comes.
func TestA09FastOpenConnect(t *testing.T) {
	w := withFastOpen(t)
	w.control()
	w.wire.Forget()
	for _, to := range both(w.decoy, 7000) {
		name := streamTo(to)
		w.p.Socket(name, name)
		w.p.Must(probe.Call{Op: "set", Socket: name, Level: tcp, Option: fastOpenConnect, Value: 1})
		w.p.Connect(name, to.String())
		w.nothing(netlab.To(tcp, to.Address, 7000)) // control: the SYN waits
	}
	w.node.Apply(revoked)
	for _, to := range both(w.decoy, 7000) {
		// No connect hook runs any more: the SYN is dropped, and the data waits.
		w.p.Do(probe.Call{Op: "send", Socket: streamTo(to), Data: []byte("x")})
		w.denied(abi.NoCrossingFor, tcp, to)
		w.p.Refused(probe.Call{Op: "recv", Socket: streamTo(to), Timeout: 1500}, probe.Timeout) // a SYN is sent again after 1 s
		w.nothing(netlab.To(tcp, to.Address, 7000))
	}
	w.silent()
}

func TestA10IoUring(t *testing.T)       { ringRow(t, 0) }
func TestA11IoUringThread(t *testing.T) { ringRow(t, 2) } // IORING_SETUP_SQPOLL: a thread of the kernel acts

func ringRow(t *testing.T, flags int) {
	w := enforced(t)
	w.control()
	w.p.Must(probe.Call{Op: "ring", New: "r", Flags: flags})
	stream := probe.Call{Op: "ringsocket", Path: "r", New: "s", Domain: unix.AF_INET, Type: unix.SOCK_STREAM}
	w.p.Must(stream)
	w.p.Refused(probe.Call{Op: "ringconnect", Path: "r", Socket: "s", Address: w.peer.At4(7001).String()}, "EPERM")
	w.denied(abi.NoCrossingFor, tcp, w.peer.At4(7001))
	w.p.Must(stream)
	to := w.decoy.At4(7000).String()
	w.p.Must(probe.Call{Op: "ringconnect", Path: "r", Socket: "s", Address: to})
	w.p.Must(probe.Call{Op: "ringsend", Path: "r", Socket: "s", Data: []byte("by ring")})
	if r := w.p.Must(probe.Call{Op: "recv", Socket: "s"}); string(r.Data) != "by ring" {
		t.Errorf("echo %q", r.Data)
	}

	w.p.Must(probe.Call{Op: "ringsocket", Path: "r", New: "u", Domain: unix.AF_INET, Type: unix.SOCK_DGRAM})
	w.p.Refused(probe.Call{Op: "ringsend", Path: "r", Socket: "u", Address: w.peer.At4(7001).String(), Data: []byte("x")}, "EPERM")
	w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
	w.p.Must(probe.Call{Op: "ringsend", Path: "r", Socket: "u", Address: to, Data: []byte("x")})
	w.p.Must(probe.Call{Op: "recv", Socket: "u"})
	w.p.Refused(probe.Call{Op: "ringsocket", Path: "r", New: "raw", Domain: unix.AF_INET, Type: unix.SOCK_RAW, Proto: udp}, "EPERM")
	w.denied(abi.RawSocket, udp, anywhere)
	w.silent()
}

// Bytes that never pass through the application's memory are bytes.
func TestA12Sendfile(t *testing.T) {
	for _, op := range []string{"sendfile", "splice"} {
		t.Run(op, func(t *testing.T) {
			w := enforced(t)
			w.control()
			const size = 4 << 20
			w.p.Socket("s", "tcp4")
			w.p.Connect("s", w.decoy.At4(7002).String())
			if r := w.p.Must(probe.Call{Op: op, Socket: "s", Size: size}); r.N != size {
				t.Errorf("moved %d bytes of %d", r.N, size)
			}
			// So much that it cannot be over when the policy changes.
			w.p.Send(probe.Call{Op: op, Socket: "s", Size: 1 << 34, Timeout: 500})
			w.node.Apply(revoked)
			w.wire.Forget()
			if r := w.p.Result(); r.Error != probe.Timeout {
				t.Errorf("cut transfer of %d bytes: %q", r.N, r.Error)
			}
			w.denied(abi.Revoked, tcp, w.decoy.At4(7002))
			w.nothing(netlab.To(tcp, w.decoy.IP4, 7002))
			w.silent()
		})
	}
}

// No connect hook runs for UDP-Lite, and no crossing can name it.
func TestA13UDPLite(t *testing.T) {
	w := enforced(t)
	w.control()
	for _, domain := range []int{unix.AF_INET, unix.AF_INET6} {
		for _, ns := range []*netlab.Namespace{w.peer, w.decoy} {
			to := ns.At4(7000)
			if domain == unix.AF_INET6 {
				to = ns.At6(7000)
			}
			c := probe.Call{Op: "socket", New: "l", Domain: domain, Type: unix.SOCK_DGRAM, Proto: unix.IPPROTO_UDPLITE}
			w.p.Must(c)
			w.p.Refused(send("l", to), "EPERM")
			w.denied(abi.NoCrossingFor, unix.IPPROTO_UDPLITE, netlab.Place{Address: to.Address})
			w.p.Must(c)
			w.p.Do(connect("l", to)) // refused here or below
			if r := w.p.Do(probe.Call{Op: "send", Socket: "l", Data: []byte("x")}); r.Error != "EPERM" && r.Error != "EDESTADDRREQ" {
				t.Errorf("connected send to %v: %q", to, r.Error)
			}
			w.nothing(func(p netlab.Packet) bool { return p.Sent && p.Proto == unix.IPPROTO_UDPLITE })
		}
	}
	w.silent()
}

// No hook but the packet's runs when a ping socket sends.
func TestA14Ping(t *testing.T) {
	w := newWorld(t)
	echo := "  - {name: web-ping, from: [workload/web], to: [network/decoy4], ports: [icmp/echo], log: all, purpose: test}\n"
	w.node.Apply(policyText(1, webDecoy, echo))
	w.serveDecoy(w.decoy)
	w.control()
	w.web.Sysctl("ipv4/ping_group_range", "0 2147483647")
	question := append([]byte{8, 0, 0, 0, 0, 0, 0, 1}, make([]byte, 1400)...)
	w.p.Must(probe.Call{Op: "socket", New: "i", Domain: unix.AF_INET, Type: unix.SOCK_DGRAM, Proto: unix.IPPROTO_ICMP})
	c := probe.Call{Op: "send", Socket: "i", Data: question, Address: netlab.Place{Address: w.peer.IP4}.String()}
	w.p.Refused(c, "EPERM")
	w.denied(abi.NoCrossingFor, unix.IPPROTO_ICMP, netlab.Place{Address: w.peer.IP4})
	c.Address = netlab.Place{Address: w.decoy.IP4}.String()
	w.p.Must(c)
	if r := w.p.Must(probe.Call{Op: "recv", Socket: "i"}); len(r.Data) != len(question) || r.Data[0] != 0 {
		t.Errorf("answer of %d bytes", len(r.Data))
	}
	question[0] = 128
	w.p.Must(probe.Call{Op: "socket", New: "i6", Domain: unix.AF_INET6, Type: unix.SOCK_DGRAM, Proto: unix.IPPROTO_ICMPV6})
	// Here the kernel keeps the error to itself (ping_v6_sendmsg).
	w.p.Do(probe.Call{Op: "send", Socket: "i6", Data: question, Address: netlab.Place{Address: w.peer.IP6}.String()})
	w.denied(abi.NoCrossingFor, unix.IPPROTO_ICMPV6, netlab.Place{Address: w.peer.IP6})
	w.silent()
}

// Two sides that open at once prove nothing to each other: the kernel would answer
// a SYN with a SYN-ACK although nobody listens.
func TestA18SimultaneousOpen(t *testing.T) {
	w := enforced(t)
	w.control()
	// An address that nobody has, so that nobody resets the half-open connection.
	nobody := netip.MustParseAddr("10.99.0.1")
	w.web.Lead(netip.PrefixFrom(nobody, 32), w.peer)
	w.peer.Lead(netip.MustParsePrefix("10.98.0.0/16"), w.web)
	from, to := w.web.At4(5000), netlab.Place{Address: nobody, Port: 7000}
	answer := func(p netlab.Packet) bool {
		return netlab.To(tcp, nobody, 7000)(p) && p.Flags&0x12 == 0x12 && p.Src.Port() == from.Port
	}
	open := func(p *netlab.Probe) string {
		p.Socket("s", "tcp4")
		p.Must(probe.Call{Op: "bind", Socket: "s", Address: from.String()})
		w.wire.Forget()
		p.Send(connect("s", to))
		w.wire.Await(netlab.To(tcp, nobody, 7000))
		w.peer.SendIP(ipv4(nobody, w.web.IP4, tcp, 0, segment(to, from, 1000, 0, 2)))
		return p.Result().Error
	}
	open(w.web.Probe(w.lab.Cgroup("free"))) // control: without demarc it works
	if n := w.wire.Count(answer); n == 0 {
		t.Fatal("the stack does not open from both sides: this test shows nothing")
	}
	from.Port++
	if got := open(w.p); got != probe.Timeout {
		t.Errorf("connect: %q", got)
	}
	f := w.node.AwaitDenied(abi.Protocol, tcp, to)
	if f.Source.Workload != "web" {
		t.Errorf("denied %s", netlab.Describe(f))
	}
	w.nothing(answer)
	w.nothing(netlab.And(netlab.ToAddress(nobody), netlab.WithPayload))
}

// Whoever listens without bind has a port that no bind hook saw.
func TestA19ListenWithoutBind(t *testing.T) {
	w := enforced(t)
	w.control()
	w.p.Socket("s", "tcp4")
	w.p.Must(probe.Call{Op: "listen", Socket: "s"})
	port := netip.MustParseAddrPort(w.p.Must(probe.Call{Op: "name", Socket: "s"}).From).Port()
	caller := w.peer.Probe(w.lab.Cgroup("peer"))
	caller.Socket("c", "tcp4")
	caller.Refused(connect("c", w.web.At4(port)), probe.Timeout)
	w.p.Refused(probe.Call{Op: "accept", Socket: "s", New: "a", Timeout: 1}, probe.Timeout)
	f := w.node.AwaitDenied(abi.NoCrossingFor, tcp, w.web.At4(port))
	if f.Direction != abi.Ingress || f.Destination.Workload != "web" {
		t.Errorf("denied %s", netlab.Describe(f))
	}
	w.silent()
}

// A port belongs to the identity that bound it first, for as long as it does.
func TestA20SharedPort(t *testing.T) {
	w := enforced(t)
	w.control()
	for _, kind := range []string{"tcp4", "udp4", "tcp6"} {
		t.Run(kind, func(t *testing.T) {
			owner := w.web.Probe(w.node.Cgroup("/lab/other"))
			shared := func(p *netlab.Probe, name string) probe.Call {
				p.Socket(name, kind)
				p.Must(probe.Call{Op: "set", Socket: name, Level: unix.SOL_SOCKET, Option: unix.SO_REUSEPORT, Value: 1})
				address := "0.0.0.0:6000"
				if kind == "tcp6" {
					address = "[::]:6000"
				}
				return probe.Call{Op: "bind", Socket: name, Address: address}
			}
			owner.Must(shared(owner, "first"))
			owner.Must(shared(owner, "second")) // control: the same identity may
			w.p.Refused(shared(w.p, "shadow"), "EPERM")
			w.node.AwaitDenied(abi.PortOwned, protocolOf(kind), netlab.Place{Port: 6000})
			owner.Must(probe.Call{Op: "close", Socket: "first"})
			w.p.Refused(shared(w.p, "shadow"), "EPERM")
			owner.Must(probe.Call{Op: "close", Socket: "second"})
			w.p.Must(shared(w.p, "shadow"))
			w.p.Must(probe.Call{Op: "close", Socket: "shadow"})
			w.node.Forget()
		})
	}
	w.silent()
}

func protocolOf(kind string) uint8 {
	if kind[:3] == "udp" {
		return udp
	}
	return tcp
}

// A bind to one address takes part of what a bind to all addresses owns.
func TestA21BindOverWildcard(t *testing.T) {
	w := enforced(t)
	w.control()
	owner := w.web.Probe(w.node.Cgroup("/lab/other"))
	reuse := func(p *netlab.Probe, kind, address string) probe.Call {
		p.Socket("s", kind)
		p.Must(probe.Call{Op: "set", Socket: "s", Level: unix.SOL_SOCKET, Option: unix.SO_REUSEADDR, Value: 1})
		return probe.Call{Op: "bind", Socket: "s", Address: address}
	}
	for _, kind := range []string{"udp4", "tcp4"} {
		owner.Must(reuse(owner, kind, "0.0.0.0:6000"))
		w.p.Refused(reuse(w.p, kind, w.web.At4(6000).String()), "EPERM")
		w.node.AwaitDenied(abi.PortOwned, protocolOf(kind), netlab.Place{Port: 6000})
		// Control: the kernel would not mind.
		same := w.web.Probe(w.node.Cgroup("/lab/other"))
		same.Must(reuse(same, kind, w.web.At4(6000).String()))
		same.Kill()
		w.node.Forget()
	}
	w.silent()
}

// A group is a destination like any other, and nobody receives what is sent to one
// without a crossing.
func TestA27Multicast(t *testing.T) {
	w := enforced(t)
	w.control()
	w.web.Lead(netip.MustParsePrefix("0.0.0.0/0"), w.peer)
	// On 7000, decoy could prove itself if it were asked alone; a group cannot.
	for _, to := range []string{
		"239.1.1.1:7001", "224.0.0.1:7001", "255.255.255.255:7001", "10.66.255.255:7001", "[ff02::1%eth0]:7001",
		"239.1.1.1:7000", "255.255.255.255:7000", "[ff02::1%eth0]:7000",
	} {
		kind, address := "udp4", netip.MustParseAddrPort(to)
		if address.Addr().Is6() {
			kind = "udp6"
		}
		w.p.Socket("u", kind)
		w.p.Must(probe.Call{Op: "set", Socket: "u", Level: unix.SOL_SOCKET, Option: unix.SO_BROADCAST, Value: 1})
		w.p.Refused(probe.Call{Op: "send", Socket: "u", Address: to, Data: []byte("x")}, "EPERM")
		group := netlab.Place{Address: address.Addr().WithZone(""), Port: address.Port()}
		w.denied(abi.NoCrossingFor, udp, group)
		w.nothing(netlab.To(udp, group.Address, 0))
	}
	w.node.Forget()

	// The other way: web has joined, and peer sends.
	w.p.Socket("g", "udp4")
	w.p.Must(probe.Call{Op: "bind", Socket: "g", Address: "0.0.0.0:7001"})
	membership := append([]byte{239, 1, 1, 1}, w.web.IP4.AsSlice()...)
	w.p.Must(probe.Call{Op: "settext", Socket: "g", Level: unix.IPPROTO_IP, Option: unix.IP_ADD_MEMBERSHIP, Data: membership})
	sender := w.peer.Probe(w.lab.Cgroup("peer"))
	sender.Socket("u", "udp4")
	sender.Must(probe.Call{Op: "settext", Socket: "u", Level: unix.IPPROTO_IP, Option: unix.IP_MULTICAST_IF, Data: w.peer.IP4.AsSlice()})
	sender.Must(probe.Call{Op: "send", Socket: "u", Address: "239.1.1.1:7001", Data: []byte("x")})
	f := w.node.AwaitDenied(abi.NoCrossingFor, udp, netlab.Place{Address: netip.MustParseAddr("239.1.1.1"), Port: 7001})
	if f.Direction != abi.Ingress || f.Destination.Workload != "web" {
		t.Errorf("denied %s", netlab.Describe(f))
	}
	w.p.Refused(probe.Call{Op: "recv", Socket: "g", Timeout: 1}, probe.Timeout)
	w.silent()
}

// Nobody sends from an address that is not its host's.
func TestA28ForeignSource(t *testing.T) {
	w := enforced(t)
	w.control()
	for _, option := range []struct {
		kind          string
		level, option int
	}{
		{"udp4", unix.IPPROTO_IP, unix.IP_FREEBIND}, {"tcp4", unix.IPPROTO_IP, unix.IP_FREEBIND},
		{"udp4", unix.IPPROTO_IP, unix.IP_TRANSPARENT}, {"tcp4", unix.IPPROTO_IP, unix.IP_TRANSPARENT},
		{"udp6", unix.IPPROTO_IPV6, unix.IPV6_FREEBIND}, {"udp6", unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT},
	} {
		w.p.Socket("s", option.kind)
		w.p.Refused(probe.Call{Op: "set", Socket: "s", Level: option.level, Option: option.option, Value: 1}, "EPERM")
		w.node.AwaitDenied(abi.Spoof, 0, anywhere)
		w.node.Forget()
	}
	// Ancillary data that names the source.
	info := append(make([]byte, 4), w.peer.IP4.AsSlice()...)
	w.p.Socket("u", "udp4")
	c := probe.Call{
		Op: "send", Socket: "u", Address: w.decoy.At4(7000).String(), Data: []byte("x"),
		Control: control(unix.IPPROTO_IP, unix.IP_PKTINFO, append(info, 0, 0, 0, 0)),
	}
	if r := w.p.Do(c); r.Error == "" {
		t.Error("sent from another's address")
	}
	c.Control = control(unix.IPPROTO_IP, unix.IP_PKTINFO, append(append(make([]byte, 4), w.web.IP4.AsSlice()...), 0, 0, 0, 0))
	w.p.Must(c) // control: from its own it may
	w.p.Must(probe.Call{Op: "recv", Socket: "u"})
	w.nothing(func(p netlab.Packet) bool { return p.Sent && p.Src.Addr() == w.peer.IP4 })
	w.silent()
}

// control is one piece of ancillary data.
func control(level, kind int32, data []byte) []byte {
	b := make([]byte, unix.CmsgSpace(len(data)))
	binary.NativeEndian.PutUint64(b, uint64(unix.CmsgLen(len(data))))
	binary.NativeEndian.PutUint32(b[8:], uint32(level))
	binary.NativeEndian.PutUint32(b[12:], uint32(kind))
	copy(b[16:], data)
	return b
}

// A device that came after the policy is no way out.
func TestA29OtherDevice(t *testing.T) {
	w := enforced(t)
	w.control()
	wire := w.web.Device("hot0", netip.MustParsePrefix("10.67.0.1/24"), w.peer.IP4)
	toHot := func(p netlab.Packet) bool { return p.Sent && p.Proto == udp }
	p := w.web.Probe(w.lab.Cgroup("free"))
	on := func(p *netlab.Probe) probe.Call {
		p.Socket("u", "udp4")
		p.Must(probe.Call{Op: "settext", Socket: "u", Level: unix.SOL_SOCKET, Option: unix.SO_BINDTODEVICE, Data: []byte("hot0")})
		return send("u", w.peer.At4(7001))
	}
	p.Must(on(p)) // control: without demarc it leaves
	wire.Await(toHot)
	wire.Forget()
	w.p.Refused(on(w.p), "EPERM")
	w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
	w.p.Socket("t", "tcp4")
	w.p.Must(probe.Call{Op: "settext", Socket: "t", Level: unix.SOL_SOCKET, Option: unix.SO_BINDTODEVICE, Data: []byte("hot0")})
	w.p.Refused(connect("t", w.peer.At4(7001)), "EPERM")
	w.denied(abi.NoCrossingFor, tcp, w.peer.At4(7001))
	if got := wire.Packets(func(p netlab.Packet) bool { return p.Sent && p.Proto != unix.IPPROTO_ICMPV6 }); len(got) > 0 {
		t.Errorf("on the other device: %v", got)
	}
	w.silent()
}

// D15 is here because it is about sockets too: workloads of one host are no
// friends.
func TestD15Loopback(t *testing.T) {
	w := newWorld(t)
	w.node.Apply(allowed)
	host := w.lab.Namespace("host")
	w.serveDecoy(host)
	other := host.Probe(w.node.Cgroup("/lab/other"))
	other.Must(probe.Call{Op: "serve", Address: ":7101"})
	host.Echo(7102)
	wire, cable := host.Loopback(), host.Wire()
	p := host.Probe(w.node.Cgroup("/lab/web"))
	for _, a := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.9.9.9"), netip.IPv6Loopback(), host.IP4, host.IP6} {
		family := "4"
		if a.Is6() {
			family = "6"
		}
		for _, kind := range []string{"tcp", "udp"} { // control
			if kind == "udp" && a.IsLoopback() && a.Is4() && a.As4() != [4]byte{127, 0, 0, 1} {
				continue // the server would answer from 127.0.0.1
			}
			p.Socket("s", kind+family)
			p.Connect("s", netlab.Place{Address: a, Port: 7000}.String())
			p.Echoed("s", "declared, on one host")
		}
		for _, port := range []uint16{7001, 7101, 7102} {
			to := netlab.Place{Address: a, Port: port}
			p.Socket("s", "tcp"+family)
			p.Refused(connect("s", to), "EPERM")
			w.node.AwaitDenied(abi.NoCrossingFor, tcp, to)
			p.Socket("u", "udp"+family)
			p.Refused(send("u", to), "EPERM")
			w.node.AwaitDenied(abi.NoCrossingFor, udp, to)
			undeclared := func(p netlab.Packet) bool { return p.Dst.Port() == port }
			if got := append(wire.Packets(undeclared), cable.Packets(undeclared)...); len(got) > 0 {
				t.Errorf("undeclared packets to %v, the first: %v", to, got[0])
			}
		}
	}
}
