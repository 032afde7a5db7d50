package bench

import (
	"fmt"
	"strings"
)

// Goals of a start, in ms, by the number of rules.
var (
	goalStartSmall = Goal{ID: "P20", What: "start to in force with 1,000 rules, median", Unit: "ms", Must: 300, Aim: 150}
	goalStartLarge = Goal{ID: "P20", What: "start to in force with 100,000 rules, median", Unit: "ms", Must: 1500, Aim: 700}
)

// Starts is how long the core takes from exec to its first answer, by which the policy
// is in force.
type Starts struct {
	Machine Machine   `json:"machine"`
	Sizes   []Started `json:"sizes"`
	Goals   []Goal    `json:"goals"`
}

// Started is one size of policy.
type Started struct {
	Rules  int       `json:"rules"`
	Fresh  Latency   `json:"fresh_ms"`   // nothing in the kernel, as after a boot
	Adopt  Latency   `json:"adopted_ms"` // a former core's programs and tables there
	Series []float64 `json:"fresh"`
}

// leastStarts are needed before a median says anything.
const leastStarts = 10

func (s *Starts) judge() {
	for i, g := range []Goal{goalStartSmall, goalStartLarge} {
		if i < len(s.Sizes) {
			s.Goals = append(s.Goals, g.judge(s.Sizes[i].Fresh.P50, s.Sizes[i].Fresh.N >= leastStarts))
		}
	}
}

// String is what `make bench` prints.
func (s *Starts) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\nexec of the core to its first answer, ms\n\n", s.Machine)
	for _, size := range s.Sizes {
		for _, row := range []struct {
			what string
			Latency
		}{{"nothing in the kernel", size.Fresh}, {"a former core's tables adopted", size.Adopt}} {
			fmt.Fprintf(&b, "  %6d rules, %-32s n=%-3d p50 %8.1f  max %8.1f\n", size.Rules, row.what, row.N, row.P50, row.Max)
		}
	}
	b.WriteByte('\n')
	for _, g := range s.Goals {
		fmt.Fprintln(&b, g)
	}
	return b.String()
}
