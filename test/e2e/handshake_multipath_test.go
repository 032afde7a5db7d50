package e2e_test

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

const optionMPTCP = 30

// hasOption says whether a segment has a TCP option of a kind.
func (s tcpFrame) hasOption(kind byte) bool {
	for o := s.options(); len(o) > 1 && o[0] != 0; {
		switch {
		case o[0] == kind:
			return true
		case o[0] == 1:
			o = o[1:]
		case o[1] < 2 || int(o[1]) > len(o):
			return false
		default:
			o = o[o[1]:]
		}
	}
	return false
}

// Workloads cannot have sockets of Multipath TCP, by no way of making one. Others
// may call them with it: their SYNs are judged like any, and what comes about is
// TCP.
func TestA16Multipath(t *testing.T) {
	w := newWired(t).enforce()
	server := startActor(t, w.db, w.listener.Cgroup("/lab/db"))
	server.serve(7000)
	server.serve(7100)
	p := w.web.Probe(w.caller.Cgroup("/lab/web"))
	p.Must(probe.Call{Op: "ring", New: "r"})
	for _, domain := range []int{unix.AF_INET, unix.AF_INET6} {
		for _, c := range []probe.Call{{Op: "socket"}, {Op: "ringsocket", Path: "r"}} {
			c.New, c.Domain, c.Type, c.Proto = "m", domain, unix.SOCK_STREAM, protoMPTCP
			before := w.caller.Denied(abi.Protocol)
			p.Refused(c, "EPERM")
			if n := w.caller.Denied(abi.Protocol) - before; n != 1 {
				t.Errorf("%s: %d denials, want 1", c.Op, n)
			}
		}
	}

	caller := w.outside.Probe(w.lab.Cgroup("outside"))
	for i, to := range w.both(7100) {
		domain := []int{unix.AF_INET, unix.AF_INET6}[i]
		multipath := probe.Call{Op: "socket", New: "m", Domain: domain, Type: unix.SOCK_STREAM, Proto: protoMPTCP}
		caller.Must(multipath)
		w.cable.segments()
		caller.Connect("m", to.String())
		caller.Echoed("m", "declared, by address")
		asked, agreed := 0, 0
		for _, s := range w.cable.segments() {
			switch {
			case s.flags == flagSYN && s.hasOption(optionMPTCP):
				asked++ // control
			case s.hasOption(optionMPTCP):
				agreed++
			}
		}
		if asked != 1 || agreed != 0 {
			t.Errorf("%s: %d SYNs ask for multipath, %d segments agree", to, asked, agreed)
		}
		w.listener.AwaitFlow("the visit", func(f netlab.Flow) bool {
			return f.Verdict == abi.Allow && f.Crossing == "visit" && f.Destination.Address == to.Addr()
		})
		caller.Must(multipath)
		caller.Refused(probe.Call{Op: "connect", Socket: "m", Address: w.both(7000)[i].String()}, "ECONNREFUSED")
		w.listener.AwaitDenied(abi.TagMissing, tcp, netlab.Place{Address: to.Addr(), Port: 7000})
	}
	if got := server.served("tcp", 7000); got.Count != 0 {
		t.Errorf("the listener got %d connections", got.Count)
	}
}

// A socket of Multipath TCP that is older than the policy has connections whose
// kernel opens more of them by itself: from another address of its own, or to one
// that the peer names. Each of these is a call of its own, and since no task of the
// workload makes it, it is refused.
func TestA17AnnouncedAddress(t *testing.T) {
	t.Run("IPv4", func(t *testing.T) { announced(t, unix.AF_INET, "10.66.7.1/16", "10.66.7.3/16") })
	t.Run("IPv6", func(t *testing.T) { announced(t, unix.AF_INET6, "fd66::7:1/64", "fd66::7:3/64") })
}

