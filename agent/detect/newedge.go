package detect

import (
	"net/netip"
	"time"

	"github.com/demarc/demarc/agent/flow"
)

// edges are the uses that a party made of crossings: whom it reached, on which
// port.
type edges struct {
	known recent[edge]
	since time.Time // of the first flow, or of the last change of the policy
	epoch uint32
	day   time.Time // when today's drift began
	drift int
}

// edgesKept bounds what one workload may have learned; the least recent use goes.
const edgesKept = 512

// newEdge finds the first use of a crossing that leads to many: what leads to one
// peer is declared as narrowly as it can be, and using it is no news. The policy is
// the baseline, and it is signed; what is learned here only says which of the many
// are usual. Who adds too many a day is no longer believed.
func newEdge(g *Engine, m *moment) []Finding {
	f := m.event.Flow
	if f == nil || m.contact != reached || m.actor.Workload == "" || !m.outgoing() || g.policy.leadsToOneAddress(f.Crossing) {
		return nil
	}
	c, e := g.config.NewEdge, &m.actors.edges
	if e.since.IsZero() || f.Epoch != e.epoch {
		e.since, e.epoch = m.at, f.Epoch
	}
	if m.at.Sub(e.day) >= 24*time.Hour {
		e.day, e.drift = m.at, 0
	}
	to := edgeTo(&m.peer, m.proto)
	if !e.known.see(to, m.at, 30*24*time.Hour, edgesKept, 0) || m.at.Sub(e.since) < c.Learn {
		return nil
	}
	e.drift++
	severity, confidence := Info, uint8(30)
	if e.drift > c.Drift {
		severity, confidence = Low, 60
	}
	found := m.finding("new-edge", exploitation, severity, confidence, "", "used crossing %s for the first time to reach %s", f.Crossing, m.target())
	if e.drift > c.Drift {
		found.Title = m.actor.Label() + " adds more new peers a day than a workload may"
	}
	found.Advice = "If the new peer is meant, nothing is to be done; if the crossing is wider than it needs to be, narrow it."
	return []Finding{found}
}

// edge is a peer by what is known of it: where it has an identity, all its addresses
// are the same.
type edge struct {
	target
	identity uint32 // 0 = not proved; then it is the address
}

func edgeTo(peer *flow.Endpoint, proto string) edge {
	to := edge{target: target{peer.Address, peer.Port, proto}}
	if peer.Identity != 0 && !peer.Claimed {
		to.identity, to.address = peer.Identity, netip.Addr{}
	}
	return to
}
