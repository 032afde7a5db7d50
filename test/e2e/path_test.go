package e2e_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// routed is a fleet whose hosts have a router between each two of them:
//
//	host web ----.      .---- host db
//	             router
//	host api ----'      '---- outside, without demarc
type routed struct {
	fleet
	router *netlab.Namespace
	cables map[string]*netlab.Cable // from each host to the router
	wires  map[string]*netlab.Wire
	flows  atomic.Int32 // ports that were used
}

var routedPlaces = []string{"web", "api", "db", "outside"}

func newRouted(t *testing.T) *routed {
	t.Helper()
	r := &routed{cables: map[string]*netlab.Cable{}, wires: map[string]*netlab.Wire{}}
	r.fleet = fleet{lab: netlab.New(t), hosts: map[string]*netlab.Namespace{}, nodes: map[string]*netlab.Node{}, actors: map[string]*actor{}}
	r.router = r.lab.Island("router")
	r.router.Router()
	for _, name := range routedPlaces {
		ns := r.lab.Island(name)
		r.cables[name] = r.lab.Cable(ns, r.router)
		r.cables[name].A.LeadAll()
		if name == "outside" {
			r.outside = ns
		} else {
			r.hosts[name] = ns
		}
	}
	text := document(1, fmt.Sprintf(fleetPolicy, r.outside.IP4, r.outside.IP6, ""))
	for name, ns := range r.hosts {
		r.nodes[name] = r.lab.Node(text, netlab.NodeOptions{CoreOnly: true, Home: ns})
		r.actors[name] = startActor(t, ns, r.nodes[name].Cgroup("/lab/"+name))
	}
	r.stranger = startActor(t, r.outside, r.lab.Cgroup("outside"))
	return r
}

// With a router in between, every declared pair connects and every other does not:
// TCP and UDP, IPv4 and IPv6, with SYN cookies too. No host with demarc puts an answer
// on its cable that no crossing declares.
func TestRoutedHosts(t *testing.T) {
	r := newRouted(t)
	r.serve()
	places := map[string]*netlab.Namespace{"outside": r.outside}
	actors := map[string]*actor{"outside": r.stranger}
	for name := range r.hosts {
		places[name], actors[name] = r.hosts[name], r.actors[name]
	}
	for name := range r.hosts {
		r.wires[name] = r.cables[name].A.Wire()
	}
	declared := map[string]bool{
		"web api 8080": true, "api db 5432": true, "outside web 443": true, "db outside 443": true,
	}
	for _, cookies := range []string{"1", "2"} {
		for _, ns := range places {
			ns.Sysctl("ipv4/tcp_syncookies", cookies)
		}
		var all sync.WaitGroup
		for from, a := range actors {
			for to, ns := range places {
				if from == to {
					continue
				}
				all.Go(func() {
					for _, port := range fleetPorts {
						want := declared[fmt.Sprintf("%s %s %d", from, to, port)]
						for _, address := range []netip.Addr{ns.IP4, ns.IP6} {
							a.checkReach(t, netip.AddrPortFrom(address, port), want, cookies == "1")
						}
					}
				})
			}
		}
		all.Wait()
	}
	for to, ns := range r.hosts {
		answers := r.wires[to].Packets(func(p netlab.Packet) bool {
			return p.Sent && p.Payload > 0 && slices.Contains(fleetPorts, p.Src.Port()) && (p.Proto == unix.IPPROTO_TCP || p.Proto == unix.IPPROTO_UDP)
		})
		for from, caller := range places {
			for _, port := range fleetPorts {
				any := slices.ContainsFunc(answers, func(p netlab.Packet) bool {
					return p.Src.Port() == port && (p.Dst.Addr() == caller.IP4 || p.Dst.Addr() == caller.IP6)
				})
				if want := declared[fmt.Sprintf("%s %s %d", from, to, port)]; from != to && any != want {
					t.Errorf("%s (%s) answered %s on %d with data: %v, want %v", to, ns.IP4, from, port, any, want)
				}
			}
		}
	}
}

