package e2e_test

import (
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// What a container sends on for somebody else: packets that it made up, and those
// of namespaces behind it.

var hidden4, hidden6 = netip.MustParseAddr("10.200.0.2"), netip.MustParseAddr("fd88::2")

// masquerade gives what a namespace forwards its own address.
var masquerade = []string{
	"add table inet t", "add chain inet t c { type nat hook postrouting priority 100; }", "add rule inet t c oifname eth0 masquerade",
}

// Packets that come out of a TUN device are forwarded by the container's kernel.
func TestD06Injected(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		e.web.Sysctl("ipv4/ip_forward", "1")
		e.web.Sysctl("ipv6/conf/all/forwarding", "1")
		e.a.tun("tun0", false)
		fromPort := func(p netlab.Packet) bool { return p.Src.Port() == 5000 }
		to := func(port uint16) (from4, from6 netip.AddrPort) { return place(hidden4, port), place(hidden6, port) }
		from4, from6 := to(5000)
		own := []string{"sysctl -qw net.ipv4.conf.all.accept_local=1 net.ipv4.conf.tun0.accept_local=1"}
		why := []string{"no-socket", "spoof"}
		e.ways([]way{
			{
				name: "from an address of nobody's", seen: toPeer(e), why: why,
				try: func(e *estate) { e.a.inject("tun0", whole(udp, from4, place(e.peer.IP4, 7001), 0)) },
			},
			{
				name: "from nobody over IPv6", seen: toPeer(e), why: why,
				try: func(e *estate) { e.a.inject("tun0", whole(tcp, from6, place(e.peer.IP6, 7001), flagSYN)) },
			},
			{
				name: "from its neighbour's address", seen: fromPort, why: why,
				try: func(e *estate) {
					e.a.inject("tun0", whole(udp, place(e.api.IP4, 5000), e.partner4(7000), 0), whole(udp, place(e.api.IP6, 5000), e.partner6(7000), 0))
				},
			},
			{
				name: "from its own address", up: own, seen: toPeer(e), why: why,
				try: func(e *estate) { e.a.inject("tun0", whole(udp, place(e.web.IP4, 5000), place(e.peer.IP4, 7001), 0)) },
			},
			{
				name: "from its own address over IPv6, to where it may go", seen: fromPort, why: why,
				try: func(e *estate) { e.a.inject("tun0", whole(tcp, place(e.web.IP6, 5000), e.partner6(7000), flagSYN)) },
			},
			{
				name: "translated to its own address", rules: masquerade, seen: towards(e.partner), why: why,
				try: func(e *estate) {
					e.a.inject("tun0", whole(udp, from4, e.partner4(7000), 0), whole(tcp, from6, e.partner6(7000), flagSYN))
				},
			},
			{
				name: "to its neighbour", up: own, seen: towards(e.api.Namespace), why: why,
				try: func(e *estate) { e.a.inject("tun0", whole(udp, place(e.web.IP4, 5000), place(e.api.IP4, 7400), 0)) },
			},
		})
	})
}

// Who can make packets inside a container puts no tag on them either, not on what kernels
// say by themselves, which passes doors.
func TestE01TagsThroughDoors(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		e.web.Sysctl("ipv4/ip_forward", "1")
		e.web.Sysctl("ipv6/conf/all/forwarding", "1")
		e.a.tun("tun0", false)
		tag := append([]byte{253, 16, 0xd3, 0xac, 0, 0, 16, 0}, "perhaps."...)
		other := append([]byte{253, 8, 0xd3, 0xad}, "else"...)
		four := func(flags uint8, options ...byte) []byte {
			return whole(tcp, place(e.web.IP4, 5000), e.partner4(7000), flags, options...)
		}
		six := func(flags uint8, options ...byte) []byte {
			return whole(tcp, place(e.web.IP6, 5000), e.partner6(7000), flags, options...)
		}
		forged := func(name string, packet func() []byte) way {
			return way{
				name: name, up: []string{"sysctl -qw net.ipv4.conf.all.accept_local=1 net.ipv4.conf.tun0.accept_local=1"},
				try:  func(e *estate) { e.a.inject("tun0", packet()) },
				seen: func(p netlab.Packet) bool { return p.Src.Port() == 5000 }, why: []string{"tag-bad-identity"},
			}
		}
		e.ways([]way{
			forged("an answer with a tag", func() []byte { return four(flagSYN|flagACK, tag...) }),
			forged("an answer with a tag, over IPv6", func() []byte { return six(flagSYN|flagACK, tag...) }),
			forged("a last ACK with a tag", func() []byte { return four(flagACK, tag...) }),
			forged("a last ACK with a tag, over IPv6", func() []byte { return six(flagACK, tag...) }),
			forged("an ACK with two tags", func() []byte { return four(flagACK, append(tag, tag...)...) }),
		})
		// Control: the same without a tag, and with an option that only looks like one.
		for _, packet := range [][]byte{four(flagACK), six(flagACK), four(flagACK, other...), six(flagACK, other...)} {
			e.forget()
			e.a.inject("tun0", packet)
			e.wires[e.partner].Await(func(p netlab.Packet) bool { return !p.Sent && p.Src.Port() == 5000 })
		}
	})
}

