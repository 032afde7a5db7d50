package e2e_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

const flagRST = 0x04

// refusalsPolicy has a crossing for each way in which a caller may fall short. Web may
// call the API on two ports, and so knows no more of anybody else's than that somebody
// may prove himself there.
const refusalsPolicy = `workloads:
  web: {zone: app, match: [{cgroup: /lab/web}]}
  api: {zone: app, match: [{cgroup: /lab/api}]}
networks:
  visitors: {zone: app, cidrs: [%[1]s/32, "%[2]s/128"]}
crossings:
  - {name: told, from: [workload/web], to: [workload/api], ports: [tcp/8080, udp/8080]}
  - {name: silent, from: [workload/web], to: [workload/api], ports: [tcp/8081, udp/8081], refuse: drop}
  - {name: limited, from: [workload/web], to: [workload/api], ports: [tcp/8082, udp/8082], limit: {connections: 1/h}}
  - {name: limited-silent, from: [workload/web], to: [workload/api], ports: [tcp/8083, udp/8083], limit: {connections: 1/h}, refuse: drop}
  - {name: visit, from: [network/visitors], to: [workload/api], ports: [tcp/8084, udp/8084], identity: none, limit: {connections: 1/h}}
  - {name: visit-told, from: [network/visitors], to: [workload/api], ports: [tcp/8085, udp/8085], identity: none, limit: {connections: 1/h}, refuse: reject}
  - {name: other, from: [workload/api], to: [workload/web], ports: [tcp/9000, udp/9000]}
  - {name: elsewhere, from: [workload/web], to: [workload/web], ports: [tcp/9001, udp/9001]}
`

// A caller that is refused learns it at once where the policy says reject, which is the
// default within the fleet, at whichever end it is refused: TCP and UDP, IPv4 and IPv6.
// Where it says drop, the default toward networks, it hears nothing. Either way nothing
// of what it says is delivered.
func TestRefusals(t *testing.T) {
	lab := netlab.New(t)
	hosts := map[string]*netlab.Namespace{"web": lab.Namespace("web"), "api": lab.Namespace("api"), "outside": lab.Namespace("outside")}
	text := document(1, fmt.Sprintf(refusalsPolicy, hosts["outside"].IP4, hosts["outside"].IP6))
	actors, nodes := map[string]*actor{"outside": startActor(t, hosts["outside"], lab.Cgroup("outside"))}, map[string]*netlab.Node{}
	for _, name := range []string{"web", "api"} {
		nodes[name] = lab.Node(text, netlab.NodeOptions{CoreOnly: true, Home: hosts[name]})
		actors[name] = startActor(t, hosts[name], nodes[name].Cgroup("/lab/"+name))
	}
	ports := []uint16{8080, 8081, 8082, 8083, 8084, 8085, 9001}
	for _, a := range actors {
		for _, port := range ports {
			a.serve(port)
		}
	}
	const told, silence = "told", "silence"
	toWeb, wire := hosts["web"].Wire(), hosts["outside"].Wire()
	for _, c := range []struct {
		name     string
		from, to string
		port     uint16
		want     string
		by       string // whose host refuses
		reason   abi.Reason
		first    bool // one connection is within the limit
	}{
		{"a proven caller without a crossing", "web", "api", 9001, told, "api", abi.NoCrossingFor, false},
		{"a caller without proof", "outside", "api", 8080, told, "api", abi.TagMissing, false},
		{"a caller without proof, drop", "outside", "api", 8081, silence, "api", abi.TagMissing, false},
		{"an answer without proof", "web", "outside", 8080, told, "web", abi.TagMissing, false},
		{"an answer without proof, drop", "web", "outside", 8081, silence, "web", abi.TagMissing, false},
		{"over the limit", "web", "api", 8082, told, "", abi.OverLimit, true},
		{"over the limit, drop", "web", "api", 8083, silence, "", abi.OverLimit, true},
		{"a visitor over the limit", "outside", "api", 8084, silence, "api", abi.OverLimit, true},
		{"a visitor over the limit, reject", "outside", "api", 8085, told, "api", abi.OverLimit, true},
		{"what nobody declared", "outside", "web", 8080, silence, "web", abi.NoCrossingFor, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.first {
				r := patient(actors[c.from], netip.AddrPortFrom(hosts[c.to].IP4, c.port))
				if r.Error != "" {
					t.Fatalf("within the limit: %s", r.Error)
				}
				// It is made before its server has taken it.
				eventually(t, timeToAnswer, "the connection within the limit", func() bool { return actors[c.to].served("tcp", c.port).Count == 1 })
			}
			served := func() (all Served) {
				for _, network := range []string{"tcp", "udp"} {
					s := actors[c.to].served(network, c.port)
					all.Count, all.Bytes = all.Count+s.Count, all.Bytes+s.Bytes
				}
				return all
			}
			before := served()
			toWeb.Forget()
			wire.Forget()
			patience := timeToAnswer
			if c.want == silence {
				patience = 400 * time.Millisecond
			}
			var all sync.WaitGroup
			for _, address := range []netip.Addr{hosts[c.to].IP4, hosts[c.to].IP6} {
				at := netip.AddrPortFrom(address, c.port)
				for network, try := range map[string]func() string{
					"TCP": func() string {
						return call[DialReply](actors[c.from], "Dial", DialArgs{To: at.String(), Timeout: patience}).Error
					},
					"UDP": func() string {
						return call[string](actors[c.from], "Ask", DialArgs{To: at.String(), Timeout: patience})
					},
				} {
					all.Go(func() {
						got := try()
						// By its own host's policy, a caller learns it from the call.
						want := map[string][]string{told: {unix.ECONNREFUSED.Error(), unix.EPERM.Error()}, silence: {"timeout"}}[c.want]
						if c.reason != abi.OverLimit || c.from != "web" {
							want = want[:1]
						}
						if !slices.Contains(want, got) {
							t.Errorf("%s to %s ends with %q, want %s", network, at, got, strings.Join(want, " or "))
						}
					})
				}
			}
			all.Wait()
			if c.by != "" {
				for _, proto := range []string{"tcp", "udp"} {
					nodes[c.by].AwaitFlow(c.reason.String(), func(f netlab.Flow) bool {
						return f.Verdict == abi.Deny && f.Reason == c.reason && f.Destination.Port == c.port && f.Protocol == proto
					})
				}
			}
			if got := served(); got != before && c.by != "web" {
				t.Errorf("delivered %+v, and %+v before", got, before)
			}
			if c.want == silence {
				for _, w := range []*netlab.Wire{toWeb, wire} {
					if got := w.Packets(func(p netlab.Packet) bool {
						from := p.Src.Addr() == hosts[c.to].IP4 || p.Src.Addr() == hosts[c.to].IP6
						return !p.Sent && from && (p.Flags&flagRST != 0 && p.Src.Port() == c.port ||
							p.Proto == unix.IPPROTO_ICMP && p.ICMP == 3 || p.Proto == unix.IPPROTO_ICMPV6 && p.ICMP == 1)
					}); len(got) > 0 && c.by != "web" {
						t.Errorf("told on the wire: %s", got[0])
					}
				}
			}
		})
	}
}
