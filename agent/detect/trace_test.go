package detect

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/policy"
)

// policySource is the policy of every trace here.
const policySource = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: shop, version: 1}
trustDomain: shop.example
zones: {internet: {trust: 0}, edge: {trust: 10}, app: {trust: 20}, data: {trust: 30}}
networks:
  anywhere: {zone: internet, cidrs: [0.0.0.0/0, "::/0"]}
  databases: {zone: data, cidrs: [10.3.0.0/16]}
  machines: {zone: app, cidrs: [10.0.0.0/8]}
  imds: {zone: internet, cidrs: [169.254.169.254/32]}
workloads:
  web: {zone: edge, match: [{cgroup: /lab/web}]}
  api: {zone: app, match: [{cgroup: /lab/api}]}
  batch: {zone: app, match: [{cgroup: /lab/batch}]}
  mail: {zone: app, match: [{cgroup: /lab/mail}]}
  jump: {zone: app, match: [{cgroup: /lab/jump}], roles: [bastion]}
  nessus: {zone: app, match: [{cgroup: /lab/nessus}], roles: [{role: scanner, until: 2026-06-01T00:00:00Z}]}
  trap: {zone: app, match: [{cgroup: /lab/trap}]}
crossings:
  - {name: web-api, from: [workload/web], to: [workload/api], ports: [tcp/8080], limit: {connections: 100/s}, log: all}
  - {name: updates, from: [workload/web, workload/api, workload/batch, workload/mail], to: [network/anywhere], ports: [tcp/443], identity: none, log: all}
  - {name: ssh, from: [workload/jump, workload/batch], to: [network/machines], ports: [tcp/22], identity: none, log: all}
  - {name: credentials, from: [workload/batch], to: [network/imds], ports: [tcp/80], identity: none, log: all}
  - {name: trap, from: [zone/app], to: [workload/trap], ports: [tcp/3306], decoy: true, log: all}
  - {name: scan-trap, from: [workload/nessus], to: [workload/trap], ports: [tcp/9], log: all}
