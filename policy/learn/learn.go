// Package learn proposes a policy from flows that were seen.
//
// It proposes what was asked for by processes with a name of their own (a unit, a
// container, a cgroup) and, where it is TCP, answered. Whatever failed a proof, was
// over a limit, was denied, or looks like a scan is not proposed but listed: a person
// has to decide.
package learn

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/policy"
)

// Bounds of what is remembered, whatever was seen.
const (
	maxTalks   = 1 << 17 // conversations that may still get another side
	maxEdges   = 20_000  // kinds of flows
	maxPeers   = 1024    // addresses of one kind of flow
	maxRefused = 1000    // kinds of what is not proposed
)

// Options of a learner. The zero value starts from nothing.
type Options struct {
	Name        string // of the policy; "" = learned
	TrustDomain string // "" = learned.example
	Version     uint64 // 0 = 1
	// Base is a policy that stays as it is, to which is added what it lacks; nil =
	// none. The three above are then its own.
	Base *policy.Policy
}

// Learner takes in flows, in any order, and proposes a policy. Not for concurrent use.
type Learner struct {
	options Options
	talks   map[talkKey]*talk
	order   []talkKey             // oldest first
	calls   map[callKey]time.Time // UDP sockets that were connected; zero = and sent something
	edges   map[edgeKey]*edge
	refused map[refusal]*tally
	judged  map[place]example  // the last process seen of a place
	met     map[place]*members // of places that are pods or named containers
	members int                // cgroups of all of those
	seen    tally
	lost    uint64
	unnamed string // a workload that no base declares
	full    bool
}

// talkKey is one conversation, opener first.
type talkKey struct {
	protocol    string
	source      netip.AddrPort
	destination netip.AddrPort
}

// callKey is a UDP socket that was connected: to ask for a route, many never send.
type callKey struct {
	from place
	to   netip.AddrPort
}

// talk is what both ends have told of a conversation.
type talk struct {
	from, to place
	nodes    [2]string // that told of either
	answered bool      // TCP: the answer came
	doubt    string    // why it must not be proposed
	at       time.Time
}

// edgeKey is a kind of flow. An end that is no place of this host is a peer, of which
// only the address is known.
type edgeKey struct {
	from, to place
	port     port
}

// port is one that a policy can name.
type port struct {
	protocol string // tcp, udp, sctp, icmp, icmp6
	number   uint16
}

func (p port) String() string {
	switch p.protocol {
	case "icmp", "icmp6":
		return "icmp/echo"
	}
	return fmt.Sprintf("%s/%d", p.protocol, p.number)
}

// edge is the evidence of a kind of flow.
type edge struct {
	tally
	peers map[netip.Addr]struct{} // addresses of the end without a place
	more  bool                    // there are others
	apart bool                    // its ends are on different hosts
	pair  [2]netip.AddrPort       // an example
}

// tally counts flows.
type tally struct {
	count       uint64
	first, last time.Time
	second      int64 // the one that is being counted
	within      uint64
	peak        uint64 // most in one second
}

func (t *tally) add(at time.Time) {
	if t.count == 0 || at.Before(t.first) {
		t.first = at
	}
	if at.After(t.last) {
		t.last = at
	}
	t.count++
	if s := at.Unix(); s != t.second {
		t.second, t.within = s, 0
	}
	t.within++
	t.peak = max(t.peak, t.within)
}

// refusal is a kind of what is not proposed.
type refusal struct{ what, why string }

// example is a process, where one is known.
type example struct {
	pid  uint32
	comm string
}

func (e example) String() string {
	switch {
	case e.comm == "" && e.pid == 0:
		return ""
	case e.comm == "":
		return fmt.Sprintf("pid %d", e.pid)
	}
	return fmt.Sprintf("%s (pid %d)", e.comm, e.pid)
}

// New makes a learner that has seen nothing.
func New(o Options) *Learner {
	if o.Name == "" {
		o.Name = "learned"
	}
	if o.TrustDomain == "" {
		o.TrustDomain = "learned.example"
	}
	if o.Version == 0 {
		o.Version = 1
	}
	return &Learner{
		options: o, talks: map[talkKey]*talk{}, calls: map[callKey]time.Time{}, edges: map[edgeKey]*edge{}, refused: map[refusal]*tally{}, judged: map[place]example{},
		met: map[place]*members{},
	}
}

// Lost notes flows that are missing among those that were added.
func (l *Learner) Lost(n uint64) { l.lost += n }

