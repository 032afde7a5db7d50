package detect

import (
	"fmt"
	"time"
)

// Ports of one host, and hosts of one port, that somebody tried without success.
// Only what failed counts: who talks to many is no scanner. A denial has certainly
// failed, so a scan of what no policy declares is found whatever listens there.
//
// What is remembered is one list of failed contacts for each party. It holds more
// of them than a scan needs to be found, so nobody can push out their own beginning
// unseen: whoever spreads over so many ports and hosts that neither is many is
// found for the sum.

// scanRoom is how many failed contacts are remembered of a party.
func (c *Config) scanRoom() int { return 2 * (c.PortScan.Count + c.HostSweep.Count) }

func (m *moment) hasFailed() bool { return m.contact == failed || m.contact == denied }

// remember takes a contact into what is known of its actor.
func (g *Engine) remember(m *moment) {
	if m.isRaw() && m.process != nil {
		m.actors.raw, m.actors.rawAt = m.doer(), m.at
		g.raw, g.rawAt = m.actors.raw, m.at
	}
	if m.event.Signal != nil && m.process != nil && m.peer.Address.IsValid() {
		m.actors.doers.did(m.target(), m.doer(), m.at)
	}
	if m.admin && m.contact != noContact && m.proto == "tcp" {
		m.actors.logins.add(m.event)
	}
	if m.hasFailed() {
		m.actors.failures.add(m.event)
		m.actors.failed.see(m.target(), m.at, max(g.config.PortScan.Within, g.config.HostSweep.Within), g.config.scanRoom(), uint8(m.contact))
	}
}

func portName(t target) string {
	if t.port == 0 {
		return t.proto
	}
	return fmt.Sprintf("%s/%d", t.proto, t.port)
}

// doers are the processes that lately made contacts, by what they contacted.
type doers struct {
	targets   recent[target]
	processes map[target]*Process
}

// doersKept bounds them for each party; a newer contact pushes out its own oldest.
const doersKept = 64

func (d *doers) did(t target, p *Process, at time.Time) {
	if d.processes == nil {
		d.processes = map[target]*Process{}
	}
	d.targets.see(t, at, forgetAfter, doersKept, 0)
	d.processes[t] = p
	if len(d.processes) > doersKept {
		kept := map[target]*Process{}
		for _, i := range d.targets.items {
			kept[i.value] = d.processes[i.value]
		}
		d.processes = kept
	}
}

func (d *doers) of(t target) *Process { return d.processes[t] }

// trail is the latest events of a kind, oldest first: what led to a finding.
type trail []Event

// trailKept bounds it.
const trailKept = evidenceFirst

func (t *trail) add(e *Event) {
	if len(*t) == trailKept {
		copy(*t, (*t)[1:])
		*t = (*t)[:trailKept-1]
	}
	*t = append(*t, e.kept())
}

// led makes a trail that ends with the finding's own event its evidence.
func (f *Finding) led(t trail) {
	f.Evidence = append([]Event(nil), t...)
	f.FirstSeen = t[0].Time()
	if f.FirstSeen.After(f.LastSeen) {
		f.FirstSeen = f.LastSeen
	}
}
