package bench

import (
	"fmt"
	"strings"
)

// Packet is what one kind of packet costs a program: ns of the kernel's own clock,
// the best of several runs of one flow, warm.
type Packet struct {
	What    string  `json:"what"`
	Program string  `json:"program"`
	NS      float64 `json:"ns"`
	Net     float64 `json:"net"`            // minus an empty program of the same run
	Lost    float64 `json:"lost,omitempty"` // share of its events that found no room
}

// Live is what a program cost under traffic, with the kernel's own statistics on,
// which themselves cost some 50 ns a run.
type Live struct {
	Mode          Mode    `json:"mode"`
	Configuration string  `json:"configuration"`
	Program       string  `json:"program"`
	Runs          float64 `json:"runs"` // an operation
	NS            float64 `json:"ns"`   // a run
}

// Packets is the whole outcome.
type Packets struct {
	Machine Machine  `json:"machine"`
	Repeat  int      `json:"repeat"`
	Best    int      `json:"best"` // of so many
	Empty   float64  `json:"empty_ns"`
	Packets []Packet `json:"packets"`
	Live    []Live   `json:"live"`
	Goals   []Goal   `json:"goals"`
}

// String is the table that `make bench-micro` prints.
func (p *Packets) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\nBPF_PROG_TEST_RUN, %d repeats, best of %d; an empty program takes %.0f ns\n\n", p.Machine, p.Repeat, p.Best, p.Empty)
	fmt.Fprintf(&b, "  %-58s %8s %8s\n", "", "ns", "net")
	for _, r := range p.Packets {
		note := ""
		if r.Lost > 0 {
			note = fmt.Sprintf("   (%.0f %% of its events found no room)", r.Lost*100)
		}
		fmt.Fprintf(&b, "  %-58s %8.0f %8.0f%s\n", r.What, r.NS, r.Net, note)
	}
	fmt.Fprintf(&b, "\nlive, with bpf_stats, which add some 50 ns to each run\n\n  %-5s %-12s %-12s %9s %8s %8s\n", "", "", "", "runs/op", "ns/run", "ns/op")
	for _, l := range p.Live {
		fmt.Fprintf(&b, "  %-5s %-12s %-12s %9.2f %8.0f %8.0f\n", l.Mode, l.Configuration, l.Program, l.Runs, l.NS, l.Runs*l.NS)
	}
	b.WriteByte('\n')
	for _, g := range p.Goals {
		fmt.Fprintln(&b, g)
	}
	return b.String()
}
