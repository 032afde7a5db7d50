package e2e_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/demarc/demarc/test/netlab"
)

// Ways of root in a container to send what no socket hook has judged, or something
// else than it has judged.

// any4 and any6 match what comes to peer, which nobody may talk to.
func toPeer(e *estate) netlab.Match { return towards(e.peer) }

// outside places.
func (e *estate) partner4(port uint16) netip.AddrPort { return place(e.partner.IP4, port) }
func (e *estate) partner6(port uint16) netip.AddrPort { return place(e.partner.IP6, port) }

// both says something to a place and calls there.
func (e *estate) both(to ...netip.AddrPort) {
	for _, at := range to {
		e.says(at)
		e.calls(at)
	}
}

// A destination that the container translates is judged as it leaves the socket
// layer, which is behind that.
func TestD01TranslatedOutput(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		nat := func(family, rule string) []string {
			return []string{"add table " + family + " t", "add chain " + family + " t c { type nat hook output priority -100; }", "add rule " + family + " t c " + rule}
		}
		e.ways([]way{
			{
				name: "to peer", rules: nat("ip", fmt.Sprintf("ip daddr %s dnat to %s", e.partner.IP4, e.peer.IP4)),
				try: func(e *estate) { e.both(e.partner4(7000)) }, seen: toPeer(e), why: []string{"no-crossing"},
			},
			{
				name: "to peer over IPv6", rules: nat("ip6", fmt.Sprintf("ip6 daddr %s dnat to %s", e.partner.IP6, e.peer.IP6)),
				try: func(e *estate) { e.both(e.partner6(7000)) }, seen: toPeer(e), why: []string{"no-crossing"},
			},
			{
				name: "to another port", rules: nat("ip", "meta l4proto { tcp, udp } dnat to :7001"),
				try:  func(e *estate) { e.both(e.partner4(7000)) },
				seen: func(p netlab.Packet) bool { return p.Dst.Port() == 7001 }, why: []string{"no-crossing"},
			},
		})
	})
}

// A packet that is rewritten on the device, behind the socket hook, is not what the
// hook has judged.
func TestD02RewrittenAtDevice(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		netdev := func(rule string) []string {
			return []string{"add table netdev t", "add chain netdev t c { type filter hook egress device eth0 priority 0; }", "add rule netdev t c " + rule}
		}
		why := []string{"no-socket", "spoof"}
		e.ways([]way{
			{
				name: "to peer", rules: netdev(fmt.Sprintf("ip daddr %s ip daddr set %s", e.partner.IP4, e.peer.IP4)),
				try: func(e *estate) { e.both(e.partner4(7000)) }, seen: toPeer(e), why: why,
			},
			{
				name: "to peer over IPv6", rules: netdev(fmt.Sprintf("ip6 daddr %s ip6 daddr set %s", e.partner.IP6, e.peer.IP6)),
				try: func(e *estate) { e.both(e.partner6(7000)) }, seen: toPeer(e), why: why,
			},
			{
				name: "to another UDP port", rules: netdev("udp dport 7000 udp dport set 7001"),
				try:  func(e *estate) { e.says(e.partner4(7000)) },
				seen: func(p netlab.Packet) bool { return p.Dst.Port() == 7001 }, why: why,
			},
			{
				name: "to another TCP port", rules: netdev("tcp dport 7000 tcp dport set 7001"),
				try:  func(e *estate) { e.calls(e.partner6(7000)) },
				seen: func(p netlab.Packet) bool { return p.Dst.Port() == 7001 }, why: why,
			},
			{
				name: "from its neighbour", rules: netdev(fmt.Sprintf("ip saddr %s ip saddr set %s", e.web.IP4, e.api.IP4)),
				try:  func(e *estate) { e.both(e.partner4(7000)) },
				seen: func(p netlab.Packet) bool { return p.Src.Addr() == e.api.IP4 }, why: why,
			},
		})
	})
}