// A router between the hosts translates an end of the connection. Where the
// crossing says that end, it works and the tag still proves who is there; where it
// says nothing, the other end, or only one of the hosts says it, the SYN or the
// datagram is refused, and for the right reason.
func TestE16Translation(t *testing.T) {
	r := newRouted(t)
	r.serve()
	wire := r.cables["api"].A.Wire()
	version := 1
	for _, c := range []struct {
		name     string
		web, api string // what each host's policy says of nat
		path     string // which end is translated: source, destination, both; "" = none
		reason   abi.Reason
	}{
		{"OK none", "", "", "", abi.Undecided},
		{"OK source", "source", "source", "source", abi.Undecided},
		{"OK destination", "destination", "destination", "destination", abi.Undecided},
		{"OK source said, none translated", "source", "source", "", abi.Undecided},
		{"OK destination said, none translated", "destination", "destination", "", abi.Undecided},
		{"bad source not said", "", "", "source", abi.TagBadMAC},
		{"bad destination not said", "", "", "destination", abi.TagBadMAC},
		{"bad source, and destination said", "destination", "destination", "source", abi.TagBadMAC},
		{"bad destination, and source said", "source", "source", "destination", abi.TagBadMAC},
		{"bad both", "source", "source", "both", abi.TagBadMAC},
		{"bad source, said by the caller alone", "source", "", "source", abi.TagUnbound},
		{"bad destination, said by the caller alone", "destination", "", "destination", abi.TagUnbound},
		{"bad source, said by the listener alone", "", "source", "source", abi.TagBadMAC},
	} {
		version++
		for node, nat := range map[string]string{"web": c.web, "api": c.api} {
			if nat != "" {
				nat = ", nat: " + nat
			}
			r.nodes[node].Apply(document(version, fmt.Sprintf(fleetPolicy, r.outside.IP4, r.outside.IP6, nat)))
		}
		nft(t, r.router, "flush ruleset; add table inet t; "+translation(r, c.path))
		for _, cookies := range []string{"1", "2"} {
			r.hosts["api"].Sysctl("ipv4/tcp_syncookies", cookies)
			t.Run(c.name+", cookies "+cookies, func(t *testing.T) {
				r.checkTranslation(t, wire, c.path, c.reason)
			})
		}
	}
}

// checkTranslation connects from web to api, and sends datagrams in two flows at once.
// Undecided: they come about.
func (r *routed) checkTranslation(t *testing.T, wire *netlab.Wire, path string, reason abi.Reason) {
	t.Helper()
	r.nodes["api"].Forget()
	wire.Forget()
	var families sync.WaitGroup
	for _, ends := range [][2]netip.Addr{{r.hosts["api"].IP4, r.cables["web"].B.IP4}, {r.hosts["api"].IP6, r.cables["web"].B.IP6}} {
		at, front := netip.AddrPortFrom(ends[0], 8080), ends[1]
		stream, datagram := at, at
		if path == "destination" || path == "both" {
			stream, datagram = netip.AddrPortFrom(front, 80), netip.AddrPortFrom(front, 8080)
		}
		place := netlab.Place{Address: at.Addr(), Port: 8080}
		denied := func(proto uint8) {
			f := r.nodes["api"].AwaitDenied(reason, proto, place)
			// A bad MAC proves nothing of what it claims.
			want := map[abi.Reason]string{abi.TagBadMAC: "claims app/web", abi.TagUnbound: "app/web"}[reason]
			if who := f.Source.Label(); who != want {
				t.Errorf("denied %q, want %q: %s", who, want, netlab.Describe(f))
			}
		}
		families.Go(func() {
			want := reason == abi.Undecided
			if got := r.actors["web"].reachesWithin(stream, patience(want)); got != want {
				t.Errorf("reaches %s: %v, want %v", stream, got, want)
			}
			if reason != abi.Undecided {
				denied(unix.IPPROTO_TCP)
			}
		})
		for range 2 { // within a second their tags differ in the nonce alone
			families.Go(func() {
				// From a port that no earlier flow had: one that has proved itself goes on.
				any := netip.IPv4Unspecified()
				if datagram.Addr().Is6() {
					any = netip.IPv6Unspecified()
				}
				from := netip.AddrPortFrom(any, uint16(20_000+r.flows.Add(1)))
				args := DatagramArgs{To: datagram.String(), From: from.String(), Count: 2, Timeout: patience(reason == abi.Undecided)}
				got := call[DatagramReply](r.actors["web"], "Datagrams", args)
				if want := map[bool]int{true: 2}[reason == abi.Undecided]; got.Answered != want {
					t.Errorf("datagrams to %s: %+v, want %d answered", datagram, got, want)
				}
				if reason != abi.Undecided {
					denied(unix.IPPROTO_UDP)
				}
			})
		}
	}
	families.Wait()
	accepted := wire.Count(func(p netlab.Packet) bool {
		return p.Sent && p.Proto == unix.IPPROTO_TCP && p.Flags&(flagSYN|flagACK) == flagSYN|flagACK && p.Tagged
	})
	if reason != abi.Undecided && accepted > 0 || reason == abi.Undecided && accepted < 2 {
		t.Errorf("%d SYN-ACKs with a tag", accepted)
	}
}

