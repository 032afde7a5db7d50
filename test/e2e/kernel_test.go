package e2e_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// What a kernel says without a socket of a workload's.

// The kernel's own tunnel sockets of a container say nothing outside, also when what
// they carry is the kernel's: a VXLAN device looks for its neighbours by itself. NFS,
// CIFS, NBD and the like are sockets that the kernel makes for a workload; those that
// it makes in the workload's name have its identity, and others are the kernel's.
func TestG01KernelTunnel(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		e.ways([]way{{
			name: "neighbour discovery in a tunnel",
			up: []string{
				fmt.Sprintf("ip link add vx0 type vxlan id 7 local %s remote %s dstport 4789 dev eth0", e.web.IP4, e.peer.IP4),
				"ip link set vx0 up",
			},
			down: []string{"ip link del vx0"},
			// The kernel joins groups as the address comes, and then asks who has it.
			try:  func(e *estate) { e.a.run("ip addr replace fd99::9/64 dev vx0 nodad"); e.awaitSent(4789) },
			seen: func(p netlab.Packet) bool { return p.Dst.Port() == 4789 },
			why:  []string{"no-socket"},
		}})
	})
}

// awaitSent waits until web's door has seen something for a port.
func (e *estate) awaitSent(port uint16) {
	e.t.Helper()
	e.doors[0].Await(func(p netlab.Packet) bool { return p.Sent && p.Dst.Port() == port })
}

// A workload that lets the kernel copy or answer in its place gains nothing: what
// the kernel makes of it has no socket.
func TestG02KernelSpeaks(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		visitor := startActor(t, e.partner, e.lab.Cgroup("visitor"))
		say := func(to netip.AddrPort) {
			call[DatagramReply](visitor, "Datagrams", DatagramArgs{To: to.String(), Count: 1})
		}
		why := []string{"no-socket", "spoof"}
		e.ways([]way{
			{
				name: "a copy of what comes in", rules: []string{
					"add table ip t", "add chain ip t c { type filter hook prerouting priority 0; }",
					fmt.Sprintf("add rule ip t c udp dport 7200 ip daddr set %s dup to %s device eth0", e.peer.IP4, e.web.Gateway()),
				},
				try:  func(e *estate) { say(place(e.web.IP4, 7200)); e.doors[0].Settle() },
				seen: toPeer(e), why: why,
			},
			{
				name: "what comes in sent on", up: []string{"sysctl -qw net.ipv4.ip_forward=1"}, rules: []string{
					"add table ip t", "add chain ip t c { type nat hook prerouting priority -100; }",
					fmt.Sprintf("add rule ip t c udp dport 7200 dnat to %s", e.peer.IP4),
				},
				try: func(e *estate) { say(place(e.web.IP4, 7200)) }, seen: toPeer(e), why: why,
			},
		})
	})
}

// beyond is a third network behind the host, without workloads.
func beyond(e *estate) *netlab.Namespace {
	e.t.Helper()
	outside := e.lab.Island("outside")
	own4, own6 := netip.MustParsePrefix("10.201.0.1/24"), netip.MustParsePrefix("fd89::1/64")
	e.host.Join(outside, "lan0", own4, own6)
	for _, p := range []netip.Prefix{own4.Masked(), own6.Masked()} {
		e.peer.Through(p, e.host)
	}
	// A veth without an address could have been a workload's door.
	eventually(e.t, waitGuarded, "lan0 is no door", func() bool {
		return slices.ContainsFunc(e.node.Status().Links, func(l proto.Link) bool { return l.Name == "tc_ingress lan0" && l.Attached })
	})
	return outside
}

// A host forwards for machines that are not its own as it did before; for a
// workload, only what the workload itself has said.
func TestG04Forwarded(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		e.enforce()
		outside := beyond(e) // control
		a := startActor(t, outside, e.lab.Cgroup("outside"))
		for _, to := range []netip.AddrPort{place(e.peer.IP4, 7001), place(e.peer.IP6, 7001)} {
			a.checkReach(t, to, true, true)
		}
		hidden := behind(t, e)
		stranger := startActor(t, hidden, e.lab.Cgroup("hidden"))
		e.forget()
		for _, to := range []netip.AddrPort{e.partner4(7000), e.partner6(7000)} {
			stranger.checkReach(t, to, false, true)
		}
		e.nothing("forwarded by web")
		e.told("forwarded by web", "no-socket", "spoof")
	})
}

