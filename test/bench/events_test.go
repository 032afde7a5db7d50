package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	observerpb "github.com/cilium/cilium/api/v1/observer"
	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/test/netlab"
)

// TestEvents has refused SYNs told in a real node's ring, at a rate, and counts what a
// reader of the agent's API gets and is told to have lost. The programs are demarc's own
// under BPF_PROG_TEST_RUN, as in TestPackets, but the ring and its counters are those of
// the node; core and agent run as they do everywhere.
func TestEvents(t *testing.T) {
	full := os.Getenv(repeatVariable) != ""
	seconds, tuples, rates := 0.5, 400, []int{20_000, 1_000_000}
	if full {
		seconds, tuples, rates = 10, 10_000, []int{20_000, 100_000, 300_000, 500_000, 1_000_000}
	}
	outcome := Events{Machine: describeMachine()}
	b := build(t, tuples)
	small := b.lab.Node(smallPolicy, netlab.NodeOptions{})
	outcome.Idle = settledMemory(t, small.Agent.PID(), full)
	b.addDemarc()
	outcome.Resident = settledMemory(t, b.node.Agent.PID(), full)
	c := b.private("allowed_events", "denied_events", "ring_state")
	// Without a tag: each is refused, and told. An admitted one is told when the
	// connection has come about, which no test run shows.
	frame := frame(&layers.TCP{SrcPort: 40000, DstPort: firstPort, SYN: true, Seq: 7, Options: usualOptions()}, nil)
	best := 0
	for _, how := range []string{"json", "grpc"} {
		for _, rate := range rates {
			r := b.burst(c, frame, how, rate, seconds)
			outcome.Bursts = append(outcome.Bursts, r)
			if r.Lost == 0 && r.Missing() == 0 && r.Reached > 0.95*float64(rate) {
				best = max(best, rate)
			}
			if r.Missing() != 0 {
				t.Errorf("%s at %d/s: %d events are neither delivered nor counted as lost: %+v", how, rate, r.Missing(), r)
			}
			if r.Delivered == 0 {
				t.Errorf("%s at %d/s: nothing was delivered: %+v", how, rate, r)
			}
		}
	}
	outcome.After = memory(t, b.node.Agent.PID())
	outcome.Machine.After = loadAverage()
	missing := int64(0)
	for _, r := range outcome.Bursts {
		missing += max(r.Missing(), -r.Missing())
	}
	outcome.Goals = []Goal{
		goalIdle.judge(outcome.Idle, full), goalResident.judge(outcome.Resident, full), goalEvents.judge(float64(best), full),
		goalExact.judge(float64(missing), true), goalCPU.judge(outcome.Bursts[0].CPU, full),
	}
	fmt.Println(&outcome)
	for _, g := range outcome.Goals {
		if g.Outcome == Missed {
			t.Errorf("goal missed: %s", g)
		}
	}
	writeJSON(t, &outcome)
}

const smallPolicy = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: small, version: 1}
trustDomain: bench.example
zones:
  app: {trust: 10}
workloads:
  a: {zone: app, match: [{cgroup: /a}]}
  b: {zone: app, match: [{cgroup: /b}]}
crossings:
  - {name: a-b, from: [workload/a], to: [workload/b], ports: [tcp/80], log: all, purpose: bench}
