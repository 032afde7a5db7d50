package e2e_test

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// towards matches what is sent to a namespace.
func towards(ns *netlab.Namespace) netlab.Match {
	return func(p netlab.Packet) bool { return p.Dst.Addr() == ns.IP4 || p.Dst.Addr() == ns.IP6 }
}

// frameWays are frames that no socket of the workload's made: to where it may go,
// to where it may not, and to its neighbour.
func frameWays(by ...string) (all []way) {
	for _, by := range by {
		for _, c := range []struct {
			name  string
			frame func(e *estate) []byte
		}{
			{"UDP to peer", func(e *estate) []byte { return whole(udp, place(e.web.IP4, 5000), place(e.peer.IP4, 7001), 0) }},
			{"UDP over IPv6 to peer", func(e *estate) []byte { return whole(udp, place(e.web.IP6, 5000), place(e.peer.IP6, 7001), 0) }},
			{"UDP to partner", func(e *estate) []byte { return whole(udp, place(e.web.IP4, 5000), place(e.partner.IP4, 7000), 0) }},
			{"UDP to its neighbour", func(e *estate) []byte { return whole(udp, place(e.web.IP4, 5000), place(e.api.IP4, 7400), 0) }},
			{"SYN to partner", func(e *estate) []byte { return whole(tcp, place(e.web.IP4, 5000), place(e.partner.IP4, 7000), flagSYN) }},
			{"SYN over IPv6 to its neighbour", func(e *estate) []byte { return whole(tcp, place(e.web.IP6, 5000), place(e.api.IP6, 7400), flagSYN) }},
		} {
			all = append(all, way{
				name: by + " " + c.name,
				try:  func(e *estate) { e.a.frames(by, e.toward(c.frame(e))) },
				seen: func(p netlab.Packet) bool { return p.Src.Port() == 5000 },
				why:  []string{"raw-socket"},
			})
		}
	}
	return all
}

// toward is a frame of web's that finds its way also to a neighbour on the bridge,
// where no gateway helps.
func (e *estate) toward(packet []byte) []byte {
	f := e.frame(packet)
	if dst, ok := parseAddresses(packet); ok && (dst == e.api.IP4 || dst == e.api.IP6) && !e.web.IsRouted() {
		copy(f, e.api.MAC())
	}
	return f
}

// Packet sockets send nothing, whatever they are made of.
func TestB05PacketSocket(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) { e.ways(frameWays(byPacket, byDatagram)) })
}

// The queue discipline is where a container's own device could have been watched;
// the host's end of it is not to be gone around.
func TestB06QdiscBypass(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) { e.ways(frameWays(byBypass)) })
}

// AF_XDP goes around even more of the container's own stack.
func TestB08XDPSocket(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) { e.ways(frameWays(byXDP)) })
}

// In the host's own namespace there is no other end: there, PACKET_QDISC_BYPASS is a
// gap that SECURITY.md declares, and only packet sockets that use the queue are
// stopped.
func TestB06QdiscBypassInHost(t *testing.T) {
	e := newEstate(t, false)
	a := startActor(t, e.host.Namespace, e.node.Cgroup("/lab/web"))
	e.enforce()
	e.forget()
	frame := ethernet(net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, net.HardwareAddr{2, 0, 0, 0, 0, 1},
		whole(udp, place(e.host.IP4, 5000), place(e.peer.IP4, 7001), 0))
	for _, by := range []string{byPacket, byDatagram} { // told of it, as of a full queue
		if problem := call[string](a, "Frames", FrameArgs{By: by, Device: "eth0", Frames: [][]byte{frame}}); problem != unix.ENOBUFS.Error() {
			t.Errorf("sent by %s: %q", by, problem)
		}
	}
	e.nothing("by the queue")
	e.told("by the queue", "raw-socket")
	a.frames(byBypass, frame)
	if n := len(e.arrived()); n == 0 {
		t.Error("nothing arrives around the queue any more: it is no gap, and SECURITY.md is wrong")
	}
}

// Who hears another workload's handshake on a device that they share has a tag that
// is of no use: not from where it is, and not from outside.
func TestB07Eavesdropper(t *testing.T) {
	e := newEstate(t, false)
	db := e.lab.Host("db")
	e.host.Known(db.Namespace)
	text := document(1, `workloads:
  web: {zone: app, match: [{cgroup: /lab/web}]}
  other: {zone: app, match: [{cgroup: /lab/other}]}
  db: {zone: app, match: [{cgroup: /lab/db}]}
crossings:
  - {name: other-db, from: [workload/other], to: [workload/db], ports: [tcp/5432]}
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/9]}
`)
	far := e.lab.Node(text, netlab.NodeOptions{CoreOnly: true, Home: db.Namespace})
	e.node.Apply(text)
	guarded(t, e.node, e.web.Door)
	server := startActor(t, db.Namespace, far.Cgroup("/lab/db"))
	server.serve(5432)
	other := startActor(t, e.web.Namespace, e.node.Cgroup("/lab/other"))
	call[bool](e.a, "Listen", CaptureArgs{Device: "eth0"})
	for _, a := range []netip.Addr{db.IP4, db.IP6} {
		if !other.reaches(place(a, 5432)) {
			t.Fatalf("other does not reach %s", a)
		}
	}
	var heard []tcpFrame
	eventually(t, 5*time.Second, "both handshakes heard, and both ends", func() bool {
		for _, b := range call[[][]byte](e.a, "Heard", true) {
			if s, ok := parseTCPFrame(b); ok && s.flags&(flagSYN|flagACK) == flagSYN && len(s.tags()) == 1 {
				heard = append(heard, s)
			}
		}
		return len(heard) >= 2
	})
	wire := db.Wire()
	ally := openCable(t, e.peer)
	for _, s := range heard {
		s = s.with(s.src.Port(), bytes.Clone(s.options())) // with its checksum
		e.node.Forget()
		e.a.frames(byPacket, s.frame)
		e.told("sent again from where it was heard", "raw-socket")
		e.settle()
		if n := wire.Count(func(p netlab.Packet) bool { return !p.Sent && p.Tagged }); n > 0 {
			t.Errorf("%d SYNs sent again arrive", n)
		}
		before := far.Denied(abi.TagReplayed)
		out := tcpFrame{frame: append(append([]byte(nil), db.MAC()...), s.frame[6:]...)}
		ally.send(out)
		eventually(t, 5*time.Second, "the SYN from outside is refused", func() bool { return far.Denied(abi.TagReplayed) > before })
		wire.Forget()
	}
	if n := server.served("tcp", 5432).Count; n != 2 {
		t.Errorf("the listener has accepted %d connections, want the two honest ones", n)
	}
}

