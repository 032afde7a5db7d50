package detect

// tunDevice finds who makes a network device of its own: what goes through it is
// carried by something else.
func tunDevice(_ *Engine, m *moment) []Finding {
	if m.kind() != Tun {
		return nil
	}
	f := m.finding("tun", protocolTunnel, Medium, 80, "", "holds a tun or tap device")
	f.Certain = true
	f.Advice = "A VPN belongs into a workload that is declared for it. Take CAP_NET_ADMIN from this one."
	return []Finding{f}
}
