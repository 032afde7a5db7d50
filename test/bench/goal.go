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

// Goal is an upper bound of something measured; where Aim is above Must, a lower one.
type Goal struct {
	ID       string  `json:"id"`
	What     string  `json:"what"`
	Unit     string  `json:"unit"` // "ratio", "ns", "ms", "%", "MB" or "/s"
	Must     float64 `json:"must"`
	Aim      float64 `json:"aim"`
	Measured float64 `json:"measured"`
	Outcome  Outcome `json:"outcome"`
}

// judge says how a measured value stands to its bounds, if the control lets it.
func (g Goal) judge(measured float64, conclusive bool) Goal {
	g.Measured = measured
	within := func(bound float64) bool {
		if g.Aim > g.Must {
			return measured >= bound
		}
		return measured <= bound
	}
	switch {
	case !conclusive:
		g.Outcome = Inconclusive
	case within(g.Aim):
		g.Outcome = Aim
	case within(g.Must):
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

// The goals of events on their way through the agent.
var (
	goalIdle     = Goal{ID: "P15", What: "agent, resident, idle, a small policy", Unit: "MB", Must: 40, Aim: 25}
	goalResident = Goal{ID: "P15", What: "agent, resident, idle, 10,000 identities", Unit: "MB", Must: 150, Aim: 90}
	goalEvents   = Goal{ID: "P17", What: "events through the agent to a reader, none lost", Unit: "/s", Must: 100_000, Aim: 300_000}
	goalExact    = Goal{ID: "P18", What: "events neither delivered nor counted as lost, at 1,000,000/s", Unit: "", Must: 0, Aim: 0}
	goalNode     = Goal{ID: "P15", What: "agent, resident, idle, 200 workloads, 1,000 rules", Unit: "MB", Must: 40, Aim: 25}
	goalAllowed  = Goal{ID: "P19", What: "agent's CPU at 10,000 connections/s of 200 workloads", Unit: "%", Must: 15, Aim: 8}
	goalCPU      = Goal{ID: "P19", What: "agent's CPU at 10,000 connections/s, every event read", Unit: "%", Must: 15, Aim: 8}
)

// The goals of traffic, and those of single packets.
var (
	goalConnections = Goal{ID: "P1", What: "connections, CPU/op over none", Unit: "ratio", Must: 1.10, Aim: 1.06}
	goalConntrack   = Goal{ID: "P2", What: "connections, overhead over that of nftables conntrack", Unit: "ratio", Must: 0.45, Aim: 0.3}
	goalLatency     = Goal{ID: "P5", What: "request and response, p50 over none", Unit: "ratio", Must: 1.05, Aim: 1.035}
	goalDatagrams   = Goal{ID: "P6", What: "datagrams, CPU/op over none, worse of the two kinds", Unit: "ratio", Must: 1.06, Aim: 1.04}
	goalPacket      = Goal{ID: "P8", What: "packet of an established connection, net of empty", Unit: "ns", Must: 25, Aim: 15}
	goalSYN         = Goal{ID: "P9", What: "verified SYN, whole ingress path, net of empty", Unit: "ns", Must: 600, Aim: 400}
)
