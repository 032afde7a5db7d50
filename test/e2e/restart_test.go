package e2e_test

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// restarts is how often the daemons are ended and started again.
const restarts = 100

// Core and agent come and go, by SIGTERM and by SIGKILL, and nobody whose traffic
// is declared notices, and nothing else passes.
//
//	web  ->  db    7000 declared: streams kept open, new connections all the time
//	web  ->  db    7001 not: tried all the time
//	peer ->  db    7000 without a proof: tried all the time
func TestRestart100(t *testing.T) {
	e := newEnds(t, `crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000], log: none}
`, netlab.NodeOptions{})
	e.server.serve(7000)
	e.server.serve(7001)
	peer := e.lab.Namespace("peer")
	stranger := startActor(t, peer, e.lab.Cgroup("peer"))
	wire, door := e.web.Wire(), e.db.Wire()
	four, six := e.at4(7000).String(), e.at6(7000).String()
	call[bool](e.client, "StartTraffic", TrafficArgs{
		Streams: []string{four, six, four, six}, Connect: []string{four, six},
		Denied: []string{e.at4(7001).String(), e.at6(7001).String()}, Every: 10 * time.Millisecond,
	})
	start := time.Now()
	for i := range restarts {
		core, agent := i%3 != 1, i%3 != 0
		if agent {
			end := e.node.KillAgent
			if i%2 == 0 {
				end = e.node.StopAgent
			}
			end()
		}
		if core {
			end := e.node.KillCore
			if i%2 == 0 {
				end = e.node.StopCore
			}
			end()
		}
		// With the daemons gone, and again with them back.
		if r := call[DialReply](stranger, "Dial", DialArgs{To: four, Timeout: 10 * time.Millisecond}); r.Error != "timeout" {
			t.Errorf("restart %d: connection without a proof: %q", i, r.Error)
		}
		if core {
			e.node.StartCore()
		}
		if agent {
			e.node.StartAgent()
		}
		call[DatagramReply](stranger, "Datagrams", DatagramArgs{To: e.at4(7001).String(), Count: 5})
	}
	took := time.Since(start)
	r := call[TrafficReply](e.client, "StopTraffic", true)
	rate := float64(r.Tried) / took.Seconds()
	t.Logf("%d restarts in %s: %d round trips, %d connections, %d denied calls (%.0f/s)", restarts, took, r.Exchanged, r.Connected, r.Tried, rate)
	for _, problem := range r.Problems {
		t.Error(problem)
	}
	for name, n := range r.Lost {
		if n != 0 {
			t.Errorf("%s lost %d", name, n)
		}
	}
	if r.Tried < 20*restarts || r.Exchanged < 4*restarts || r.Connected < restarts {
		t.Errorf("too little traffic to prove anything")
	}
	if e.node.Status().State != "enforcing" {
		t.Errorf("status %+v", e.node.Status())
	}
	undeclared := func(p netlab.Packet) bool { return p.Sent && p.Dst.Port() == 7001 }
	if got := wire.Packets(undeclared); len(got) != 0 {
		t.Errorf("%d undeclared packets, the first: %s", len(got), got[0])
	}
	answer := func(p netlab.Packet) bool { return p.Sent && p.Dst.Addr() == peer.IP4 && p.Proto == unix.IPPROTO_TCP }
	if got := door.Packets(answer); len(got) != 0 {
		t.Errorf("%d answers to a caller without proof, the first: %s", len(got), got[0])
	}
	if got := e.server.served("udp", 7001); got.Count != 0 {
		t.Errorf("datagrams of nobody were delivered: %+v", got)
	}
}

// A caller whose host crashed connects again from the same port: the server still
// has the old connection, says so, is told otherwise, and the new one comes about.
func TestHalfOpenRecovery(t *testing.T) {
	e := newEnds(t, `crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000]}
`, netlab.NodeOptions{CoreOnly: true})
	e.server.serve(7000)
	for i, to := range e.both(7000) {
		from := []netlab.Place{e.web.At4(5000), e.web.At6(5000)}[i].String()
		for range 2 {
			r := call[DialReply](e.client, "Dial", DialArgs{To: to.String(), From: from, Timeout: 5 * time.Second})
			if r.Error != "" {
				t.Fatalf("dial %s from %s: %s", to, from, r.Error)
			}
			if problem := call[string](e.client, "Exchange", ExchangeArgs{Stream: r.Stream, Bytes: 16, Timeout: timeToAnswer}); problem != "" {
				t.Errorf("exchange with %s: %s", to, problem)
			}
			call[bool](e.client, "Vanish", r.Stream)
		}
	}
	for _, f := range e.node.Flows() {
		if f.Verdict != abi.Allow {
			t.Errorf("%s", netlab.Describe(f))
		}
	}
}
