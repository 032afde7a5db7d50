package detect

import (
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
)

// forgery finds who proves an identity that it has not: a false MAC, a tag that was
// used before, an identity that is none, an address that is another's. One is
// certain. Old proofs come from clocks and rotated keys, too, so those are counted.
func forgery(g *Engine, m *moment) []Finding {
	var reason abi.Reason
	egress := false
	switch f, s := m.event.Flow, m.event.Signal; {
	case f != nil:
		reason, egress = f.Reason, f.Direction == abi.Egress
	case s.Kind == Proof && reason.UnmarshalText([]byte(s.Cause)) == nil:
		egress = s.Direction != abi.Ingress.String()
	}
	stale := false
	switch reason {
	case abi.TagMalformed, abi.TagBadMAC, abi.TagBadIdentity, abi.TagReplayed, abi.TagUnbound, abi.Spoof:
	case abi.TagWrongEpoch, abi.TagStale:
		stale = true
	default:
		return nil
	}
	if egress && reason != abi.Spoof {
		// The answer was false: who gave it is the peer.
		peer := *m
		peer.actor, peer.key = party(&m.peer, false)
		peer.actors, peer.key = g.actors.get(peer.key, m.at, forgetAfter)
		peer.process = nil
		m = &peer
	}
	var claimed string
	if f := m.event.Flow; f != nil {
		claimed = claim(&f.Source, &f.Destination)
	} else {
		claimed = claim(&m.event.Signal.Peer)
	}
	severity, confidence, certain := High, uint8(95), true
	if stale {
		if m.actors.stale.see(m.at, g.config.Forgery.Within, g.config.Forgery.Count, 1) < g.config.Forgery.Count {
			return nil
		}
		severity, confidence, certain = Low, 50, false
	}
	found := m.finding("forgery", masquerading, severity, confidence, reason.String(), "showed a false proof (%s)%s", reason, claimed)
	found.Certain = certain
	found.Advice = "Find the machine behind the address. Whoever forges proofs there has a workload's packets or a wrong keyring: compare `demarc keys` of both nodes, and their clocks."
	return []Finding{found}
}

// claim names whom a false proof claims to be.
func claim(ends ...*flow.Endpoint) string {
	for _, e := range ends {
		if e.Claimed {
			named := *e
			named.Claimed = false
			return " and claimed to be " + named.Label()
		}
	}
	return ""
}
