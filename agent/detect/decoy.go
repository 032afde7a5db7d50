package detect

// decoy finds who touches what is there only to be touched.
func decoy(g *Engine, m *moment) []Finding {
	crossing := ""
	switch f, s := m.event.Flow, m.event.Signal; {
	case f != nil && g.policy.decoys[f.Crossing]:
		crossing = f.Crossing
	case s != nil && s.Kind == Decoy:
		crossing = s.Crossing
	default:
		return nil
	}
	f := m.finding("decoy", serviceDiscovery, High, 99, crossing, "touched decoy %s at %s", crossing, m.target())
	f.Certain = true
	f.Advice = "Nothing that is meant leads there. Quarantine the workload, and look for who is in it."
	return []Finding{f}
}
