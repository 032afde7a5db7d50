package bench

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// roundsVariable says how many rounds are run. Without it there is one short one,
// whose controls are what it is for.
const roundsVariable = "ROUNDS"

// jsonVariable names a file that the whole outcome is written to.
const jsonVariable = "BENCH_JSON"

// TestTraffic runs every configuration under every load, in rounds of a fresh order,
// and checks with the controls that what was measured is what was meant.
func TestTraffic(t *testing.T) {
	rounds, turns, seconds, tuples := 1, 1, 0.1, 400
	full := os.Getenv(roundsVariable)
	if full != "" {
		var err error
		if rounds, err = strconv.Atoi(full); err != nil || rounds < 1 {
			t.Fatalf("%s=%q is no number of rounds", roundsVariable, full)
		}
		turns, seconds, tuples = slots, 0.2, 10_000
	}
	outcome := Traffic{Machine: describeMachine(), Tuples: tuples}
	b := build(t, tuples)
	b.addNone(noneA)
	b.addEmpty(empty, packetHooks)
	b.addEmpty(every, everyHook)
	b.addDemarc()
	b.addNFT()
	b.addTC()
	b.addNone(noneB)
	var names []string
	for _, p := range b.pairs {
		names = append(names, p.name)
	}

	outcome.Controls = b.controls()
	b.pace = share * b.run(b.pairs[0], Connections, max(seconds, 0.5)).Rate
	outcome.Pace = b.pace
	rings := b.node.Rings()
	order := append([]*pair(nil), b.pairs...)
	var connections int64
	for range rounds {
		for _, mode := range modes {
			r := Round{Mode: mode, Results: map[string][]Result{}}
			for range turns {
				rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
				for _, p := range order {
					before := b.admitted(p)
					result := b.run(p, mode, seconds)
					if p.name == demarc {
						after := b.admitted(p)
						b.accounted(mode, result.Made, [2]uint64{after[0] - before[0], after[1] - before[1]})
						connections += result.Made
					}
					r.Order = append(r.Order, p.name)
					r.Results[p.name] = append(r.Results[p.name], result)
				}
			}
			for _, p := range b.pairs {
				if r.metric(p.name) == 0 {
					t.Fatalf("%s, %s: nothing came through: %+v", p.name, mode, r.Results[p.name])
				}
			}
			outcome.Rounds = append(outcome.Rounds, r)
		}
	}
	outcome.Controls = append(outcome.Controls, fmt.Sprintf("OK demarc: a verdict at either end for each of %d connections and flows", connections))
	outcome.Events = map[string]int64{}
	for i, state := range b.node.Rings() {
		outcome.Events["made"] += int64(state.Seq - rings[i].Seq)
		outcome.Events["lost"] += int64(state.Lost - rings[i].Lost)
	}
	if faults := b.node.Faults(); faults != [record.Faults]uint64{} {
		t.Errorf("faults in the kernel programs: %v", faults)
	}
	outcome.Machine.After = loadAverage()
	outcome.sum(names)
	fmt.Println(&outcome)
	for _, g := range outcome.Goals {
		if g.Outcome == Missed {
			t.Errorf("goal missed: %s", g)
		}
	}
	writeJSON(t, &outcome)
}

// controls checks that each configuration does what it is measured for, and returns
// what was checked.
func (b *bench) controls() (said []string) {
	b.t.Helper()
	for _, p := range b.pairs {
		if !b.reaches(p, firstPort, p.client.cgroup) {
			b.t.Fatalf("%s: a declared connection is refused", p.name)
		}
		got := b.reaches(p, closedPort, p.client.cgroup)
		if got == p.enforces {
			b.t.Fatalf("%s: a connection that nobody declared: came about: %v", p.name, got)
		}
		what := "refused"
		if got {
			what = "comes about"
		}
		said = append(said, fmt.Sprintf("OK %s: a connection that nobody declared %s", p.name, what))
		if p.name != demarc {
			continue
		}
		before := b.node.Denied(abi.TagMissing)
		if b.reaches(p, firstPort, b.lab.Cgroup("stranger")) {
			b.t.Fatal("demarc: a SYN without tag is let in")
		}
		if b.node.Denied(abi.TagMissing) == before {
			b.t.Fatal("demarc: a SYN without tag is refused for another reason")
		}
		said = append(said, "OK demarc: a SYN from the client's own address without tag is refused")
	}
	return said
}

// admitted counts the final verdicts that let something pass, as the opener and as
// the acceptor. Only the client opens, only the server accepts.
func (b *bench) admitted(p *pair) (n [2]uint64) {
	b.t.Helper()
	if p.name != demarc {
		return n
	}
	for key, count := range b.node.Counts() {
		if key.Verdict == abi.Allow && key.Reason == abi.ByCrossing {
			n[key.Direction] += count
		}
	}
	return n
}

// accounted checks that each connection had one final verdict at either end: traffic
// without went past the hooks. A flow of datagrams has at least one; where the first
// answer comes in while the next datagram goes out on another CPU, both settle it.
func (b *bench) accounted(mode Mode, made int64, verdicts [2]uint64) {
	b.t.Helper()
	for _, got := range verdicts {
		if got < uint64(made) || (got > uint64(made) && mode != Datagrams && mode != Unconnected) {
			b.t.Errorf("%s: %v verdicts at client and server for %d connections", mode, verdicts, made)
		}
	}
}

func writeJSON(t *testing.T, outcome any) {
	t.Helper()
	file := os.Getenv(jsonVariable)
	if file == "" {
		return
	}
	text, err := json.MarshalIndent(outcome, "", "  ")
	check(t, err)
	check(t, os.WriteFile(file, append(text, '\n'), 0o644))
}