// A connection that has ended is still answered by the kernel, without a socket. It
// passes the door, and never carries data.
func TestG05TimeWait(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		e.enforce()
		far := openCable(t, e.partner)
		for _, at := range []netip.AddrPort{e.partner4(7000), e.partner6(7000)} {
			r := e.a.dial(at)
			if r.Error != "" {
				t.Fatalf("dial %s: %s", at, r.Error)
			}
			local := netip.MustParseAddrPort(r.Local)
			call[string](e.a, "Exchange", ExchangeArgs{Stream: r.Stream, Bytes: 16, Timeout: 5 * time.Second})
			call[bool](e.a, "Close", r.Stream) // web closes first: TIME_WAIT is its
			isFIN := func(s tcpFrame) bool { return s.src == at && s.dst == local && s.flags&1 != 0 }
			var fin tcpFrame
			eventually(t, 5*time.Second, "the server's FIN", func() bool {
				for _, s := range far.segments() {
					if isFIN(s) {
						fin = s
					}
				}
				return fin.frame != nil
			})
			answers := func(p netlab.Packet) bool {
				return !p.Sent && p.Src == local && p.Dst == at
			}
			e.settle()
			e.wires[e.partner].Forget()
			far.send(fin.with(at.Port(), bytes.Clone(fin.options()))) // as if the last ACK had been lost; with its checksum
			e.wires[e.partner].Await(answers)
			for _, p := range e.wires[e.partner].Packets(answers) {
				if p.Payload != 0 || p.Flags&(flagSYN|flagRST) != 0 {
					t.Errorf("TIME_WAIT says %v", p)
				}
			}
		}
		// An acknowledgement that carries data is no such thing, whoever makes it.
		e.forget()
		b := whole(tcp, place(e.web.IP4, 5000), e.partner4(7000), flagACK)
		e.a.frames(byPacket, e.frame(b))
		e.nothing("an invented ACK")
	})
}

// The verdict on a SYN falls before the listener's stack sees it, with and without
// SYN cookies: nothing is answered, and nothing waits half open.
func TestF04VerdictOnSYN(t *testing.T) {
	e := newEstate(t, false)
	e.enforce()
	e.a.serve(7200)
	e.a.serve(7300)
	partner, peer := startActor(t, e.partner, e.lab.Cgroup("partner")), startActor(t, e.peer, e.lab.Cgroup("stranger"))
	for _, cookies := range []string{"0", "1", "2"} {
		e.web.Sysctl("ipv4/tcp_syncookies", cookies)
		for _, a := range []netip.Addr{e.web.IP4, e.web.IP6} {
			if !partner.reaches(place(a, 7200)) { // control
				t.Errorf("cookies %s: the declared visitor does not reach %s", cookies, a)
			}
			e.forget()
			before := e.node.Denied(abi.NoCrossingFor)
			for _, c := range []struct {
				by *actor
				to netip.AddrPort
			}{{peer, place(a, 7200)}, {partner, place(a, 7300)}} {
				if r := call[DialReply](c.by, "Dial", DialArgs{To: c.to.String(), Timeout: 200 * time.Millisecond}); r.Error == "" {
					t.Errorf("cookies %s: %s is reached", cookies, c.to)
				}
			}
			eventually(t, 5*time.Second, "both SYNs are refused", func() bool { return e.node.Denied(abi.NoCrossingFor) >= before+2 })
			e.settle()
			if got := e.doors[0].Packets(func(p netlab.Packet) bool { return p.Sent && p.Proto == tcp && p.Flags&flagSYN != 0 }); len(got) > 0 {
				t.Errorf("cookies %s: answered: %v", cookies, got[0])
			}
			if r := call[string](e.a, "HalfOpen", true); r != "" {
				t.Errorf("cookies %s: half open: %s", cookies, r)
			}
		}
	}
	if n := e.a.served("tcp", 7300).Count; n != 0 {
		t.Errorf("an undeclared port has accepted %d", n)
	}
}

// A workload that may not talk to another one cannot tell its open ports from its
// closed ones: it is refused in the way in which closed ports are. A stranger can:
// it gets silence from what refuses it, and the kernel's reset from what nobody
// serves, as from every host. That is a declared gap.
func TestF05PortScan(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		e.enforce()
		e.a.serve(7300)
		const open, closed = 7300, 7301
		denied := startActor(t, e.api.Namespace, e.node.Cgroup("/lab/other"))
		stranger := startActor(t, e.peer, e.lab.Cgroup("stranger"))
		for _, a := range []netip.Addr{e.web.IP4, e.web.IP6} {
			for _, port := range []uint16{open, closed} { // so that no neighbour has to be found any more
				e.scan(stranger, e.wires[e.peer], place(a, port))
			}
			got, want := e.scan(denied, e.doors[1], place(a, open)), e.scan(denied, e.doors[1], place(a, closed))
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s: a closed port (-) and an open one (+) to who is denied:\n%s", a, diff)
			}
			silence := scanned{Stream: "timeout", Datagram: "timeout"}
			if diff := cmp.Diff(silence, e.scan(stranger, e.wires[e.peer], place(a, open))); diff != "" {
				t.Errorf("%s: an open port to a stranger (-want +got):\n%s", a, diff)
			}
			if got := e.scan(stranger, e.wires[e.peer], place(a, closed)); got.Stream != "connection refused" {
				t.Errorf("%s: a closed port to a stranger: %+v", a, got)
			}
		}
		if n := e.a.served("tcp", open).Count + e.a.served("udp", open).Count; n != 0 {
			t.Errorf("the open port was given %d", n)
		}
	})
}