// Where the router translates, what nobody declared does not come about, either: not
// on another port, not for another workload, not for who proves nothing. It does not
// leave its host; where that host's policy alone declares it, api does not answer.
func TestE16Undeclared(t *testing.T) {
	const more = `  - {name: web-api-more, from: [workload/web], to: [workload/api], ports: [tcp/5432, udp/5432]%[1]s}
  - {name: db-api, from: [workload/db], to: [workload/api], ports: [tcp/8080, udp/8080, tcp/80]%[1]s}
`
	r := newRouted(t)
	r.serve()
	for name := range r.hosts {
		r.wires[name] = r.cables[name].A.Wire()
	}
	version := 1
	for _, path := range []string{"source", "destination"} {
		nft(t, r.router, "flush ruleset; add table inet t; "+translation(r, path))
		for _, alone := range []bool{false, true} { // the caller's host declares it
			version++
			for name, node := range r.nodes {
				nat := ", nat: " + path
				text := fmt.Sprintf(fleetPolicy, r.outside.IP4, r.outside.IP6, nat)
				if alone && name != "api" {
					text += fmt.Sprintf(more, nat)
				}
				node.Apply(document(version, text))
			}
			t.Run(fmt.Sprintf("%s, declared by the caller %v", path, alone), func(t *testing.T) {
				r.checkTranslation(t, r.wires["api"], path, abi.Undecided) // control
				r.checkUndeclared(t, path, "web", 5432, alone)
				r.checkUndeclared(t, path, "db", 8080, alone)
				r.checkUndeclared(t, path, "outside", 8080, true)
				r.checkTranslation(t, r.wires["api"], path, abi.Undecided)
			})
		}
	}
}

// checkUndeclared asks api what nobody declared for it. Either it leaves, and api's host
// refuses it, or its own host does.
func (r *routed) checkUndeclared(t *testing.T, path, from string, port uint16, leaves bool) {
	t.Helper()
	caller, refuses, reason := r.actors[from], r.nodes["api"], abi.NoCrossingFor
	if from == "outside" {
		caller, reason = r.stranger, abi.TagMissing
	}
	if !leaves {
		refuses = r.nodes[from]
	}
	for _, ends := range [][2]netip.Addr{{r.hosts["api"].IP4, r.cables["web"].B.IP4}, {r.hosts["api"].IP6, r.cables["web"].B.IP6}} {
		at := netip.AddrPortFrom(ends[0], port)
		stream, datagram := at, at
		if path == "destination" {
			stream, datagram = netip.AddrPortFrom(ends[1], port), netip.AddrPortFrom(ends[1], port)
			if port == 8080 {
				stream = netip.AddrPortFrom(ends[1], 80)
			}
		}
		refuses.Forget()
		for _, w := range r.wires {
			w.Forget()
		}
		if caller.reachesWithin(stream, timeOfSilence) {
			t.Errorf("%s reaches %s", from, stream)
		}
		if got := caller.datagramsWithin(datagram, 2, timeOfSilence); got.Answered > 0 {
			t.Errorf("%s to %s: %+v", from, datagram, got)
		}
		for proto, asked := range map[uint8]netip.AddrPort{unix.IPPROTO_TCP: stream, unix.IPPROTO_UDP: datagram} {
			if leaves {
				asked = at
			}
			f := refuses.AwaitDenied(reason, proto, netlab.Place{Address: asked.Addr(), Port: asked.Port()})
			if who := f.Source.Workload; from != "outside" && who != from {
				t.Errorf("denied %q, want %q: %s", who, from, netlab.Describe(f))
			}
			came := r.wires["api"].Count(func(p netlab.Packet) bool { return !p.Sent && p.Proto == proto && p.Dst == at })
			if leaves != (came > 0) {
				t.Errorf("%s to %s: %d packets of protocol %d came to api's host", from, asked, came, proto)
			}
			answers := r.wires["api"].Packets(func(p netlab.Packet) bool {
				return p.Sent && p.Proto == proto && p.Src == at && (proto == unix.IPPROTO_UDP || p.Flags&flagSYN != 0)
			})
			if len(answers) > 0 {
				t.Errorf("api answered %s: %s", from, answers[0])
			}
			if leaves {
				continue
			}
			if left := r.wires[from].Packets(netlab.To(proto, asked.Addr(), asked.Port())); len(left) > 0 {
				t.Errorf("%s sent %s", from, left[0])
			}
		}
	}
}

