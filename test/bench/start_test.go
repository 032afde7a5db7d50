package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/policy/image/encode"
	"github.com/demarc/demarc/test/netlab"
)

// startsVariable says how often the core is started, at 1,000 and at 100,000 rules.
// Without it there are two starts of a small policy.
const startsVariable = "STARTS"

// TestStart ends enforcement and starts the core, again and again: from exec until a
// process of a workload is refused what nobody declared, which it tries each millisecond,
// and until the core answers, for which it looks every 5 ms.
func TestStart(t *testing.T) {
	starts, sizes := 2, [][2]int{{50, 200}}
	if text := os.Getenv(startsVariable); text != "" {
		var err error
		if starts, err = strconv.Atoi(text); err != nil || starts < 1 {
			t.Fatalf("%s=%q is no number of starts", startsVariable, text)
		}
		sizes = [][2]int{{100, 250}, {2500, 26_000}}
	}
	outcome := Starts{Machine: describeMachine()}
	for _, size := range sizes {
		lab := netlab.New(t)
		node := lab.Node("", netlab.NodeOptions{})
		img := changing(t, size[0], size[1], true)
		encoded, err := encode.Image(img)
		check(t, err)
		agent, err := api.NewClient(node.AgentSocket())
		check(t, err)
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		_, err = agent.Apply(ctx, encoded, 0)
		cancel()
		check(t, err)
		agent.Close()
		node.StopAgent()
		one := Started{Rules: len(img.Rules)}
		prober := startPeer(t, lab.Namespace("client"), node.Cgroup("/large/w000000"), "probe")
		start := func(end func()) (begun time.Duration, took float64) {
			end()
			begun = monotonic()
			node.StartCore()
			took = milliseconds(monotonic() - begun)
			if s := node.Status(); s.State != proto.StateEnforcing || s.Active.Digest == "" {
				t.Fatalf("%s, %v", s.State, s.Problems)
			}
			return begun, took
		}
		var fresh, adopted, cpu []float64
		for range starts {
			begun, took := start(func() {
				node.Detach()
				if left, err := os.ReadDir(filepath.Join(node.Dir(), "bpf", "demarc")); err == nil && len(left) > 0 {
					t.Fatalf("%d pins are left", len(left))
				}
				prober.ask("await")
				prober.await("open")
			})
			fresh, cpu = append(fresh, took), append(cpu, milliseconds(cpuTime(t, node.Core)))
			one.Series = append(one.Series, milliseconds(prober.await("refused")-begun))
			_, took = start(node.StopCore)
			adopted = append(adopted, took)
		}
		one.Forced, one.Fresh, one.Adopt, one.CPU = latency(one.Series), latency(fresh), latency(adopted), latency(cpu)
		outcome.Sizes = append(outcome.Sizes, one)
	}
	outcome.Machine.After = loadAverage()
	outcome.judge()
	fmt.Println(&outcome)
	for _, g := range outcome.Goals {
		if g.Outcome == Missed {
			t.Errorf("goal missed: %s", g)
		}
	}
	writeJSON(t, &outcome)
}
