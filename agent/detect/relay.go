package detect

import (
	"path"
	"strings"
)

// relay finds who hands on what it receives: a process whose accepted and opened
// connections carry the same bytes.
func relay(_ *Engine, m *moment) []Finding {
	if m.kind() != Relay {
		return nil
	}
	s := m.event.Signal
	technique := internalProxy
	if strings.HasPrefix(s.Comm, "ssh") || strings.HasPrefix(path.Base(s.Exe), "ssh") {
		technique = protocolTunnel
	}
	f := m.finding("relay", technique, Medium, 75, "", "relays between its own callers and %s, %d bytes so far", m.target(), s.Bytes)
	f.Advice = "A proxy belongs into a workload with the role proxy. If it is none, end the process and look for who calls it."
	return []Finding{f}
}
