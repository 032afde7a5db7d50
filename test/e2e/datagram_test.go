package e2e_test

import (
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// unprovenMax is how many datagrams a flow may send before its peer has proved
// itself; DEMARC_UNPROVEN_MAX of the programs.
const unprovenMax = 16

// Toward an address that proves nothing, a flow ends after a few datagrams, unless
// its crossing asks no proof of the acceptor. Toward one that answers with its
// proof it does not end.
func TestUDPUnprovenLimit(t *testing.T) {
	e := newEnds(t, `crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [udp/7000]}
  - {name: log, from: [workload/web], to: [workload/db], ports: [udp/7001], identity: sender}
`, netlab.NodeOptions{CoreOnly: true})
	e.server.serve(7000)
	if problem := call[string](e.server, "Serve", ServeArgs{Network: "udp", At: "[::]:7001", Silent: true}); problem != "" {
		t.Fatal(problem)
	}
	far := e.lab.Namespace("far")
	far.Echo(7000)
	far.Echo(7001)
	wire := e.web.Wire()
	const count = 40
	for _, c := range []struct {
		name     string
		to       netip.AddrPort
		leave    int
		answered int
	}{
		{"OK proven", e.at4(7000), count, count},
		{"OK proven", e.at6(7000), count, count},
		{"OK sender only", e.at4(7001), count, 0},
		{"OK sender only, whoever answers", netip.AddrPortFrom(far.IP4, 7001), count, count},
		{"bad unproven", netip.AddrPortFrom(far.IP4, 7000), unprovenMax, 0},
		{"bad unproven", netip.AddrPortFrom(far.IP6, 7000), unprovenMax, 0},
		{"bad group, which can prove nothing", netip.MustParseAddrPort("[ff02::7%eth0]:7000"), 0, 0},
	} {
		t.Run(c.name+" "+c.to.Addr().WithZone("").String(), func(t *testing.T) {
			wire.Forget()
			args := DatagramArgs{To: c.to.String(), Count: count, Timeout: 20 * time.Millisecond}
			if c.answered > 0 {
				args.Timeout = timeToAnswer
			}
			r := call[DatagramReply](e.client, "Datagrams", args)
			if r.Sent != c.leave || r.Answered != c.answered || r.Errors["operation not permitted"] != count-c.leave {
				t.Errorf("%+v, want %d sent, %d answered, the rest not permitted", r, c.leave, c.answered)
			}
			to := netip.AddrPortFrom(c.to.Addr().WithZone(""), c.to.Port())
			if n := wire.Count(netlab.To(unix.IPPROTO_UDP, to.Addr(), to.Port())); n != c.leave {
				t.Errorf("%d datagrams on the wire, want %d", n, c.leave)
			}
		})
	}
	e.node.AwaitDenied(abi.UnprovenLimit, unix.IPPROTO_UDP, far.At4(7000))
	// What the stranger answered was not taken for the workload's answer.
	e.node.AwaitFlow("answers without a proof", func(f flow.Flow) bool {
		return f.Verdict == abi.Deny && f.Reason == abi.TagMissing && f.Direction == abi.Egress && f.Destination.Address == far.IP4
	})
}

// The answer to a datagram is let in by the question, and nothing else is: not
// from another port of the peer, not from another process at its address, and not
// to another port.
func TestUDPReplies(t *testing.T) {
	e := newEnds(t, `crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [udp/7000]}
`, netlab.NodeOptions{CoreOnly: true})
	local := startActor(t, e.db, e.node.Cgroup("/local"))
	elsewhere := startActor(t, e.db, e.lab.Cgroup("elsewhere"))
	for i, family := range []func(*netlab.Namespace) netip.Addr{
		func(ns *netlab.Namespace) netip.Addr { return ns.IP4 }, func(ns *netlab.Namespace) netip.Addr { return ns.IP6 },
	} {
		at := func(ns *netlab.Namespace, port int) string {
			return netip.AddrPortFrom(family(ns), uint16(port)).String()
		}
		serve := func(a *actor, where string) {
			t.Helper()
			if problem := call[string](a, "Serve", ServeArgs{Network: "udp", At: where, Silent: true}); problem != "" {
				t.Fatalf("serve %s: %s", where, problem)
			}
		}
		send := func(a *actor, from, to string) string {
			t.Helper()
			return call[string](a, "SendFrom", SendArgs{At: from, To: to})
		}
		const denied = "operation not permitted"
		question, quiet := at(e.web, 5000), at(e.web, 5001)
		server, other := at(e.db, 7000), at(e.db, 7001)
		serve(e.client, question)
		serve(e.client, quiet)
		serve(e.server, server)
		serve(e.server, other)
		serve(local, at(e.db, 7002))
		serve(elsewhere, at(e.db, 7003))

		if got := send(e.server, server, question); got != denied {
			t.Errorf("before any question: %q", got)
		}
		if got := send(e.client, question, server); got != "" {
			t.Errorf("question: %q", got)
		}
		eventually(t, timeToAnswer, "question arrives", func() bool {
			return call[Served](e.server, "Served", ServeArgs{Network: "udp", At: server}).Count == 1
		})
		for range 3 {
			if got := send(e.server, server, question); got != "" {
				t.Errorf("answer: %q", got)
			}
		}
		for _, bad := range []struct {
			name     string
			from     *actor
			at, to   string
			answered string // what the sender is told
		}{
			{"another port of the peer", e.server, other, question, denied},
			{"another port of the caller", e.server, server, quiet, denied},
			{"another process at the peer's address", local, at(e.db, 7002), question, ""},
			{"the same to another port", local, at(e.db, 7002), quiet, ""},
			{"another host at the peer's address", elsewhere, at(e.db, 7003), question, ""},
		} {
			if got := send(bad.from, bad.at, bad.to); got != bad.answered {
				t.Errorf("%s: the sender is told %q, want %q", bad.name, got, bad.answered)
			}
		}
		eventually(t, timeToAnswer, "denials at the caller", func() bool { return e.node.Denied(abi.NoCrossingFor) >= uint64(6*(i+1)) })
		for where, want := range map[string]int{question: 3, quiet: 0} {
			got := func() int { return call[Served](e.client, "Served", ServeArgs{Network: "udp", At: where}).Count }
			eventually(t, timeToAnswer, "the answers", func() bool { return got() >= want })
			if n := got(); n != want {
				t.Errorf("%s got %d datagrams, want %d", where, n, want)
			}
		}
	}
}
