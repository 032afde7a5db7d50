package bench

import (
	"fmt"
	"strings"
)

// Mode is a kind of load.
type Mode string

const (
	Connections Mode = "crr"  // connect, one byte each way, close; 16 at a time
	Paced       Mode = "crrp" // the same, at share of the rate of one without an agent
	Requests    Mode = "rr"   // one byte each way on one connection
	Datagrams   Mode = "udp"  // 64 bytes each way, 32 on their way, from a connected socket
	Unconnected Mode = "udpu" // the same from an unconnected one
)

// share of the highest rate at which connections are paced. With as many as go, whoever
// is slower lets the other end sleep more, and pays for waking it: part of what an agent
// costs there is that. How often either slept stands beside each figure.
const share = 0.6

// modes of one round. Connections come twice: they are what costs most and what
// swings most.
var modes = []Mode{Connections, Requests, Datagrams, Connections, Unconnected, Paced}

// Result is what the load tool printed.
type Result struct {
	Operations        int64   `json:"operations"`
	Made              int64   `json:"made"` // connections
	Lost              int64   `json:"lost"`
	Seconds           float64 `json:"seconds"`
	Rate              float64 `json:"rate"` // operations a second
	P50               float64 `json:"p50_us"`
	P99               float64 `json:"p99_us"`
	ClientCPU         float64 `json:"client_cpu_us"` // an operation
	ServerCPU         float64 `json:"server_cpu_us"`
	ClientInvoluntary int64   `json:"client_involuntary"` // context switches
	ServerInvoluntary int64   `json:"server_involuntary"`
	ClientSleeps      int64   `json:"client_sleeps"` // voluntary ones
	ServerSleeps      int64   `json:"server_sleeps"`
}

// metric is what a mode is judged by, in µs: CPU time of both ends an operation, or,
// where both ends spin, the median latency.
func (m Mode) metric(r Result) float64 {
	if m == Requests {
		return r.P50
	}
	return r.ClientCPU + r.ServerCPU
}

func (m Mode) describe() string {
	return map[Mode]string{
		Connections: "connections (crr), CPU/op",
		Paced:       "connections at the same rate (crrp), CPU/op",
		Requests:    "request-response (rr), p50",
		Datagrams:   "datagrams, connected (udp), CPU/op",
		Unconnected: "datagrams, unconnected (udpu), CPU/op",
	}[m]
}

// width is how far the quartiles of the control may lie from 1 before nothing can be
// told from a run.
func (m Mode) width() float64 {
	if m == Requests {
		return 0.015
	}
	return 0.03
}

// leastRounds are needed before a quartile says anything.
const leastRounds = 9

// The configurations that the figures need by name.
const (
	noneA  = "none A"
	noneB  = "none B"
	empty  = "empty hooks" // on packets
	every  = "every hook"  // empty, too: all of demarc's
	demarc = "demarc"
	nft    = "nftables"
	tc     = "tc conntrack"
)

// slots are how often every configuration runs within a round. What else the machine
// does comes in bursts: short runs in turns meet the same ones, and a median over them
// leaves out the few that one configuration met alone.
const slots = 4

// Round is every configuration's runs under one mode, taken in turns.
type Round struct {
	Mode    Mode                `json:"mode"`
	Order   []string            `json:"order"` // of all runs
	Results map[string][]Result `json:"results"`
}

// metric is the median over a configuration's runs; 0 if nothing came through.
func (r *Round) metric(name string) float64 {
	return r.median(name, r.Mode.metric)
}

func (r *Round) median(name string, of func(Result) float64) float64 {
	var all []float64
	for _, result := range r.Results[name] {
		if result.Operations > 0 { // otherwise it says what was lost, and nothing else
			all = append(all, of(result))
		}
	}
	return spread(all).Median
}

// Row sums one configuration under one mode up.
type Row struct {
	Mode          Mode    `json:"mode"`
	Configuration string  `json:"configuration"`
	Ratio         Spread  `json:"ratio"`    // to the mean of both none of the same round
	Absolute      Spread  `json:"absolute"` // µs
	Rate          Spread  `json:"rate"`     // operations a second
	P99           Spread  `json:"p99"`      // µs
	Lost          int64   `json:"lost"`
	Switches      float64 `json:"switches"` // involuntary, of both ends, a round
	Sleeps        Spread  `json:"sleeps"`   // of both ends, an operation
}