// Traffic control moves frames between devices: what comes in at one goes out at
// another.
func TestD03Redirected(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		e.a.tun("tap0", true)
		out := func(e *estate, packet []byte) { e.a.inject("tap0", e.toward(packet)) }
		redirect := []string{"tc qdisc add dev tap0 clsact", "tc filter add dev tap0 ingress protocol all u32 match u32 0 0 action mirred egress redirect dev eth0"}
		down := []string{"tc qdisc del dev tap0 clsact"}
		why := []string{"no-socket", "raw-socket"}
		e.ways([]way{
			{
				name: "UDP to peer", up: redirect, down: down, why: why,
				try:  func(e *estate) { out(e, whole(udp, place(e.web.IP4, 5000), place(e.peer.IP4, 7001), 0)) },
				seen: toPeer(e),
			},
			{
				name: "SYN to partner over IPv6", up: redirect, down: down, why: why,
				try:  func(e *estate) { out(e, whole(tcp, place(e.web.IP6, 5000), e.partner6(7000), flagSYN)) },
				seen: func(p netlab.Packet) bool { return p.Src.Port() == 5000 },
			},
			{
				name: "through a bridge of its own", why: why,
				up: []string{"ip link add br1 type bridge stp_state 0 forward_delay 0", "ip link set tap0 master br1", "ip link set eth0 master br1", "ip link set br1 up"},
				// A port has no addresses of its own while it is one.
				down: []string{"ip link del br1"},
				try:  func(e *estate) { out(e, whole(udp, place(e.web.IP4, 5000), place(e.peer.IP4, 7001), 0)) },
				seen: toPeer(e),
			},
			{
				name:  "nat",
				needs: "tc actions add action nat egress 10.99.0.0/24 10.98.0.0", needed: "tc actions flush action nat",
				up: []string{"tc qdisc add dev eth0 clsact", fmt.Sprintf("tc filter add dev eth0 egress protocol ip u32 match ip dst %s/32 action nat ingress %s/32 %s",
					e.partner.IP4, e.partner.IP4, e.peer.IP4)},
				down: []string{"tc qdisc del dev eth0 clsact"}, why: why,
				try: func(e *estate) { e.says(e.partner4(7000)) }, seen: toPeer(e),
			},
			{
				name:  "pedit",
				needs: "tc actions add action pedit ex munge ip ttl set 9", needed: "tc actions flush action pedit",
				up: []string{"tc qdisc add dev eth0 clsact", fmt.Sprintf("tc filter add dev eth0 egress protocol ip u32 match ip dst %s/32 action pedit ex munge ip dst set %s pipe action csum ip4h udp",
					e.partner.IP4, e.peer.IP4)},
				down: []string{"tc qdisc del dev eth0 clsact"}, why: why,
				try: func(e *estate) { e.says(e.partner4(7000)) }, seen: toPeer(e),
			},
			{
				name: "a program that rewrites", why: why, seen: toPeer(e),
				try: func(e *estate) {
					defer rewriteDestination(e, e.peer.IP4).Close()
					e.both(e.partner4(7000))
				},
			},
		})
	})
}

// The outer packet of a tunnel goes elsewhere than the inner one, which is all that
// the socket hook sees.
func TestD04VXLAN(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		var all []way
		for _, outer := range []struct {
			name    string
			to, own netip.Addr
		}{{"IPv4", e.peer.IP4, e.web.IP4}, {"IPv6", e.peer.IP6, e.web.IP6}, {"to where it may go", e.partner.IP4, e.web.IP4}} {
			all = append(all, way{
				name: "outer " + outer.name,
				up: []string{
					fmt.Sprintf("ip link add vx0 type vxlan id 7 local %s remote %s dstport 4789 dev eth0", outer.own, outer.to),
					"ip link set vx0 up", "ip addr add 10.99.0.1/24 dev vx0", "ip addr add fd99::1/64 dev vx0 nodad",
					"ip neigh add 10.99.0.2 lladdr 02:00:00:00:00:99 dev vx0", "ip neigh add fd99::2 lladdr 02:00:00:00:00:99 dev vx0",
				},
				down: []string{"ip link del vx0"},
				try: func(e *estate) {
					e.both(netip.MustParseAddrPort("10.99.0.2:7000"), netip.MustParseAddrPort("[fd99::2]:7000"))
				},
				seen: func(p netlab.Packet) bool { return p.Dst.Port() == 4789 },
				why:  []string{"no-socket"},
			})
		}
		e.ways(all)
	})
}

