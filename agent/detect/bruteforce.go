package detect

import "slices"

// attempt is one connection to a service on which somebody logs in.
type attempt struct {
	to   target
	from uint16 // the port that the attempt came from, which tells attempts apart
}

// bruteForcing finds who connects again and again to log in. What is said on the
// connection is not looked at: many short ones in a few seconds are enough.
func bruteForcing(g *Engine, m *moment) []Finding {
	c := g.config.BruteForce
	f := m.event.Flow
	if f == nil || m.contact != reached || m.proto != "tcp" || !slices.Contains(c.Services, m.peer.Port) {
		return nil
	}
	now := attempt{m.target(), f.Source.Port}
	m.actors.attempts.see(now, m.at, c.Within, max(c.Count, c.Total), 0)
	same := m.actors.attempts.count(func(i item[attempt]) bool { return i.value.to == now.to })
	if same < c.Count && len(m.actors.attempts.items) < c.Total {
		return nil
	}
	found := m.finding("brute-force", bruteForce, Medium, 75, portName(now.to), "connected %d times within %s to log in by %s", len(m.actors.attempts.items), c.Within, portName(now.to))
	found.Advice = "Look at the service's log for refused logins, and at the process for who tries. A limit on the crossing slows it down."
	if len(m.actors.logins) > 0 {
		found.led(m.actors.logins)
	}
	return []Finding{found}
}
