package simulate

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

var began = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

const head = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: shop, version: 3}
trustDomain: shop.example
zones: {outside: {trust: 0}, edge: {trust: 10}, app: {trust: 20}}
networks: {lan: {zone: outside, cidrs: [192.0.2.0/24]}}
workloads:
  web: {zone: edge, match: [{cgroup: /web}]}
  api: {zone: app, match: [{cgroup: /api}, {container: {name: api}}]}
unmanaged: {zone: edge, inbound: deny}
`

func simulator(t testing.TB, crossings string) *Simulator {
	t.Helper()
	p, err := policy.Parse("shop.yaml", []byte(head+crossings))
	if err != nil {
		t.Fatal(err)
	}
	b, err := policy.Build(p)
	if err != nil {
		t.Fatal(err)
	}
	img, err := image.Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(img, began)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

const webAPI = `crossings:
  - {name: web-api, from: [workload/web], to: [workload/api], ports: [tcp/8080, udp/53], limit: {connections: 10/s}, log: all}
  - {name: lan-web, from: [network/lan], to: [workload/web], ports: [tcp/443, icmp/echo], identity: none, limit: {connections: 10/s}, log: all}
  - {name: local-api, from: [unmanaged], to: [workload/api], ports: [tcp/9000], limit: {connections: 10/s}, log: all}