// A device is a boundary soon after it comes, wherever its other end goes. Sockets
// are judged from their first moment, whatever the device; frames of packet sockets
// are stopped once the core has heard of it, and not before: a declared gap.
func TestD12HotPlug(t *testing.T) {
	e := newEstate(t, false)
	e.enforce()
	e.forget()
	late := e.lab.Island("late")
	a := startActor(t, late, e.node.Cgroup("/lab/web"))
	frame := ethernet(e.host.NextDoorMAC(1), net.HardwareAddr{2, 0, 0, 0, 0, 1}, whole(udp, place(hidden4, 5000), place(e.peer.IP4, 7001), 0))
	call[bool](a, "Pester", PesterArgs{Frame: frame, To: place(e.peer.IP4, 7001).String()})
	c := e.host.Plug(late)
	guarded(t, e.node, c.Door)
	door := c.Wire()
	settle := func() { door.Settle(); e.settle() }
	settle()
	e.node.Forget()
	early := len(e.arrived())
	t.Logf("%d frames of packet sockets before the door was guarded", early)
	e.told("a frame", "raw-socket")
	tried := call[PesterReply](a, "StopPester", true)
	settle()
	if tried.Frames <= early || tried.Datagrams == 0 || tried.Sent > 0 {
		t.Errorf("%+v, of which %d frames before the door was guarded", tried, early)
	}
	for _, p := range e.arrived() {
		if p.Src.Port() != 5000 {
			t.Errorf("a socket's: %v", p)
		}
	}
	if n := len(e.arrived()); n > early {
		t.Errorf("%d frames after the door was guarded", n-early)
	}
	a.stop()

	// The container's end goes to another namespace.
	other := e.lab.Island("other")
	b := startActor(t, other, e.node.Cgroup("/lab/web"))
	c.Give(other)
	guarded(t, e.node, c.Door)
	e.forget()
	b.frames(byPacket, frame)
	e.nothing("moved")
	e.told("moved", "raw-socket")
	b.checkReach(t, e.partner4(7000), true, true)
	b.checkReach(t, e.partner6(7000), true, true)
}

// A thousand devices that come at once keep no other from being guarded: each is a
// boundary soon, also the one behind them all, and what is in force goes on
// meanwhile. When they go, nothing of them stays.
func TestD12Storm(t *testing.T) {
	e := newEstate(t, false)
	e.enforce()
	before := e.node.Status().Links
	crowd, late := e.lab.Island("crowd"), e.lab.Island("late")
	a := startActor(t, late, e.node.Cgroup("/lab/web"))
	frame := ethernet(e.host.NextDoorMAC(1), net.HardwareAddr{2, 0, 0, 0, 0, 1}, whole(udp, place(hidden4, 5000), place(e.peer.IP4, 7001), 0))

	const size = 1000
	start := time.Now()
	e.host.Crowd(crowd, size)
	made := time.Now()
	c := e.host.Plug(late)
	e.control()
	guarded(t, e.node, c.Door)
	eventually(t, waitGuarded, "the crowd is guarded both ways", func() bool {
		ways := 0
		for _, l := range e.node.Status().Links {
			if strings.Contains(l.Name, " crowd") && l.Attached {
				ways++
			}
		}
		return ways == 2*size
	})
	t.Logf("%d devices made in %v, guarded %v later", size, made.Sub(start).Round(time.Millisecond), time.Since(made).Round(time.Millisecond))
	e.forget()
	a.frames(byPacket, frame)
	e.nothing("behind the crowd")
	e.told("behind the crowd", "raw-socket")
	a.checkReach(t, e.partner4(7000), true, true)

	e.host.Disperse()
	eventually(t, waitGuarded, "the crowd's links to go", func() bool { return len(e.node.Status().Links) == len(before)+2 })
	pins, err := os.ReadDir(filepath.Join(e.node.Dir(), "bpf", "demarc", "links"))
	if err != nil {
		t.Fatal(err)
	}
	if len(pins) != len(before)+2 {
		t.Errorf("%d links are pinned, and %d are in force", len(pins), len(before)+2)
	}
	e.control()
}
