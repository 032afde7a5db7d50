package bench

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/demarc/demarc/test/netlab"
)

// Workloads is what the agent takes on a node with many workloads.
type Workloads struct {
	Machine     Machine `json:"machine"`
	Workloads   int     `json:"workloads"`
	Rules       int     `json:"rules"`
	Idle        float64 `json:"idle_mb"`     // the agent's resident memory
	Connections int64   `json:"connections"` // that were made
	Rate        float64 `json:"rate"`        // of them, a second
	Events      uint64  `json:"events"`      // that the reader got
	Lost        uint64  `json:"lost"`        // that it was told of
	CPU         float64 `json:"cpu"`         // the agent's, % of one core
	Each        float64 `json:"each_us"`     // the agent's CPU time for one connection
	After       float64 `json:"after_mb"`    // resident memory, once it is idle again
	Goals       []Goal  `json:"goals"`
}

// String is what `make bench-micro` prints.
func (w *Workloads) String() string {
	return fmt.Sprintf("%s\n%d workloads, %d crossings; idle %.1f MB\n%d connections, %.0f/s: %d events read, %d lost; agent's CPU %.1f %%, %.1f us a connection; then %.1f MB\n%s\n%s",
		w.Machine, w.Workloads, w.Rules, w.Idle, w.Connections, w.Rate, w.Events, w.Lost, w.CPU, w.Each, w.After, w.Goals[0], w.Goals[1])
}

// TestWorkloads has a node with 200 workloads and 1,000 crossings, all of whose
// connections are told. What the agent takes is looked at when nothing happens, and while
// workload after workload makes connections, 10,000 a second in all, and one reader reads.
func TestWorkloads(t *testing.T) {
	const workloads, crossings, rate = 200, 5, 10_000
	full := os.Getenv(repeatVariable) != ""
	turns, seconds := 2, 0.25
	if full {
		turns, seconds = 20, 1
	}
	outcome := Workloads{Machine: describeMachine(), Workloads: workloads, Rules: workloads * crossings}
	b := build(t, 0)
	var p strings.Builder
	p.WriteString("apiVersion: demarc.dev/v1alpha1\nkind: BoundaryPolicy\nmetadata: {name: many, version: 1}\n" +
		"trustDomain: bench.example\nzones:\n  app: {trust: 10}\nworkloads:\n")
	for i := range workloads {
		fmt.Fprintf(&p, "  w%03d: {zone: app, match: [{cgroup: /w%03[1]d}]}\n", i)
	}
	p.WriteString("crossings:\n")
	for i := range workloads {
		for port := range crossings {
			fmt.Fprintf(&p, "  - {name: c%03d-%d, from: [workload/w%03[1]d], to: [workload/w%03[3]d], ports: [tcp/%[4]d], log: all, purpose: bench}\n",
				i, port, (i+workloads/2)%workloads, firstPort+port)
		}
	}
	b.node = b.lab.Node(p.String(), netlab.NodeOptions{})
	cgroups := make([]*netlab.Cgroup, workloads)
	for i := range cgroups {
		cgroups[i] = b.node.Cgroup(fmt.Sprintf("/w%03d", i))
	}
	pair := b.pair(demarc, true, cgroups[0], cgroups[workloads/2])
	agent := b.node.Agent.PID()
	outcome.Idle = settledMemory(t, agent, full)

	ctx, cancel := context.WithCancel(context.Background())
	var reading sync.WaitGroup
	r := &reader{}
	reading.Go(func() { r.readJSON(ctx, t, b.node.AgentSocket()) })
	defer reading.Wait()
	defer cancel()
	// Its first events show that the reader is there.
	for deadline := time.Now().Add(30 * time.Second); r.delivered.Load() == 0; {
		if time.Now().After(deadline) {
			t.Fatal("nothing was delivered")
		}
		b.run(pair, Connections, 0.05)
	}
	time.Sleep(time.Second)
	delivered, lost := r.delivered.Load(), r.lost.Load()
	cpu, spent := processorTime(t, agent), 0.0
	for turn := range turns {
		from := turn * 37 % workloads
		pair.client.cgroup, pair.server.cgroup = cgroups[from], cgroups[(from+workloads/2)%workloads]
		done := b.run(pair, Mode(fmt.Sprintf("%s:%d", Connections, rate)), seconds)
		if done.Lost > 0 {
			t.Errorf("w%03d: %d connections were lost", from, done.Lost)
		}
		outcome.Connections += done.Made
		spent += done.Seconds
	}
	time.Sleep(time.Second) // what is under way is read, at the agent's expense
	used := processorTime(t, agent) - cpu
	outcome.Rate = float64(outcome.Connections) / spent
	outcome.Each = float64(used.Microseconds()) / float64(outcome.Connections)
	outcome.CPU = 100 * used.Seconds() / spent
	outcome.Events, outcome.Lost = r.delivered.Load()-delivered, r.lost.Load()-lost
	// Both ends tell of each.
	if want := 2 * uint64(outcome.Connections); outcome.Events+outcome.Lost < want {
		t.Errorf("%d events came and %d were lost, of %d", outcome.Events, outcome.Lost, want)
	}
	cancel()
	reading.Wait()
	outcome.After = settledMemory(t, agent, full)
	outcome.Machine.After = loadAverage()
	// Fewer a second cost more each, not less: there is less to read at a time.
	outcome.Goals = []Goal{goalNode.judge(outcome.Idle, full), goalAllowed.judge(outcome.Each*rate/1e4, full && outcome.Rate < 1.1*rate)}
	fmt.Println(&outcome)
	for _, g := range outcome.Goals {
		if g.Outcome == Missed {
			t.Errorf("goal missed: %s", g)
		}
	}
	writeJSON(t, &outcome)
}
