package detect

const scanAdvice = "Look at the process: a scanner belongs into a workload with the role scanner. Quarantine the workload if nobody started one."

// portScan finds who tries many ports, of one host or of several.
func portScan(g *Engine, m *moment) []Finding {
	if m.kind() == Ports && int(m.event.Signal.Distinct) >= g.config.PortScan.Count {
		f := m.finding("port-scan", serviceDiscovery, Medium, 90, "", "tried about %d %s ports of %s, and none was open to it", m.event.Signal.Distinct, m.proto, m.peer.Address)
		f.Advice = scanAdvice
		return []Finding{f}
	}
	if !m.hasFailed() {
		return nil
	}
	c, now := g.config.PortScan, m.target()
	since := m.at.Add(-c.Within)
	ports := m.actors.failed.count(func(i item[target]) bool {
		return !i.at.Before(since) && i.value.address == now.address && i.value.proto == now.proto
	})
	all := m.actors.failed.count(func(i item[target]) bool { return !i.at.Before(since) })
	switch {
	case ports >= c.Count:
		f := m.finding("port-scan", serviceDiscovery, Medium, 90, "", "tried %d %s ports of %s, and none was open to it", ports, now.proto, now.address)
		f.Advice = scanAdvice
		f.led(m.actors.failures)
		return []Finding{f}
	case all >= g.config.PortScan.Count+g.config.HostSweep.Count:
		f := m.finding("port-scan", serviceDiscovery, Medium, 80, "", "tried %d ports of several hosts, and none was open to it", all)
		f.Advice = scanAdvice
		f.led(m.actors.failures)
		return []Finding{f}
	}
	return nil
}
