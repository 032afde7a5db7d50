package detect

import (
	"slices"
	"time"
)

// forgetAfter is for how long an address that did nothing is remembered.
const forgetAfter = 24 * time.Hour

// actor is what is remembered of one party: a part for each detector that needs
// one, each of bounded size.
type actor struct {
	failed   recent[target]  // contacts that failed, within the time of scans
	first    recent[target]  // contacts that failed, within the time of slow scans,
	good     recent[target]  // and those that did not
	admin    recent[target]  // hosts on ports for administration
	attempts recent[attempt] // to log in
	upward   recent[target]  // denied contacts with more trusted zones
	stale    burst           // proofs
	edges    edges           // that were used
	volumes  volumes         // bytes that edges usually carry
	relayed  relayed         // from its callers to others
	typed    relayed         // the same, of little messages
	names    burst           // long DNS names
	echoes   burst           // large ICMP payloads
	failures trail           // events of contacts that failed,
	logins   trail           // and of those that may be logins
	session  session         // that somebody has here
	doers    doers           // processes behind contacts
	unnamed  []unnamed       // findings that wait for one
	raw      *Process        // that last opened a raw socket,
	rawAt    time.Time       // and when
}

// Engine runs every detector on events, one after the other. It knows no other time
// than that of the events, so what it finds in a recording is what it found live.
// It belongs to one goroutine.
type Engine struct {
	config *Config
	policy *Policy
	actors roster[actor]
	spread spread
	raw    *Process // that last opened a raw socket on this node
	rawAt  time.Time

	event  Event  // that is looked at,
	moment moment // and what it is; both used again for each
}

// NewEngine makes an engine; nil = the default configuration.
func NewEngine(c *Config) *Engine {
	if c == nil {
		c = DefaultConfig()
	}
	return &Engine{config: c, policy: &Policy{}}
}

// SetPolicy tells the engine which policy is in force from the next event on.
func (g *Engine) SetPolicy(p *Policy) { g.policy = p }

// detectors are the rows of the catalogue. Each is a function of an event and of
// what is remembered of its actor.
var detectors = []func(*Engine, *moment) []Finding{
	portScan, hostSweep, slowScan, spreading, fanOut, newEdge, upwardProbe, bruteForcing, forgery, metadataService,
	decoy, rawSocket, handover, chain, relay, shell, cgroupMove, namespaceMove, tunDevice, listener, transfer, dnsNames, icmpEcho, banner,
	lostSignals,
}

// See takes in an event and returns what it makes suspicious. A finding may come
// again and again, with the same key; Findings puts them together. It keeps nothing of
// the event.
func (g *Engine) See(e Event) []Finding {
	if (e.Flow == nil) == (e.Signal == nil) {
		return nil
	}
	g.event = e
	m := g.look(&g.event)
	g.remember(m)
	var found []Finding
	for _, d := range detectors {
		for _, f := range d(g, m) {
			if g.config.mode(f.Technique) == Off {
				continue
			}
			g.attribute(m, &f)
			f.SuppressedBy = g.policy.suppresses(&f)
			found = append(found, f)
		}
	}
	for _, f := range m.actors.named(m) {
		f.SuppressedBy = g.policy.suppresses(&f)
		found = append(found, f)
	}
	return found
}

// attributeWithin is how long after a process opened a raw socket packets without
// a socket are taken for its own.
const attributeWithin = 5 * time.Minute

// attribute names the process of a finding whose event names none: an allowed flow
// is told where its packets pass, and the process that opened it by a signal. Who sends
// packets by a raw socket has no socket that they come from: then it is the process
// that last opened one in the same workload.
func (g *Engine) attribute(m *moment, f *Finding) {
	if f.Process != nil {
		return
	}
	switch doer := m.actors.doers.of(m.target()); {
	case doer != nil:
		f.Process = doer
	case m.actors.raw != nil && m.at.Sub(m.actors.rawAt) <= attributeWithin:
		f.Process = m.actors.raw
	case m.actor.Identity == 0 && m.event.Flow != nil && m.outgoing() && g.raw != nil && m.at.Sub(g.rawAt) <= attributeWithin:
		f.Process = g.raw
	default:
		m.actors.wait(m, f)
	}
}

// unnamed is a finding whose process is not known yet. A flow and the signal that
// names its process come by two rings, in either order.
type unnamed struct {
	finding Finding // without its evidence
	of      target
	at      time.Time
}

// Bounds of those that wait. Rings are read within milliseconds of each other.
const (
	unnamedKept = 8 // of each party; a newer one pushes out its own oldest
	namedWithin = 10 * time.Second
)

func (a *actor) wait(m *moment, f *Finding) {
	if !m.peer.Address.IsValid() || m.actor.Identity == 0 {
		return
	}
	a.unnamed = slices.DeleteFunc(a.unnamed, func(u unnamed) bool { return u.finding.Key == f.Key })
	if len(a.unnamed) == unnamedKept {
		a.unnamed = slices.Delete(a.unnamed, 0, 1)
	}
	u := unnamed{*f, m.target(), m.at}
	u.finding.Evidence = nil
	a.unnamed = append(a.unnamed, u)
}

// named are the findings that a signal names the process of: no new sighting, but
// the signal belongs to their evidence.
func (a *actor) named(m *moment) (found []Finding) {
	if m.event.Signal == nil || m.process == nil || len(a.unnamed) == 0 {
		return nil
	}
	a.unnamed = slices.DeleteFunc(a.unnamed, func(u unnamed) bool {
		if u.of != m.target() {
			return m.at.Sub(u.at) > namedWithin
		}
		if m.at.Sub(u.at) <= namedWithin {
			f := u.finding
			f.Count, f.Process, f.Evidence = 0, m.doer(), []Event{m.event.kept()}
			found = append(found, f)
		}
		return true
	})
	return found
}