// A container is no router for another one: not for whom nothing is declared, and
// not for a namespace of its own workload either, whose proof is for its own
// address.
func TestD07Router(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		hidden := behind(t, e)
		stranger := startActor(t, hidden, e.lab.Cgroup("hidden"))
		workload := startActor(t, hidden, e.node.Cgroup("/lab/web/hidden"))
		tell := func(by *actor, to ...netip.AddrPort) {
			for _, at := range to {
				call[DatagramReply](by, "Datagrams", DatagramArgs{To: at.String(), Count: 1})
				call[DialReply](by, "Dial", DialArgs{To: at.String(), Timeout: 50 * time.Millisecond})
			}
		}
		var all []way
		for _, who := range []struct {
			name string
			by   *actor
		}{{"another's", stranger}, {"its own workload's", workload}} {
			all = append(all, way{
				name: who.name, seen: towards(e.partner), why: []string{"no-socket", "spoof"},
				try: func(e *estate) { tell(who.by, e.partner4(7000), e.partner6(7000)) },
			}, way{
				name: who.name + ", translated", rules: masquerade, seen: towards(e.partner), why: []string{"no-socket"},
				try: func(e *estate) { tell(who.by, e.partner4(7000), e.partner6(7000)) },
			})
		}
		e.ways(all)
	})
}

// behind makes a namespace behind web, which web forwards for.
func behind(t *testing.T, e *estate) *netlab.Namespace {
	t.Helper()
	e.web.Sysctl("ipv4/ip_forward", "1")
	e.web.Sysctl("ipv6/conf/all/forwarding", "1")
	hidden := e.lab.Island("hidden")
	e.web.Join(hidden, "cellar", netip.PrefixFrom(hidden4.Prev(), 24), netip.PrefixFrom(hidden6.Prev(), 64))
	e.web.Behind(netip.PrefixFrom(hidden4, 24).Masked(), e.partner)
	e.web.Behind(netip.PrefixFrom(hidden6, 64).Masked(), e.partner)
	return hidden
}

