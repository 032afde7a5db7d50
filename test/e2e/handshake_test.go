package e2e_test

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// wired is two hosts with a demarc of their own, and one without, on one switch:
// whatever one host knows of the other's workloads came over the wire.
//
//	host of web and other  ----.
//	                           switch---- outside, which has a cable of its own
//	host of db             ----'          and answers for nobody
//
// Nobody is addresses that no kernel has. What is sent there arrives outside, and
// a test can speak for them without a stack that would disagree.
type wired struct {
	t                *testing.T
	lab              *netlab.Lab
	web, db, outside *netlab.Namespace
	caller, listener *netlab.Node // of the hosts of web and of db
	counts           *ebpf.Map    // of verdicts, of the listener's host
	cable            *cable       // outside
	tap              *cable       // at db's host
	mac              struct{ db, outside net.HardwareAddr }
	key              [16]byte
	epoch            uint8
	id               map[string]uint32 // identities by workload
}

// Web may reach db on a few ports. Other is a workload that may not: it can prove
// who it is, and that is all.
const wiredPolicy = `workloads:
  web: {zone: app, match: [{cgroup: /lab/web}]}
  db: {zone: app, match: [{cgroup: /lab/db}]}
  other: {zone: app, match: [{cgroup: /lab/other}]}
networks:
  outside: {zone: app, cidrs: [10.66.0.3/32, "fd66::3/128"]}
crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000-7009, udp/7000], log: all}
  - {name: other-web, from: [workload/other], to: [workload/web], ports: [tcp/9]}
  - {name: visit, from: [network/outside], to: [workload/db], ports: [tcp/7100], identity: none, log: all}
  - {name: leave, from: [workload/web], to: [network/outside], ports: [tcp/7100], identity: none, log: all}
`

var (
	nowhere4 = netip.MustParseAddr("10.99.0.1")
	nowhere6 = netip.MustParseAddr("fd99::1")
)

// newWired makes the hosts without a policy in force, so that what is older than
// enforcement can be made.
func newWired(t *testing.T) *wired {
	t.Helper()
	return newWiredWith(t, netlab.NodeOptions{CoreOnly: true})
}

// newWiredWith has another kind of node at the listener's host.
func newWiredWith(t *testing.T, listener netlab.NodeOptions) *wired {
	t.Helper()
	w := &wired{t: t, lab: netlab.New(t), id: map[string]uint32{}}
	w.web, w.db, w.outside = w.lab.Namespace("web"), w.lab.Namespace("db"), w.lab.Namespace("outside")
	for _, ns := range []*netlab.Namespace{w.web, w.db} {
		ns.Lead(netip.PrefixFrom(nowhere4, 16).Masked(), w.outside)
		ip(t, ns, "-6 route add fd99::/64 via "+w.outside.IP6.String())
	}
	w.cable, w.tap = openCable(t, w.outside), openCable(t, w.db)
	if err := unix.SetsockoptInt(w.tap.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20); err != nil { // for floods
		t.Fatal(err)
	}
	w.mac.db, w.mac.outside = hardware(t, w.db), hardware(t, w.outside)
	w.caller = w.lab.Node("", netlab.NodeOptions{CoreOnly: true, Home: w.web})
	listener.Home = w.db
	w.listener = w.lab.Node("", listener)
	w.counts = pinned(t, w.listener, "counts")
	w.key, w.epoch = tagKey(t, w.lab)
	for _, workload := range decoded(t, w.caller, document(1, wiredPolicy)).Workloads {
		w.id[workload.Name] = uint32(workload.ID)
	}
	return w
}

func (w *wired) enforce() *wired {
	w.t.Helper()
	w.caller.Apply(document(1, wiredPolicy))
	w.listener.Apply(document(1, wiredPolicy))
	return w
}

// connected is wired hosts that enforce, a server of db on 7000 and a client of
// web.
func connected(t *testing.T) (w *wired, client, server *actor) {
	t.Helper()
	w = newWired(t).enforce()
	client = startActor(t, w.web, w.caller.Cgroup("/lab/web"))
	server = startActor(t, w.db, w.listener.Cgroup("/lab/db"))
	server.serve(7000)
	return w, client, server
}