// translation is what the router does: which end it translates.
func translation(r *routed, path string) string {
	var rules []string
	api4, api6, web, api := r.hosts["api"].IP4, r.hosts["api"].IP6, r.cables["web"].B, r.cables["api"].B
	if path == "source" || path == "both" {
		rules = append(rules, "add chain inet t s { type nat hook postrouting priority 100; }",
			fmt.Sprintf("add rule inet t s ip daddr %s meta l4proto { tcp, udp } snat ip to %s", api4, api.IP4),
			fmt.Sprintf("add rule inet t s ip6 daddr %s meta l4proto { tcp, udp } snat ip6 to %s", api6, api.IP6))
	}
	if path == "destination" || path == "both" {
		rules = append(rules, "add chain inet t d { type nat hook prerouting priority -100; }",
			fmt.Sprintf("add rule inet t d ip daddr %s tcp dport 80 dnat ip to %s:8080", web.IP4, api4),
			fmt.Sprintf("add rule inet t d ip6 daddr %s tcp dport 80 dnat ip6 to [%s]:8080", web.IP6, api6),
			fmt.Sprintf("add rule inet t d ip daddr %s udp dport 8080 dnat ip to %s:8080", web.IP4, api4),
			fmt.Sprintf("add rule inet t d ip6 daddr %s udp dport 8080 dnat ip6 to [%s]:8080", web.IP6, api6),
			fmt.Sprintf("add rule inet t d ip daddr %s th dport 5432 dnat ip to %s", web.IP4, api4), // which nobody declares
			fmt.Sprintf("add rule inet t d ip6 daddr %s th dport 5432 dnat ip6 to %s", web.IP6, api6))
	}
	return strings.Join(rules, "; ")
}

// To a declared network and from one, a host with demarc sends byte for byte what
// it sends without: TCP, UDP as large as the path and in fragments too, and echo, over
// IPv4 and IPv6, opened by either side.
func TestNoAgentByteForByte(t *testing.T) {
	without, with := conversation(t, false), conversation(t, true)
	if len(without) < 188 { // beside bare acknowledgements
		t.Errorf("only %d frames", len(without))
	}
	if diff := cmp.Diff(without, with); diff != "" {
		t.Errorf("frames without and with demarc (-without +with):\n%s", diff)
	}
	for _, f := range with {
		if strings.Contains(f, "options fd") || strings.Contains(f, "fd10d3ac") {
			t.Errorf("a tag: %s", f)
		}
	}
}