// What is redirected within a namespace is judged as what it becomes: by the port
// where it ends, and the workload that has it.
func TestD08Redirect(t *testing.T) {
	e := newEstate(t, false)
	e.a.serve(7200)
	e.a.serve(7202)
	other := startActor(t, e.web.Namespace, e.node.Cgroup("/lab/other"))
	other.serve(7201)
	proxy := e.web.Probe(e.node.Cgroup("/lab/other"))
	for _, family := range []string{"4", "6"} {
		for _, kind := range []string{"tcp" + family, "udp" + family} {
			proxy.Socket(kind, kind)
			level, option, any := unix.SOL_IP, unix.IP_TRANSPARENT, "0.0.0.0:7300"
			if family == "6" {
				level, option, any = unix.SOL_IPV6, unix.IPV6_TRANSPARENT, "[::]:7300"
				proxy.Must(probe.Call{Op: "set", Socket: kind, Level: unix.SOL_IPV6, Option: unix.IPV6_V6ONLY, Value: 1})
			}
			proxy.Must(probe.Call{Op: "set", Socket: kind, Level: level, Option: option, Value: 1})
			proxy.Must(probe.Call{Op: "bind", Socket: kind, Address: any})
		}
		proxy.Must(probe.Call{Op: "listen", Socket: "tcp" + family})
	}
	visitor := startActor(t, e.partner, e.lab.Cgroup("visitor"))
	try := func(a *actor, to netip.AddrPort) {
		call[DatagramReply](a, "Datagrams", DatagramArgs{To: to.String(), Count: 1})
		call[DialReply](a, "Dial", DialArgs{To: to.String(), Timeout: 200 * time.Millisecond})
	}
	visit := func() {
		try(visitor, place(e.web.IP4, 7200))
		try(visitor, place(e.web.IP6, 7200))
	}
	count := func(a *actor, port uint16) int { return a.served("tcp", port).Count + a.served("udp", port).Count }
	n := 0
	taken := func() int { // so far
		for _, family := range []string{"4", "6"} {
			for proxy.Do(probe.Call{Op: "recv", Socket: "udp" + family, Timeout: 50}).Error == "" {
				n++
			}
			for proxy.Do(probe.Call{Op: "accept", Socket: "tcp" + family, New: "s", Timeout: 50}).Error == "" {
				proxy.Must(probe.Call{Op: "close", Socket: "s"})
				n++
			}
		}
		return n
	}
	const any, nat = "meta l4proto { tcp, udp } th dport ", "add chain inet t c { type nat hook "
	cases := []struct {
		name  string
		rules []string
		try   func()
		given func() int // to whom it is redirected
		times int
	}{
		{
			"to another workload as it leaves", []string{nat + "output priority -100; }", any + "7000 redirect to :7201"},
			func() { try(e.a, e.partner4(7000)); try(e.a, e.partner6(7000)) }, func() int { return count(other, 7201) }, 4,
		},
		{
			"to another workload as it comes", []string{nat + "prerouting priority -100; }", any + "7200 redirect to :7201"},
			visit, func() int { return count(other, 7201) }, 4,
		},
		{
			"to another port as it comes", []string{nat + "prerouting priority -100; }", any + "7200 redirect to :7202"},
			visit, func() int { return count(e.a, 7202) }, 4,
		},
		{
			"to another workload's socket as it comes",
			[]string{"add chain inet t c { type filter hook prerouting priority -150; }", any + "7200 tproxy to :7300"},
			visit, taken, 4,
		},
	}
	for _, enforced := range []bool{false, true} {
		if enforced {
			e.enforce()
		}
		for _, c := range cases {
			e.a.nft("add table inet t", c.rules[0], "add rule inet t c "+c.rules[1])
			e.node.Forget()
			before := c.given()
			c.try()
			if enforced {
				e.told(c.name, "no-crossing")
				if n := c.given() - before; n != 0 {
					t.Errorf("redirected %s: %d given", c.name, n)
				}
			} else {
				eventually(t, 5*time.Second, "redirected "+c.name, func() bool { return c.given()-before == c.times })
			}
			e.a.nft("flush ruleset")
		}
	}
	for _, a := range []netip.Addr{e.web.IP4, e.web.IP6} {
		visitor.checkReach(t, place(a, 7200), true, true) // control
	}
	e.control()
}

// No mark that a workload sets means anything, whichever other tool uses it.
func TestD09Mark(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		e.enforce()
		p := e.web.Probe(e.node.Cgroup("/lab/web"))
		marks := []int{0x0200, 0x0e00, 0x0f00, 0x8000, 0xffff, -1}
		for bit := range 32 {
			marks = append(marks, int(int32(1)<<bit))
		}
		e.forget()
		for _, to := range []netip.AddrPort{place(e.peer.IP4, 7001), place(e.peer.IP6, 7001), place(e.api.IP4, 7001)} {
			kind := "4"
			if to.Addr().Is6() {
				kind = "6"
			}
			p.Socket("u", "udp"+kind)
			for _, mark := range marks {
				p.Must(probe.Call{Op: "set", Socket: "u", Level: unix.SOL_SOCKET, Option: unix.SO_MARK, Value: mark})
				p.Refused(probe.Call{Op: "send", Socket: "u", Address: to.String(), Data: []byte("marked")}, "EPERM")
				p.Socket("t", "tcp"+kind)
				p.Must(probe.Call{Op: "set", Socket: "t", Level: unix.SOL_SOCKET, Option: unix.SO_MARK, Value: mark})
				p.Refused(probe.Call{Op: "connect", Socket: "t", Address: to.String(), Timeout: 500}, "EPERM")
				p.Must(probe.Call{Op: "close", Socket: "t"})
			}
			p.Must(probe.Call{Op: "close", Socket: "u"})
		}
		e.nothing("marked")
		e.node.AwaitDenied(abi.NoCrossingFor, udp, netlab.Place{Address: e.peer.IP4, Port: 7001})
		// Control, and marks that change on the way out: what is declared passes all
		// the same.
		e.a.nft("add table inet t", "add chain inet t c { type route hook output priority -150; }", "add rule inet t c meta mark set 0x0e00")
		e.control()
	})
}

