// Package simulate judges flows that were recorded by a policy that was not in force.
//
// A conversation is judged at each end that recorded it, and passes where both ends let
// it, as on the wire. Who was at an end is found by the candidate's own selectors, not by
// the names of the policy that was in force. What no policy decides (a forged tag, a
// packet that cannot be parsed, a rate that was used up) is left out and counted.
package simulate

import (
	"net/netip"
	"time"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/learn"
)

// Bounds of what is remembered, whatever was recorded.
const (
	maxTalks  = 1 << 14          // conversations that may still get another side
	maxKinds  = 10_000           // kinds of changes that are listed
	maxPlaces = 1 << 14          // places whose workload is known already
	oneTalk   = 30 * time.Second // between two records of one conversation
)

// Simulator takes in flows in the order in which they were recorded. Not for
// concurrent use.
type Simulator struct {
	image  *image.Image
	policy *policy.Policy
	index  *image.Index
	now    time.Time

	ids    map[string]image.ID // by workload
	names  map[image.ID]string // "zone/workload"
	byMeta map[string]bool     // workloads that also metadata finds
	places map[place]string    // workloads that were found
	talks  map[talkKey]*talk   // not judged yet
	queue  []*talk             // the same, oldest first
	kinds  map[kind]*Change
	result Result
}

// New makes a simulator of a verified image. Windows of crossings are those at a time.
func New(img *image.Image, now time.Time) (*Simulator, error) {
	p, err := policy.Declared(img)
	if err != nil {
		return nil, err
	}
	s := &Simulator{
		image: img, policy: p, index: img.Index(), now: now,
		ids: map[string]image.ID{}, names: map[image.ID]string{}, byMeta: map[string]bool{},
		places: map[place]string{}, talks: map[talkKey]*talk{}, kinds: map[kind]*Change{},
		result: Result{Policy: img.Name, Version: img.Version, Changes: []Change{}, NotJudged: map[string]uint64{}},
	}
	for _, w := range img.Workloads {
		s.ids[w.Name], s.names[w.ID] = w.ID, img.Zones[w.Zone].Name+"/"+w.Name
	}
	for _, sel := range img.Selectors {
		if sel.Kind == image.SelectKubernetes || sel.Kind == image.SelectContainer {
			s.byMeta[img.Workloads[sel.Workload].Name] = true
		}
	}
	return s, nil
}

// place is what tells who the judged side of a flow is.
type place struct{ cgroup, pod, container, image string }

// talkKey tells conversations apart. Calls that were refused have no port of their own
// yet, so each is one by its number, which is of its processor, and its time.
type talkKey struct {
	protocol            string
	source, destination netip.AddrPort
	node                string
	seq                 uint64
	at                  int64 // ns since 1970
}

// talk is a conversation, as each side recorded it last.
type talk struct {
	key   talkKey
	first time.Time
	last  time.Time
	sides [2]*flow.Flow // by abi.Direction; nil = not recorded
}

// Add takes a flow.
func (s *Simulator) Add(f *flow.Flow) {
	if f.Verdict.OfShadow() { // nothing came of it
		return
	}
	if why := undecided(f); why != "" {
		s.result.NotJudged[why]++
		return
	}
	if f.Verdict == abi.Audit && (f.Hook == record.HookConnect || f.Hook == record.HookSendmsg) {
		return // it was let through, and its first packet was judged, too
	}
	key := talkKey{protocol: f.Protocol, source: netip.AddrPortFrom(f.Source.Address, f.Source.Port),
		destination: netip.AddrPortFrom(f.Destination.Address, f.Destination.Port)}
	if f.Source.Port == 0 {
		key.node, key.seq, key.at = f.Node, f.Seq, f.Time.UnixNano()
	}
	t := s.talks[key]
	if t != nil && f.Time.Sub(t.last) > oneTalk {
		s.end(t)
		t = nil
	}
	if t == nil {
		t = &talk{key: key, first: f.Time, last: f.Time}
		s.talks[key] = t
		s.queue = append(s.queue, t)
	}
	kept := *f
	t.sides[f.Direction&1] = &kept
	if f.Time.Before(t.first) {
		t.first = f.Time
	}
	if f.Time.After(t.last) {
		t.last = f.Time
	}
	for len(s.talks) > maxTalks {
		s.end(s.queue[0])
	}
}

// Lost counts flows that were lost before they were recorded.
func (s *Simulator) Lost(n uint64) { s.result.Lost += n }

// undecided says why no policy decides about a flow, or "".
func undecided(f *flow.Flow) string {
	switch f.Reason {
	case abi.ByCrossing, abi.ByUnmanaged, abi.Unproven, abi.NoCrossingFor, abi.NotInWindow, abi.TagMissing,
		abi.DecoyTouched, abi.Revoked:
	default:
		return f.Reason.String()
	}
	if f.Proof == abi.ProofBad {
		return "bad-proof"
	}
	if subject, _ := ends(f); subject.Reserved == "kernel" || subject.Reserved == "pending" {
		return subject.Reserved
	}
	return ""
}

// ends are the side of a flow that was judged, and its peer.
func ends(f *flow.Flow) (subject, peer *flow.Endpoint) {
	if f.Direction == abi.Ingress {
		return &f.Destination, &f.Source
	}
	return &f.Source, &f.Destination
}

// end judges a conversation that gets no more records.
func (s *Simulator) end(t *talk) {
	if s.talks[t.key] == t {
		delete(s.talks, t.key)
	}
	for len(s.queue) > 0 && s.talks[s.queue[0].key] != s.queue[0] {
		s.queue[0] = nil
		s.queue = s.queue[1:]
	}
	s.judge(t)
}

