package e2e_test

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// More flows than the table of flows has room for: what was denied stays denied,
// what was allowed goes on.
func TestH01FlowTable(t *testing.T) {
	w := enforced(t)
	w.control()
	w.p.Socket("t", "tcp4")
	w.p.Connect("t", w.decoy.At4(7000).String())
	w.p.Echoed("t", "before")
	w.p.Socket("u", "udp4")
	w.p.Connect("u", w.decoy.At4(7000).String())
	w.p.Echoed("u", "before")
	// Everything on 7000 may be opened until the other side fails to prove itself.
	crowd := netip.MustParsePrefix("10.128.0.0/9")
	w.web.Lead(crowd, w.peer)
	w.p.Socket("f", "udp4")
	const flows = 300_000 // the table holds 131,072
	flood := probe.Call{Op: "flood", Socket: "f", Size: flows, Data: []byte("x"), Address: netlab.Place{Address: crowd.Addr(), Port: 7000}.String()}
	if r := w.p.Must(flood); r.N != flows {
		t.Errorf("%d of %d flows were opened", r.N, flows)
	}
	w.p.Echoed("t", "after")
	w.p.Echoed("u", "after")
	w.p.Refused(send("f", w.peer.At4(7001)), "EPERM")
	w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
	w.p.Socket("s", "tcp4")
	w.p.Refused(connect("s", w.peer.At4(7001)), "EPERM")
	w.denied(abi.NoCrossingFor, tcp, w.peer.At4(7001))
	sender := w.peer.Probe(w.lab.Cgroup("peer"))
	sender.Socket("u", "udp4")
	w.p.Socket("in", "udp4")
	w.p.Must(probe.Call{Op: "bind", Socket: "in", Address: w.web.At4(7005).String()})
	sender.Must(send("u", w.web.At4(7005)))
	w.node.AwaitDenied(abi.NoCrossingFor, udp, w.web.At4(7005))
	w.p.Refused(probe.Call{Op: "recv", Socket: "in", Timeout: 1}, probe.Timeout)
	w.control()
	w.silent()
}

// A full table refuses what it has no room for, and says so.
func TestH02FullTable(t *testing.T) {
	w := enforced(t)
	w.control()
	// One namespace has too few ports to fill the table of port owners, and one
	// process too few descriptors.
	const room, each = 65536, 15000
	held := 0
	hoard := func() (last *netlab.Probe, err string) {
		for _, ns := range []*netlab.Namespace{w.web, w.decoy} {
			for _, kind := range []int{unix.SOCK_DGRAM, unix.SOCK_STREAM} {
				for first := 10000; first < 55000; first += each {
					last = ns.Probe(w.node.Cgroup("/lab/other"))
					r := last.Do(probe.Call{Op: "bindall", Type: kind, Value: first, Size: each})
					if held += r.N; r.Error != "" {
						return last, r.Error
					}
				}
			}
		}
		return last, ""
	}
	last, err := hoard()
	if err != "EPERM" || held < room-64 || held > room {
		t.Fatalf("bind: %q with %d ports held", err, held)
	}
	f := w.node.AwaitFlow("a full table", func(f netlab.Flow) bool { return f.Verdict == abi.Deny && f.Reason == abi.MapFull })
	if f.Hook != record.HookBind || f.Destination.Workload != "other" {
		t.Errorf("denied %s", netlab.Describe(f))
	}
	if n := w.node.Faults()[record.FaultPortFull]; n == 0 {
		t.Error("the fault is not counted")
	}
	w.p.Socket("t", "tcp4")
	w.p.Refused(probe.Call{Op: "bind", Socket: "t", Address: w.web.At4(9999).String()}, "EPERM")
	w.p.Socket("u", "udp4")
	w.p.Refused(send("u", w.peer.At4(7001)), "EPERM")
	w.denied(abi.NoCrossingFor, udp, w.peer.At4(7001))
	last.Kill() // its ports are free again
	w.p.Must(probe.Call{Op: "bind", Socket: "t", Address: w.web.At4(9999).String()})
	w.control()
	w.silent()
}

// With the rings full and nobody reading them, nothing passes and everything is
// counted; who reads again hears how much is missing.
func TestH03FullRing(t *testing.T) {
	w := enforced(t)
	w.control()
	w.node.StopCore() // and with it the only reader
	w.p.Socket("u", "udp4")
	const times = 100_000 // the ring holds less than a fifth of that
	flood := probe.Call{Op: "flood", Socket: "u", Size: times, Value: 1, Data: []byte("x"), Address: w.peer.At4(7001).String()}
	if r := w.p.Do(flood); r.N != 0 || r.Error != "EPERM" {
		t.Errorf("%d of %d datagrams were taken: %q", r.N, times, r.Error)
	}
	w.silent()
	w.node.Forget()
	w.node.StartCore()
	if n := w.node.Denied(abi.NoCrossingFor); n != times {
		t.Errorf("%d denials counted of %d", n, times)
	}
	w.p.Socket("t", "tcp4")
	w.p.Refused(connect("t", w.peer.At4(7001)), "EPERM")
	w.denied(abi.NoCrossingFor, tcp, w.peer.At4(7001)) // behind the flood, there is room again
	ring := w.node.Rings()[record.RingDenied]
	if ring.Lost == 0 {
		t.Error("nothing was lost: this test shows nothing")
	}
	var heard uint64
	for _, f := range w.node.Flows() {
		if f.Verdict == abi.Deny {
			heard++
		}
	}
	if heard+ring.Lost != ring.Seq || ring.Seq != times+1 {
		t.Errorf("%d events made, %d heard, %d lost", ring.Seq, heard, ring.Lost)
	}
	w.control()
	w.silent()
}
