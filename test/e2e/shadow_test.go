package e2e_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

const (
	shadowBefore = `crossings:
  - {name: kept, from: [workload/web], to: [workload/db], ports: [tcp/7000], log: all}
  - {name: lost, from: [workload/web], to: [workload/db], ports: [tcp/7001], log: all}
`
	shadowAfter = `crossings:
  - {name: kept, from: [workload/web], to: [workload/db], ports: [tcp/7000], log: all}
  - {name: gained, from: [workload/web], to: [workload/db], ports: [tcp/7002], log: all}
`
)

// difference is what a verdict of a shadow says, but for who and when.
type difference struct {
	Verdict   abi.Verdict
	Reason    abi.Reason
	Direction abi.Direction
	Crossing  string
	Port      uint16
}

// differences are those that were told, by how often.
func differences(node *netlab.Node) map[difference]int {
	told := map[difference]int{}
	for _, f := range node.Flows("--verdict", "would-deny", "--verdict", "would-allow") {
		told[difference{f.Verdict, f.Reason, f.Direction, f.Crossing, f.Destination.Port}]++
	}
	return told
}

// shadowCounts are the kernel's exact counts, from its pinned map, so that they can be read without a core.
func shadowCounts(t *testing.T, node *netlab.Node) (n uint64) {
	t.Helper()
	m := pinned(t, node, "counts")
	defer m.Close()
	var key abi.CountKey
	var cpus []uint64
	walk := m.Iterate()
	for walk.Next(&key, &cpus) {
		if key.Verdict.OfShadow() {
			for _, c := range cpus {
				n += c
			}
		}
	}
	if err := walk.Err(); err != nil {
		t.Fatal(err)
	}
	return n
}

