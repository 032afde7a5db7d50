package e2e_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/test/netlab"
)

// grandfathered is long enough for a loaded machine to see that they go on.
const grandfathered = 8 * time.Second

// spared follows two streams to port 7000 that a change cut and spared, and one that it
// kept if there is one, with every process of demarc dead: the two go on until the time is over, and no
// packet of theirs is on the server's wire after it.
func (e *ends) spared(t *testing.T, began, applied time.Time, kept string) {
	t.Helper()
	e.node.KillAgent()
	e.node.KillCore()
	wire := e.db.Wire()
	lost := []string{e.at4(7000).String(), e.at6(7000).String()}
	over := applied.Add(grandfathered)
	eventually(t, time.Until(over), "the spared connections go on", func() bool {
		return wire.Count(func(p netlab.Packet) bool { return p.Dst.Port() == 7000 && p.Payload > 0 }) > 4
	})
	for _, to := range e.both(7000) {
		if r := e.client.dial(to); r.Error != "operation not permitted" {
			t.Errorf("a new connection to %s: %q", to, r.Error)
		}
	}
	if time.Now().After(over) {
		t.Fatal("the time was over before the test could look")
	}
	// The kernel's time began while `apply` ran.
	time.Sleep(time.Until(over) + 500*time.Millisecond)
	wire.Forget()
	time.Sleep(time.Second)
	if n := wire.Count(on(7000)); n != 0 {
		t.Errorf("%d packets of what was spared after the time", n)
	}
	if kept != "" {
		wire.Await(on(7001))
	}
	r := call[TrafficReply](e.client, "StopTraffic", true)
	for _, to := range lost {
		if early := began.Add(grandfathered).Sub(r.Last["tcp "+to]); early > 2*time.Second {
			t.Errorf("%s was cut %s before its time", to, early)
		}
	}
	if n := r.Lost["tcp "+kept]; kept != "" && n != 0 {
		t.Errorf("%s lost %d", kept, n)
	}
	e.node.StartCore()
	e.node.StartAgent()
	wantTCP(t, "after the core came back", e.client, e.at4(7001))
}

// grandfather applies a policy that spares live connections, between the two times.
func (e *ends) grandfather(t *testing.T, file, names string) (began, applied time.Time) {
	t.Helper()
	began = time.Now()
	out, problems, code := e.node.Demarc("apply", file, "--grandfather", grandfathered.String())
	applied = time.Now()
	if code != 0 || !strings.HasPrefix(out, "applied ") || !strings.HasPrefix(problems, names) || !strings.Contains(problems, "they go on until ") {
		t.Fatalf("apply --grandfather: %d\n%s%s", code, out, problems)
	}
	return began, applied
}

// Live connections that lose their crossing go on for a time.
func TestGrandfather(t *testing.T) {
	t.Parallel() // it waits most of its time
	const before, after = `crossings:
  - {name: lost, from: [workload/web], to: [workload/db], ports: [tcp/7000]}
  - {name: kept, from: [workload/web], to: [workload/db], ports: [tcp/7001]}
`, `crossings:
  - {name: kept, from: [workload/web], to: [workload/db], ports: [tcp/7001]}
`
	e := newEnds(t, before, netlab.NodeOptions{})
	e.server.serve(7000)
	e.server.serve(7001)
	call[bool](e.client, "StartTraffic", TrafficArgs{Streams: []string{e.at4(7000).String(), e.at6(7000).String(), e.at4(7001).String()}})
	file := e.file(t, "after.yaml", 2, after)
	for _, wrong := range []string{"0s", "-1m"} {
		if _, problems, code := e.node.Demarc("apply", file, "--grandfather", wrong); code != 2 || !strings.Contains(problems, "no time for anything to go on") {
			t.Errorf("--grandfather %s: %d %s", wrong, code, problems)
		}
	}
	if _, _, code := e.node.Demarc("apply", file, "--grandfather", "25h"); code != 1 {
		t.Errorf("--grandfather 25h: %d", code)
	}
	began, applied := e.grandfather(t, file, "would cut 2 connections:\n")
	if out := e.must(t, "audit", "show"); !strings.Contains(out, "live connections that it cuts go on for 8s") {
		t.Errorf("the audit log does not say what goes on:\n%s", out)
	}
	// What goes on is not cut by the next change, nor named by it.
	if out := e.must(t, "apply", e.file(t, "same.yaml", 3, after), "--dry-run"); out != "would cut no connection\n" {
		t.Errorf("the next change: %s", out)
	}
	e.spared(t, began, applied, e.at4(7001).String())
}

// Connections that are older than the first policy carry no proof. They go on, too, and
// are cut then although nobody ever judged them.
func TestGrandfatherOlder(t *testing.T) {
	t.Parallel() // it waits most of its time
	e := &ends{lab: netlab.New(t)}
	e.web, e.db = e.lab.Namespace("web"), e.lab.Namespace("db")
	e.node = e.lab.Node("", netlab.NodeOptions{})
	if err := os.Chmod(filepath.Dir(e.node.Root().Dir()), 0o755); err != nil {
		t.Fatal(err)
	}
	e.client, e.server = startActor(t, e.web, e.node.Cgroup("/lab/web")), startActor(t, e.db, e.node.Cgroup("/lab/db"))
	e.server.serve(7000)
	call[bool](e.client, "StartTraffic", TrafficArgs{Streams: []string{e.at4(7000).String(), e.at6(7000).String()}})
	const both = `crossings:
  - {name: both, from: [workload/web], to: [workload/db], ports: [tcp/7001]}
`
	began, applied := e.grandfather(t, e.file(t, "first.yaml", 1, both), "would cut 2 connections:\n")
	e.server.serve(7001)
	e.spared(t, began, applied, "")
}

// Quarantine cuts what was spared.
func TestQuarantineCutsGrandfathered(t *testing.T) {
	const before, after = `crossings:
  - {name: lost, from: [workload/web], to: [workload/db], ports: [tcp/7000]}
`, `crossings:
  - {name: kept, from: [workload/web], to: [workload/db], ports: [tcp/7001]}
`
	e := newEnds(t, before, netlab.NodeOptions{})
	e.server.serve(7000)
	stream := e.at4(7000).String()
	call[bool](e.client, "StartTraffic", TrafficArgs{Streams: []string{stream}})
	e.must(t, "apply", e.file(t, "after.yaml", 2, after), "--grandfather", "10m")
	wire := e.db.Wire()
	eventually(t, 10*time.Second, "it goes on", func() bool { return wire.Count(on(7000)) > 4 })
	e.must(t, "quarantine", "web", "--for", "10m", "--reason", "test")
	wire.Forget()
	time.Sleep(time.Second)
	if n := wire.Count(func(p netlab.Packet) bool { return p.Dst.Port() == 7000 }); n != 0 {
		t.Errorf("%d packets of a quarantined workload", n)
	}
}