// conversation is what is on the cable of a host, with or without demarc, while it
// talks to one that has none; what differs from time to time is taken out.
func conversation(t *testing.T, demarc bool) []string {
	t.Helper()
	lab := netlab.New(t)
	home, outside, router := lab.Island("home"), lab.Island("outside"), lab.Island("router")
	near := lab.Cable(home, router)
	far := lab.Cable(outside, router)
	near.A.LeadAll()
	far.A.LeadAll()
	router.Router()
	cgroup := lab.Cgroup("home")
	if demarc {
		// Beside the network, another host's workload may come in on the same ports if
		// it proves who it is, and home proves itself on others than it leaves by:
		// that must not show. (Where it leaves by the same, it has to.)
		node := lab.Node(document(1, fmt.Sprintf(`workloads:
  home: {zone: app, match: [{cgroup: /lab/home}]}
  other: {zone: app, match: [{cgroup: /lab/other}]}
networks:
  beyond: {zone: app, cidrs: [%s/32, "%s/128"]}
crossings:
  - {name: leave, from: [workload/home], to: [network/beyond], ports: [tcp/443, udp/443, icmp/echo], identity: none}
  - {name: pings, from: [network/beyond], to: [unmanaged], ports: [icmp/echo], identity: none}
  - {name: visit, from: [network/beyond], to: [workload/home], ports: [tcp/444, udp/444], identity: none}
  - {name: proven, from: [workload/other], to: [workload/home], ports: [tcp/444, udp/444]}
  - {name: elsewhere, from: [workload/home], to: [workload/other], ports: [tcp/8080]}
`, outside.IP4, outside.IP6)), netlab.NodeOptions{CoreOnly: true, Home: home})
		cgroup = node.Cgroup("/lab/home")
	}
	beyond := lab.Cgroup("outside")
	a, b := startActor(t, home, cgroup), startActor(t, outside, beyond)
	a.serve(444)
	b.serve(443)
	pings := map[*actor]*netlab.Probe{a: home.Probe(cgroup), b: outside.Probe(beyond)}
	for _, ns := range []*netlab.Namespace{home, outside} {
		ns.Sysctl("ipv4/ping_group_range", "0 2147483647")
	}
	tap := openTap(t, outside, "eth0")
	for _, c := range []struct {
		from *actor
		to   netip.AddrPort
	}{
		{a, netip.AddrPortFrom(outside.IP4, 443)}, {a, netip.AddrPortFrom(outside.IP6, 443)},
		{b, netip.AddrPortFrom(home.IP4, 444)}, {b, netip.AddrPortFrom(home.IP6, 444)},
	} {
		for _, size := range []int{16, 1000} {
			r := c.from.dial(c.to)
			if r.Error != "" {
				t.Fatalf("demarc %v: dial %s: %s", demarc, c.to, r.Error)
			}
			if problem := call[string](c.from, "Exchange", ExchangeArgs{Stream: r.Stream, Bytes: size, Timeout: 10 * time.Second}); problem != "" {
				t.Fatalf("demarc %v: exchange with %s: %s", demarc, c.to, problem)
			}
			call[bool](c.from, "Close", r.Stream)
			tap.awaitEnd(netip.MustParseAddrPort(r.Local).Port())
		}
		whole := 1500 - 20 - 8
		if c.to.Addr().Is6() {
			whole = 1500 - 40 - 8
		}
		for _, size := range []int{16, 1000, whole, 2 * whole} {
			u := call[DatagramReply](c.from, "Datagrams", DatagramArgs{To: c.to.String(), Count: 3, Bytes: size, Timeout: 10 * time.Second})
			if u.Answered != 3 {
				t.Fatalf("demarc %v: datagrams of %d bytes to %s: %+v", demarc, size, c.to, u)
			}
		}
		ping(pings[c.from], c.to.Addr(), []byte("any payload of an echo"))
	}
	return tap.normal()
}

// ping asks for an echo and waits for it.
func ping(p *netlab.Probe, to netip.Addr, payload []byte) {
	socket := probe.Call{Op: "socket", New: "i", Domain: unix.AF_INET, Type: unix.SOCK_DGRAM, Proto: unix.IPPROTO_ICMP}
	question := append([]byte{8, 0, 0, 0, 0, 0, 0, 1}, payload...)
	if to.Is6() {
		socket.Domain, socket.Proto, question[0] = unix.AF_INET6, unix.IPPROTO_ICMPV6, 128
	}
	p.Must(socket)
	p.Must(probe.Call{Op: "send", Socket: "i", Address: netlab.Place{Address: to}.String(), Data: question})
	p.Must(probe.Call{Op: "recv", Socket: "i"})
	p.Must(probe.Call{Op: "close", Socket: "i"})
}

// tap keeps whole frames of a namespace's device.
type tap struct {
	t      *testing.T
	fd     int
	frames [][]byte
}

func openTap(t *testing.T, ns *netlab.Namespace, device string) *tap {
	t.Helper()
	tp := &tap{t: t, fd: -1}
	err := ns.Do(func() (err error) {
		index, err := deviceIndex(device)
		if err != nil {
			return err
		}
		if tp.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		return unix.Bind(tp.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: index})
	})
	if err != nil {
		t.Fatalf("open tap: %v", err)
	}
	t.Cleanup(func() { _ = unix.Close(tp.fd) })
	return tp
}

func deviceIndex(name string) (int, error) {
	request, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, request); err != nil {
		return 0, os.NewSyscallError("ioctl", err)
	}
	return int(request.Uint32()), nil
}

