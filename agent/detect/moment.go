package detect

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// moment is one event as detectors look at it: who did what to whom.
type moment struct {
	config *Config
	policy *Policy
	event  *Event
	at     time.Time
	node   string

	actor   Party // who opened the flow, or did what the signal says
	key     who
	process *Process      // not to be kept: see doer
	self    Process       // what it points to
	peer    flow.Endpoint // whom it was about; the zero value where there is none
	proto   string

	technique Technique // of moving on by the peer's port,
	admin     bool      // which is one for administration

	contact outcome // of a contact with peer, if it is about one
	actors  *actor  // what is remembered of the actor
}

// outcome of a contact. A denial is worse than a failure, which success elsewhere
// makes good.
type outcome uint8

const (
	noContact outcome = 0
	tried     outcome = 1 // what came of it is not known
	reached   outcome = 2
	failed    outcome = 3
	denied    outcome = 4
)

// target is what was contacted.
type target struct {
	address netip.Addr
	port    uint16
	proto   string
}

func (t target) String() string {
	if t.port == 0 {
		return fmt.Sprintf("%s %s", t.proto, t.address)
	}
	return fmt.Sprintf("%s/%d at %s", t.proto, t.port, t.address)
}

func (m *moment) target() target { return target{m.peer.Address, m.peer.Port, m.proto} }

// look takes an event apart.
func (g *Engine) look(e *Event) *moment {
	m := &g.moment
	*m = moment{}
	m.config, m.policy, m.event = g.config, g.policy, e
	if f := e.Flow; f != nil {
		m.ofFlow(f)
	} else {
		m.ofSignal(e.Signal)
	}
	m.technique, m.admin = adminPorts[m.peer.Port]
	m.actors, m.key = g.actors.get(m.key, m.at, forgetAfter)
	return m
}

func (m *moment) ofFlow(f *flow.Flow) {
	m.at, m.node, m.proto, m.peer = f.Time, f.Node, f.Protocol, f.Destination
	m.actor, m.key = party(&f.Source, f.Direction == abi.Egress)
	if f.PID != 0 && f.Direction == abi.Egress {
		m.self = Process{PID: f.PID, Comm: f.Comm, Cgroup: f.Source.Cgroup}
		m.process = &m.self
	}
	if !f.Destination.Address.IsValid() {
		return
	}
	switch f.Verdict {
	case abi.Allow, abi.Provisional:
		m.contact = reached
	case abi.Deny, abi.Audit:
		if isContact(f) {
			m.contact = denied
		}
	}
}

func (m *moment) ofSignal(s *Signal) {
	m.at, m.node, m.proto, m.peer = s.Time, s.Node, s.Protocol, s.Peer
	self := flow.Endpoint{Identity: s.Subject, Workload: s.Workload, Zone: s.Zone, Reserved: s.Reserved, Cgroup: s.Cgroup, Address: s.Local.Address, Port: s.Local.Port}
	if s.Direction == abi.Ingress.String() {
		m.actor, m.key = party(&s.Peer, false)
		m.peer = self
	} else {
		m.actor, m.key = party(&self, true)
		if s.PID != 0 {
			m.self = Process{PID: s.PID, StartTime: s.StartTime, Comm: s.Comm, Exe: s.Exe, Cgroup: s.Cgroup, UID: s.UID}
			m.process = &m.self
		}
	}
	if !m.peer.Address.IsValid() {
		return
	}
	switch s.Kind {
	case Contact, Chain:
		m.contact = tried
	case Edge:
		m.contact = denied
	case Failed:
		m.contact = failed
		if s.Cause == "denied" {
			m.contact = denied
		}
	}
}

// doer is the process for longer than the moment, or nil.
func (m *moment) doer() *Process {
	if m.process == nil {
		return nil
	}
	p := *m.process
	return &p
}

// kind of the signal; 0 for a flow.
func (m *moment) kind() SignalKind {
	if m.event.Signal == nil {
		return 0
	}
	return m.event.Signal.Kind
}

// isContact says whether a denial is one of a contact that somebody tried: what is
// refused for its rate, for want of room or while quarantined says nothing new.
func isContact(f *flow.Flow) bool {
	switch f.Reason {
	case abi.NoCrossingFor, abi.NotInWindow, abi.TagMissing, abi.Protocol, abi.ICMPType, abi.NoSocket, abi.Unbound, abi.PendingSubject,
		abi.Fragment, abi.Malformed, abi.IPOptions:
		return f.Hook != record.HookSockCreate
	case abi.NoState:
		// A segment without a connection is a probe, or comes late. What comes late is
		// mostly an answer, on its way back to a port that the system chose.
		const ephemeral = 32768
		return f.Destination.Port < ephemeral
	}
	return false
}

// party names one side of a flow. An identity that was claimed with a bad proof is
// nobody's.
func party(e *flow.Endpoint, judged bool) (Party, who) {
	p := Party{Address: e.Address, Networks: e.Networks}
	if e.Identity == 0 || e.Claimed {
		return p, who{address: e.Address}
	}
	p.Identity, p.Workload, p.Zone, p.Reserved, p.Networks = e.Identity, e.Workload, e.Zone, e.Reserved, nil
	key := who{identity: e.Identity}
	if e.Reserved != "" {
		if key.cgroup = e.Cgroup; !judged || key.cgroup == "" {
			key.address, key.cgroup = e.Address, "-"
		}
	}
	return p, key
}

// finding starts a finding about the actor; the key may tell several of one
// detector apart by few words.
func (m *moment) finding(detector string, t Technique, s Severity, confidence uint8, key, title string, args ...any) Finding {
	return Finding{
		Key: fmt.Sprintf("%s|%s|%s", detector, m.label(), key), Detector: detector, Technique: t, Severity: s, Confidence: confidence,
		Title: m.actor.Label() + " " + fmt.Sprintf(title, args...), Node: m.node, Subject: m.actor, Process: m.doer(),
		FirstSeen: m.at, LastSeen: m.at, Count: 1, Evidence: []Event{m.event.kept()},
	}
}

// label keys the actor.
func (m *moment) label() string {
	switch k := m.key; {
	case k.identity != 0 && k.cgroup == "":
		return m.actor.Label()
	case k.identity != 0 && k.cgroup != "-":
		return m.actor.Label() + " " + k.cgroup
	case k.bits != 0:
		return fmt.Sprintf("%s/%d", k.address, k.bits)
	case k.address.IsValid():
		return k.address.String()
	}
	return "unknown"
}

// outgoing says whether the side that opened the flow was judged: only then is it
// this node's own.
func (m *moment) outgoing() bool {
	return m.event.Flow != nil && m.event.Flow.Direction == abi.Egress
}
