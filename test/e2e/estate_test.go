package e2e_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// estate is a guarded host with two containers, and two machines without demarc.
// Web may talk to api, to partner, and to a network that is nowhere, for tunnels
// to say that they go there; nobody may talk to peer.
//
//	web (root of its namespace) --- door --.
//	                                        host ---- switch ---- partner (declared)
//	api (its neighbour) ----------- door --'                  `-- peer (not)
type estate struct {
	t             *testing.T
	lab           *netlab.Lab
	host          *netlab.Host
	node          *netlab.Node
	web, api      *netlab.Container
	partner, peer *netlab.Namespace
	a, neighbour  *actor // in web and in api
	doors         []*netlab.Wire
	uplink        *netlab.Wire
	wires         map[*netlab.Namespace]*netlab.Wire // of partner and peer
}

const estatePolicy = `workloads:
  web: {zone: app, match: [{cgroup: /lab/web}]}
  api: {zone: app, match: [{cgroup: /lab/api}]}
  other: {zone: app, match: [{cgroup: /lab/other}]}
networks:
  partner: {zone: app, cidrs: [%s/32, "%s/128"]}
  inside: {zone: app, cidrs: [10.99.0.0/24, "fd99::/64"]}
crossings:
  - {name: web-api, from: [workload/web], to: [workload/api], ports: [tcp/7400, udp/7400]}
  - {name: web-partner, from: [workload/web], to: [network/partner], ports: [tcp/7000, udp/7000]}
  - {name: web-inside, from: [workload/web], to: [network/inside], ports: [tcp/7000, udp/7000]}
  - {name: partner-web, from: [network/partner], to: [workload/web], ports: [tcp/7200, udp/7200], identity: none}
  - {name: other-api, from: [workload/other], to: [workload/api], ports: [tcp/7300-7301, udp/7300-7301]}
`

// newEstate makes one without a policy in force: what is tried can be seen to work.
func newEstate(t *testing.T, bridged bool) *estate {
	t.Helper()
	e := &estate{t: t, lab: netlab.New(t), wires: map[*netlab.Namespace]*netlab.Wire{}}
	e.host, e.partner, e.peer = e.lab.Host("host"), e.lab.Namespace("partner"), e.lab.Namespace("peer")
	e.host.Known(e.partner, e.peer)
	for _, ns := range []*netlab.Namespace{e.partner, e.peer} {
		ns.Echo(7000)
		ns.Echo(7001)
		e.wires[ns] = ns.Wire()
	}
	e.node = e.lab.Node("", netlab.NodeOptions{CoreOnly: true, Home: e.host.Namespace})
	contain := e.host.Routed
	if bridged {
		contain = e.host.Bridged
	}
	e.web, e.api = contain("web"), contain("api")
	e.doors, e.uplink = []*netlab.Wire{e.web.Wire(), e.api.Wire()}, e.host.Wire()
	e.a = startActor(t, e.web.Namespace, e.node.Cgroup("/lab/web"))
	e.neighbour = startActor(t, e.api.Namespace, e.node.Cgroup("/lab/api"))
	return e
}

// enforce applies the policy, waits until the doors are guarded, and shows that
// what is declared works.
func (e *estate) enforce() {
	e.t.Helper()
	e.node.Apply(document(1, fmt.Sprintf(estatePolicy, e.partner.IP4, e.partner.IP6)))
	for _, c := range []*netlab.Container{e.web, e.api} {
		guarded(e.t, e.node, c.Door)
	}
	e.neighbour.serve(7400)
	e.control()
}

func (e *estate) control() {
	e.t.Helper()
	for _, to := range []netip.AddrPort{
		place(e.partner.IP4, 7000), place(e.partner.IP6, 7000), place(e.api.IP4, 7400), place(e.api.IP6, 7400),
	} {
		e.a.checkReach(e.t, to, true, true)
	}
}

// estates runs a test on both kinds of container.
func estates(t *testing.T, test func(t *testing.T, e *estate)) {
	for _, kind := range []string{"routed", "bridged"} {
		t.Run(kind, func(t *testing.T) { test(t, newEstate(t, kind == "bridged")) })
	}
}

// settle waits until everything that web has sent has gone where it goes: behind
// it, a frame follows through the queue of every CPU to the host, and another one
// from there to the switch.
func (e *estate) settle() {
	e.t.Helper()
	for _, d := range e.doors {
		d.Settle()
	}
	e.uplink.Settle()
}

func (e *estate) forget() {
	e.t.Helper()
	e.settle()
	for _, w := range e.wires {
		w.Forget()
	}
	for _, w := range e.doors {
		w.Forget()
	}
	e.node.Forget()
}

