package e2e_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// bothWays tries a TCP connection and a datagram.
func bothWays(a *actor, to netip.AddrPort, patience time.Duration) (tcp, udp bool) {
	a.t.Helper()
	return a.reachesWithin(to, patience), a.datagramsWithin(to, 1, patience).Answered == 1
}

func wantBothWays(t *testing.T, what string, a *actor, to netip.AddrPort, want bool) {
	t.Helper()
	if tcp, udp := bothWays(a, to, patience(want)); tcp != want || udp != want {
		t.Errorf("%s to %s: tcp %t, udp %t, want %t", what, to, tcp, udp, want)
	}
}

// Processes of no workload meet workloads where a crossing names them, and nowhere
// else; somebody on another host is not one of them, whatever it is.
//
//	web:  web (workload), local (unmanaged), elsewhere (no demarc)
//	db:   db (workload, 7000 7001), local server (unmanaged, 7100 7101)
func TestUnmanagedCrossings(t *testing.T) {
	const crossings = `crossings:
  - {name: local-db, from: [unmanaged], to: [workload/db], ports: [tcp/7000, udp/7000]}
  - {name: web-local, from: [workload/web], to: [unmanaged], ports: [tcp/7100, udp/7100]}
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7200]}
  - {name: web-proven, from: [workload/web], to: [workload/db, unmanaged], ports: [tcp/7102, udp/7102]}
`
	e := newEnds(t, crossings, netlab.NodeOptions{CoreOnly: true})
	local := startActor(t, e.web, e.node.Cgroup("/local"))
	elsewhere := startActor(t, e.web, e.lab.Cgroup("elsewhere"))
	localServer := startActor(t, e.db, e.node.Cgroup("/local"))
	for _, port := range []uint16{7000, 7001} {
		e.server.serve(port)
	}
	for _, port := range []uint16{7100, 7101, 7102} {
		localServer.serve(port)
	}
	for _, family := range []func(uint16) netip.AddrPort{e.at4, e.at6} {
		wantBothWays(t, "unmanaged, declared", local, family(7000), true)
		wantBothWays(t, "unmanaged, undeclared", local, family(7001), false)
		wantBothWays(t, "another host, declared for unmanaged", elsewhere, family(7000), false)
		wantBothWays(t, "workload to unmanaged, declared", e.client, family(7100), true)
		wantBothWays(t, "workload to unmanaged, undeclared", e.client, family(7101), false)
		wantBothWays(t, "workload to unmanaged, with a tag that a workload could ask for", e.client, family(7102), true)
		wantBothWays(t, "among unmanaged", local, family(7101), true)
	}
	e.node.AwaitFlow("the unmanaged caller, by name", func(f flow.Flow) bool {
		return f.Verdict == abi.Allow && f.Crossing == "local-db" && f.Source.Label() == "unmanaged" && f.Direction == abi.Ingress
	})
	e.node.AwaitFlow("the unmanaged listener, by name", func(f flow.Flow) bool {
		return f.Verdict == abi.Allow && f.Crossing == "web-local" && f.Destination.Label() == "unmanaged" && f.Direction == abi.Egress
	})
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		e.node.AwaitDenied(abi.NoCrossingFor, proto, e.db.At4(7001))
		e.node.AwaitDenied(abi.NoCrossingFor, proto, e.db.At6(7101))
	}

	t.Run("not a workload of another host", func(t *testing.T) {
		// A server without demarc where `unmanaged` is declared: not a local
		// process, so the caller does not take it for one.
		far := e.lab.Namespace("far")
		server := far.Echo(7100)
		wantBothWays(t, "workload to another host", e.client, netip.AddrPortFrom(far.IP4, 7100), false)
		if n := server.Accepted.Load(); n != 0 {
			t.Errorf("%d connections accepted", n)
		}
	})

	t.Run("outbound and inbound deny", func(t *testing.T) {
		for _, c := range []struct {
			rule                               string
			declared, toUnmanaged, fromFarAway bool
		}{
			{"unmanaged: {zone: app, outbound: deny}", true, false, true},
			{"unmanaged: {zone: app, inbound: deny}", true, false, false},
			{"unmanaged: {zone: app, outbound: deny, inbound: deny}", true, false, false},
			{"unmanaged: {zone: app}", true, true, true},
		} {
			e.apply(crossings + c.rule + "\n")
			for _, family := range []func(uint16) netip.AddrPort{e.at4, e.at6} {
				wantBothWays(t, c.rule+": declared", local, family(7000), c.declared)
				wantBothWays(t, c.rule+": workload to unmanaged", e.client, family(7100), true)
				wantBothWays(t, c.rule+": workload to unmanaged with a tag", e.client, family(7102), true)
				wantBothWays(t, c.rule+": among unmanaged", local, family(7101), c.toUnmanaged)
				wantBothWays(t, c.rule+": from another host to unmanaged", elsewhere, family(7101), c.fromFarAway)
			}
		}
	})
}

// Without a crossing that names it, nobody of no workload meets a workload.
func TestUnmanagedIsNobody(t *testing.T) {
	e := newEnds(t, `crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000]}
`, netlab.NodeOptions{CoreOnly: true})
	local := startActor(t, e.web, e.node.Cgroup("/local"))
	localServer := startActor(t, e.db, e.node.Cgroup("/local"))
	e.server.serve(7000)
	localServer.serve(7100)
	for _, to := range e.both(7000) {
		wantBothWays(t, "unmanaged to workload", local, to, false)
		wantBothWays(t, "workload to workload", e.client, to, true)
	}
	for _, to := range e.both(7100) {
		wantBothWays(t, "workload to unmanaged", e.client, to, false)
	}
	if got := fmt.Sprint(e.server.served("udp", 7000).Count, localServer.served("udp", 7100).Count, localServer.served("tcp", 7100).Count); got != "2 0 0" {
		t.Errorf("the servers got %s, want 2 0 0", got)
	}
}
