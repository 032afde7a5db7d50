package detect

// upwardProbe finds denied contacts with a zone that is more trusted than that of
// who tried. One is recorded; several are an alert.
func upwardProbe(g *Engine, m *moment) []Finding {
	if m.contact != denied {
		return nil
	}
	from, known := g.policy.zoneOf(m.actor.Zone, m.actor.Networks)
	to, also := g.policy.zoneOf(m.peer.Zone, m.peer.Networks)
	if !known || !also || g.policy.trust[from] >= g.policy.trust[to] {
		return nil
	}
	c := g.config.Upward
	m.actors.upward.see(m.target(), m.at, c.Within, 4*c.Count, 0)
	n := len(m.actors.upward.items)
	severity, confidence := Info, uint8(40)
	if n >= c.Count {
		severity, confidence = Medium, 75
	}
	f := m.finding("upward-probe", remoteServices, severity, confidence, to, "was refused at %d places of zone %s, which is more trusted than its own, %s", n, to, from)
	f.Advice = "Declare the crossing if it is meant; it needs a limit and a log. If not, look for what runs in the workload."
	if n >= c.Count {
		f.led(m.actors.failures)
	}
	return []Finding{f}
}