// A neighbour's address makes nobody the neighbour: the host finds the address
// behind another door, and where it cannot, its peers ask for a proof.
func TestB09Neighbour(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		db := e.lab.Host("db")
		e.host.Known(db.Namespace)
		text := document(1, `workloads:
  web: {zone: app, match: [{cgroup: /lab/web}]}
  api: {zone: app, match: [{cgroup: /lab/api}]}
  db: {zone: app, match: [{cgroup: /lab/db}]}
crossings:
  - {name: api-db, from: [workload/api], to: [workload/db], ports: [tcp/5432, udp/5432]}
  - {name: db-api, from: [workload/db], to: [workload/api], ports: [tcp/7400, udp/7400]}
  - {name: web-api, from: [workload/web], to: [workload/api], ports: [tcp/5432, udp/5432]}
`)
		far := e.lab.Node(text, netlab.NodeOptions{CoreOnly: true, Home: db.Namespace})
		server := startActor(t, db.Namespace, far.Cgroup("/lab/db"))
		server.serve(5432)
		e.node.Apply(text)
		for _, c := range []*netlab.Container{e.web, e.api} {
			guarded(t, e.node, c.Door)
		}
		e.neighbour.serve(7400)
		for _, a := range []netip.Addr{db.IP4, db.IP6} {
			e.neighbour.checkReach(t, place(a, 5432), true, true) // control
		}
		server.checkReach(t, place(e.api.IP4, 7400), true, true)
		server.checkReach(t, place(e.api.IP6, 7400), true, true)
		e.forget()

		// What web says with a packet socket nobody hears.
		e.a.frames(byPacket, announce(e))
		e.told("an announcement", "raw-socket")
		server.checkReach(t, place(e.api.IP4, 7400), true, true)

		e.neighbour.run("ip link set eth0 down")
		e.doors[0].Forget()
		before := server.served("tcp", 5432).Count + server.served("udp", 5432).Count

		// Api is gone. Web takes the addresses, which its kernel tells everybody who
		// asks, and offers api's service.
		e.a.run(
			"ip addr add "+e.api.IP4.String()+"/32 dev eth0", "ip addr add "+e.api.IP6.String()+"/128 dev eth0 nodad",
		)
		e.a.serve(7400)
		e.host.ForgetNeighbours()
		for _, c := range []struct{ from, to netip.Addr }{{e.api.IP4, db.IP4}, {e.api.IP6, db.IP6}} {
			from := place(c.from, 0).String()
			r := call[DialReply](e.a, "Dial", DialArgs{To: place(c.to, 5432).String(), From: from, Timeout: 300 * time.Millisecond})
			if r.Error == "" {
				t.Errorf("connected to %s as %s", c.to, c.from)
			}
			d := call[DatagramReply](e.a, "Datagrams", DatagramArgs{To: place(c.to, 5432).String(), From: from, Count: 2, Timeout: 100 * time.Millisecond})
			if d.Answered != 0 {
				t.Errorf("%d datagrams answered to %s as %s", d.Answered, c.to, c.from)
			}
		}
		if e.web.IsRouted() {
			e.told("in its neighbour's name", "spoof")
		} else {
			far.AwaitFlow("web in its neighbour's name", func(f netlab.Flow) bool {
				return f.Reason == abi.NoCrossingFor && f.Source.Workload == "web" && f.Source.Address == e.api.IP4
			})
		}
		// Who calls api gets nothing of web's. On the bridge the frames do come to
		// web; the proof is what tells.
		for _, a := range []netip.Addr{e.api.IP4, e.api.IP6} {
			server.checkReach(t, place(a, 7400), false, true)
			came := e.doors[0].Count(func(p netlab.Packet) bool { return !p.Sent && p.Dst == place(a, 7400) })
			if e.web.IsRouted() == (came > 0) {
				t.Errorf("%d packets for %s at web's door", came, a)
			}
		}
		if n := server.served("tcp", 5432).Count + server.served("udp", 5432).Count - before; n != 0 {
			t.Errorf("db was given %d", n)
		}
		if n := e.a.served("tcp", 7400).Count + e.a.served("udp", 7400).Count; n != 0 {
			t.Errorf("web was given %d that is api's", n)
		}
	})
}

// announce is an ARP answer that nobody asked for: api's address is at web.
func announce(e *estate) []byte {
	all := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	ip := e.api.IP4.As4()
	frame := append(append([]byte(nil), all...), e.web.MAC()...)
	frame = append(frame, 0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 2)
	frame = append(append(frame, e.web.MAC()...), ip[:]...)
	return append(append(frame, all...), ip[:]...)
}