`

func at(address string, port uint16, e flow.Endpoint) flow.Endpoint {
	e.Address, e.Port = netip.MustParseAddr(address), port
	return e
}

// What the candidate would say about one conversation, and who it finds at its ends.
func TestJudge(t *testing.T) {
	web, api := flow.Endpoint{Cgroup: "/web/1"}, flow.Endpoint{Cgroup: "/api"}
	host := flow.Endpoint{Cgroup: "/ssh", Reserved: "unmanaged"}
	egress := func(f flow.Flow) flow.Flow { f.Direction, f.Hook = abi.Egress, record.HookIngress; return f }
	ingress := func(f flow.Flow) flow.Flow { f.Direction, f.Hook = abi.Ingress, record.HookIngress; return f }
	talk := func(protocol string, v abi.Verdict, r abi.Reason, p abi.Proof, source, destination flow.Endpoint) flow.Flow {
		return flow.Flow{Time: began, Node: "n1", Protocol: protocol, Verdict: v, Reason: r, Proof: p, Source: source, Destination: destination}
	}
	allowed := func(protocol string, source, destination flow.Endpoint) flow.Flow {
		return talk(protocol, abi.Allow, abi.ByCrossing, abi.ProofIdentity, source, destination)
	}
	denied := func(protocol string, source, destination flow.Endpoint) flow.Flow {
		return talk(protocol, abi.Deny, abi.NoCrossingFor, abi.ProofNone, source, destination)
	}
	proven := func(e flow.Endpoint, zone, workload string) flow.Endpoint {
		e.Zone, e.Workload = zone, workload
		return e
	}
	tests := []struct {
		name  string
		flows []flow.Flow
		want  string // FROM TO PORT WAS/REASON WOULD/REASON/CROSSING; "" = as it was
	}{
		{"OK proven peer", []flow.Flow{ingress(allowed("tcp", at("10.0.0.1", 1000, proven(flow.Endpoint{}, "edge", "web")), at("10.0.0.2", 8080, api)))}, ""},
		{"OK both ends", []flow.Flow{
			egress(allowed("udp", at("10.0.0.1", 1000, web), at("10.0.0.2", 53, flow.Endpoint{}))),
			ingress(allowed("udp", at("10.0.0.1", 1000, flow.Endpoint{}), at("10.0.0.2", 53, api)))}, ""},
		{"OK a network needs no proof", []flow.Flow{ingress(allowed("tcp", at("192.0.2.7", 1000, flow.Endpoint{}), at("10.0.0.1", 443, web)))}, ""},
		{"OK ping", []flow.Flow{ingress(allowed("icmp", at("192.0.2.7", 7, flow.Endpoint{}), at("10.0.0.1", 0, web)))}, ""},
		{"OK unmanaged of the own host", []flow.Flow{
			egress(talk("tcp", abi.Allow, abi.ByUnmanaged, abi.ProofNone, at("10.0.0.1", 1000, host), at("10.0.0.1", 9000, flow.Endpoint{}))),
			ingress(allowed("tcp", at("10.0.0.1", 1000, flow.Endpoint{}), at("10.0.0.1", 9000, api)))}, ""},
		{"OK a container that only metadata finds keeps its name", []flow.Flow{
			ingress(allowed("tcp", at("10.0.0.1", 1000, proven(flow.Endpoint{}, "edge", "web")), at("10.0.0.2", 8080, proven(flow.Endpoint{Cgroup: "/docker/1"}, "app", "api"))))}, ""},
		{"bad peer that proved nothing", []flow.Flow{ingress(allowed("tcp", at("10.0.0.9", 1000, flow.Endpoint{Workload: "gone", Zone: "edge"}), at("10.0.0.2", 8080, api)))},
			"edge/gone app/api tcp/8080 allow/crossing deny/tag-missing/"},
		{"bad unmanaged of another host", []flow.Flow{
			egress(talk("tcp", abi.Allow, abi.ByUnmanaged, abi.ProofNone, at("10.0.0.9", 1000, host), at("10.0.0.1", 9000, flow.Endpoint{}))),
			func() flow.Flow {
				f := ingress(allowed("tcp", at("10.0.0.9", 1000, flow.Endpoint{}), at("10.0.0.1", 9000, api)))
				f.Node = "n2"
				return f
			}()}, "unmanaged app/api tcp/9000 allow/unmanaged deny/no-crossing/"},
		{"bad one end of two refuses", []flow.Flow{
			egress(allowed("tcp", at("10.0.0.1", 1000, web), at("10.0.0.2", 8081, flow.Endpoint{}))),
			ingress(allowed("tcp", at("10.0.0.1", 1000, flow.Endpoint{}), at("10.0.0.2", 8081, api)))},
			"edge/web app/api tcp/8081 allow/crossing deny/no-crossing/"},
		{"bad name that its selectors do not find any more", []flow.Flow{
			ingress(allowed("tcp", at("192.0.2.7", 1000, flow.Endpoint{}), at("10.0.0.1", 443, proven(flow.Endpoint{Cgroup: "/old"}, "edge", "web"))))},
			"192.0.2.7 unmanaged (was edge/web) tcp/443 allow/crossing deny/no-crossing/"},
		{"OK newly declared, waits for proof", []flow.Flow{func() flow.Flow {
			f := egress(denied("tcp", at("10.0.0.1", 0, web), at("10.0.0.2", 8080, flow.Endpoint{})))
			f.Hook, f.Proof = record.HookConnect, abi.ProofUnknown
			return f
		}()}, "edge/web 10.0.0.2 tcp/8080 deny/no-crossing provisional/unproven/web-api"},
		{"OK denied again", []flow.Flow{ingress(denied("tcp", at("10.0.0.9", 1000, flow.Endpoint{}), at("10.0.0.2", 22, api)))}, ""},
		{"OK revoked, and declared", []flow.Flow{func() flow.Flow {
			f := ingress(allowed("tcp", at("10.0.0.1", 1000, proven(flow.Endpoint{}, "edge", "web")), at("10.0.0.2", 8080, api)))
			f.Verdict, f.Reason = abi.Deny, abi.Revoked
			return f
		}()}, "edge/web app/api tcp/8080 deny/revoked allow/crossing/web-api"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := simulator(t, webAPI)
			for i := range tt.flows {
				s.Add(&tt.flows[i])
			}
			r := s.Result()
			got := ""
			for _, c := range r.Changes {
				got += fmt.Sprintf("%s %s %s %s/%s %s/%s/%s", c.From, c.To, c.Port, c.Was, c.WasReason, c.Would, c.WouldReason, c.WouldCrossing)
			}
			if got != tt.want || r.Conversations != 1 {
				t.Errorf("%q of %d conversations, want %q", got, r.Conversations, tt.want)
			}
		})
	}
}

// Each processor numbers its events, so two refused calls may have one number.
func TestRefusedCallsOfTwoProcessors(t *testing.T) {
	s := simulator(t, webAPI)
	for i := range 2 {
		s.Add(&flow.Flow{Time: began.Add(time.Duration(i)), Seq: 7, Node: "n1", Protocol: "tcp", Verdict: abi.Deny, Reason: abi.NoCrossingFor,
			Source: flow.Endpoint{Cgroup: "/web/1"}, Destination: at("192.0.2.1", 22, flow.Endpoint{})})
	}
	if r := s.Result(); r.Conversations != 2 {
		t.Errorf("%+v", r)
	}
}

// However many flows there are, what is remembered is bounded and nothing is lost from
// the count.
func TestBounded(t *testing.T) {
	s := simulator(t, webAPI)
	const many = 3*maxTalks + maxKinds
	for i := range many {
		f := flow.Flow{Time: began.Add(time.Duration(i) * time.Millisecond), Protocol: "tcp", Verdict: abi.Allow, Reason: abi.ByCrossing, Direction: abi.Ingress,
			Source:      flow.Endpoint{Address: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), Port: 1000},
			Destination: flow.Endpoint{Address: netip.MustParseAddr("10.0.0.2"), Port: 22, Cgroup: "/api/" + fmt.Sprint(i)}}
		s.Add(&f)
		if len(s.talks) > maxTalks || len(s.queue) > maxTalks+1 || len(s.kinds) > maxKinds || len(s.places) > maxPlaces {
			t.Fatalf("after %d: %d conversations, %d queued, %d kinds, %d places", i, len(s.talks), len(s.queue), len(s.kinds), len(s.places))
		}
	}
	r := s.Result()
	if r.Conversations != many || r.NewlyDenied != many || len(r.Changes) != maxKinds || r.NotListed != many-maxKinds {
		t.Errorf("%d conversations, %d newly denied, %d kinds, %d not listed", r.Conversations, r.NewlyDenied, len(r.Changes), r.NotListed)
	}
}

// A conversation that begins again at the same ports is another one.
func TestPortsAreUsedAgain(t *testing.T) {
	s := simulator(t, webAPI)
	for i := range 3 {
		f := flow.Flow{Time: began.Add(time.Duration(i) * time.Minute), Protocol: "tcp", Verdict: abi.Allow, Reason: abi.ByCrossing, Direction: abi.Ingress,
			Source: at("10.0.0.9", 1000, flow.Endpoint{}), Destination: at("10.0.0.2", 22, flow.Endpoint{Cgroup: "/api"})}
		s.Add(&f)
	}
	want := []Change{{kind: kind{From: "10.0.0.9", To: "app/api", Port: "tcp/22", Was: abi.Allow, WasReason: abi.ByCrossing, Would: abi.Deny, WouldReason: abi.NoCrossingFor},
		Flows: 3, First: began, Last: began.Add(2 * time.Minute)}}
	if diff := cmp.Diff(want, s.Result().Changes, cmp.AllowUnexported(Change{})); diff != "" {
		t.Errorf("changes (-want +got):\n%s", diff)
	}
}
