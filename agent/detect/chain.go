package detect

import (
	"time"

	"github.com/demarc/demarc/bpf/abi"
)

// chain finds who moves on from a session: a program that goes back to a connection
// that somebody opened to this machine opens one to a port for administration. With
// two connections in a row it may be a jump host by design; three have almost no
// other use.
func chain(g *Engine, m *moment) []Finding {
	technique := m.technique
	if !m.admin {
		return nil
	}
	if m.contact == reached && m.proto == "tcp" {
		return sessions(g, m, technique)
	}
	if m.kind() != Chain {
		return nil
	}
	s := m.event.Signal
	connections := int(s.Hops) + 1
	severity, confidence := Low, uint8(50)
	switch {
	case connections >= g.config.Chain.Alert:
		severity, confidence = High, 85
	case connections < g.config.Chain.Note:
		return nil
	}
	origin := s.OriginWorkload
	if origin == "" {
		origin = "somebody who proved nothing"
	} else {
		origin = s.OriginZone + "/" + origin
	}
	f := m.finding("chain", technique, severity, confidence, "", "moves on to %s in a session of %s, connection %d in a row", m.target(), origin, connections)
	f.Advice = chainAdvice
	return []Finding{f}
}

// session is that somebody administers a party: how many connections in a row led
// there, and from whom.
type session struct {
	length int
	from   string
	at     time.Time
}

// sessionLasts is for how long after it was opened a connection counts as a session
// that others may go back to. When it ends is not known.
const sessionLasts = time.Hour

// sessions finds chains in flows alone: a workload that lately accepted a connection
// for administration opens one. That it is the same task that does both is not known,
// which the confidence says.
func sessions(g *Engine, m *moment, technique Technique) []Finding {
	mine := m.actors.session
	if m.at.Sub(mine.at) > sessionLasts {
		mine = session{}
	}
	f := m.event.Flow
	if to, key := party(&f.Destination, f.Direction == abi.Ingress); key.identity != 0 && to.Workload != "" {
		peer, _ := g.actors.get(key, m.at, forgetAfter)
		if !m.at.Before(peer.session.at) {
			peer.session = session{mine.length + 1, m.label(), m.at}
		}
	}
	connections := mine.length + 1
	severity, confidence := Low, uint8(40)
	switch {
	case m.actor.Workload == "" || connections < max(2, g.config.Chain.Note):
		return nil
	case connections >= g.config.Chain.Alert:
		severity, confidence = High, 70
	}
	found := m.finding("chain", technique, severity, confidence, "", "moves on to %s while %s has a session there, connection %d in a row", m.target(), mine.from, connections)
	found.Advice = chainAdvice
	found.led(m.actors.logins)
	return []Finding{found}
}

const chainAdvice = "A jump host belongs into a workload with the role bastion. Look for who holds the first session."