// announced has web one more address of its own, and its peer one that it names.
func announced(t *testing.T, domain int, ownNet, namedNet string) {
	w := newWired(t)
	own, named := netip.MustParsePrefix(ownNet).Addr(), netip.MustParsePrefix(namedNet).Addr()
	w.web.Address(netip.MustParsePrefix(ownNet))
	w.outside.Address(netip.MustParsePrefix(namedNet))
	from, first, any := w.web.IP4, w.outside.IP4, netip.IPv4Unspecified()
	if domain == unix.AF_INET6 {
		from, first, any = w.web.IP6, w.outside.IP6, netip.IPv6Unspecified()
	}
	for _, ns := range []*netlab.Namespace{w.web, w.outside} {
		ip(t, ns, "mptcp limits set add_addr_accepted 4 subflow 4")
	}
	ip(t, w.web, "mptcp endpoint add "+own.String()+" dev eth0 subflow")
	ip(t, w.outside, "mptcp endpoint add "+named.String()+" dev eth0 signal")
	p, peer := w.web.Probe(w.caller.Cgroup("/lab/web")), w.outside.Probe(w.lab.Cgroup("outside"))
	multipath := probe.Call{Op: "socket", Domain: domain, Type: unix.SOCK_STREAM, Proto: protoMPTCP}
	for _, name := range []string{"before", "after"} {
		multipath.New = name
		p.Must(multipath)
		p.Must(probe.Call{Op: "bind", Socket: name, Address: netip.AddrPortFrom(from, 0).String()})
	}
	multipath.New = "l"
	peer.Must(multipath)
	peer.Must(probe.Call{Op: "bind", Socket: "l", Address: netip.AddrPortFrom(any, 7100).String()})
	peer.Must(probe.Call{Op: "listen", Socket: "l"})
	wire := w.web.Wire()
	converse := func(socket string) {
		p.Connect(socket, netip.AddrPortFrom(first, 7100).String())
		peer.Must(probe.Call{Op: "accept", Socket: "l", New: "a"})
		p.Must(probe.Call{Op: "send", Socket: socket, Data: []byte("there")})
		peer.Must(probe.Call{Op: "recv", Socket: "a"})
		peer.Must(probe.Call{Op: "send", Socket: "a", Data: []byte("back")})
		p.Must(probe.Call{Op: "recv", Socket: socket})
	}
	fromOwn := func(q netlab.Packet) bool { return q.Sent && q.Proto == tcp && q.Src.Addr() == own }
	toNamed := netlab.To(tcp, named, 0)

	converse("before") // control: without a policy both happen
	wire.Await(fromOwn)
	wire.Await(toNamed)
	p.Must(probe.Call{Op: "close", Socket: "before"})
	peer.Must(probe.Call{Op: "close", Socket: "a"})

	w.enforce()
	wire.Forget()
	converse("after") // its first call is the workload's own, and declared
	for _, to := range []netip.Addr{first, named} {
		w.caller.AwaitDenied(abi.TaskMismatch, tcp, netlab.Place{Address: to, Port: 7100})
	}
	if got := wire.Packets(netlab.And(func(q netlab.Packet) bool { return fromOwn(q) || toNamed(q) }, handshakes)); len(got) > 0 {
		t.Errorf("%d undeclared packets, the first: %s", len(got), got[0])
	}
	p.Must(probe.Call{Op: "send", Socket: "after", Data: []byte("on")})
	peer.Must(probe.Call{Op: "recv", Socket: "a"})
}

// Data in a SYN is for nobody before the sender has proved itself, and nobody who
// has to prove himself sends any. Where an address is enough, it goes as before.
func TestE07DataBeforeProof(t *testing.T) {
	const fast = 34
	w := newWired(t)
	w.db.Sysctl("ipv4/tcp_fastopen", "0x402") // every listener
	server := startActor(t, w.db, w.listener.Cgroup("/lab/db"))
	server.serve(7000)
	cookies := map[netip.AddrPort][]byte{}
	port := uint16(20000)
	syn := func(to netip.AddrPort, data string) segmentOf {
		port++
		s := segmentOf{from: nobody(to, port), to: to, seq: 1000, flags: flagSYN, payload: []byte(data)}
		s.options = append([]byte{1, 1}, cookies[to]...)
		return s
	}
	for _, to := range w.both(7000) {
		cookies[to] = []byte{fast, 2}
		s := w.frame(syn(to, ""))
		w.cable.send(s)
		for o := w.answerTo(s).options(); len(o) > 1; o = o[1:] {
			if o[0] == fast && o[1] == 10 {
				cookies[to] = o[:10]
			}
		}
		if len(cookies[to]) != 10 {
			t.Fatalf("no cookie from %s", to)
		}
		w.cable.send(w.frame(syn(to, "data")))
		eventually(t, timeToAnswer, "data in a SYN without a policy", func() bool { return server.served("tcp", 7000).Bytes >= 4 })
		server.stop()
		server = startActor(t, w.db, w.listener.Cgroup("/lab/db"))
		server.serve(7000)
	}
	w.enforce()
	server.stop() // a new one, to be counted from zero
	server = startActor(t, w.db, w.listener.Cgroup("/lab/db"))
	server.serve(7000)
	server.serve(7100)
	for _, to := range w.both(7000) {
		w.refused(abi.TagMissing, w.frame(syn(to, "data")))
		for _, data := range []string{"data", ""} { // a cookie alone opens a connection too
			w.refused(abi.TagMalformed, w.signed(syn(to, data), w.id["web"]))
		}
		plain := syn(to, "")
		plain.options = nil
		good := w.signed(plain, w.id["web"])
		w.cable.send(good) // control: without either, it is admitted
		w.answerTo(good)
	}
	if got := server.served("tcp", 7000); got.Count != 0 || got.Bytes != 0 {
		t.Errorf("the listener got %d connections and %d bytes", got.Count, got.Bytes)
	}

	w.outside.Sysctl("ipv4/tcp_fastopen", "3")
	visitor, wire := w.outside.Probe(w.lab.Cgroup("outside")), w.db.Wire()
	for range 2 { // a cookie, and then data
		visitor.Socket("s", "tcp4")
		if r := visitor.Must(fastOpening("s", w.db.At4(7100))); r.N == 0 {
			visitor.Must(probe.Call{Op: "send", Socket: "s", Data: []byte("fast")})
		}
		if r := visitor.Must(probe.Call{Op: "recv", Socket: "s"}); string(r.Data) != "fast" {
			t.Errorf("echo %q", r.Data)
		}
	}
	if n := wire.Count(func(p netlab.Packet) bool { return handshakes(p) && p.Payload > 0 }); n != 1 {
		t.Errorf("%d SYNs with data of a visitor, want 1", n)
	}
}
