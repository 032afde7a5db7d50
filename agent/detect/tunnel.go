package detect

// dnsNames finds names that carry data: too long to be a name, again and again.
func dnsNames(g *Engine, m *moment) []Finding {
	if m.kind() != DNS {
		return nil
	}
	s, c := m.event.Signal, g.config.DNS
	long := int(s.Length) > c.Name || s.Labels > 0 && int(s.Length)/int(s.Labels) > c.Label
	if !long {
		return nil
	}
	n := m.actors.names.see(m.at, c.Within, c.Count, s.Count)
	if n < c.Count {
		return nil
	}
	such := ""
	if s.Name != "" {
		such = ", such as ..." + s.Name
	}
	f := m.finding("dns-tunnel", dnsTunnel, Medium, 70, "", "asked for %d long names within %s%s", n, c.Within, such)
	f.Advice = "Look at the names at the resolver. Let workloads ask your own resolver only, and count what it forwards."
	return []Finding{f}
}

// icmpEcho finds pings that carry data.
func icmpEcho(g *Engine, m *moment) []Finding {
	if m.kind() != ICMP || int(m.event.Signal.Bytes) <= g.config.ICMP.Payload {
		return nil
	}
	s, c := m.event.Signal, g.config.ICMP
	n := m.actors.echoes.see(m.at, c.Within, c.Count, s.Count)
	if n < c.Count {
		return nil
	}
	f := m.finding("icmp-tunnel", nonApplication, Medium, 70, "", "sent %d pings of more than %d bytes to %s within %s", n, c.Payload, m.peer.Address, c.Within)
	f.Advice = "ping sends 56 bytes unless told otherwise. Look at the process, and declare icmp/echo only where it is needed."
	return []Finding{f}
}