// carried says whether a packet is more than a kernel's own talk: about its
// neighbourhood, or an empty reset for what an earlier attempt left behind.
func carried(p netlab.Packet) bool {
	switch {
	case p.EtherType != unix.ETH_P_IP && p.EtherType != unix.ETH_P_IPV6 || p.Proto == unix.IPPROTO_IGMP:
		return false
	case p.Proto == unix.IPPROTO_ICMPV6:
		return p.ICMP < 130 || p.ICMP > 137 && p.ICMP != 143
	case p.Proto == tcp:
		return p.Flags&flagRST == 0 || p.Payload > 0
	}
	return true
}

// arrived returns what came to partner, to peer and to the neighbour.
func (e *estate) arrived() (all []netlab.Packet) {
	e.t.Helper()
	e.settle()
	in := func(p netlab.Packet) bool { return !p.Sent && carried(p) }
	for _, w := range e.wires {
		all = append(all, w.Packets(in)...)
	}
	return append(all, e.doors[1].Packets(in)...)
}

// nothing shows that nothing arrived anywhere.
func (e *estate) nothing(what string) {
	e.t.Helper()
	if got := e.arrived(); len(got) > 0 {
		e.t.Errorf("%s: %d undeclared packets on a wire, the first: %v", what, len(got), got[0])
	}
}

// told waits until the kernel has told of a refusal for one of the reasons.
func (e *estate) told(what string, reasons ...string) {
	e.t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		flows := e.node.Flows()
		if slices.ContainsFunc(flows, func(f netlab.Flow) bool {
			return f.Verdict == abi.Deny && slices.Contains(reasons, f.Reason.String())
		}) {
			return
		}
		if time.Now().After(end) {
			e.t.Errorf("%s: not refused with %s", what, strings.Join(reasons, " or "))
			for _, f := range flows {
				e.t.Logf("  %s", netlab.Describe(f))
			}
			return
		}
	}
}

// way is one way around the sockets of a workload.
type way struct {
	name   string
	needs  string   // a command that fails on kernels without what the way needs
	needed string   // what undoes that command
	up     []string // commands before it
	rules  []string // of nft, too
	down   []string // commands after it; the rules go by themselves
	try    func(e *estate)
	seen   netlab.Match // what arrives somewhere if nobody stops it
	why    []string     // the reasons that it may be stopped for
}

func (w way) with(change func(*way)) way {
	change(&w)
	return w
}

// ways tries every way without a policy, where it has to work, and under one, where
// nothing may arrive anywhere.
func (e *estate) ways(all []way) {
	e.t.Helper()
	var present []way
	for _, w := range all {
		if w.needs != "" {
			if r := e.a.tries(w.needs); r.Failed {
				e.t.Logf("not on this kernel: %s: %s", w.name, strings.TrimSpace(r.Output))
				continue
			}
			e.a.run(w.needed)
		}
		present = append(present, w)
	}
	for _, w := range present {
		e.prepare(w)
		e.forget()
		w.try(e)
		if got := e.arrived(); !slices.ContainsFunc(got, w.seen) {
			e.t.Errorf("%s: does not work without a policy either: %v arrives, web sent %v", w.name, got, e.doors[0].Packets(carried))
		}
		e.undo(w)
	}
	e.enforce()
	for _, w := range present {
		e.prepare(w)
		e.forget()
		w.try(e)
		e.nothing(w.name)
		e.told(w.name, w.why...)
		e.undo(w)
	}
	e.control()
}

func (e *estate) prepare(w way) {
	e.t.Helper()
	e.a.run(w.up...)
	if len(w.rules) > 0 {
		e.a.nft(w.rules...)
	}
}

func (e *estate) undo(w way) {
	e.t.Helper()
	if len(w.rules) > 0 {
		e.a.nft("flush ruleset")
	}
	e.a.run(w.down...)
}

// place is a port of a machine.
func place(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// says sends a datagram by an ordinary socket, of which it does not matter what
// becomes.
func (e *estate) says(to netip.AddrPort) {
	e.t.Helper()
	call[DatagramReply](e.a, "Datagrams", DatagramArgs{To: to.String(), Count: 1})
}

// calls tries to connect.
func (e *estate) calls(to netip.AddrPort) {
	e.t.Helper()
	call[DialReply](e.a, "Dial", DialArgs{To: to.String(), Timeout: 50 * time.Millisecond})
}

// frame is a frame of web's to whatever its way out is.
func (e *estate) frame(packet []byte) []byte { return ethernet(e.web.DoorMAC(), e.web.MAC(), packet) }
