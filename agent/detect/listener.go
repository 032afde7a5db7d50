package detect

// listener finds who listens where no crossing leads: a back door, or a service
// that nobody declared. Nobody can reach it, which keeps this low.
func listener(_ *Engine, m *moment) []Finding {
	if m.kind() != Listen || m.actor.Workload == "" {
		return nil
	}
	s := m.event.Signal
	port := s.Local.Port
	if port == 0 {
		port = m.peer.Port
	}
	f := m.finding("listener", nonStandardPort, Info, 40, "", "listens on %s", portName(target{port: port, proto: m.proto}))
	f.Title += ", which no crossing leads to"
	f.Advice = "Declare the port if it is meant to be reached. Otherwise look at the process."
	return []Finding{f}
}