// Other tunnels are the same; each that this kernel can make is tried.
func TestD05Tunnels(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) {
		inner4, inner6 := netip.MustParseAddrPort("10.99.0.2:7000"), netip.MustParseAddrPort("[fd99::2]:7000")
		// A tunnel device, with addresses inside, and whoever is there named.
		device := func(name, kind string, proto uint8) way {
			return way{
				name:  name,
				needs: "ip link add tun9 " + kind, needed: "ip link del tun9",
				up: []string{
					"ip link add tun9 " + kind, "ip link set tun9 up", "ip addr add 10.99.0.1/24 dev tun9", "ip addr add fd99::1/64 dev tun9 nodad",
					"ip neigh replace 10.99.0.2 lladdr 02:00:00:00:00:99 dev tun9", "ip neigh replace fd99::2 lladdr 02:00:00:00:00:99 dev tun9",
				},
				down: []string{"ip link del tun9"},
				try:  func(e *estate) { e.both(inner4, inner6) },
				seen: func(p netlab.Packet) bool { return p.Proto == proto }, why: []string{"no-socket"},
			}
		}
		ends4 := fmt.Sprintf("local %s remote %s", e.web.IP4, e.peer.IP4)
		ends6 := fmt.Sprintf("local %s remote %s", e.web.IP6, e.peer.IP6)
		// Only a device without hardware addresses needs no neighbours.
		plain := func(w way) way {
			w.up = w.up[:4]
			return w
		}
		only4 := func(w way) way {
			w.up = append(w.up[:2:2], "ip addr add 10.99.0.1/24 dev tun9")
			w.try = func(e *estate) { e.both(inner4) }
			return w
		}
		only6 := func(w way) way {
			w.up = append(w.up[:2:2], "ip addr add fd99::1/64 dev tun9 nodad")
			w.try = func(e *estate) { e.both(inner6) }
			return w
		}
		e.ways([]way{
			device("vxlan", "type vxlan id 9 "+ends4+" dstport 8472 dev eth0", udp),
			device("vxlan, generic protocol", "type vxlan external gpe dstport 4790", udp).with(func(w *way) {
				w.up = []string{
					w.up[0], w.up[1],
					fmt.Sprintf("ip route add 10.99.0.0/24 encap ip id 9 src %s dst %s dev tun9", e.web.IP4, e.peer.IP4),
				}
				w.try = func(e *estate) { e.both(inner4) }
			}),
			device("geneve", fmt.Sprintf("type geneve id 9 remote %s", e.peer.IP4), udp),
			device("bareudp", "type bareudp dstport 6635 ethertype ipv4", udp).with(func(w *way) {
				w.up = append(w.up[:2:2], fmt.Sprintf("ip route add 10.99.0.0/24 encap ip id 9 src %s dst %s dev tun9", e.web.IP4, e.peer.IP4))
				w.try = func(e *estate) { e.both(inner4) }
			}),
			plain(device("gre", "type gre "+ends4, 47)),
			device("gretap", "type gretap "+ends4, 47),
			plain(device("gre over IPv6", "type ip6gre "+ends6, 47)),
			device("gretap over IPv6", "type ip6gretap "+ends6, 47),
			only4(device("ipip", "type ipip "+ends4, 4)),
			only6(device("sit", "type sit "+ends4, 41)),
			plain(device("ip6tnl", "type ip6tnl mode any "+ends6, 0).with(func(w *way) {
				w.seen = func(p netlab.Packet) bool { return p.Proto == 4 || p.Proto == 41 }
			})),
			only4(device("foo over UDP", "type ipip "+ends4+" encap fou encap-sport 5555 encap-dport 5555", udp)),
			{
				name:  "segment routing",
				needs: fmt.Sprintf("ip -6 route add fd99::/64 encap seg6 mode encap segs %s dev eth0", e.peer.IP6), needed: "ip -6 route del fd99::/64",
				up:   []string{fmt.Sprintf("ip -6 route add fd99::/64 encap seg6 mode encap segs %s dev eth0", e.peer.IP6)},
				down: []string{"ip -6 route del fd99::/64"},
				try:  func(e *estate) { e.both(inner6) },
				seen: toPeer(e), why: []string{"no-socket", "ip-options", "no-crossing", "protocol"},
			},
		})
	})
}

// rewriteDestination attaches a program to web's eth0 that gives what leaves there
// another IPv4 destination, checksum and all. Containers cannot load programs; what
// tc can do for them is no more than this.
func rewriteDestination(e *estate, to netip.Addr) link.Link {
	e.t.Helper()
	const at, sum = 14 + 16, 14 + 10
	partner, peer := e.partner.IP4.As4(), to.As4()
	load := asm.LoadMem(asm.R2, asm.R1, int16(unsafe.Offsetof(skBuff{}.protocol)), asm.Word)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "rewrite", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{
			load,
			asm.JNE.Imm(asm.R2, int32(binary.NativeEndian.Uint16([]byte{8, 0})), "out"),
			asm.Mov.Reg(asm.R6, asm.R1),
			// The checksum first: from the old address to the new one.
			asm.Mov.Imm(asm.R2, sum),
			asm.Mov.Imm(asm.R3, int32(binary.NativeEndian.Uint32(partner[:]))),
			asm.Mov.Imm(asm.R4, int32(binary.NativeEndian.Uint32(peer[:]))),
			asm.Mov.Imm(asm.R5, 4),
			asm.FnL3CsumReplace.Call(),
			asm.StoreImm(asm.RFP, -4, int64(binary.NativeEndian.Uint32(peer[:])), asm.Word),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, at),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, -4),
			asm.Mov.Imm(asm.R4, 4),
			asm.Mov.Imm(asm.R5, 0),
			asm.FnSkbStoreBytes.Call(),
			asm.Mov.Imm(asm.R0, -1).WithSymbol("out"),
			asm.Return(),
		},
	})
	if err != nil {
		e.t.Fatal(err)
	}
	defer p.Close()
	var l link.Link
	err = e.web.Do(func() error {
		device, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		l, err = link.AttachTCX(link.TCXOptions{Interface: device.Index, Program: p, Attach: ebpf.AttachTCXEgress})
		return err
	})
	if err != nil {
		e.t.Fatal(err)
	}
	return l
}

// skBuff is the beginning of struct __sk_buff.
type skBuff struct{ len, pktType, mark, queueMapping, protocol uint32 }
