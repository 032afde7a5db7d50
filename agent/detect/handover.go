package detect

import "github.com/demarc/demarc/bpf/abi"

// handover finds who uses a socket of another workload, as it comes through a Unix
// socket or with a process that changes its cgroup.
func handover(_ *Engine, m *moment) []Finding {
	if f := m.event.Flow; f == nil || f.Reason != abi.TaskMismatch {
		return nil
	}
	f := m.finding("handover", interprocess, High, 90, "", "was refused the use of a socket of another workload")
	f.Certain = true
	f.Advice = "Find the process that handed the socket over, or moved: two workloads share a Unix socket or a manager that should not."
	return []Finding{f}
}
