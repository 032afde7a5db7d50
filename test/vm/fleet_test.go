//go:build kernels

package vm_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/vm/talk"
)

const fleetPolicy = `
workloads:
  web: {zone: app, match: [{cgroup: /lab/web}]}
  api: {zone: app, match: [{cgroup: /lab/api}]}
  db: {zone: app, match: [{cgroup: /lab/db}]}
networks:
  visitors: {zone: app, cidrs: [%[1]s/32, "%[2]s/128"]}
crossings:
  - {name: web-api, from: [workload/web], to: [workload/api], ports: [tcp/8080, udp/8080]}
  - {name: api-web, from: [workload/api], to: [workload/web], ports: [tcp/8080, udp/8080]}
  - {name: api-db, from: [workload/api], to: [workload/db], ports: [tcp/5432, udp/5432]}
  - {name: db-web, from: [workload/db], to: [workload/web], ports: [tcp/5432, udp/5432]}
  - {name: visit, from: [network/visitors], to: [workload/web], ports: [tcp/443, udp/443], identity: none}
  - {name: leave, from: [workload/db], to: [network/visitors], ports: [tcp/443, udp/443], identity: none}
`

// declared is what that policy lets pass.
var declared = map[string]bool{
	"web api 8080": true, "api web 8080": true, "api db 5432": true, "db web 5432": true,
	"outside web 443": true, "db outside 443": true,
}

var fleetPorts = []uint16{8080, 5432, 443}

// Hosts with different kernels share a keyring and a policy, and nothing else: every
// declared pair converses, every other does not, TCP and UDP, IPv4 and IPv6, with
// SYN cookies too. What the applications see and what is on the wires must both be
// exactly what is declared. Proof of a datagram needs tcx at both ends: where a
// kernel has none, what needs that proof is refused.
func TestFleet(t *testing.T) {
	all := slices.DeleteFunc(series(t), func(s string) bool { return refusals[s] != "" })
	if len(all) < 2 {
		t.Fatalf("a fleet of different kernels needs two: %s names %q", seriesVariable, all)
	}
	// The newest, and the oldest, which lacks most, and one between them.
	kernels := map[string]string{"api": all[len(all)-1], "db": all[0], "web": all[len(all)/2]}
	names := []string{"web", "api", "db"}
	lab := netlab.New(t)
	outside := lab.Namespace("outside")
	machines := map[string]*machine{}
	for i, m := range boot(t, build(t), lab, kernels[names[0]], kernels[names[1]], kernels[names[2]]) {
		machines[names[i]] = m
	}
	var starting sync.WaitGroup
	for _, name := range names {
		t.Logf("%s: %s", name, machines[name].hello.Release)
		starting.Go(func() { machines[name].enforce(document(fmt.Sprintf(fleetPolicy, outside.IP4, outside.IP6))) })
	}
	starting.Wait()

	places := map[string]*netlab.Namespace{"outside": outside}
	callers := map[string]caller{"outside": outside.Probe(lab.Cgroup("outside")).Do}
	who := map[netip.Addr]string{outside.IP4: "outside", outside.IP6: "outside"}
	for name, m := range machines {
		m.healthy()
		places[name], callers[name] = m.ns, m.workload(name)
		who[m.ns.IP4], who[m.ns.IP6] = name, name
	}
	for name, do := range callers {
		for _, port := range fleetPorts {
			if problem := do.serve(port); problem != "" {
				t.Fatalf("%s: serve port %d: %s", name, port, problem)
			}
		}
	}
	lacksTCX := func(name string) bool { return machines[name] != nil && limits[machines[name].series] != nil }
	passes := func(from, to, network string, port uint16) bool {
		proven := from != "outside" && to != "outside"
		return declared[fmt.Sprintf("%s %s %d", from, to, port)] &&
			!(network == "udp" && proven && (lacksTCX(from) || lacksTCX(to)))
	}

	for _, cookies := range []string{"1", "2"} {
		t.Run("syncookies="+cookies, func(t *testing.T) {
			networks := []string{"tcp", "udp"}
			if cookies == "2" {
				networks = networks[:1] // UDP has none
			}
			for _, m := range machines {
				m.set("/proc/sys/net/ipv4/tcp_syncookies", cookies)
				m.settle()
				m.wire.Forget()
			}
			want, got := map[string]bool{}, map[string]bool{}
			var mu sync.Mutex
			var asking sync.WaitGroup
			for from, do := range callers {
				asking.Go(func() {
					for to, ns := range places {
						for _, port := range fleetPorts {
							for _, network := range networks {
								for _, family := range families {
									if from == to {
										continue
									}
									wait, pass := short, passes(from, to, network, port)
									if pass {
										wait = long
									}
									problem := do.reaches(network, netip.AddrPortFrom(addressOf(ns, family), port), wait)
									mu.Lock()
									if w := way(from, to, network, port, family); pass {
										want[w] = true
									}
									if w := way(from, to, network, port, family); problem == "" {
										got[w] = true
									} else if pass {
										t.Logf("%s: %s", w, problem)
									}
									mu.Unlock()
								}
							}
						}
					}
				})
			}
			asking.Wait()
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("conversations (-declared +seen by applications):\n%s", diff)
			}
			onWires := map[string]bool{}
			for _, m := range machines {
				maps.Copy(onWires, answers(m, fleetPorts, func(a netip.Addr) string { return who[a] }))
			}
			maps.DeleteFunc(want, func(w string, _ bool) bool { return strings.Contains(w, "to outside") }) // not on a machine's side
			if diff := cmp.Diff(want, onWires); diff != "" {
				t.Errorf("conversations (-declared +answered on the wires):\n%s", diff)
			}
			if t.Failed() {
				for _, m := range machines {
					m.tell()
				}
			}
		})
	}
	t.Run("a clock that steps", func(t *testing.T) { machines["web"].stepsAway(t, callers["web"], machines["api"]) })
	for _, m := range machines {
		m.healthy()
		m.stop()
	}
}

// stepsAway sets a host's clock forward and back. Tags allow for half a minute; beyond, its
// proofs are refused elsewhere, also when it is back at once: what it said was of a time that
// has not come. Started again, its core takes the clock's word. (X9)
func (m *machine) stepsAway(t *testing.T, do caller, peer *machine) {
	t.Helper()
	const little, much = 20 * time.Second, 5 * time.Minute
	reaches := func(when string, want bool) {
		t.Helper()
		time.Sleep(2 * time.Second) // the core looks at the clock each second
		for _, family := range families {
			wait := long
			if !want {
				wait = short
			}
			if problem := do.reaches("tcp", netip.AddrPortFrom(addressOf(peer.ns, family), 8080), wait); (problem == "") != want {
				t.Errorf("%s, IPv%s: %q", when, family, problem)
			}
		}
	}
	reaches("before", true)
	m.step(little)
	reaches("a little ahead", true)
	m.step(much)
	reaches("far ahead", false)
	m.step(-little - much)
	reaches("back", false)
	if out := call[talk.Outcome](m, "Run", talk.Command{Path: "/bin/demarc", Args: []string{"status"}, Env: []string{"DEMARC_SERVER=unix://" + agentSocket}}); !strings.Contains(out.Stdout, "the wall clock went back") {
		t.Errorf("status says %q", out.Stdout)
	}
	call[bool](m, "Kill", corePath)
	m.startAgain()
	reaches("started again", true)
}
