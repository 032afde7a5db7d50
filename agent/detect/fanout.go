package detect

// adminPorts are those by which machines are administered, with the technique of
// using them to move on.
var adminPorts = map[uint16]Technique{
	22: sshService, 23: remoteServices, 139: adminShares, 445: adminShares, 3389: remoteDesktop,
	5900: remoteServices, 5985: remoteManagement, 5986: remoteManagement,
}

// fanOut finds who administers many hosts, whether it was let in or not.
func fanOut(g *Engine, m *moment) []Finding {
	if m.contact == noContact || m.proto != "tcp" || !m.admin {
		return nil
	}
	c, now := g.config.FanOut, m.target()
	m.actors.admin.see(now, m.at, c.Within, 2*c.Count*len(adminPorts), uint8(m.contact))
	hosts := m.actors.admin.count(func(i item[target]) bool { return i.value.port == now.port })
	if hosts < c.Count {
		return nil
	}
	f := m.finding("fan-out", m.technique, Medium, 70, portName(now), "went to %s of %d hosts within %s", portName(now), hosts, c.Within)
	f.Advice = "Who administers many hosts belongs into a workload with the role bastion or management. Look for who logged in where."
	f.led(m.actors.logins)
	return []Finding{f}
}
