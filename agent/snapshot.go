package agent

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/agent/journal"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/exporter"
	"github.com/demarc/demarc/policy/image"
)

// metrics is the exporter's source: the kernel's numbers under the policy's names.
type metrics struct {
	link      *link
	binder    *binder          // nil without an inventory
	journal   *journal.Journal // nil without one
	detection *detection       // nil in tests of the rest
	errors    atomic.Uint64
	applies
}

// applies counts what became of images, and how long the last one took.
type applies struct {
	mu   sync.Mutex
	last exporter.Applies
}

// count takes in one that ended: how long its parts took, and whether it is in force.
func (a *applies) count(check, core time.Duration, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		a.last.Refused++
		return
	}
	a.last.Applied++
	a.last.Check, a.last.Core = check, core
}

func (a *applies) read() exporter.Applies {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.last
}

// Snapshot implements exporter.Source.
func (m *metrics) Snapshot() exporter.Snapshot {
	s := exporter.Snapshot{State: string(api.StateUnknown), Applies: m.applies.read()}
	m.link.look(func(v view, k kernel) {
		s.Connected = v.Connected
		if v.Status != nil {
			s.State, s.Enforcing = string(v.Status.State), v.Status.State == proto.StateEnforcing
			s.Core = coreOf(v.Status)
			s.Quarantined = m.quarantined(v.Status.Quarantines)
			if g := v.Status.Active; g != nil {
				s.Policy = &exporter.Policy{Name: g.Name, Digest: g.Digest, Mode: g.Mode, Version: g.Version, Generation: g.Epoch, Applied: g.Since}
				if v.Names != nil {
					s.Policy.Expires, s.Policy.Grants = ends(v.Names.Image)
				}
			}
		}
		if k != nil {
			m.read(&s, k)
		}
	})
	for i, c := range m.link.store.Counts() {
		s.Received[i], s.Missed[i] = c.Received, c.Missed
	}
	if m.binder != nil {
		i := m.binder.status()
		s.Inventory = &exporter.Inventory{Workloads: i.Workloads, Bound: i.Bound, Problems: len(i.Problems)}
	}
	if m.journal != nil {
		j := m.journal.State()
		s.Journal = &exporter.Journal{Bytes: j.Bytes, Max: m.journal.MaxSize, Written: j.Flows, Dropped: j.Dropped}
	}
	s.ReadErrors = m.errors.Load()
	if m.detection != nil {
		s.Findings = m.detection.found.Counts()
		_, s.Unseen = m.detection.status()
	}
	return s
}

// read takes the kernel's numbers; what cannot be read is left out and counted.
func (m *metrics) read(s *exporter.Snapshot, k kernel) {
	if counts, err := k.Counts(); m.good(err) {
		s.Verdicts = m.verdicts(counts)
		s.Maps = append(s.Maps, exporter.Map{Name: "counts", Entries: len(counts), Max: k.Room().Counts})
	}
	if states, err := k.Rings(); m.good(err) {
		for i, name := range ringNames {
			s.Rings = append(s.Rings, exporter.Ring{Name: name, Made: states[i].Seq, Lost: states[i].Lost})
		}
	}
	if faults, err := k.Faults(); m.good(err) {
		s.Faults = &faults
	}
	if bound, err := k.Bindings(); m.good(err) {
		s.Bindings = m.bindings(bound)
		s.Maps = append(s.Maps, exporter.Map{Name: "bindings", Entries: len(bound), Max: k.Room().Bindings})
	}
}

func coreOf(s *proto.Status) *exporter.Core {
	c := &exporter.Core{Programs: len(s.Links), Problems: len(s.Problems), Limits: len(s.Limits), Drifts: s.Drifts, Proved: s.Proved}
	for _, l := range s.Links {
		if l.Attached {
			c.Attached++
		}
	}
	c.Shadow = s.Shadow != nil
	if s.Unconfirmed != nil {
		c.Unconfirmed = s.Unconfirmed.Until
	}
	for _, k := range s.Keys {
		c.Keys = append(c.Keys, exporter.Key{Epoch: k.Epoch, From: k.From, Until: k.Until, Sending: k.Sending})
	}
	return c
}

// ends says when an image expires, and which of its crossings do.
func ends(img *image.Image) (expires time.Time, grants []exporter.Grant) {
	if img.NotAfter != 0 {
		expires = time.Unix(img.NotAfter, 0)
	}
	for _, c := range img.Crossings {
		if c.Until != 0 {
			grants = append(grants, exporter.Grant{Crossing: c.Name, Until: time.Unix(c.Until, 0)})
		}
	}
	return expires, grants
}

func (m *metrics) good(err error) bool {
	if err != nil {
		m.errors.Add(1)
	}
	return err == nil
}

// unknown stands for identities and crossings of images that the agent no longer
// remembers, so that labels never hold a number.
const unknown = "unknown"

// newest names by the newest image that knows a number.
const newest = ^uint32(0)

func (m *metrics) party(id uint32) exporter.Party {
	if id == 0 {
		return exporter.Party{}
	}
	if name := flow.ReservedName(id); name != "" {
		return exporter.Party{Workload: name}
	}
	if workload, zone, ok := m.link.book.Workload(newest, id); ok {
		return exporter.Party{Zone: zone, Workload: workload}
	}
	return exporter.Party{Zone: unknown, Workload: unknown}
}

func (m *metrics) quarantined(all []proto.Quarantine) (out []exporter.Party) {
	for _, q := range all {
		if p := m.party(q.Identity); !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out
}

func (m *metrics) verdicts(counts map[abi.CountKey]uint64) []exporter.Verdict {
	// Several keys may get the same names, and a series may exist only once.
	sums := make(map[exporter.Verdict]uint64, len(counts))
	for key, n := range counts {
		v := exporter.Verdict{Direction: key.Direction, Verdict: key.Verdict, Reason: key.Reason, Source: m.party(key.Subject), Destination: m.party(key.Peer)}
		if key.Direction == abi.Ingress {
			v.Source, v.Destination = v.Destination, v.Source
		}
		if key.Crossing != 0 {
			v.Crossing = unknown
			if c := m.link.book.Crossing(newest, key.Crossing); c != nil {
				v.Crossing = c.Name
			}
		}
		sums[v] += n
	}
	out := make([]exporter.Verdict, 0, len(sums))
	for v, n := range sums {
		v.Count = n
		out = append(out, v)
	}
	return out
}

func (m *metrics) bindings(bound map[uint64]uint32) []exporter.Bindings {
	sums := make(map[exporter.Party]int)
	for _, id := range bound {
		if id != 0 {
			sums[m.party(id)]++
		}
	}
	var out []exporter.Bindings
	for p, n := range sums {
		out = append(out, exporter.Bindings{Party: p, Count: n})
	}
	slices.SortFunc(out, func(a, b exporter.Bindings) int {
		return cmp.Or(cmp.Compare(a.Zone, b.Zone), cmp.Compare(a.Workload, b.Workload))
	})
	return out
}