`

// reader counts what it reads.
type reader struct {
	delivered, lost atomic.Uint64
}

// burst makes events for so many seconds while one reader reads, and waits until
// everything is accounted for.
func (b *bench) burst(c *ebpf.Collection, frame []byte, how string, rate int, seconds float64) Burst {
	b.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var reading sync.WaitGroup
	defer reading.Wait()
	defer cancel()
	r := &reader{}
	reading.Go(func() {
		if how == "grpc" {
			r.readGRPC(ctx, b.t, b.node.AgentSocket())
		} else {
			r.readJSON(ctx, b.t, b.node.AgentSocket())
		}
	})
	// The first events show that the reader is there; from then on all are counted.
	b.inside(b.node.Cgroup("/bench/server"), func() {
		for deadline := time.Now().Add(30 * time.Second); ; {
			b.make(c, frame, 1)
			time.Sleep(20 * time.Millisecond)
			if r.delivered.Load() > 0 || time.Now().After(deadline) {
				break
			}
		}
	})
	b.settle(c, frame, r, 0, 0)
	before := rings(b.t, c)
	delivered, lost := r.delivered.Load(), r.lost.Load()

	out := Burst{Reader: how, Rate: rate}
	cpu, start := processorTime(b.t, b.node.Agent.PID()), time.Now()
	b.inside(b.node.Cgroup("/bench/server"), func() {
		const slice = 5 * time.Millisecond
		share := rate / int(time.Second/slice)
		end := start.Add(time.Duration(seconds * float64(time.Second)))
		for at := start; at.Before(end); at = at.Add(slice) {
			time.Sleep(time.Until(at))
			b.make(c, frame, share)
		}
	})
	spent := time.Since(start)
	out.CPU = 100 * float64(processorTime(b.t, b.node.Agent.PID())-cpu) / float64(spent)
	made := rings(b.t, c).Seq - before.Seq
	out.Reached = float64(made) / spent.Seconds()
	out.Made, out.Delivered, out.Lost = b.settle(c, frame, r, delivered, lost)
	out.Made -= before.Seq
	return out
}

// make runs a SYN through the listener's path so often.
func (b *bench) make(c *ebpf.Collection, frame []byte, n int) {
	b.t.Helper()
	_, _, err := c.Programs["packet_syn"].Benchmark(frame, max(n, 1), nil)
	check(b.t, err)
}

// settle waits until what was made is what was delivered and lost, for some time. A
// loss at the very end shows with the next event, so there is one now and then, on each
// CPU. It returns the sum of what was made ever, and what came since the given counts.
func (b *bench) settle(c *ebpf.Collection, frame []byte, r *reader, delivered, lost uint64) (made, got, told uint64) {
	b.t.Helper()
	var base uint64
	b.inside(b.node.Cgroup("/bench/server"), func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		var all unix.CPUSet
		check(b.t, unix.SchedGetaffinity(0, &all))
		defer unix.SchedSetaffinity(0, &all)
		last := [2]uint64{}
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
			for _, cpu := range b.cpus {
				var one unix.CPUSet
				one.Set(cpu)
				check(b.t, unix.SchedSetaffinity(0, &one))
				b.make(c, frame, 1)
			}
			time.Sleep(100 * time.Millisecond)
			now := [2]uint64{r.delivered.Load(), r.lost.Load()}
			state := rings(b.t, c)
			made, got, told = state.Seq, now[0]-delivered, now[1]-lost
			// Quiet twice: as many came as were made since the last look.
			if now[0]+now[1]-last[0]-last[1] == state.Seq-base {
				return
			}
			last, base = now, state.Seq
		}
	})
	return made, got, told
}

func (r *reader) readJSON(ctx context.Context, t testing.TB, socket string) {
	client, err := api.NewClient("unix://" + socket)
	if err != nil {
		t.Error(err)
		return
	}
	defer client.Close()
	for line, err := range client.FlowLines(ctx, url.Values{"follow": {"true"}, "last": {"0"}}) {
		switch {
		case err != nil:
			if ctx.Err() == nil {
				t.Error(err)
			}
			return
		case bytes.HasPrefix(line, []byte(`{"lost"`)):
			var l api.Line
			if err := json.Unmarshal(line, &l); err != nil {
				t.Error(err)
			}
			r.lost.Add(l.Lost)
		default:
			r.delivered.Add(1)
		}
	}
}

func (r *reader) readGRPC(ctx context.Context, t testing.TB, socket string) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	stream, err := observerpb.NewObserverClient(conn).GetFlows(ctx, &observerpb.GetFlowsRequest{Follow: true})
	for err == nil {
		var m *observerpb.GetFlowsResponse
		if m, err = stream.Recv(); err == nil {
			if l := m.GetLostEvents(); l != nil {
				r.lost.Add(l.GetNumEventsLost())
			} else {
				r.delivered.Add(1)
			}
		}
	}
	if ctx.Err() == nil {
		t.Error(err)
	}
}

// processorTime is what a process has used, in both modes.
func processorTime(t testing.TB, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	check(t, err)
	_, rest, _ := strings.Cut(string(text), ") ")
	f := strings.Fields(rest)
	var ticks uint64
	for _, field := range f[11:13] { // utime and stime
		n, err := strconv.ParseUint(field, 10, 64)
		check(t, err)
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / 100)
}

// memory is a process's resident memory, in MB.
func memory(t testing.TB, pid int) float64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	check(t, err)
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(value)[0], 64)
			check(t, err)
			return kb / 1024
		}
	}
	t.Fatalf("process %d tells no VmRSS", pid)
	return 0
}

// settledMemory waits, where it matters, until the garbage of the start is collected.
func settledMemory(t testing.TB, pid int, wait bool) float64 {
	t.Helper()
	if wait {
		time.Sleep(30 * time.Second)
	}
	return memory(t, pid)
}
