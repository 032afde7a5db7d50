//go:build churn

package e2e_test

import (
	"math"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/test/netlab"
)

// What `make test-churn` asks: cgroups that are born and end without a pause.
const (
	churnLasts  = 3 * time.Minute
	churnLeast  = 10_000                // cgroups a minute
	churnNamed  = 50 * time.Millisecond // from mkdir to a judged packet, of 99 in 100
	churnGrowth = 32                    // bytes of a daemon's memory for each, once the agent's store of events is full: too few to remember one by
)

// For three minutes at least 10,000 cgroups a minute are made, and a process in each
// dials at once, what is declared and what is not: nothing undeclared leaves, nothing
// declared is refused, and neither daemon grows over what it keeps. (X13)
func TestX13Churn(t *testing.T) {
	e := newEnds(t, `crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000], log: none}
`, netlab.NodeOptions{})
	e.server.serve(7000)
	e.server.serve(7001)
	wire := e.web.Wire()
	forker := startActor(t, e.web, e.node.Cgroup("/forker"))
	daemons := map[string]int{"core": e.node.Core.PID(), "agent": e.node.Agent.PID()}
	births := func(want int, limit time.Duration) BirthReply {
		return call[BirthReply](forker, "Births", BirthArgs{Dir: e.node.Cgroup("/lab/web").Dir(), To: e.db.IP4.String(), Want: want, Limit: limit})
	}
	// Two calls of each are refused, and so told.
	filled := births(flow.StoreSize/2, 10*time.Minute).Made
	if filled < flow.StoreSize/2 {
		t.Fatalf("%d cgroups, too few to fill the agent's store of events", filled)
	}
	made := filled
	before := map[string]int{}
	for name, pid := range daemons {
		before[name] = resident(t, pid)
		t.Logf("%s: %d kB after %d cgroups", name, before[name], made)
	}
	for minute := range int(churnLasts / time.Minute) {
		r := births(math.MaxInt, time.Minute)
		made += r.Made
		t.Logf("minute %d: %d cgroups; first packet after a median of %s, 99 of 100 within %s; retried %d datagrams", minute+1, r.Made, r.Median, r.Late, r.Retried)
		if r.Made < churnLeast {
			t.Errorf("only %d cgroups in a minute: too slow to prove anything", r.Made)
		}
		if r.Late > churnNamed {
			t.Errorf("one in a hundred waited longer than %s, at most %s are allowed", r.Late, churnNamed)
		}
		if r.Echoed != r.Made || r.Connected != r.Made {
			t.Errorf("of %d cgroups, %d had their datagram answered and %d connected; the first failure: %s", r.Made, r.Echoed, r.Connected, r.Failure)
		}
		if r.Refused["operation not permitted"] != 2*r.Made {
			t.Errorf("undeclared calls ended with %v, want %d refused", r.Refused, 2*r.Made)
		}
		for name, pid := range daemons {
			t.Logf("%s: %d kB", name, resident(t, pid))
		}
	}
	// The heap of a daemon breathes by a megabyte or so, whoever comes and goes.
	for name, pid := range daemons {
		if each := (resident(t, pid) - before[name]) << 10 / (made - filled); each > churnGrowth {
			t.Errorf("%s grew by %d bytes for each of %d cgroups", name, each, made-filled)
		}
	}
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		if n := wire.Count(netlab.To(proto, e.db.IP4, 7001)); n != 0 {
			t.Errorf("%d undeclared packets of protocol %d on the wire", n, proto)
		}
		if n := wire.Count(netlab.To(proto, e.db.IP4, 7000)); n < made {
			t.Errorf("the wire saw %d declared packets of protocol %d, at least %d were sent", n, proto, made)
		}
	}
}