// Add takes in a flow.
func (l *Learner) Add(f *flow.Flow) {
	if f.Verdict.OfShadow() { // nothing came of it
		return
	}
	l.seen.add(f.Time)
	subject, peer := &f.Source, &f.Destination
	if f.Direction == abi.Ingress {
		subject, peer = peer, subject
	}
	if f.Verdict == abi.Allow || f.Verdict == abi.Provisional {
		return // declared already
	}
	here := l.place(*subject)
	if _, known := l.judged[here]; !known && f.Comm != "" && here != (place{}) {
		l.judged[here] = example{f.PID, f.Comm}
	}
	why := l.doubt(f, *peer)
	key := talkKey{f.Protocol, netip.AddrPortFrom(f.Source.Address, f.Source.Port), netip.AddrPortFrom(f.Destination.Address, f.Destination.Port)}
	call := callKey{here, key.destination}
	if why != "" && (f.Hook != record.HookEgress && f.Hook != record.HookIngress || !key.source.IsValid()) {
		l.refuse(f.Time, describe(f, here), why)
		return
	}
	if f.Hook == record.HookConnect || f.Hook == record.HookSendmsg {
		// A packet will tell the rest. If there is none, only UDP has come to something.
		if _, known := l.calls[call]; !known && f.Protocol == "udp" && len(l.calls) < maxTalks {
			l.calls[call] = f.Time
		}
		return
	}
	if f.Direction == abi.Egress && f.Protocol == "udp" && (len(l.calls) < maxTalks || !l.calls[call].IsZero()) {
		l.calls[call] = time.Time{}
	}
	if group(f.Destination.Address) {
		// Nobody can prove to be all of them: each end needs an address.
		t := &talk{at: f.Time, answered: true, doubt: why}
		if f.Direction == abi.Egress {
			t.from = here
		} else {
			t.to = here
		}
		l.count(key, t)
		return
	}
	t := l.talks[key]
	if t != nil && t.from != (place{}) && f.Direction == abi.Egress && f.Hook == record.HookEgress {
		// Another conversation between the same ports: opened anew, by whomever.
		l.fold(key) // its key stays in the order, and ends the next one early at worst
		t = nil
	}
	if t == nil {
		if len(l.order) == maxTalks {
			l.fold(l.order[0])
			l.order = l.order[1:]
		}
		t = &talk{at: f.Time}
		l.talks[key], l.order = t, append(l.order, key)
	}
	if f.Time.Before(t.at) {
		t.at = f.Time
	}
	if t.doubt == "" {
		t.doubt = why // of either end
	}
	if f.Direction == abi.Egress {
		t.nodes[0] = f.Node
	} else {
		t.nodes[1] = f.Node
	}
	switch {
	case f.Direction == abi.Egress && f.Hook == record.HookIngress:
		t.from, t.answered = here, true
	case f.Direction == abi.Egress:
		t.from = here
		if f.Proof == abi.ProofIdentity && t.to == (place{}) {
			t.to = l.named(*peer)
		}
	default:
		t.to, t.answered = here, true
		if f.Proof == abi.ProofIdentity && t.from == (place{}) {
			t.from = l.named(*peer)
		}
	}
}

// doubt says why a flow must not be proposed, or "".
func (l *Learner) doubt(f *flow.Flow, peer flow.Endpoint) string {
	switch {
	case f.Verdict == abi.Deny:
		return "it was denied (" + f.Reason.String() + "): what is enforced is not widened by trying"
	case f.Reason != abi.NoCrossingFor && f.Reason != abi.Revoked:
		return doubts[f.Reason]
	case peer.Claimed:
		return "its peer failed to prove what it claimed to be"
	}
	switch f.Protocol {
	case "tcp", "udp", "sctp":
	case "icmp", "icmp6":
		if f.Source.Port == 0 {
			return "it is no echo request; name its type yourself"
		}
	default:
		return "protocol " + f.Protocol + " has no ports; declare it as any, if at all"
	}
	return ""
}

// doubts about flows that were refused for another reason than that nobody declared
// them. Those without words have failed a check.
var doubts = func() (all [abi.Reasons]string) {
	for i := range all {
		all[i] = "it failed a check (" + abi.Reason(i).String() + ")"
	}
	all[abi.TagMissing] = "a crossing asks for a proof and there was none"
	all[abi.OverLimit] = "it was over the limit of its crossing; raise the limit yourself"
	all[abi.NotInWindow] = "it was outside the window of its crossing"
	all[abi.RawSocket] = "it came from a raw socket, which could send anything"
	all[abi.NoState] = "its connection is older than what judges it; let it connect again"
	all[abi.TaskMismatch] = "a process used the socket of another workload"
	all[abi.Protocol] = "its protocol is none that demarc admits"
	return all
}()

