package bench

import (
	"fmt"
	"strings"
)

// Goals of a start, in ms, by the number of rules.
var (
	goalStartSmall = Goal{ID: "P20", What: "exec to enforcing with 1,000 rules, median", Unit: "ms", Must: 300, Aim: 150}
	goalStartLarge = Goal{ID: "P20", What: "exec to enforcing with 100,000 rules, median", Unit: "ms", Must: 1500, Aim: 700}
)

// Starts is how long the core takes from exec until a process of a workload is refused,
// and until it answers, by which everything has been asked and all that observes runs.
type Starts struct {
	Machine Machine   `json:"machine"`
	Sizes   []Started `json:"sizes"`
	Goals   []Goal    `json:"goals"`
}

// Started is one size of policy.
type Started struct {
	Rules  int       `json:"rules"`
	Forced Latency   `json:"enforcing_ms"` // nothing in the kernel, as after a boot
	Fresh  Latency   `json:"fresh_ms"`     // the same, to the first answer
	Adopt  Latency   `json:"adopted_ms"`   // to the first answer; a former core's programs enforce meanwhile
	CPU    Latency   `json:"cpu_ms"`       // what Fresh took of it
	Series []float64 `json:"enforcing"`
}

// leastStarts are needed before a median says anything.
const leastStarts = 10

func (s *Starts) judge() {
	for i, g := range []Goal{goalStartSmall, goalStartLarge} {
		if i < len(s.Sizes) {
			s.Goals = append(s.Goals, g.judge(s.Sizes[i].Forced.P50, s.Sizes[i].Forced.N >= leastStarts))
		}
	}
}

// String is what `make bench` prints.
func (s *Starts) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\nexec of the core, ms\n\n", s.Machine)
	for _, size := range s.Sizes {
		for _, row := range []struct {
			what string
			Latency
		}{{"enforcing, nothing was in the kernel", size.Forced}, {"answering", size.Fresh}, {"CPU time", size.CPU},
			{"answering, a former core's adopted", size.Adopt}} {
			fmt.Fprintf(&b, "  %6d rules, %-37s n=%-3d p50 %8.1f  max %8.1f\n", size.Rules, row.what, row.N, row.P50, row.Max)
		}
	}
	b.WriteByte('\n')
	for _, g := range s.Goals {
		fmt.Fprintln(&b, g)
	}
	return b.String()
}