// who is the identity of a flow's judged side under the candidate. Its selectors say so
// where the place is recorded; the recorded name stands in where only metadata that
// flows do not carry could tell.
func (s *Simulator) who(e *flow.Endpoint) image.ID {
	at := place{e.Cgroup, e.Pod, e.Container, e.Image}
	name, known := s.places[at]
	if !known {
		name = learn.Selected(s.policy, *e)
		if len(s.places) >= maxPlaces {
			clear(s.places)
		}
		s.places[at] = name
	}
	if name == "" && (e.Cgroup == "" || s.byMeta[e.Workload]) {
		name = e.Workload
	}
	if id, found := s.ids[name]; found {
		return id
	}
	return image.Unmanaged
}

// peer is what the candidate's judge would know of the other end of a side.
func (s *Simulator) peer(f, other *flow.Flow) (abi.Proof, image.ID) {
	if other != nil {
		far, _ := ends(other)
		id := s.who(far)
		switch {
		case id >= image.FirstID:
			return abi.ProofIdentity, id
		case f.Node == other.Node: // only the own host vouches for its unmanaged processes
			return abi.ProofIdentity, image.Unmanaged
		}
		return abi.ProofNone, image.None
	}
	if f.Proof != abi.ProofIdentity {
		return f.Proof, image.None
	}
	_, e := ends(f)
	if id, found := s.ids[e.Workload]; found {
		return abi.ProofIdentity, id
	}
	if e.Reserved == "unmanaged" {
		return abi.ProofIdentity, image.Unmanaged
	}
	return abi.ProofNone, image.None
}

// protocols are the words of flows that the language has, too.
var protocols = map[string]image.Proto{"tcp": image.TCP, "udp": image.UDP, "sctp": image.SCTP, "icmp": image.ICMP, "icmp6": image.ICMP6}

// port is what policy speaks of. Flows do not carry ICMP types: what hosts open are echoes.
func port(f *flow.Flow) image.Port {
	proto := protocols[f.Protocol]
	switch proto {
	case image.ICMP:
		return image.Port{Proto: proto, Number: 8}
	case image.ICMP6:
		return image.Port{Proto: proto, Number: 128}
	case image.Other:
		return image.Port{}
	}
	return image.Port{Proto: proto, Number: f.Destination.Port}
}

// ruling is what one side, or both together, decided.
type ruling struct {
	verdict  abi.Verdict
	reason   abi.Reason
	crossing string
}

// weight orders verdicts by which of two sides' decides about a conversation.
func (r ruling) weight() int {
	switch r.verdict {
	case abi.Deny:
		return 3
	case abi.Audit:
		return 2
	case abi.Provisional:
		return 1
	}
	return 0
}

// judge compares what was decided about a conversation with what the candidate would.
func (s *Simulator) judge(t *talk) {
	var was, would ruling
	ids := [2]image.ID{}
	first := true
	for d, f := range t.sides {
		if f == nil {
			continue
		}
		subject, peer := ends(f)
		q := image.Query{Subject: s.who(subject), Direction: abi.Direction(d), Port: port(f), Address: peer.Address, Now: s.now}
		q.Proof, q.Peer = s.peer(f, t.sides[1-d])
		ids[d] = q.Subject
		if ids[1-d] == image.None {
			ids[1-d] = q.Peer
		}
		then := ruling{f.Verdict, f.Reason, f.Crossing}
		decision := s.index.Decide(q)
		next := ruling{verdict: decision.Verdict, reason: decision.Reason}
		if decision.Crossing >= 0 {
			next.crossing = s.image.Crossings[decision.Crossing].Name
		}
		if next.verdict == abi.Deny && s.image.Mode == image.Observe {
			next.verdict = abi.Audit
		}
		if first || then.weight() > was.weight() {
			was = then
		}
		if first || next.weight() > would.weight() {
			would = next
		}
		first = false
	}
	s.result.Conversations++
	if was.verdict == would.verdict {
		return
	}
	some := t.sides[0]
	if some == nil {
		some = t.sides[1]
	}
	s.change(t, kind{
		From: s.label(ids[abi.Egress], &some.Source), To: s.label(ids[abi.Ingress], &some.Destination), Port: portWord(some),
		Was: was.verdict, WasReason: was.reason, WasCrossing: was.crossing,
		Would: would.verdict, WouldReason: would.reason, WouldCrossing: would.crossing,
	})
}

// label names an end: as the candidate does if it knows it, as it was recorded
// otherwise, by its address if nothing else is known.
func (s *Simulator) label(id image.ID, e *flow.Endpoint) string {
	if name, found := s.names[id]; found {
		return name
	}
	if id == image.Unmanaged && e.Workload != "" {
		return "unmanaged (was " + e.Label() + ")"
	}
	if label := e.Label(); label != "unknown" || !e.Address.IsValid() {
		return label
	}
	return e.Address.String()
}

func (s *Simulator) change(t *talk, k kind) {
	passed, passes := k.Was != abi.Deny, k.Would != abi.Deny
	switch {
	case passed && !passes:
		s.result.NewlyDenied++
	case !passed && passes:
		s.result.NewlyPassed++
	}
	c := s.kinds[k]
	if c == nil {
		if len(s.kinds) >= maxKinds {
			s.result.NotListed++
			return
		}
		c = &Change{kind: k, First: t.first, Last: t.last}
		s.kinds[k] = c
	}
	c.Flows++
	if t.first.Before(c.First) {
		c.First = t.first
	}
	if t.last.After(c.Last) {
		c.Last = t.last
	}
}