func (e *ends) file(t *testing.T, name string, version int, body string) string {
	t.Helper()
	file := filepath.Join(e.node.Dir(), name)
	if err := os.WriteFile(file, []byte(document(version, webAndDB+body)), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// demarc runs a command that has to work.
func (e *ends) must(t *testing.T, args ...string) string {
	t.Helper()
	out, problems, code := e.node.Demarc(args...)
	if code != 0 {
		t.Fatalf("demarc %v: %d\n%s%s", args, code, out, problems)
	}
	return out
}

// A policy in shadow changes nothing on the wire, and what it would decide otherwise is
// told exactly: of live connections once, of new ones once at each end that lets them
// pass, of refused ones once.
func TestShadow(t *testing.T) {
	e := newEnds(t, shadowBefore, netlab.NodeOptions{})
	for _, port := range []uint16{7000, 7001, 7002} {
		e.server.serve(port)
	}
	live := []string{e.at4(7000).String(), e.at4(7001).String()}
	call[bool](e.client, "StartTraffic", TrafficArgs{Streams: live})
	file := e.file(t, "after.yaml", 2, shadowAfter)
	out, problems, code := e.node.Demarc("apply", file, "--shadow", "--for", "10m")
	if code != 0 || !strings.HasPrefix(out, "in shadow lab version 2 until ") || !strings.HasPrefix(problems, "would cut 1 connection:\n") {
		t.Fatalf("apply --shadow: %d\n%s%s", code, out, problems)
	}
	began := time.Now()
	live2 := map[difference]int{
		{abi.WouldDeny, abi.NoCrossingFor, abi.Egress, "", 7001}:  1,
		{abi.WouldDeny, abi.NoCrossingFor, abi.Ingress, "", 7001}: 1,
	}
	eventually(t, 10*time.Second, "both ends of the live connection are told of", func() bool {
		return cmp.Equal(live2, differences(e.node))
	})

	wire := e.db.Wire()
	const each = 10
	for range each {
		for _, port := range []uint16{7000, 7001} {
			for _, to := range e.both(port) {
				if !e.client.reaches(to) {
					t.Errorf("%s is not reached", to)
				}
			}
		}
		for _, to := range e.both(7002) {
			if r := e.client.dial(to); r.Error != "operation not permitted" {
				t.Errorf("%s: %q", to, r.Error)
			}
		}
	}
	if n := wire.Count(func(p netlab.Packet) bool { return p.Dst.Port() == 7002 }); n != 0 {
		t.Errorf("%d packets to a port that only the policy in shadow declares", n)
	}
	for _, port := range []uint16{7000, 7001} {
		syns := wire.Count(func(p netlab.Packet) bool { return p.Dst.Port() == port && p.Flags&0x12 == 2 })
		answers := wire.Count(func(p netlab.Packet) bool { return p.Src.Port() == port && p.Flags&0x12 == 0x12 })
		resets := wire.Count(func(p netlab.Packet) bool { return on(port)(p) && p.Flags&4 != 0 })
		if syns < 2*each || answers < 2*each || resets != 0 {
			t.Errorf("port %d: %d SYNs, %d answers, %d resets on the wire", port, syns, answers, resets)
		}
	}
	want := map[difference]int{
		{abi.WouldDeny, abi.NoCrossingFor, abi.Egress, "", 7001}:   1 + 2*each,
		{abi.WouldDeny, abi.NoCrossingFor, abi.Ingress, "", 7001}:  1 + 2*each,
		{abi.WouldAllow, abi.Unproven, abi.Egress, "gained", 7002}: 2 * each,
	}
	eventually(t, 10*time.Second, "all differences are told", func() bool {
		return len(e.node.Flows("--verdict", "would-deny", "--verdict", "would-allow")) >= 2+6*each
	})
	if diff := cmp.Diff(want, differences(e.node)); diff != "" {
		t.Errorf("differences (-want +told):\n%s", diff)
	}
	if n := shadowCounts(t, e.node); n != 2+6*each {
		t.Errorf("%d differences are counted, want %d", n, 2+6*each)
	}

	// What is in force is as it was, and everybody can see what is in shadow.
	s := statusOf(t, e.node)
	if s.State != "enforcing" || s.Policy.Version != 1 || s.Shadow == nil || s.Shadow.Version != 2 || s.Shadow.WouldDeny != 2+4*each || s.Shadow.WouldAllow != 2*each {
		t.Errorf("status %+v, shadow %+v", s.State, s.Shadow)
	}
	if out := e.must(t, "status"); !strings.Contains(out, "Shadow:     lab version 2 until ") || !strings.Contains(out, fmt.Sprintf("would newly deny %d and newly allow %d\n", 2+4*each, 2*each)) {
		t.Errorf("status:\n%s", out)
	}
	out, problems, code = e.node.Demarc("shadow", "show")
	for _, want := range []string{
		"would-deny   egress   app/web  app/db     tcp/7001  no-crossing  -         21 ",
		"would-deny   ingress  app/web  app/db     tcp/7001  no-crossing  -         21 ",
		"gained    20 ",
	} {
		if code != 1 || !strings.Contains(out, want) {
			t.Errorf("shadow show: %d, without %q\n%s%s", code, want, out, problems)
		}
	}
	metrics := metricsOf(t, e.node)
	for _, want := range []string{
		"demarc_shadow 1\n",
		`demarc_verdicts_total{crossing="gained",direction="egress",dst_workload="",dst_zone="",reason="unproven",src_workload="web",src_zone="app",verdict="would-allow"} 20`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("metrics have no %s", want)
		}
	}

	// What was recorded says the same beforehand.
	flows := filepath.Join(e.node.Dir(), "flows.json")
	if err := os.WriteFile(flows, []byte(e.must(t, "flows", "--all", "-o", "json", "--since", began.Format(time.RFC3339Nano))), 0o644); err != nil {
		t.Fatal(err)
	}
	out, problems, code = e.node.Demarc("policy", "simulate", file, "--from", flows, "-o", "json")
	var simulated struct{ NewlyDenied, NewlyPassed int }
	if err := json.Unmarshal([]byte(out), &simulated); err != nil || code != 1 || simulated.NewlyDenied != 2*each || simulated.NewlyPassed != 2*each {
		t.Errorf("simulate: %d, %v, %+v, want %d and %d\n%s%s", code, err, simulated, 2*each, 2*each, out, problems)
	}

	// It is promoted by applying it.
	r := call[TrafficReply](e.client, "StopTraffic", true)
	for _, to := range live {
		if n := r.Lost["tcp "+to]; n != 0 {
			t.Errorf("%s lost %d under the shadow", to, n)
		}
	}
	e.must(t, "apply", file)
	if s := statusOf(t, e.node); s.Policy.Version != 2 || s.Shadow != nil {
		t.Errorf("after apply: %+v, shadow %+v", s.Policy, s.Shadow)
	}
	before := shadowCounts(t, e.node)
	for _, to := range e.both(7002) {
		wantTCP(t, "promoted", e.client, to)
	}
	if r := e.client.dial(e.at4(7001)); r.Error != "operation not permitted" {
		t.Errorf("promoted: %q", r.Error)
	}
	if n := shadowCounts(t, e.node); n != before {
		t.Errorf("%d differences from a shadow that has ended", n-before)
	}
	if _, problems, code := e.node.Demarc("shadow", "show"); code != 1 || !strings.Contains(problems, "no policy is in shadow") {
		t.Errorf("shadow show: %d %s", code, problems)
	}
}

// A shadow ends by itself, in the kernel, with every process dead; when it is stopped;
// when another policy is applied or rolled back to; and when a core starts.
func TestShadowEnds(t *testing.T) {
	e := newEnds(t, shadowBefore, netlab.NodeOptions{})
	e.server.serve(7001)
	file := e.file(t, "after.yaml", 2, shadowAfter)
	tells := func(when string, want bool) {
		t.Helper()
		before := shadowCounts(t, e.node)
		wantTCP(t, when, e.client, e.at4(7001))
		if got := shadowCounts(t, e.node) > before; got != want {
			t.Errorf("%s: a shadow tells %t, want %t", when, got, want)
		}
	}
	begin := func(lasting string) {
		t.Helper()
		e.must(t, "apply", file, "--shadow", "--for", lasting)
	}
	ended := func(when string) {
		t.Helper()
		if s := statusOf(t, e.node); s.Shadow != nil || s.State != "enforcing" {
			t.Errorf("%s: %s, shadow %+v", when, s.State, s.Shadow)
		}
		tells(when, false)
	}
	begin("10m")
	tells("in shadow", true)
	e.must(t, "shadow", "stop")
	ended("stopped")

	begin("10m")
	e.must(t, "apply", e.file(t, "other.yaml", 3, shadowBefore+"mode: enforce\n"))
	ended("another one applied")
	file = e.file(t, "after.yaml", 4, shadowAfter)
	begin("10m")
	e.must(t, "rollback")
	ended("rolled back")

	begin("10m")
	e.node.KillAgent()
	e.node.KillCore()
	tells("every process dead", true)
	e.node.StartCore()
	e.node.StartAgent()
	e.must(t, "status", "--wait", "enforcing", "--timeout", "20s")
	ended("the core was started anew")

	const lasting = 3 * time.Second
	begin(lasting.String())
	over := time.Now().Add(lasting)
	e.node.KillAgent()
	e.node.KillCore()
	time.Sleep(time.Until(over))
	tells("its time is over, every process dead", false)
	e.node.StartCore()
	e.node.StartAgent()
	e.must(t, "status", "--wait", "enforcing", "--timeout", "20s")
	begin("1s")
	eventually(t, 10*time.Second, "the core notes that the time is over", func() bool { return e.node.Status().Shadow == nil })

	out := e.must(t, "audit", "show")
	for _, want := range []string{"unshadow", "it was stopped", "a policy is applied", "a policy is rolled back to", "the core was started anew", "its time is over"} {
		if !strings.Contains(out, want) {
			t.Errorf("the audit log does not say %q:\n%s", want, out)
		}
	}
	e.must(t, "audit", "verify")

	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"shadow", "stop"}, 1, "no policy is in shadow"},
		{[]string{"apply", file, "--shadow", "--for", "1ms"}, 1, "shadow for 1ms is out of bounds"},
		{[]string{"apply", file, "--shadow", "--for", "-1s"}, 2, "no time to see anything in"},
		{[]string{"apply", file, "--shadow", "--now"}, 2, "--shadow puts nothing in force"},
		{[]string{"apply", file, "--for", "1h"}, 2, "--for says how long --shadow lasts"},
		{[]string{"apply", e.file(t, "old.yaml", 2, shadowAfter), "--shadow"}, 1, "image has version 2, and version 3 was in force already"},
	} {
		if _, problems, code := e.node.Demarc(tt.args...); code != tt.code || !strings.Contains(problems, tt.want) {
			t.Errorf("demarc %v: %d, want %d and %q: %s", tt.args, code, tt.code, tt.want, problems)
		}
	}
}

// metricsOf is what Prometheus would get.
func metricsOf(t *testing.T, node *netlab.Node) string {
	t.Helper()
	client, err := api.NewClient(strings.TrimPrefix(node.DemarcEnv()[0], "DEMARC_SERVER="))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	b, err := client.Metrics(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// wantTCP shows that a place is reached by TCP.
func wantTCP(t *testing.T, when string, client *actor, to netip.AddrPort) {
	t.Helper()
	if !client.reaches(to) {
		t.Errorf("%s: %s is not reached", when, to)
	}
}