// scanned is what a caller learns of a port.
type scanned struct {
	Stream, Datagram string   // what its sockets are told
	Frames           []string // what comes to it; how much an ICMP error quotes differs
}

func (e *estate) scan(by *actor, wire *netlab.Wire, at netip.AddrPort) (s scanned) {
	e.t.Helper()
	e.forget()
	s.Stream = call[DialReply](by, "Dial", DialArgs{To: at.String(), Timeout: 500 * time.Millisecond}).Error
	s.Datagram = call[string](by, "Poke", at.String())
	e.settle()
	for _, p := range wire.Packets(func(p netlab.Packet) bool { return !p.Sent && p.Src.Addr() == at.Addr() }) {
		if p.Proto != unix.IPPROTO_ICMPV6 || p.ICMP < 130 { // neighbours are found at any time
			s.Frames = append(s.Frames, fmt.Sprintf("proto %d flags %#x icmp %d", p.Proto, p.Flags, p.ICMP))
		}
	}
	return s
}

// Every frame of a guarded host, idle and busy, is of a class that is known: there is
// no traffic that nobody has thought of.
func TestG03EveryFrame(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		e.host.ForgetNeighbours()
		e.enforce()
		e.host.ForgetNeighbours()
		e.control() // busy
		visitor := startActor(t, e.partner, e.lab.Cgroup("visitor"))
		e.a.serve(7200)
		for _, a := range []netip.Addr{e.web.IP4, e.web.IP6} {
			visitor.checkReach(t, place(a, 7200), true, true)
			e.scan(visitor, e.wires[e.partner], place(a, 7999)) // closed, and refused
		}
		e.host.ForgetNeighbours()
		e.control()
		e.a.run("ip link set eth0 mtu 1400") // groups are joined again as a device changes
		e.a.run("ip addr add fd99::9/128 dev eth0 nodad")
		e.settle()

		served := func(port uint16) bool { return port == 7000 || port == 7200 || port == 7400 }
		classes := []struct {
			name  string
			match netlab.Match
			seen  bool
		}{
			{name: "ARP", match: func(p netlab.Packet) bool { return p.EtherType == unix.ETH_P_ARP }},
			{name: "neighbour discovery", match: func(p netlab.Packet) bool { return p.Proto == unix.IPPROTO_ICMPV6 && p.ICMP >= 133 && p.ICMP <= 136 }},
			{name: "multicast listeners", match: func(p netlab.Packet) bool {
				return p.Proto == unix.IPPROTO_ICMPV6 && (p.ICMP == 143 || p.ICMP >= 130 && p.ICMP <= 132)
			}},
			{name: "declared TCP", match: func(p netlab.Packet) bool { return p.Proto == tcp && (served(p.Src.Port()) || served(p.Dst.Port())) }},
			{name: "declared UDP", match: func(p netlab.Packet) bool { return p.Proto == udp && (served(p.Src.Port()) || served(p.Dst.Port())) }},
			{name: "a caller that is refused at the other end", match: func(p netlab.Packet) bool {
				return p.Dst.Port() == 7999 && p.Src.Addr() != e.web.IP4 && p.Src.Addr() != e.web.IP6
			}},
			{name: "an empty reset", match: func(p netlab.Packet) bool { return p.Proto == tcp && p.Flags&flagRST != 0 && p.Payload == 0 }},
			{name: "an ICMP error", match: func(p netlab.Packet) bool {
				return p.Proto == unix.IPPROTO_ICMP && p.ICMP == 3 || p.Proto == unix.IPPROTO_ICMPV6 && p.ICMP >= 1 && p.ICMP <= 4
			}},
		}
		for _, w := range append([]*netlab.Wire{e.uplink}, e.doors...) {
			for _, p := range w.Packets(func(netlab.Packet) bool { return true }) {
				known := false
				for i := range classes {
					if classes[i].match(p) {
						known, classes[i].seen = true, true
						break
					}
				}
				if !known && !(p.Proto == unix.IPPROTO_IGMP) {
					t.Errorf("of no class: %v", p)
				}
			}
		}
		for _, c := range classes {
			if !c.seen {
				t.Errorf("no frame of class %q: it was not busy enough", c.name)
			}
		}
	})
}
