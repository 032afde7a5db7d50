package detect

import "slices"

// banner finds SSH where nobody expects it.
func banner(g *Engine, m *moment) []Finding {
	port := m.peer.Port
	if m.kind() != Banner || slices.Contains(g.config.SSHPorts, port) {
		return nil
	}
	f := m.finding("banner", nonStandardPort, Medium, 80, "", "speaks SSH on %s", m.target())
	f.Advice = "Add the port to detect.sshPorts if SSH is meant to be there. Otherwise it is a tunnel through a port that is open for something else."
	return []Finding{f}
}