func describe(f *flow.Flow, here place) string {
	from, to := f.Source.Label(), f.Destination.Label()
	if f.Direction == abi.Egress && here != (place{}) {
		from = here.String()
	} else if f.Direction == abi.Ingress && here != (place{}) {
		to = here.String()
	}
	if a := f.Source.Address; a.IsValid() && from == "unknown" {
		from = a.String()
	}
	if a := f.Destination.Address; a.IsValid() && to == "unknown" {
		to = a.String()
	}
	what := from + " -> " + to
	switch {
	case f.Destination.Port != 0:
		what += fmt.Sprintf(" %s/%d", f.Protocol, f.Destination.Port)
	case f.Protocol != "":
		what += " " + f.Protocol
	}
	return what
}

func (l *Learner) refuse(at time.Time, what, why string) {
	key := refusal{what, why}
	t := l.refused[key]
	if t == nil {
		if len(l.refused) >= maxRefused {
			key = refusal{"others", "there are more kinds of refused flows than are listed"}
			t = l.refused[key]
		}
		if t == nil {
			t = &tally{}
			l.refused[key] = t
		}
	}
	t.add(at)
}

// fold makes a conversation part of the evidence of its kind.
func (l *Learner) fold(key talkKey) {
	if t := l.talks[key]; t != nil {
		delete(l.talks, key)
		l.count(key, t)
	}
}

func (l *Learner) count(key talkKey, t *talk) {
	at := port{key.protocol, key.destination.Port()}
	if key.protocol == "icmp6" || key.protocol == "icmp" {
		at = port{"icmp", 0} // one word for both families
	}
	what := endText(t.from, key.source.Addr()) + " -> " + endText(t.to, key.destination.Addr()) + " " + at.String()
	switch {
	case t.doubt != "":
		l.refuse(t.at, what, t.doubt)
		return
	case at.protocol == "tcp" && !t.answered:
		l.refuse(t.at, what, "nobody answered")
		return
	case at.number == 0 && at.protocol != "icmp":
		l.refuse(t.at, what, "port 0 is none")
		return
	}
	e := edgeKey{t.from, t.to, at}
	got := l.edges[e]
	if got == nil {
		if len(l.edges) == maxEdges {
			l.full = true
			return
		}
		got = &edge{peers: map[netip.Addr]struct{}{}, pair: [2]netip.AddrPort{key.source, key.destination}}
		l.edges[e] = got
	}
	got.add(t.at)
	got.apart = got.apart || t.nodes[0] != "" && t.nodes[1] != "" && t.nodes[0] != t.nodes[1]
	peer := key.source.Addr()
	switch {
	case t.from == (place{}):
	case t.to == (place{}):
		peer = key.destination.Addr()
	default:
		return
	}
	if _, known := got.peers[peer]; !known && len(got.peers) == maxPeers {
		got.more = true
		return
	}
	got.peers[peer] = struct{}{}
}

// group says whether an address stands for several hosts, as the kernel does.
func group(a netip.Addr) bool { return a.IsMulticast() || a.Is4() && a.As4()[0] >= 224 }

func endText(p place, a netip.Addr) string {
	if p != (place{}) {
		return p.String()
	}
	return a.String()
}

// foldAll ends every conversation.
func (l *Learner) foldAll() {
	for _, key := range l.order {
		l.fold(key)
	}
	l.order = nil
	for call, at := range l.calls {
		if !at.IsZero() {
			l.count(talkKey{"udp", netip.AddrPortFrom(netip.Addr{}, 0), call.to}, &talk{from: call.from, at: at})
		}
	}
	clear(l.calls)
}

// sortedRefusals lists what is not proposed, in a fixed order.
func (l *Learner) sortedRefusals() []string {
	var lines []string
	for r, t := range l.refused {
		lines = append(lines, fmt.Sprintf("%s: %s, %s", r.what, r.why, t))
	}
	slices.Sort(lines)
	return lines
}

// String says how many flows, and when: "3 flows, 2026-01-01T00:00:00Z to ...".
func (t *tally) String() string {
	flows := fmt.Sprintf("%d flows", t.count)
	if t.count == 1 {
		flows = "1 flow"
	}
	first, last := t.first.UTC().Format(time.RFC3339), t.last.UTC().Format(time.RFC3339)
	if first == last {
		return flows + ", " + first
	}
	return flows + ", " + first + " to " + last
}

// Start is a policy under which everything that processes of the host do is told, and
// nothing refused: what learning starts with.
func Start(trustDomain string) []byte {
	return []byte(strings.ReplaceAll(`# Tells everything that this host's processes do, and refuses nothing: learning starts here.
# Put it in force, let the host do its work, and then: demarc policy learn -o policy.yaml
apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: learn, version: 1}
trustDomain: DOMAIN
zones:
  host: {trust: 10}
workloads:
  nobody: {zone: host, match: [{cgroup: /demarc-learn}], waive: {rule: unreachable-workload, reason: a policy names one}}
unmanaged: {zone: host, outbound: deny, inbound: deny}
mode: observe
`, "DOMAIN", trustDomain))
}
