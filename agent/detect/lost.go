package detect

// lostSignals tells that signals of somebody were lost, as they are when somebody
// makes more of them than one may: what they hide is not known.
func lostSignals(_ *Engine, m *moment) []Finding {
	if m.kind() != Lost || m.actor.Identity == 0 {
		return nil
	}
	f := m.finding("lost", impairDefenses, Low, 40, "", "made more signals than are kept of one workload; %d were lost (%s)", m.event.Signal.Count, m.event.Signal.Cause)
	f.Advice = "Signals of others were not touched. Look at what this workload does so often."
	return []Finding{f}
}
