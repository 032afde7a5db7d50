package detect

import "github.com/demarc/demarc/agent/flow"

// cgroupMove finds a task that moves into the cgroup of another workload: it then
// is that workload.
func cgroupMove(_ *Engine, m *moment) []Finding {
	if m.kind() != Migrate {
		return nil
	}
	to := flow.Endpoint{Identity: m.peer.Identity, Workload: m.peer.Workload, Zone: m.peer.Zone, Reserved: m.peer.Reserved}
	f := m.finding("cgroup-move", escape, High, 80, "", "has a process that moved into a cgroup of %s", to.Label())
	f.Certain = m.actor.Workload != ""
	switch manager := m.event.Signal.Cause == "manager"; {
	case manager && to.Workload == "":
		return nil // logind and its like move sessions into scopes of their own
	case m.actor.Workload == "", manager: // who starts workloads moves its children so
		f.Severity, f.Confidence, f.Certain = Low, 20, false
	}
	f.Advice = "Only the service manager or the container runtime moves processes. Look for who may write to cgroup.procs."
	return []Finding{f}
}

// namespaceMove finds a process of a workload that went into another network
// namespace.
func namespaceMove(_ *Engine, m *moment) []Finding {
	if m.kind() != Setns {
		return nil
	}
	f := m.finding("namespace", escape, High, 80, "", "has a process that went into another network namespace")
	f.Certain = m.actor.Workload != ""
	if m.actor.Workload == "" {
		f.Severity, f.Confidence = Info, 20
	}
	f.Advice = "Only container runtimes and network plugins do so. Take CAP_SYS_ADMIN from the workload."
	return []Finding{f}
}
