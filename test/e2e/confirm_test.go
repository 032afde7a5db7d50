package e2e_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/test/netlab"
)

// A change that nobody confirms ends at its deadline with every process of demarc
// dead: what it cut off is let through again, what it let through is cut.
func TestConfirmDeadline(t *testing.T) {
	t.Parallel() // it waits most of its time
	const before, after = `crossings:
  - {name: before, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000]}
`, `crossings:
  - {name: after, from: [workload/web], to: [workload/db], ports: [tcp/7001, udp/7001]}
`
	e := newEnds(t, before, netlab.NodeOptions{})
	e.server.serve(7000)
	e.server.serve(7001)
	fresh := e.at4(7001).String()
	file := filepath.Join(t.TempDir(), "after.yaml")
	if err := os.WriteFile(file, []byte(document(2, webAndDB+after)), 0o644); err != nil {
		t.Fatal(err)
	}

	const within = 8 * time.Second
	out, problems, code := e.node.Demarc("apply", file, "--confirm-within", within.String())
	deadline := time.Now().Add(within)
	if code != 0 || !strings.HasPrefix(out, "applied lab version 2 ") || !strings.HasPrefix(problems, "unconfirmed: version 1 comes back at ") {
		t.Fatalf("apply: %d\n%s%s", code, out, problems)
	}
	if out, _, _ := e.node.Demarc("status"); !strings.Contains(out, "Unconfirmed") {
		t.Errorf("status does not say that it ends:\n%s", out)
	}
	e.node.KillAgent()
	e.node.KillCore()
	call[bool](e.client, "StartTraffic", TrafficArgs{Streams: []string{fresh}, Datagrams: []string{fresh}})
	wire := e.web.Wire()
	for _, to := range e.both(7000) {
		if r := e.client.dial(to); r.Error != "operation not permitted" {
			t.Errorf("dial %s under the change: %q", to, r.Error)
		}
	}
	if n := wire.Count(func(p netlab.Packet) bool { return p.Dst.Port() == 7000 }); n != 0 {
		t.Errorf("%d packets to port 7000 under the change", n)
	}
	if time.Now().After(deadline) {
		t.Fatal("the deadline passed before the test could look")
	}

	time.Sleep(time.Until(deadline) + 100*time.Millisecond)
	wire.Forget()
	for _, to := range e.both(7000) {
		wantBothWays(t, "after the deadline", e.client, to, true)
	}
	for _, to := range e.both(7001) {
		if r := e.client.dial(to); r.Error != "operation not permitted" {
			t.Errorf("dial %s after the deadline: %q", to, r.Error)
		}
	}
	if n := wire.Count(func(p netlab.Packet) bool { return p.Dst.Port() == 7001 || p.Src.Port() == 7001 }); n != 0 {
		t.Errorf("%d packets of port 7001 after the deadline", n)
	}
	call[TrafficReply](e.client, "StopTraffic", true)
	e.node.StartCore()
	e.node.StartAgent()
	wantBothWays(t, "after the core came back", e.client, e.at4(7000), true)
	if _, problems, code := e.node.Demarc("confirm"); code != 1 || !strings.Contains(problems, "no change waits to be confirmed") {
		t.Errorf("confirm: %d %s", code, problems)
	}
}

// Confirmed in time, a change stays.
func TestConfirmInTime(t *testing.T) {
	t.Parallel() // it waits most of its time
	const ports = `crossings:
  - {name: before, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000]}
`
	e := newEnds(t, ports, netlab.NodeOptions{})
	e.server.serve(7000)
	e.server.serve(7001)
	file := filepath.Join(t.TempDir(), "after.yaml")
	if err := os.WriteFile(file, []byte(document(2, webAndDB+strings.ReplaceAll(ports, "7000", "7001"))), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"apply", file, "--confirm-within", "5s"}, {"confirm"}} {
		if out, problems, code := e.node.Demarc(args...); code != 0 {
			t.Fatalf("demarc %v: %d\n%s%s", args, code, out, problems)
		}
	}
	confirmed := time.Now()
	time.Sleep(time.Until(confirmed.Add(5500 * time.Millisecond)))
	wantBothWays(t, "after the time", e.client, e.at4(7001), true)
	if r := e.client.dial(e.at4(7000)); r.Error != "operation not permitted" {
		t.Errorf("what was replaced: %q", r.Error)
	}
	for _, args := range [][]string{{"apply", file, "--confirm-within", "0s"}, {"apply", file, "--now", "--confirm-within", "5s"}} {
		if _, _, code := e.node.Demarc(args...); code != 2 {
			t.Errorf("demarc %v: status %d", args, code)
		}
	}
}

// A person at a terminal is asked, and no answer but yes keeps the change.
func TestApplyAsks(t *testing.T) {
	const ports = `crossings:
  - {name: before, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000]}
`
	e := newEnds(t, ports, netlab.NodeOptions{})
	e.server.serve(7001)
	file := filepath.Join(t.TempDir(), "after.yaml")
	if err := os.WriteFile(file, []byte(document(2, webAndDB+strings.ReplaceAll(ports, "7000", "7001"))), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		answer string
		args   []string
		want   string
		code   int
		open   bool
	}{
		{"", []string{"apply", file}, "took the change back, in force is lab version 1", 1, false},
		{"no", []string{"apply", file}, "took the change back, in force is lab version 1", 1, false},
		{"yes", []string{"apply", file}, "confirmed lab version 2", 0, true},
		{"", []string{"apply", file, "--now"}, "applied lab version 2", 0, true},
	} {
		screen, code := e.node.DemarcAsked(tt.answer, tt.args...)
		if code != tt.code || !strings.Contains(screen, tt.want) {
			t.Errorf("answered %q: %d\n%s", tt.answer, code, screen)
		}
		wantBothWays(t, "answered "+tt.answer, e.client, e.at4(7001), tt.open)
	}
}
