package e2e_test

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// A crossing's limit lets its burst and then its rate through, whatever is tried
// beside, and says so of the others.
func TestLimit(t *testing.T) {
	const rate, burst = 50, 10
	e := newEnds(t, fmt.Sprintf(`crossings:
  - {name: slow, from: [workload/web], to: [workload/db], ports: [tcp/7000], limit: {connections: %d/s, burst: %d}}
  - {name: slow-datagrams, from: [workload/web], to: [workload/db], ports: [udp/7000], limit: {connections: %d/s, burst: %d}}
  - {name: rare, from: [workload/web], to: [workload/db], ports: [tcp/7001], limit: {connections: 1/m, burst: 7}}
  - {name: free, from: [workload/web], to: [workload/db], ports: [tcp/7002]}
`, rate, burst, rate, burst), netlab.NodeOptions{CoreOnly: true})
	for port := uint16(7000); port < 7003; port++ {
		e.server.serve(port)
	}

	t.Run("burst", func(t *testing.T) {
		through := 0
		for range 20 {
			if r := call[DialReply](e.client, "Dial", DialArgs{To: e.at4(7001).String(), Timeout: 50 * time.Millisecond}); r.Error == "" {
				through++
			}
		}
		if through != 7 {
			t.Errorf("%d of 20 connections, want the burst of 7", through)
		}
		// The limit of one crossing is no other's.
		if !e.client.reaches(e.at4(7002)) {
			t.Error("another crossing is limited too")
		}
		e.node.AwaitDenied(abi.OverLimit, unix.IPPROTO_TCP, e.db.At4(7001))
	})

	t.Run("rate", func(t *testing.T) {
		const seconds = 3
		var to []string
		for range 16 {
			to = append(to, e.at4(7000).String())
		}
		start := time.Now()
		call[bool](e.client, "StartAttempts", AttemptArgs{To: to, Every: 5 * time.Millisecond})
		time.Sleep(seconds * time.Second)
		r := call[AttemptReply](e.client, "StopAttempts", true)
		want := burst + rate*time.Since(start).Seconds()
		for _, network := range []string{"tcp/7000", "udp/7000"} {
			got := float64(r.Through[network])
			t.Logf("%s: %.0f of %d through, want %.0f", network, got, r.Tried, want)
			if got < want*0.9 || got > want*1.1 {
				t.Errorf("%s: %.0f through in %s, want %.0f within 10 %%", network, got, time.Since(start), want)
			}
		}
		e.node.AwaitDenied(abi.OverLimit, unix.IPPROTO_TCP, e.db.At4(7000))
		e.node.AwaitDenied(abi.OverLimit, unix.IPPROTO_UDP, e.db.At4(7000))
	})
}

// A crossing's end cuts what it carries and refuses what comes later, within
// 100 ms, with nobody there to do it but the kernel.
func TestExpiry(t *testing.T) {
	const lastingOnly = `  - {name: lasting, from: [workload/web], to: [workload/db], ports: [tcp/7001, udp/7001]}
`
	e := newEnds(t, "crossings:\n"+lastingOnly, netlab.NodeOptions{})
	// The end is set when everything else stands, however long that took.
	until := time.Now().Add(4 * time.Second).Truncate(time.Second)
	e.apply(fmt.Sprintf(`crossings:
%s  - {name: brief, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000], until: %s}
`, lastingOnly, until.UTC().Format(time.RFC3339)))
	e.server.serve(7000)
	e.server.serve(7001)
	wire := e.web.Wire()
	brief := []string{e.at4(7000).String(), e.at6(7000).String()}
	lasting := []string{e.at4(7001).String(), e.at6(7001).String()}
	call[bool](e.client, "StartTraffic", TrafficArgs{Streams: append(brief, lasting...), Datagrams: append(brief, lasting...)})
	e.node.KillAgent()
	e.node.KillCore()

	time.Sleep(time.Until(until) + 100*time.Millisecond)
	wire.Forget()
	r := call[DialReply](e.client, "Dial", DialArgs{To: brief[0], Timeout: time.Second})
	if r.Error != "operation not permitted" {
		t.Errorf("new connection: %q", r.Error)
	}
	if d := e.client.datagrams(e.at4(7000), 1); d.Errors["operation not permitted"] != 1 {
		t.Errorf("new datagram: %+v", d)
	}
	time.Sleep(500 * time.Millisecond)
	for _, p := range wire.Packets(func(p netlab.Packet) bool { return p.Dst.Port() == 7000 || p.Src.Port() == 7000 }) {
		t.Errorf("after the end: %s", p)
	}
	traffic := call[TrafficReply](e.client, "StopTraffic", true)
	for _, to := range brief {
		for _, network := range []string{"tcp ", "udp "} {
			last := traffic.Last[network+to]
			if early := until.Sub(last); early > 200*time.Millisecond || early < -100*time.Millisecond {
				t.Errorf("%s%s: last exchange %s before the end", network, to, early)
			}
		}
	}
	for _, to := range lasting {
		for _, network := range []string{"tcp ", "udp "} {
			if gone := time.Since(traffic.Last[network+to]); gone > 200*time.Millisecond {
				t.Errorf("%s%s: last exchange %s ago, and its crossing lasts", network, to, gone)
			}
		}
	}
	e.node.StartCore()
	e.node.StartAgent()
	for _, reason := range []string{"not-in-window", "revoked"} {
		if flows := e.node.Flows("--verdict", "deny", "--reason", reason); len(flows) == 0 {
			t.Errorf("nobody was told %s", reason)
		}
	}
	if r := call[DialReply](e.client, "Dial", DialArgs{To: brief[0], Timeout: time.Second}); r.Error != "operation not permitted" {
		t.Errorf("new connection after the core came back: %q", r.Error)
	}
}

// A window opens by itself, too.
func TestSinceWindow(t *testing.T) {
	const always = `  - {name: always, from: [workload/web], to: [workload/db], ports: [tcp/7001]}
`
	e := newEnds(t, "crossings:\n"+always, netlab.NodeOptions{CoreOnly: true})
	since := time.Now().Add(4 * time.Second).Truncate(time.Second)
	e.apply(fmt.Sprintf(`crossings:
%s  - {name: later, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000], since: %s, until: %s}
`, always, since.UTC().Format(time.RFC3339), since.Add(time.Hour).UTC().Format(time.RFC3339)))
	e.server.serve(7000)
	wire := e.web.Wire()
	e.node.KillCore()
	if time.Until(since) < 500*time.Millisecond {
		t.Fatal("the window opens before the test could look")
	}
	for _, to := range e.both(7000) {
		if r := e.client.dial(to); r.Error != "operation not permitted" {
			t.Errorf("dial %s before its window: %q", to, r.Error)
		}
		if d := e.client.datagrams(to, 1); d.Errors["operation not permitted"] != 1 {
			t.Errorf("datagram to %s before its window: %+v", to, d)
		}
	}
	if n := wire.Count(func(p netlab.Packet) bool { return p.Dst.Port() == 7000 }); n != 0 {
		t.Errorf("%d packets before the window", n)
	}
	time.Sleep(time.Until(since) + 20*time.Millisecond)
	for _, to := range e.both(7000) {
		wantBothWays(t, "in its window", e.client, to, true)
	}
	e.node.StartCore()
	e.node.AwaitDenied(abi.NotInWindow, unix.IPPROTO_TCP, e.db.At4(7000))
	e.node.AwaitDenied(abi.NotInWindow, unix.IPPROTO_UDP, e.db.At6(7000))
}