// Traffic is the whole outcome. Control is the ratio of none A to none B.
type Traffic struct {
	Machine  Machine          `json:"machine"`
	Tuples   int              `json:"tuples"` // peers and ports that each policy declares, each way
	Pace     float64          `json:"pace"`   // connections a second of the paced ones
	Control  map[Mode]Spread  `json:"control"`
	Rows     []Row            `json:"rows"`
	Goals    []Goal           `json:"goals"`
	Events   map[string]int64 `json:"events"` // demarc's rings over the whole run
	Controls []string         `json:"controls"`
	Rounds   []Round          `json:"rounds"`
}

// sum fills rows, control and goals from the rounds.
func (t *Traffic) sum(configurations []string) {
	t.Control = map[Mode]Spread{}
	ratios := map[Mode]map[string]Spread{}
	for _, m := range []Mode{Connections, Paced, Requests, Datagrams, Unconnected} {
		var control []float64
		ratios[m] = map[string]Spread{}
		for _, r := range t.Rounds {
			if r.Mode == m {
				control = append(control, r.metric(noneA)/r.metric(noneB))
			}
		}
		t.Control[m] = spread(control)
		for _, name := range configurations {
			row := t.row(m, name)
			ratios[m][name] = row.Ratio
			t.Rows = append(t.Rows, row)
		}
	}
	over := func(m Mode, name string) float64 { return ratios[m][name].Median }
	t.Goals = []Goal{
		goalConnections.judge(over(Connections, demarc), t.conclusive(Connections)),
		goalConntrack.judge((over(Connections, demarc)-1)/(over(Connections, nft)-1), t.conclusive(Connections)),
		goalLatency.judge(over(Requests, demarc), t.conclusive(Requests)),
		goalDatagrams.judge(max(over(Datagrams, demarc), over(Unconnected, demarc)), t.conclusive(Datagrams) && t.conclusive(Unconnected)),
	}
}

func (t *Traffic) conclusive(m Mode) bool {
	c := t.Control[m]
	return c.N >= leastRounds && c.within(m.width())
}

func (t *Traffic) row(m Mode, name string) Row {
	var ratio, absolute, rate, p99, sleeps []float64
	row := Row{Mode: m, Configuration: name}
	for _, r := range t.Rounds {
		if r.Mode != m {
			continue
		}
		own := r.metric(name)
		ratio = append(ratio, 2*own/(r.metric(noneA)+r.metric(noneB)))
		absolute = append(absolute, own)
		rate = append(rate, r.median(name, func(r Result) float64 { return r.Rate }))
		p99 = append(p99, r.median(name, func(r Result) float64 { return r.P99 }))
		sleeps = append(sleeps, r.median(name, func(r Result) float64 { return float64(r.ClientSleeps+r.ServerSleeps) / float64(r.Operations) }))
		for _, result := range r.Results[name] {
			row.Lost += result.Lost
			row.Switches += float64(result.ClientInvoluntary + result.ServerInvoluntary)
		}
	}
	row.Ratio, row.Absolute, row.Rate, row.P99, row.Sleeps = spread(ratio), spread(absolute), spread(rate), spread(p99), spread(sleeps)
	row.Switches /= float64(max(len(ratio), 1))
	return row
}

// String is the table that `make bench` prints.
func (t *Traffic) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n%d peers and ports declared each way; ratios to the mean of both `none` of the same round: median [quartiles]\n", t.Machine, t.Tuples)
	var mode Mode
	for _, r := range t.Rows {
		if r.Mode != mode {
			mode = r.Mode
			c, note := t.Control[mode], ""
			if !t.conclusive(mode) {
				note = ": inconclusive"
			}
			fmt.Fprintf(&b, "\n%s; n=%d; none A/none B %s, allowed ±%.1f %%%s\n", mode.describe(), c.N, c, mode.width()*100, note)
			fmt.Fprintf(&b, "  %-14s %-22s %9s %11s %9s %6s %9s %7s\n", "", "ratio", "µs", "op/s", "p99 µs", "lost", "switches", "sleeps")
		}
		fmt.Fprintf(&b, "  %-14s %-22s %9.2f %11.0f %9.1f %6d %9.0f %7.2f\n", r.Configuration, r.Ratio, r.Absolute.Median, r.Rate.Median, r.P99.Median, r.Lost, r.Switches, r.Sleeps.Median)
	}
	fmt.Fprintf(&b, "\nOn a machine that is not idle op/s, µs and p99 say little: only the ratios are comparable.\n")
	fmt.Fprintf(&b, "demarc's events: %d made, %d lost\n\n", t.Events["made"], t.Events["lost"])
	for _, c := range t.Controls {
		fmt.Fprintf(&b, "control: %s\n", c)
	}
	b.WriteByte('\n')
	for _, g := range t.Goals {
		fmt.Fprintln(&b, g)
	}
	return b.String()
}