// both are a port of db in both families.
func (w *wired) both(port uint16) []netip.AddrPort {
	return []netip.AddrPort{netip.AddrPortFrom(w.db.IP4, port), netip.AddrPortFrom(w.db.IP6, port)}
}

// nobody is a port of nobody, in the family of an address.
func nobody(like netip.AddrPort, port uint16) netip.AddrPort {
	if like.Addr().Is4() {
		return netip.AddrPortFrom(nowhere4, port)
	}
	return netip.AddrPortFrom(nowhere6, port)
}

// control shows that what is declared works in both families.
func (w *wired) control(client *actor, port uint16) {
	w.t.Helper()
	for _, at := range w.both(port) {
		r := patient(client, at)
		if r.Error != "" {
			w.t.Fatalf("dial %s, which is declared: %s", at, r.Error)
		}
		w.exchanged(client, r)
		call[bool](client, "Close", r.Stream)
	}
}

// patient dials as long as a loaded machine may need.
func patient(a *actor, to netip.AddrPort) DialReply {
	a.t.Helper()
	return call[DialReply](a, "Dial", DialArgs{To: to.String(), Timeout: timeToAnswer})
}

// exchanged sends a few bytes on a stream and wants them back.
func (w *wired) exchanged(a *actor, stream DialReply) {
	w.t.Helper()
	problem := call[string](a, "Exchange", ExchangeArgs{Stream: stream.Stream, Bytes: 16, Timeout: timeToAnswer})
	if problem != "" {
		w.t.Errorf("exchange from %s: %s", stream.Local, problem)
	}
}

// segmentOf is a TCP segment to be sent by hand.
type segmentOf struct {
	from, to         netip.AddrPort
	seq, ack         uint32
	flags            uint8
	options, payload []byte
}

// frame is the segment on its way from outside to db, with right lengths and
// checksums.
func (w *wired) frame(s segmentOf) tcpFrame {
	b := append(append([]byte(nil), w.mac.db...), w.mac.outside...)
	for len(s.options)%4 != 0 {
		s.options = append(s.options, 0)
	}
	length := 20 + len(s.options) + len(s.payload)
	if s.from.Addr().Is4() {
		b = binary.BigEndian.AppendUint16(b, unix.ETH_P_IP)
		h := ipv4(s.from.Addr(), s.to.Addr(), tcp, 0, make([]byte, length))[:20]
		binary.BigEndian.PutUint16(h[10:], internetSum(h, 0))
		b = append(b, h...)
	} else {
		b = binary.BigEndian.AppendUint16(b, unix.ETH_P_IPV6)
		b = append(b, ipv6(s.from.Addr(), s.to.Addr(), tcp, make([]byte, length))[:40]...)
	}
	at := len(b)
	b = binary.BigEndian.AppendUint16(b, s.from.Port())
	b = binary.BigEndian.AppendUint16(b, s.to.Port())
	b = binary.BigEndian.AppendUint32(b, s.seq)
	b = binary.BigEndian.AppendUint32(b, s.ack)
	b = append(b, byte(5+len(s.options)/4)<<4, s.flags, 0xff, 0xff, 0, 0, 0, 0)
	b = append(append(b, s.options...), s.payload...)
	pseudo := append(s.from.Addr().AsSlice(), s.to.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, tcp, byte(length>>8), byte(length))
	binary.BigEndian.PutUint16(b[at+16:], checksum(pseudo, b[at:]))
	f, _ := parseTCPFrame(b)
	return f
}

// tagged is the segment with a tag in front of its other options.
func (w *wired) tagged(s segmentOf, tag []byte) tcpFrame {
	s.options = append(bytes.Clone(tag), s.options...)
	return w.frame(s)
}

// tag is what an identity would put on the segment.
func (w *wired) tag(s segmentOf, identity uint32, flags uint8) []byte {
	return w.frame(s).tagOf(w.key, identity, w.epoch, flags)
}

// signed is the segment with an identity's tag.
func (w *wired) signed(s segmentOf, identity uint32) tcpFrame {
	return w.tagged(s, w.tag(s, identity, 0))
}

// awaited is the next segment outside that matches.
func (w *wired) awaited(what string, match func(tcpFrame) bool) (found tcpFrame) {
	w.t.Helper()
	eventually(w.t, timeToAnswer, what, func() bool {
		for _, s := range w.cable.segments() {
			if match(s) {
				found = s
				return true
			}
		}
		return false
	})
	return found
}

