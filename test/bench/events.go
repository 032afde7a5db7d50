package bench

import (
	"fmt"
	"strings"
)

// Burst is events that the kernel's programs made at a rate, and what became of them.
type Burst struct {
	Reader    string  `json:"reader"` // how it read: json or grpc
	Rate      int     `json:"rate"`   // a second, asked for
	Reached   float64 `json:"reached"`
	Made      uint64  `json:"made"`
	Delivered uint64  `json:"delivered"` // to the reader
	Lost      uint64  `json:"lost"`      // that the reader was told of
	CPU       float64 `json:"cpu"`       // the agent's, % of one core
}

// Missing is what the reader neither got nor was told of.
func (b Burst) Missing() int64 { return int64(b.Made) - int64(b.Delivered) - int64(b.Lost) }

// Events is the whole outcome.
type Events struct {
	Machine  Machine `json:"machine"`
	Bursts   []Burst `json:"bursts"`
	Idle     float64 `json:"idle_mb"`     // the agent's resident memory, a small policy
	Resident float64 `json:"resident_mb"` // the policy of the bursts, before them
	After    float64 `json:"after_mb"`    // and after them
	Goals    []Goal  `json:"goals"`
}

// String is the table that `make bench-micro` prints.
func (e *Events) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\nevents of BPF_PROG_TEST_RUN through the node's own ring and agent to one reader\n\n", e.Machine)
	fmt.Fprintf(&b, "  %-6s %10s %10s %10s %10s %10s %8s %7s\n", "reader", "asked/s", "made/s", "made", "delivered", "lost", "missing", "CPU %")
	for _, r := range e.Bursts {
		fmt.Fprintf(&b, "  %-6s %10d %10.0f %10d %10d %10d %8d %7.1f\n", r.Reader, r.Rate, r.Reached, r.Made, r.Delivered, r.Lost, r.Missing(), r.CPU)
	}
	fmt.Fprintf(&b, "\nagent's resident memory: %.1f MB with a small policy, %.1f MB before the bursts, %.1f MB after them\n\n", e.Idle, e.Resident, e.After)
	for _, g := range e.Goals {
		fmt.Fprintln(&b, g)
	}
	return b.String()
}
