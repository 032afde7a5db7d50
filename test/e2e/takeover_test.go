package e2e_test

import (
	"testing"

	"github.com/demarc/demarc/test/netlab"
)

// Who takes over the port of a workload that ended does not take over its
// conversations: the proof was that of the workload, not of its address.
func TestTakenOverPort(t *testing.T) {
	for _, family := range []string{"IPv4", "IPv6"} {
		t.Run(family, func(t *testing.T) {
			e := newEnds(t, `crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [udp/7000]}
`, netlab.NodeOptions{CoreOnly: true})
			to, caller := e.at4(7000).String(), e.web.At4(5000).String()
			if family == "IPv6" {
				to, caller = e.at6(7000).String(), e.web.At6(5000).String()
			}
			server := startActor(t, e.db, e.node.Cgroup("/lab/db"))
			impostor := startActor(t, e.db, e.node.Cgroup("/local"))
			serve := func(a *actor, at string) string {
				return call[string](a, "Serve", ServeArgs{Network: "udp", At: at, Silent: true})
			}
			send := func(a *actor, from, to string) string {
				return call[string](a, "SendFrom", SendArgs{At: from, To: to})
			}
			got := func(a *actor, at string) int {
				return call[Served](a, "Served", ServeArgs{Network: "udp", At: at}).Count
			}
			for _, problem := range []string{serve(server, to), serve(e.client, caller), send(e.client, caller, to)} {
				if problem != "" {
					t.Fatal(problem)
				}
			}
			eventually(t, timeToAnswer, "the question arrives", func() bool { return got(server, to) == 1 })
			if problem := send(server, to, caller); problem != "" {
				t.Fatal(problem)
			}
			eventually(t, timeToAnswer, "the answer arrives", func() bool { return got(e.client, caller) == 1 })
			server.stop()
			eventually(t, timeToAnswer, "the port is free", func() bool { return serve(impostor, to) == "" })

			wires := []*netlab.Wire{e.web.Wire(), e.db.Wire()}
			for range 3 {
				send(impostor, to, caller)
				send(e.client, caller, to)
			}
			for _, w := range wires {
				w.Settle()
			}
			if n := got(e.client, caller); n != 1 {
				t.Errorf("the caller took %d datagrams of an impostor for answers", n-1)
			}
			if n := got(impostor, to); n != 0 {
				t.Errorf("the impostor got %d datagrams", n)
			}
		})
	}
}
