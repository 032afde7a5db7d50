package detect

// chain finds who moves on from a session: a program that goes back to a connection
// that somebody opened to this machine opens one to a port for administration. With
// two connections in a row it may be a jump host by design; three have almost no
// other use.
func chain(g *Engine, m *moment) []Finding {
	technique, admin := adminPorts[m.peer.Port]
	if m.kind() != Chain || !admin {
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
	f.Advice = "A jump host belongs into a workload with the role bastion. Look for who holds the first session."
	return []Finding{f}
}
