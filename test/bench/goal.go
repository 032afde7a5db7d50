package bench

import "fmt"

// Outcome of a goal. The zero value decides nothing.
type Outcome string

const (
	Inconclusive Outcome = "inconclusive" // the control says that nothing can be told
	Missed       Outcome = "missed"
	Must         Outcome = "must" // the gate is kept
	Aim          Outcome = "aim"  // and the level to reach is reached
)

// Goal is an upper bound of something measured.
type Goal struct {
	ID       string  `json:"id"`
	What     string  `json:"what"`
	Unit     string  `json:"unit"` // "ratio", "ns" or "ms"
	Must     float64 `json:"must"`
	Aim      float64 `json:"aim"`
	Measured float64 `json:"measured"`
	Outcome  Outcome `json:"outcome"`
}

// judge says how a measured value stands to its bounds, if the control lets it.
func (g Goal) judge(measured float64, conclusive bool) Goal {
	g.Measured = measured
	switch {
	case !conclusive:
		g.Outcome = Inconclusive
	case measured <= g.Aim:
		g.Outcome = Aim
	case measured <= g.Must:
		g.Outcome = Must
	default:
		g.Outcome = Missed
	}
	return g
}

func (g Goal) String() string {
	form := "%-3s %-58s %7.3f  must %-6g aim %-6g %s"
	if g.Unit != "ratio" {
		form = "%-3s %-58s %7.0f  must %-6g aim %-6g %s"
	}
	return fmt.Sprintf(form, g.ID, g.What, g.Measured, g.Must, g.Aim, g.Outcome)
}

// The goals of traffic, and those of single packets.
var (
	goalConnections = Goal{ID: "P1", What: "connections, CPU/op over none", Unit: "ratio", Must: 1.10, Aim: 1.06}
	goalConntrack   = Goal{ID: "P2", What: "connections, overhead over that of nftables conntrack", Unit: "ratio", Must: 0.45, Aim: 0.3}
	goalLatency     = Goal{ID: "P5", What: "request and response, p50 over none", Unit: "ratio", Must: 1.05, Aim: 1.035}
	goalDatagrams   = Goal{ID: "P6", What: "datagrams, CPU/op over none, worse of the two kinds", Unit: "ratio", Must: 1.06, Aim: 1.04}
	goalPacket      = Goal{ID: "P8", What: "packet of an established connection, net of empty", Unit: "ns", Must: 25, Aim: 15}
	goalSYN         = Goal{ID: "P9", What: "verified SYN, whole ingress path, net of empty", Unit: "ns", Must: 600, Aim: 400}
)
