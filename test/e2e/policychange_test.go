package e2e_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/coreclient"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

const (
	changeBefore = `crossings:
  - {name: kept, from: [workload/web], to: [workload/db], ports: [tcp/7001, udp/7001]}
  - {name: lost, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000]}
`
	changeAfter = `crossings:
  - {name: new, from: [workload/db], to: [workload/web], ports: [tcp/1]}
  - {name: kept, from: [workload/web], to: [workload/db], ports: [tcp/7001, udp/7001]}
`
)

// on matches packets of a port of the server, either way.
func on(port uint16) netlab.Match {
	return func(p netlab.Packet) bool { return p.Src.Port() == port || p.Dst.Port() == port }
}

// A change that takes a crossing away takes its flows with it, before `apply` says
// that it is done, and no others.
func TestX16PolicyChangeCutsFlows(t *testing.T) {
	e := newEnds(t, changeBefore, netlab.NodeOptions{})
	e.server.serve(7000)
	e.server.serve(7001)
	wire := e.db.Wire()
	lost := []string{e.at4(7000).String(), e.at6(7000).String()}
	kept := []string{e.at4(7001).String(), e.at6(7001).String()}
	all := append(append([]string{}, lost...), kept...)
	call[bool](e.client, "StartTraffic", TrafficArgs{Streams: all, Datagrams: all, Connect: kept})
	time.Sleep(200 * time.Millisecond)

	file := filepath.Join(e.node.Dir(), "after.yaml")
	if err := os.WriteFile(file, []byte(document(2, webAndDB+changeAfter)), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, problems, status := e.node.Demarc("apply", file); status != 0 {
		t.Fatalf("apply: %d\n%s%s", status, out, problems)
	}
	wire.Forget()
	time.Sleep(500 * time.Millisecond)
	eventually(t, timeToAnswer, "100 packets of the other flows", func() bool { return wire.Count(on(7001)) >= 100 })
	for _, p := range wire.Packets(on(7000)) {
		t.Errorf("after the change: %s", p)
	}
	if r := call[DialReply](e.client, "Dial", DialArgs{To: lost[0], Timeout: time.Second}); r.Error != "operation not permitted" {
		t.Errorf("new connection: %q", r.Error)
	}

	// Back again: what was cut, and still there, goes on.
	e.node.Rollback()
	rolled := time.Now()
	// The longer they were cut, the longer TCP waits until it tries again.
	eventually(t, 2*timeToAnswer, "the flows that were cut go on", func() bool {
		r := call[TrafficReply](e.client, "Traffic", true)
		for _, to := range lost {
			if r.Last["tcp "+to].Before(rolled) || r.Last["udp "+to].Before(rolled) {
				return false
			}
		}
		return true
	})
	if !e.client.reaches(e.at4(7000)) {
		t.Error("new connection after the rollback does not come about")
	}
	cutInTime(t, e, lost)
	r := call[TrafficReply](e.client, "StopTraffic", true)
	for _, problem := range r.Problems {
		t.Error(problem)
	}
	t.Logf("%d round trips, %d connections, lost %v", r.Exchanged, r.Connected, r.Lost)
	for _, to := range kept {
		for _, network := range []string{"tcp ", "udp "} {
			if n := r.Lost[network+to]; n != 0 {
				t.Errorf("%s%s lost %d", network, to, n)
			}
		}
	}
	for _, f := range e.node.Flows("--verdict", "deny", "--crossing", "kept") {
		t.Errorf("denied although kept: %s", netlab.Describe(f))
	}
	if flows := e.node.Flows("--verdict", "deny", "--reason", "revoked", "--port", "7000"); len(flows) < 4 {
		t.Errorf("%d flows were told to be revoked, want the four that were cut", len(flows))
	}
}

// cutInTime takes the flows away and gives them back, eleven times. From the order to
// their last round trip it takes less than 100 ms in the median.
func cutInTime(t *testing.T, e *ends, lost []string) {
	t.Helper()
	client, err := coreclient.Dial(context.Background(), e.node.CoreSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	_, descriptors, err := client.Hello()
	if err != nil {
		t.Fatal(err)
	}
	descriptors.Close()
	roll := func() (asked time.Time) {
		t.Helper()
		asked = time.Now()
		if _, err := client.Rollback(); err != nil {
			t.Fatal(err)
		}
		return asked
	}
	var took, answered []time.Duration
	for range 11 {
		asked := roll()
		done := time.Now()
		answered = append(answered, done.Sub(asked))
		time.Sleep(50 * time.Millisecond)
		last := time.Duration(0)
		r := call[TrafficReply](e.client, "Traffic", true)
		for _, to := range lost {
			last = max(last, r.Last["tcp "+to].Sub(asked), r.Last["udp "+to].Sub(asked))
		}
		took = append(took, last)
		back := roll()
		eventually(t, 2*timeToAnswer, "datagrams go on", func() bool {
			r := call[TrafficReply](e.client, "Traffic", true)
			return r.Last["udp "+lost[0]].After(back) && r.Last["udp "+lost[1]].After(back)
		})
	}
	slices.Sort(took)
	slices.Sort(answered)
	t.Logf("from the order to the last round trip %s in the median, %s at most; to the answer %s, %s", took[5], took[10], answered[5], answered[10])
	if took[5] >= 100*time.Millisecond {
		t.Errorf("flows were cut after %v, want less than 100 ms in the median", took)
	}
}

// Rolling back puts the very image in force that was before, and back again.
func TestRollbackRestores(t *testing.T) {
	e := newEnds(t, changeBefore, netlab.NodeOptions{})
	for _, port := range []uint16{7000, 7001} {
		e.server.serve(port)
	}
	type found struct {
		Version      uint64
		Lost, Kept   bool
		LostDatagram bool
	}
	look := func() found {
		t.Helper()
		var f found
		s := statusOf(t, e.node)
		if s.Policy == nil {
			t.Fatalf("no policy: %+v", s)
		}
		f.Version = s.Policy.Version
		f.Lost, f.LostDatagram = bothWays(e.client, e.at4(7000), timeToAnswer)
		f.Kept = e.client.reaches(e.at6(7001))
		return f
	}
	before, after := found{1, true, true, true}, found{2, false, true, false}
	check := func(what string, want found) {
		t.Helper()
		if diff := cmp.Diff(want, look()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	check("at first", before)
	digest := statusOf(t, e.node).Policy.Digest
	e.apply(changeAfter)
	check("applied", after)
	e.node.Rollback()
	check("rolled back", before)
	if got := statusOf(t, e.node).Policy.Digest; got != digest {
		t.Errorf("digest %s, before it was %s", got, digest)
	}
	e.node.KillCore()
	e.node.StartCore()
	if out, problems, status := e.node.Demarc("status", "--wait", "enforcing", "--timeout", "10s"); status != 0 {
		t.Fatalf("status: %d\n%s%s", status, out, problems)
	}
	check("rolled back, and the core was killed", before)
	e.node.Rollback()
	check("rolled back once more", after)
}

// A change between a question and its answer does not cost the answer.
func TestPolicyChangeKeepsAnswers(t *testing.T) {
	e := newEnds(t, changeBefore, netlab.NodeOptions{CoreOnly: true})
	if problem := call[string](e.server, "Serve", ServeArgs{Network: "udp", At: e.at4(7001).String(), Silent: true}); problem != "" {
		t.Fatal(problem)
	}
	if problem := call[string](e.client, "Serve", ServeArgs{Network: "udp", At: e.web.At4(5000).String(), Silent: true}); problem != "" {
		t.Fatal(problem)
	}
	question := SendArgs{At: e.web.At4(5000).String(), To: e.at4(7001).String()}
	answer := SendArgs{At: question.To, To: question.At}
	got := func(a *actor, at string) Served {
		return call[Served](a, "Served", ServeArgs{Network: "udp", At: at})
	}
	if problem := call[string](e.client, "SendFrom", question); problem != "" {
		t.Fatal(problem)
	}
	eventually(t, timeToAnswer, "the question arrives", func() bool { return got(e.server, question.To).Count == 1 })
	e.apply(changeAfter)
	if problem := call[string](e.server, "SendFrom", answer); problem != "" {
		t.Errorf("the answer is refused: %s", problem)
	}
	eventually(t, timeToAnswer, "the answer arrives", func() bool { return got(e.client, question.At).Count == 1 })
	e.apply("crossings:\n  - {name: new, from: [workload/db], to: [workload/web], ports: [tcp/1]}\n")
	for range 2 {
		if problem := call[string](e.server, "SendFrom", answer); problem != "operation not permitted" {
			t.Errorf("an answer without a crossing: %q", problem)
		}
	}
	e.node.AwaitDenied(abi.Revoked, 17, e.db.At4(7001))
}
