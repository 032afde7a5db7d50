package e2e_test

import (
	"fmt"
	"slices"
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
	policy := fmt.Sprintf(`crossings:
  - {name: slow, from: [workload/web], to: [workload/db], ports: [tcp/7000], limit: {connections: %d/s, burst: %d}}
  - {name: slow-datagrams, from: [workload/web], to: [workload/db], ports: [udp/7000], limit: {connections: %d/s, burst: %d}}
  - {name: rare, from: [workload/web], to: [workload/db], ports: [tcp/7001], limit: {connections: 1/m, burst: 7}}
  - {name: free, from: [workload/web], to: [workload/db], ports: [tcp/7002]}
`, rate, burst, rate, burst)
	e := newEnds(t, policy, netlab.NodeOptions{CoreOnly: true})
	numbers := map[string]uint32{}
	for _, c := range decoded(t, e.node, document(1, webAndDB+policy)).Crossings {
		numbers[c.Name] = uint32(c.Number)
	}
	// through is how many flows the server's end of a crossing has let in, whatever
	// became of them.
	through := func(crossing string) (n int) {
		for key, count := range e.node.Counts() {
			if key.Crossing == numbers[crossing] && key.Verdict == abi.Allow && key.Direction == abi.Ingress {
				n += int(count)
			}
		}
		return n
	}
	for port := uint16(7000); port < 7003; port++ {
		e.server.serve(port)
	}

	t.Run("burst", func(t *testing.T) {
		for range 20 {
			call[DialReply](e.client, "Dial", DialArgs{To: e.at4(7001).String(), Timeout: timeOfSilence})
		}
		if n := through("rare"); n != 7 {
			t.Errorf("%d of 20 connections, want the burst of 7", n)
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
		call[bool](e.client, "StartAttempts", AttemptArgs{To: to, Every: 5 * time.Millisecond})
		time.Sleep(seconds * time.Second)
		r := call[AttemptReply](e.client, "StopAttempts", true)
		for network, crossing := range map[string]string{"tcp/7000": "slow", "udp/7000": "slow-datagrams"} {
			got, want := float64(through(crossing)), throughLimit(r.At[network], rate, burst)
			t.Logf("%s: %.0f of %d through, want %.0f", network, got, len(r.At[network]), want)
			if want < 2*burst || got < want*0.9 || got > want*1.1 {
				t.Errorf("%s: %.0f through, want %.0f within 10 %%", network, got, want)
			}
		}
		e.node.AwaitDenied(abi.OverLimit, unix.IPPROTO_TCP, e.db.At4(7000))
		e.node.AwaitDenied(abi.OverLimit, unix.IPPROTO_UDP, e.db.At4(7000))
	})
}

// throughLimit is how many attempts at these times a limit lets through: what nobody
// tries in time is not made up for.
func throughLimit(at []time.Time, rate, burst float64) (through float64) {
	slices.SortFunc(at, time.Time.Compare)
	left := burst
	for i, now := range at {
		if i > 0 {
			left = min(burst, left+rate*now.Sub(at[i-1]).Seconds())
		}
		if left >= 1 {
			left--
			through++
		}
	}
	return through
}

// A crossing's end cuts what it carries and refuses what comes later, within
// 100 ms, with nobody there to do it but the kernel.
func TestExpiry(t *testing.T) {
	t.Parallel() // it waits most of its time
	const lastingOnly = `  - {name: lasting, from: [workload/web], to: [workload/db], ports: [tcp/7001, udp/7001]}
`
	const brief = `  - {name: brief, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000]%s}
`
	e := newEnds(t, "crossings:\n"+lastingOnly+fmt.Sprintf(brief, ""), netlab.NodeOptions{})
	e.server.serve(7000)
	e.server.serve(7001)
	wire := e.web.Wire()
	short := []string{e.at4(7000).String(), e.at6(7000).String()}
	lasting := []string{e.at4(7001).String(), e.at6(7001).String()}
	all := append(slices.Clone(short), lasting...)
	call[bool](e.client, "StartTraffic", TrafficArgs{Streams: all, Datagrams: all})
	// usedSince waits until flows were used after a moment.
	usedSince := func(moment time.Time, flows []string) {
		t.Helper()
		eventually(t, timeToAnswer, "all flows are used", func() bool {
			r := call[TrafficReply](e.client, "Traffic", true)
			return !slices.ContainsFunc(flows, func(to string) bool { return r.Last["tcp "+to].Before(moment) || r.Last["udp "+to].Before(moment) })
		})
	}
	// The end is set when everything else stands, however long that took.
	until := time.Now().Add(6 * time.Second).Truncate(time.Second)
	e.apply("crossings:\n" + lastingOnly + fmt.Sprintf(brief, ", until: "+until.UTC().Format(time.RFC3339)))
	e.node.KillAgent()
	e.node.KillCore()
	usedSince(time.Now(), all)
	if time.Now().After(until) {
		t.Fatal("it ended before the test could look")
	}

	time.Sleep(time.Until(until) + 100*time.Millisecond)
	wire.Forget()
	r := call[DialReply](e.client, "Dial", DialArgs{To: short[0], Timeout: time.Second})
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
	usedSince(time.Now(), lasting)
	traffic := call[TrafficReply](e.client, "StopTraffic", true)
	for _, network := range []string{"tcp ", "udp "} {
		for _, to := range lasting {
			if n := traffic.Lost[network+to]; n != 0 {
				t.Errorf("%s%s lost %d, and its crossing lasts", network, to, n)
			}
		}
	}
	e.node.StartCore()
	e.node.StartAgent()
	for _, reason := range []string{"not-in-window", "revoked"} {
		flows := e.node.Flows("--verdict", "deny", "--reason", reason)
		if len(flows) == 0 {
			t.Errorf("nobody was told %s", reason)
		}
		for _, f := range flows {
			if early := until.Sub(f.Time); early > 100*time.Millisecond {
				t.Errorf("%s before the end: %s", early, netlab.Describe(f))
			}
		}
	}
	if r := call[DialReply](e.client, "Dial", DialArgs{To: short[0], Timeout: time.Second}); r.Error != "operation not permitted" {
		t.Errorf("new connection after the core came back: %q", r.Error)
	}
}

// A window opens by itself, too.
func TestSinceWindow(t *testing.T) {
	t.Parallel() // it waits most of its time
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
