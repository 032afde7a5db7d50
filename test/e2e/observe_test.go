package e2e_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/test/netlab"
)

// Mode observe lets everything through as if nothing were there, and tells every
// decision that would have gone the other way, exactly once.
func TestObserve(t *testing.T) {
	const declared = `crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000]}
`
	e := newEnds(t, declared+"mode: observe\n", netlab.NodeOptions{CoreOnly: true})
	e.server.serve(7000)
	e.server.serve(7001)
	far := e.lab.Namespace("far")
	far.Echo(7001)
	const each = 10
	connections, answered := 0, 0
	for range each {
		for _, port := range []uint16{7000, 7001} {
			for _, to := range e.both(port) {
				if e.client.reaches(to) {
					connections++
				}
				answered += e.client.datagrams(to, 1).Answered
			}
		}
	}
	if connections != 4*each || answered != 4*each {
		t.Errorf("%d connections and %d datagrams of %d came through", connections, answered, 4*each)
	}
	if d := e.client.datagrams(netip.AddrPortFrom(far.IP4, 7001), 40); d.Answered != 40 {
		t.Errorf("one socket's datagrams to a stranger: %+v", d)
	}

	type kind struct {
		Direction abi.Direction
		Hook      record.Hook
		Reason    abi.Reason
		Protocol  string
		Port      uint16
	}
	count := func() (audits int) {
		for key, n := range e.node.Counts() {
			if key.Verdict == abi.Audit {
				audits += int(n)
			}
		}
		return audits
	}
	audits := func() (told int) {
		for _, f := range e.node.Flows() {
			if f.Verdict == abi.Audit {
				told++
			}
		}
		return told
	}
	eventually(t, timeToAnswer, "every audit that is counted is told", func() bool { return audits() >= count() })
	told := map[kind]int{}
	for _, f := range e.node.Flows() {
		switch f.Verdict {
		case abi.Audit:
			told[kind{f.Direction, f.Hook, f.Reason, f.Protocol, f.Destination.Port}]++
		case abi.Deny:
			t.Errorf("denied: %s", netlab.Describe(f))
		}
	}
	for key, n := range e.node.Counts() {
		if key.Verdict == abi.Deny {
			t.Errorf("%d denials with %s are counted", n, key.Reason)
		}
	}
	if counted, told := count(), audits(); counted != told {
		t.Errorf("%d audits counted, %d told", counted, told)
	}
	// A connection would have been stopped at its call, its SYN at both ends, and
	// its SYN-ACK; a datagram at both ends. Later packets of a flow are told of no
	// more, however many there are.
	want := map[kind]int{
		{abi.Egress, record.HookConnect, abi.NoCrossingFor, "tcp", 7001}:  2 * each,
		{abi.Egress, record.HookEgress, abi.NoCrossingFor, "tcp", 7001}:   2 * each,
		{abi.Egress, record.HookIngress, abi.NoCrossingFor, "tcp", 7001}:  2 * each,
		{abi.Ingress, record.HookIngress, abi.NoCrossingFor, "tcp", 7001}: 2 * each,
		{abi.Egress, record.HookEgress, abi.NoCrossingFor, "udp", 7001}:   2*each + 1,
		{abi.Ingress, record.HookIngress, abi.NoCrossingFor, "udp", 7001}: 2 * each,
	}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Errorf("audits (-want +got):\n%s", diff)
	}

	// The same in earnest.
	e.apply(declared)
	if e.client.reaches(e.at4(7001)) || !e.client.reaches(e.at4(7000)) {
		t.Error("enforcing does not enforce")
	}
}
