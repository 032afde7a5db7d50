package detect

import (
	"github.com/demarc/demarc/bpf/abi"
)

const rawAdvice = "Look at the process. ping works without raw sockets where net.ipv4.ping_group_range admits its group; captures belong onto the host."

// isRaw says whether the event is a raw or packet socket.
func (m *moment) isRaw() bool {
	f := m.event.Flow
	return f != nil && f.Reason == abi.RawSocket || m.kind() == Raw
}

// rawSocket finds who opens a socket that reads or makes packets. No workload needs
// one that the policy does not know of.
func rawSocket(_ *Engine, m *moment) []Finding {
	if !m.isRaw() {
		return nil
	}
	did := "asked for a raw socket, and was refused"
	if s := m.event.Signal; s != nil && s.Cause != "refused" {
		did = "opened a raw or packet socket"
	}
	if m.proto == "icmp" || m.proto == "icmp6" {
		f := m.finding("raw-socket", sniffing, Low, 30, m.proto, "%s, of the kind that ping uses", did)
		f.Advice = rawAdvice
		return []Finding{f}
	}
	f := m.finding("raw-socket", sniffing, Medium, 90, "", "%s", did)
	f.Certain = true
	f.Advice = rawAdvice
	return []Finding{f}
}