// answerTo awaits a SYN-ACK to a segment.
func (w *wired) answerTo(s tcpFrame) tcpFrame {
	w.t.Helper()
	return w.awaited("SYN-ACK to "+s.src.String(), func(a tcpFrame) bool {
		return a.dst == s.src && a.src == s.dst && a.flags&(flagSYN|flagACK) == flagSYN|flagACK && a.ack == s.seq+1
	})
}

// refused sends segments and shows that each is denied once by db's host with the
// reason, and that nobody got an answer of the stack: it would leave in the same
// softirq, before the denial could be read. (A reset may come later, from the core.)
func (w *wired) refused(reason abi.Reason, all ...tcpFrame) {
	w.t.Helper()
	w.tap.segments()
	before := w.denied(reason)
	for _, s := range all {
		w.cable.send(s)
	}
	eventually(w.t, timeToAnswer, "denials with "+reason.String(), func() bool {
		return w.denied(reason)-before >= uint64(len(all))
	})
	callers := map[netip.AddrPort]bool{}
	for _, s := range all {
		callers[s.src] = true
	}
	for _, s := range w.tap.segments() {
		if callers[s.dst] && s.flags&flagRST == 0 {
			w.t.Errorf("answered: %s > %s flags %#x", s.src, s.dst, s.flags)
		}
	}
	if n := w.denied(reason) - before; n != uint64(len(all)) {
		w.t.Errorf("%d denials with %s, want %d", n, reason, len(all))
	}
}

// denied counts the denials of db's host as the kernel has them, also while no core
// runs.
func (w *wired) denied(reason abi.Reason) (total uint64) {
	w.t.Helper()
	var key abi.CountKey
	var cpus []uint64
	walk := w.counts.Iterate()
	for walk.Next(&key, &cpus) {
		if key.Verdict == abi.Deny && key.Reason == reason {
			for _, n := range cpus {
				total += n
			}
		}
	}
	if err := walk.Err(); err != nil {
		w.t.Fatalf("read counts: %v", err)
	}
	return total
}

// unanswered shows that nothing but resets has come for nobody lately.
func (w *wired) unanswered() {
	w.t.Helper()
	for _, s := range w.cable.segments() {
		if (s.dst.Addr() == nowhere4 || s.dst.Addr() == nowhere6) && s.flags&flagRST == 0 {
			w.t.Errorf("answered: %s > %s flags %#x", s.src, s.dst, s.flags)
		}
	}
}

// handshakes are the SYNs and SYN-ACKs that a wire has seen.
func handshakes(p netlab.Packet) bool { return p.Proto == tcp && p.Flags&flagSYN != 0 }

// allTagged shows that no SYN or SYN-ACK between web and db was without a tag, or
// carried data, and returns how many there were.
func (w *wired) allTagged(wire *netlab.Wire) int {
	w.t.Helper()
	all := wire.Packets(netlab.And(handshakes, func(p netlab.Packet) bool {
		a := []netip.Addr{p.Src.Addr(), p.Dst.Addr()}
		return a[0] != w.outside.IP4 && a[0] != w.outside.IP6 && a[1] != w.outside.IP4 && a[1] != w.outside.IP6
	}))
	for _, p := range all {
		if !p.Tagged {
			w.t.Errorf("without a tag: %s", p)
		}
		if p.Payload > 0 {
			w.t.Errorf("data before proof: %s", p)
		}
	}
	return len(all)
}

func hardware(t *testing.T, ns *netlab.Namespace) (address net.HardwareAddr) {
	t.Helper()
	err := ns.Do(func() error {
		device, err := net.InterfaceByName("eth0")
		if err == nil {
			address = device.HardwareAddr
		}
		return err
	})
	if err != nil {
		t.Fatalf("find eth0: %v", err)
	}
	return address
}

// ip runs ip(8) in a namespace.
func ip(t *testing.T, ns *netlab.Namespace, args string) {
	t.Helper()
	c := exec.Command("ip", strings.Fields(args)...)
	var out []byte
	err := ns.Do(func() (err error) {
		out, err = c.CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("ip %s: %v\n%s", args, err, out)
	}
}