// read takes in what was seen, and waits for the first frame of it.
func (tp *tap) read(wait time.Duration) bool {
	fds := []unix.PollFd{{Fd: int32(tp.fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, int(wait.Milliseconds())); n <= 0 {
		return err == unix.EINTR
	}
	for {
		b := make([]byte, 2048)
		n, _, err := unix.Recvfrom(tp.fd, b, unix.MSG_DONTWAIT)
		if err != nil {
			return true
		}
		tp.frames = append(tp.frames, b[:n])
	}
}

// awaitEnd waits until both sides have closed the connection from a port, and the
// last acknowledgement was seen.
func (tp *tap) awaitEnd(port uint16) {
	tp.t.Helper()
	for {
		var ends []tcpFrame
		for _, f := range tp.frames {
			s, ok := parseTCPFrame(f)
			if !ok || s.src.Port() != port && s.dst.Port() != port {
				continue
			}
			if len(ends) == 2 && s.src == ends[1].dst && s.ack == ends[1].seq+1 {
				return
			}
			if s.flags&1 != 0 {
				ends = append(ends, s)
			}
		}
		if !tp.read(10 * time.Second) {
			tp.t.Fatalf("the connection from port %d does not end", port)
		}
	}
}

// normal says the frames of TCP, UDP and ICMP in words, in order, without what is by
// chance: addresses of devices, identifiers, checksums, ports of callers, sequence
// numbers, timestamps. Acknowledgements without data come when the kernel likes, and
// with the window that is open then, so each kind of them is told once and last.
func (tp *tap) normal() []string {
	tp.t.Helper()
	for tp.read(0) {
	}
	var all, bare []string
	for _, frame := range tp.frames {
		f := slices.Clone(frame)
		var header []byte
		var transport []byte
		var proto uint8
		later := false // not the first fragment
		switch binary.BigEndian.Uint16(f[12:]) {
		case unix.ETH_P_IP:
			total := int(binary.BigEndian.Uint16(f[16:]))
			if len(f) != 14+total {
				tp.t.Errorf("a frame of %d bytes with a packet of %d: % x", len(f), total, f)
			}
			header, transport, proto = f[14:34], f[34:], f[23]
			later = binary.BigEndian.Uint16(f[20:])&0x1fff != 0
			clear(f[18:20]) // identifier
			clear(f[24:26]) // checksum
		case unix.ETH_P_IPV6:
			header, transport, proto = f[14:54], f[54:], f[20]
			if length := int(binary.BigEndian.Uint16(f[18:])); len(f) != 54+length {
				tp.t.Errorf("a frame of %d bytes with a packet of %d: % x", len(f), 40+length, f)
			}
			f[15] &= 0xf0 // flow label
			clear(f[16:18])
			if proto == unix.IPPROTO_FRAGMENT {
				later = binary.BigEndian.Uint16(f[56:])&^7 != 0
				clear(f[58:62]) // identifier
				header, transport, proto = f[14:62], f[62:], f[54]
			}
		}
		switch {
		case later:
			all = append(all, fmt.Sprintf("fragment %x payload %x", header, transport))
		case proto == unix.IPPROTO_ICMP, proto == unix.IPPROTO_ICMPV6 && transport[0] < 130: // no neighbours, no groups
			clear(transport[2:6]) // checksum, identifier
			all = append(all, fmt.Sprintf("icmp %x message %x", header, transport))
		case proto == unix.IPPROTO_TCP:
			s, _ := parseTCPFrame(f)
			options := slices.Clone(s.options())
			maskTimestamps(options)
			payload := transport[20+len(options):]
			line := fmt.Sprintf("tcp %x service %d flags %#x options %x payload %x", header, min(s.src.Port(), s.dst.Port()), s.flags, options, payload)
			switch {
			case s.flags&flagSYN != 0:
				line += fmt.Sprintf(" window %d", binary.BigEndian.Uint16(transport[14:]))
				all = append(all, line)
			case s.flags&1 != 0 || len(payload) > 0:
				all = append(all, line)
			case !slices.Contains(bare, line):
				bare = append(bare, line)
			}
		case proto == unix.IPPROTO_UDP:
			from, to := binary.BigEndian.Uint16(transport), binary.BigEndian.Uint16(transport[2:])
			all = append(all, fmt.Sprintf("udp %x service %d length %d payload %x", header, min(from, to), binary.BigEndian.Uint16(transport[4:]), transport[8:]))
		}
	}
	slices.Sort(bare)
	return append(all, bare...)
}

// maskTimestamps clears the values of a TCP timestamps option.
func maskTimestamps(options []byte) {
	if i := bytes.Index(options, []byte{8, 10}); i >= 0 && i+10 <= len(options) {
		clear(options[i+2 : i+10])
	}
}
