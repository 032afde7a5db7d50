package e2e_test

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/test/netlab"
)

// is matches signals of a kind, of a workload, with a peer; an invalid place is any.
func is(kind detect.SignalKind, workload string, to netlab.Place) func(detect.Signal) bool {
	return func(s detect.Signal) bool {
		return s.Kind == kind && s.Workload == workload && (!to.Address.IsValid() || s.Peer.Address == to.Address) &&
			(to.Port == 0 || s.Peer.Port == to.Port)
	}
}

// metadata is where clouds tell their machines secrets.
var metadata = netip.MustParseAddr("169.254.169.254")

const decoyCrossings = `  - {name: trap, from: [workload/web], to: [network/decoy4], ports: [tcp/7001, udp/7001, tcp/7002], decoy: true}
`

// Denied contacts are told with the process; each address and port once.
func TestSignalsOfDenials(t *testing.T) {
	w := enforced(t)
	w.p.Socket("t", "tcp4")
	for range 20 {
		w.p.Refused(connect("t", w.peer.At4(7001)), "EPERM")
	}
	s := w.node.AwaitSignal("an edge", is(detect.Edge, "web", w.peer.At4(7001)))
	if s.PID == 0 || s.Comm == "" || s.StartTime == 0 || s.Cgroup != "" || s.Cause != "denied: no-crossing" {
		t.Errorf("edge: %s", netlab.DescribeSignal(s))
	}
	for port := uint16(1); port <= 60; port++ {
		w.p.Refused(connect("t", netlab.Place{Address: w.peer.IP4, Port: port}), "EPERM")
	}
	steps := w.node.AwaitSignal("50 ports", func(s detect.Signal) bool {
		return s.Kind == detect.Ports && s.Workload == "web" && s.Distinct >= 40
	})
	if steps.PID == 0 || steps.Distinct > 70 {
		t.Errorf("ports: %s", netlab.DescribeSignal(steps))
	}
	edges := map[uint16]int{}
	for _, s := range w.node.Signals() {
		if s.Kind == detect.Edge {
			edges[s.Peer.Port]++
		}
	}
	if edges[7001] != 1 || len(edges) < 55 {
		t.Errorf("%d edges, to 7001 %d", len(edges), edges[7001])
	}
	w.p.Refused(raw("r", unix.AF_INET, unix.IPPROTO_ICMP), "EPERM")
	if s := w.node.AwaitSignal("a raw socket", is(detect.Raw, "web", anywhere)); s.PID != steps.PID {
		t.Errorf("raw: %s", netlab.DescribeSignal(s))
	}
	w.p.Refused(connect("t", netlab.Place{Address: metadata, Port: 80}), "EPERM")
	w.node.AwaitSignal("metadata", is(detect.Metadata, "web", netlab.Place{Address: metadata, Port: 80}))
}

// A decoy is reported with who touched it, and lets nothing through.
func TestDecoy(t *testing.T) {
	w := newWorld(t)
	w.node.Apply(policyText(1, decoyCrossings, webDecoy))
	w.serveDecoy(w.decoy)
	w.control()
	for _, kind := range []string{"tcp4", "udp4"} {
		w.p.Socket(kind, kind)
		w.p.Refused(connect(kind, w.decoy.At4(7001)), "EPERM")
	}
	s := w.node.AwaitSignal("a touch", is(detect.Decoy, "web", w.decoy.At4(7001)))
	if s.PID == 0 || s.Crossing != "trap" {
		t.Errorf("decoy: %s", netlab.DescribeSignal(s))
	}
	// Past connect(2) it is no different.
	w.p.Socket("u", "udp4")
	w.p.Refused(send("u", w.decoy.At4(7001)), "EPERM")
	w.nothing(func(p netlab.Packet) bool {
		return p.Dst.Port() == 7001 && p.Dst.Addr() == w.decoy.IP4 && p.Proto != unix.IPPROTO_ICMP
	})
	w.p.Socket("fast", "tcp4")
	w.p.Refused(connect("fast", w.decoy.At4(7002)), "EPERM") // although somebody there could prove himself
	w.node.AwaitSignal("a touch of 7002", is(detect.Decoy, "web", w.decoy.At4(7002)))
}
