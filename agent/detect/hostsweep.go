package detect

const sweepAdvice = "Look at the process: discovery belongs into a workload with the role scanner or monitor. Quarantine the workload if nobody started one."

// hostSweep finds who tries one port of many hosts.
func hostSweep(g *Engine, m *moment) []Finding {
	if m.kind() == Peers && int(m.event.Signal.Distinct) >= g.config.HostSweep.Count {
		f := m.finding("host-sweep", systemDiscovery, Medium, 90, "", "tried %s of about %d hosts, and was let in by none", portName(m.target()), m.event.Signal.Distinct)
		f.Advice = sweepAdvice
		return []Finding{f}
	}
	if !m.hasFailed() {
		return nil
	}
	c, now := g.config.HostSweep, m.target()
	since := m.at.Add(-c.Within)
	hosts := m.actors.failed.count(func(i item[target]) bool {
		return !i.at.Before(since) && i.value.port == now.port && i.value.proto == now.proto
	})
	if hosts < c.Count {
		return nil
	}
	f := m.finding("host-sweep", systemDiscovery, Medium, 90, "", "tried %s of %d hosts, and was let in by none", portName(now), hosts)
	f.Advice = sweepAdvice
	f.led(m.actors.failures)
	return []Finding{f}
}