`

func testPolicy(t testing.TB) *Policy {
	t.Helper()
	p, err := policy.Parse("shop.yaml", []byte(policySource))
	if err != nil {
		t.Fatal(err)
	}
	img, err := policy.Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	return PolicyOf(img)
}

// start is when every trace begins.
var start = time.Date(2026, 5, 4, 8, 0, 0, 0, time.UTC)

// trace is events at times that it moves on.
type trace struct {
	events []Event
	now    time.Time
	source uint16
	epoch  uint32
}

func newTrace() *trace { return &trace{now: start, source: 40000, epoch: 1} }

func (r *trace) wait(d time.Duration) *trace {
	r.now = r.now.Add(d)
	return r
}

var zones = map[string]string{"web": "edge", "api": "app", "batch": "app", "mail": "app", "jump": "app", "nessus": "app", "trap": "app"}

func identity(workload string) uint32 {
	id := uint32(1000)
	for _, b := range []byte(workload) {
		id = id*31%65521 + uint32(b)
	}
	return id + 1000
}

func (r *trace) endpoint(workload string) flow.Endpoint {
	return flow.Endpoint{Address: netip.MustParseAddr("10.0.0.9"), Port: r.source, Identity: identity(workload), Workload: workload, Zone: zones[workload], Cgroup: "/lab/" + workload}
}

// opens is a flow of a workload, judged where it leaves.
func (r *trace) opens(workload, proto, to string, verdict abi.Verdict, reason abi.Reason, crossing string) *trace {
	at := netip.MustParseAddrPort(to)
	r.source++
	r.events = append(r.events, Event{Flow: &flow.Flow{
		Time: r.now, Node: "n1", Verdict: verdict, Reason: reason, Direction: abi.Egress, Hook: record.HookConnect, Protocol: proto,
		Source: r.endpoint(workload), Destination: flow.Endpoint{Address: at.Addr(), Port: at.Port()}, Crossing: crossing,
		PID: 4242, Comm: "tool", Epoch: r.epoch,
	}})
	return r
}

func (r *trace) denied(workload, to string) *trace {
	return r.opens(workload, "tcp", to, abi.Deny, abi.NoCrossingFor, "")
}

func (r *trace) allowed(workload, to, crossing string) *trace {
	return r.opens(workload, "tcp", to, abi.Allow, abi.ByCrossing, crossing)
}

// reaches is an allowed flow as it is told where its packets pass: by no process.
func (r *trace) reaches(workload, to, crossing string) *trace {
	r.allowed(workload, to, crossing)
	f := r.events[len(r.events)-1].Flow
	f.Hook, f.PID, f.Comm = record.HookIngress, 0, ""
	return r
}

// accepts is a login by ssh from another workload, judged where it comes in.
func (r *trace) accepts(workload, from string) *trace {
	r.source++
	e, peer := r.endpoint(workload), r.endpoint(from)
	e.Port = 22
	r.events = append(r.events, Event{Flow: &flow.Flow{
		Time: r.now, Node: "n1", Verdict: abi.Allow, Reason: abi.ByCrossing, Direction: abi.Ingress, Hook: record.HookIngress, Protocol: "tcp",
		Source: peer, Destination: e, Crossing: "ssh", Proof: abi.ProofIdentity, Epoch: r.epoch,
	}})
	return r
}

// arrives is a flow from somebody who proved nothing, judged where it comes in.
func (r *trace) arrives(from, workload string, port uint16, reason abi.Reason) *trace {
	r.source++
	e := r.endpoint(workload)
	e.Port = port
	r.events = append(r.events, Event{Flow: &flow.Flow{
		Time: r.now, Node: "n1", Verdict: abi.Deny, Reason: reason, Direction: abi.Ingress, Hook: record.HookIngress, Protocol: "tcp",
		Source: flow.Endpoint{Address: netip.MustParseAddr(from), Port: r.source}, Destination: e, Epoch: r.epoch,
	}})
	return r
}

// signal is one of a workload.
func (r *trace) signal(workload string, s Signal) *trace {
	s.Time, s.Node = r.now, "n1"
	s.Subject, s.Workload, s.Zone = identity(workload), workload, zones[workload]
	if s.PID == 0 {
		s.PID, s.StartTime, s.Comm = 4242, 99, "tool"
	}
	r.events = append(r.events, Event{Signal: &s})
	return r
}

func peer(at string) flow.Endpoint {
	p := netip.MustParseAddrPort(at)
	return flow.Endpoint{Address: p.Addr(), Port: p.Port()}
}

// found runs the detectors on a trace and says each finding in short.
func (r *trace) found(t testing.TB, config *Config) []string {
	t.Helper()
	g := NewEngine(config)
	g.SetPolicy(testPolicy(t))
	s := NewFindings()
	for _, e := range r.events {
		for _, f := range g.See(e) {
			s.Add(f)
		}
	}
	all, _ := s.After(0)
	out := []string{}
	for _, f := range all {
		line := fmt.Sprintf("%s %s %s %s", f.Technique.ID, f.Detector, f.Severity, f.Subject.Label())
		if f.Process != nil {
			line += fmt.Sprintf(" %s[%d]", f.Process.Comm, f.Process.PID)
		}
		if f.SuppressedBy != "" {
			line += " role " + f.SuppressedBy
		}
		out = append(out, line)
		switch {
		case f.ID == "" || f.Title == "" || f.Advice == "" || f.Confidence == 0 || f.Technique.Tactic == "":
			t.Errorf("incomplete: %+v", f)
		case len(f.Evidence) == 0 || len(f.Evidence) > evidenceKept:
			t.Errorf("%d events of evidence: %+v", len(f.Evidence), f)
		case f.FirstSeen.Before(start) || f.LastSeen.Before(f.FirstSeen):
			t.Errorf("seen from %s to %s", f.FirstSeen, f.LastSeen)
		}
	}
	return out
}
