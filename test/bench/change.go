package bench

import (
	"fmt"
	"slices"
	"strings"
)

// The goals of changes of the policy, in ms, at 100,000 rules. demarc apply has a change
// previewed first; what is previewed lies ready for a minute.
var (
	goalDeclared = Goal{ID: "P12", What: "one rule more, until a new connection comes about, p99", Unit: "ms", Must: 50, Aim: 10}
	goalRevoked  = Goal{ID: "P13", What: "one rule less, until an open connection is refused, p99", Unit: "ms", Must: 100, Aim: 20}
	goalReplaced = Goal{ID: "P14", What: "all rules replaced, from the call to its answer, p99", Unit: "ms", Must: 2000, Aim: 500}
)

// Latency is a series of times in ms.
type Latency struct {
	N   int     `json:"n"`
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

// latency sums a series up. With fewer than a hundred values p99 is the largest.
func latency(series []float64) Latency {
	if len(series) == 0 {
		return Latency{}
	}
	s := slices.Sorted(slices.Values(series))
	at := func(q float64) float64 { return s[min(int(q*float64(len(s))), len(s)-1)] }
	return Latency{N: len(s), P50: at(0.5), P99: at(0.99), Max: s[len(s)-1]}
}

// leastChanges are needed before a p99 says anything.
const leastChanges = 50

// Changes is the whole outcome.
type Changes struct {
	Machine Machine `json:"machine"`
	Rules   int     `json:"rules"`
	Image   int     `json:"image_bytes"`
	Direct  Delays  `json:"direct"`     // without a preview
	Ready   Delays  `json:"previewed"`  // behind one
	Preview Latency `json:"preview_ms"` // call -> answer
	// Agent and Core are the CPU time of one change, on the average of those with a
	// preview and those without, in ms: where the machine has other work, that tells
	// more than the clock.
	Agent    float64   `json:"agent_cpu_ms"`
	Core     float64   `json:"core_cpu_ms"`
	Goals    []Goal    `json:"goals"`
	Controls []string  `json:"controls"`
	Raw      []Changed `json:"changes"`
}

// Delays are what a change takes, from the call.
type Delays struct {
	Declared Latency `json:"declared_ms"` // to a new connection
	Revoked  Latency `json:"revoked_ms"`  // to the last packet that came through
	Replaced Latency `json:"replaced_ms"` // to the answer
}

// Changed is one rule more and the same less, in ms.
type Changed struct {
	Preview  [2]float64 `json:"preview"` // 0 = there was none
	Declared float64    `json:"declared"`
	Revoked  float64    `json:"revoked"`
	Replaced [2]float64 `json:"replaced"`
}

// sum fills the latencies and goals.
func (c *Changes) sum() {
	enough := len(c.Raw)/2 >= leastChanges
	for _, way := range []struct {
		how       string
		previewed bool
		into      *Delays
	}{{"previewed: ", true, &c.Ready}, {"at once: ", false, &c.Direct}} {
		var declared, revoked, replaced, preview []float64
		for _, one := range c.Raw {
			if previewed := one.Preview[0] > 0; previewed == way.previewed {
				declared, revoked = append(declared, one.Declared), append(revoked, one.Revoked)
				replaced, preview = append(replaced, one.Replaced[:]...), append(preview, one.Preview[:]...)
			}
		}
		*way.into = Delays{latency(declared), latency(revoked), latency(replaced)}
		if way.previewed {
			c.Preview = latency(preview)
		}
		for _, g := range []Goal{
			goalDeclared.judge(way.into.Declared.P99, enough),
			goalRevoked.judge(way.into.Revoked.P99, enough),
			goalReplaced.judge(way.into.Replaced.P99, enough),
		} {
			g.What = way.how + g.What
			c.Goals = append(c.Goals, g)
		}
	}
}

// String is what `make bench` prints.
func (c *Changes) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n%d rules, %d bytes of image; %d times one rule more and less, half of them previewed; ms\n\n", c.Machine, c.Rules, c.Image, len(c.Raw))
	for _, row := range []struct {
		what string
		Latency
	}{
		{"preview -> its answer", c.Preview},
		{"previewed, one rule more -> a new connection", c.Ready.Declared},
		{"previewed, one rule less -> last packet", c.Ready.Revoked},
		{"previewed, call -> answer", c.Ready.Replaced},
		{"at once, one rule more -> a new connection", c.Direct.Declared},
		{"at once, one rule less -> last packet", c.Direct.Revoked},
		{"at once, call -> answer, all rules replaced", c.Direct.Replaced},
	} {
		fmt.Fprintf(&b, "  %-46s n=%-4d p50 %9.1f  p99 %9.1f  max %9.1f\n", row.what, row.N, row.P50, row.P99, row.Max)
	}
	fmt.Fprintf(&b, "  CPU time of one change, on the average of both: agent %.0f, core %.0f\n\n", c.Agent, c.Core)
	for _, control := range c.Controls {
		fmt.Fprintf(&b, "control: %s\n", control)
	}
	b.WriteByte('\n')
	for _, g := range c.Goals {
		fmt.Fprintln(&b, g)
	}
	return b.String()
}
