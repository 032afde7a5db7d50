package detect

import (
	"path"
	"strings"
	"time"
)

// relay finds who hands on what it receives: a process whose accepted and opened
// connections carry the same bytes. Once is enough where they are exactly the same;
// where one side is encrypted or changes a little, it takes several times.
func relay(g *Engine, m *moment) []Finding {
	if m.kind() != Relay {
		return nil
	}
	s, c := m.event.Signal, g.config.Relay
	unlike := unlikeness(&s.Values)
	if unlike > c.Unlike {
		return nil
	}
	times, bytes := m.actors.relayed.see(m.at, c.Within, s.Bytes+s.Back)
	if bytes < c.Bytes || times < c.Times && unlike > c.Exact {
		return nil
	}
	technique := internalProxy
	if strings.HasPrefix(s.Comm, "ssh") || strings.HasPrefix(path.Base(s.Exe), "ssh") {
		technique = protocolTunnel
	}
	f := m.finding("relay", technique, Medium, 75, "", "relays between its own callers and %s, %d bytes so far", m.target(), bytes)
	f.Advice = "A proxy belongs into a workload with the role proxy. If it is none, end the process and look for who calls it."
	return []Finding{f}
}

// unlikeness is the share of what passed that was on one side only: 0 = the same on
// both.
func unlikeness(v *Values) float64 {
	all := v.Received + v.Answered + v.Bytes + v.Back
	if all == 0 {
		return 1
	}
	apart := func(a, b uint64) uint64 { return max(a, b) - min(a, b) }
	return 2 * float64(apart(v.Received, v.Bytes)+apart(v.Answered, v.Back)) / float64(all)
}

// relayed is how often, and how much, a party relayed within a time.
type relayed struct {
	times []time.Time
	bytes []uint64
}

// relaysKept bounds it.
const relaysKept = 64

func (r *relayed) see(at time.Time, span time.Duration, more uint64) (times int, bytes uint64) {
	r.times, r.bytes = append(r.times, at), append(r.bytes, more)
	old := max(0, len(r.times)-relaysKept)
	for old < len(r.times) && r.times[old].Before(at.Add(-span)) {
		old++
	}
	r.times, r.bytes = append(r.times[:0], r.times[old:]...), append(r.bytes[:0], r.bytes[old:]...)
	for _, n := range r.bytes {
		bytes += n
	}
	return len(r.times), bytes
}
