package e2e_test

import (
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

const quarantinePolicy = `  boss: {zone: app, match: [{cgroup: /lab/boss}], roles: [management]}
crossings:
  - {name: forensic, from: [workload/web], to: [workload/db], ports: [tcp/7001, udp/7001], forensic: true}
  - {name: plain, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000]}
  - {name: boss-db, from: [workload/boss], to: [workload/db], ports: [tcp/22]}
`

func quarantineEnds(t *testing.T) *ends {
	t.Helper()
	e := newEnds(t, quarantinePolicy, netlab.NodeOptions{})
	e.server.serve(7000)
	e.server.serve(7001)
	for _, port := range []uint16{7000, 7001} {
		for _, to := range e.both(port) {
			wantBothWays(t, "before", e.client, to, true)
		}
	}
	return e
}

// demarc runs a command that has to succeed.
func (e *ends) demarc(t *testing.T, args ...string) string {
	t.Helper()
	out, problems, code := e.node.Demarc(args...)
	if code != 0 {
		t.Fatalf("demarc %v: %d\n%s%s", args, code, out, problems)
	}
	return out
}

// A quarantined workload keeps its forensic crossing; what else it had is cut, live
// connections too, until somebody releases it.
func TestQuarantine(t *testing.T) {
	e := quarantineEnds(t)
	wire := e.db.Wire()
	plain := []string{e.at4(7000).String(), e.at6(7000).String()}
	kept := []string{e.at4(7001).String(), e.at6(7001).String()}
	all := append(append([]string{}, plain...), kept...)
	call[bool](e.client, "StartTraffic", TrafficArgs{Streams: all, Datagrams: all})
	wire.Await(on(7000))

	out := e.demarc(t, "quarantine", "db", "--for", "1h", "--reason", "ticket 4711")
	if !strings.Contains(out, "db until ") || !strings.Contains(out, ": ticket 4711") {
		t.Errorf("quarantine says %q", out)
	}
	wire.Settle()
	wire.Forget()
	wire.Await(on(7001))
	time.Sleep(300 * time.Millisecond) // in which what was cut tries again
	for _, p := range wire.Packets(func(p netlab.Packet) bool { return p.Src.Port() == 7000 && p.Src.Addr() != e.web.IP4 }) {
		t.Errorf("answered in quarantine: %s", p)
	}
	for _, to := range e.both(7000) {
		wantBothWays(t, "in quarantine", e.client, to, false)
	}
	for _, to := range e.both(7001) {
		wantBothWays(t, "forensic crossing", e.client, to, true)
	}
	// The kernel may have told a cut stream by resetting what came back to it.
	e.node.AwaitDenied(abi.Quarantined, tcp, netlab.Place{Address: e.db.IP4, Port: 7000})
	for _, args := range [][]string{{"status"}, {"identities", "-o", "wide"}} {
		out, _, _ := e.node.Demarc(args...)
		if !strings.Contains(strings.ToLower(out), "quarantine") || !strings.Contains(out, "until ") {
			t.Errorf("demarc %v does not show it:\n%s", args, out)
		}
	}

	// Both ways: what it opens itself is refused at once.
	if r := e.server.dial(e.at4(7000)); r.Error != "operation not permitted" {
		t.Errorf("dial out of quarantine: %q", r.Error)
	}

	e.demarc(t, "release", "db")
	eventually(t, 20*time.Second, "what was cut is possible again", func() bool {
		stream, datagram := bothWays(e.client, e.at4(7000), timeOfSilence)
		return stream && datagram
	})
	reply := call[TrafficReply](e.client, "StopTraffic", true)
	for _, to := range kept {
		for _, network := range []string{"tcp ", "udp "} {
			if n := reply.Lost[network+to]; n != 0 {
				t.Errorf("forensic flow %s%s lost %d", network, to, n)
			}
		}
	}
	log, problems, code := e.node.Demarc("audit", "show")
	if code != 0 || !strings.Contains(log, "ticket 4711") || strings.Count(log, "release") < 1 || !strings.Contains(log, "quarantine") {
		t.Errorf("audit log: %d %s\n%s", code, problems, log)
	}
	if _, problems, code := e.node.Demarc("audit", "verify"); code != 0 {
		t.Errorf("audit verify: %d %s", code, problems)
	}
}

// It ends by itself with every process of demarc dead.
func TestQuarantineEndsAlone(t *testing.T) {
	t.Parallel() // it waits most of its time
	e := quarantineEnds(t)
	const lasting = 8 * time.Second
	e.demarc(t, "quarantine", "db", "--for", lasting.String(), "--reason", "test")
	end := time.Now().Add(lasting)
	e.node.KillAgent()
	e.node.KillCore()
	wire := e.db.Wire()
	for _, to := range e.both(7000) {
		wantBothWays(t, "in quarantine, all dead", e.client, to, false)
	}
	if !e.client.reaches(e.at4(7001)) {
		t.Error("forensic crossing is closed")
	}
	if n := wire.Count(func(p netlab.Packet) bool { return p.Src.Port() == 7000 }); n != 0 {
		t.Errorf("%d packets answered in quarantine", n)
	}
	if time.Now().After(end) {
		t.Fatal("it was over before the test could look")
	}
	time.Sleep(time.Until(end) + 100*time.Millisecond)
	for _, to := range e.both(7000) {
		wantBothWays(t, "after its time", e.client, to, true)
	}
	e.node.StartCore()
	e.node.StartAgent()
	e.node.AwaitAgent()
	if out, _, _ := e.node.Demarc("status"); strings.Contains(out, "Quarantine") {
		t.Errorf("status still shows it:\n%s", out)
	}
}

// A core that was killed, and one that finds its pins gone, go on with it.
func TestQuarantineOutlivesCore(t *testing.T) {
	e := quarantineEnds(t)
	e.demarc(t, "quarantine", "db", "--for", "1h", "--reason", "why it was")
	look := func(when string) {
		t.Helper()
		out := e.demarc(t, "status", "--wait", "enforcing")
		if !strings.Contains(out, "db until ") || !strings.Contains(out, "why it was") {
			t.Errorf("%s: status:\n%s", when, out)
		}
		wantBothWays(t, when, e.client, e.at4(7000), false)
		wantBothWays(t, when, e.client, e.at4(7001), true)
	}
	look("at first")
	e.node.KillCore()
	e.node.StartCore()
	look("the core was killed")
	e.node.Detach() // as a reboot does: only the disk knows
	e.node.StartCore()
	look("the pins were gone")
	e.demarc(t, "release", "db")
	wantBothWays(t, "released", e.client, e.at4(7000), true)
}

// What may not be quarantined, or not now, is refused and says why.
func TestQuarantineRefused(t *testing.T) {
	e := quarantineEnds(t)
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"quarantine", "boss", "--for", "1h", "--reason", "x"}, 1, "workload boss has the role management"},
		{[]string{"quarantine", "nobody", "--for", "1h", "--reason", "x"}, 1, `no workload "nobody"`},
		{[]string{"quarantine", "edge/db", "--for", "1h", "--reason", "x"}, 1, `no workload "edge/db"`},
		{[]string{"quarantine", "db", "--for", "1ms", "--reason", "x"}, 1, "out of bounds"},
		{[]string{"quarantine", "db", "--for", "2000h", "--reason", "x"}, 1, ""},
		{[]string{"quarantine", "db", "--for", "1h", "--reason", "tab\tin it"}, 1, "quarantine needs a reason"},
		{[]string{"quarantine", "db", "--for", "1h"}, 2, "say why"},
		{[]string{"quarantine", "db", "--reason", "x"}, 2, "say for how long"},
		{[]string{"quarantine", "--for", "1h", "--reason", "x"}, 2, "needs one WORKLOAD"},
		{[]string{"release", "db"}, 1, "is not quarantined"},
		{[]string{"release"}, 2, "needs one WORKLOAD"},
	} {
		if _, problems, code := e.node.Demarc(tt.args...); code != tt.code || !strings.Contains(problems, tt.want) {
			t.Errorf("demarc %v: %d, want %d: %s", tt.args, code, tt.code, problems)
		}
	}
	wantBothWays(t, "after all that", e.client, e.at4(7000), true)
}
