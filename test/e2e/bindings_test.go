package e2e_test

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// With no room for another cgroup's identity, a new cgroup has none: it may do
// nothing, which is counted, and those that have one go on. (X6)
func TestX6BindingsFull(t *testing.T) {
	w := enforced(t)
	w.control()
	bindings := pinned(t, w.node, "bindings")
	// Cgroup numbers that no kernel hands out in this boot.
	const first = uint64(1) << 60
	fake := first
	for {
		err := bindings.Update(fake, abi.Binding{}, ebpf.UpdateNoExist)
		if errors.Is(err, unix.E2BIG) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		fake++
	}
	t.Logf("%d entries fill the table", fake-first)
	before := w.node.Faults()[record.FaultBindFull]
	late := w.web.Probe(w.node.Cgroup("/lab/web/late"))
	late.Socket("u", "udp4")
	late.Refused(send("u", w.decoy.At4(7000)), "EPERM")
	w.node.AwaitFlow("a cgroup without an identity", func(f netlab.Flow) bool {
		return f.Verdict == abi.Deny && f.Reason == abi.Unbound && f.Destination.Port == 7000
	})
	late.Socket("t", "tcp4")
	late.Refused(probe.Call{Op: "connect", Socket: "t", Address: w.decoy.At4(7000).String()}, "EPERM")
	if n := w.node.Faults()[record.FaultBindFull]; n == before {
		t.Error("the fault is not counted")
	}
	w.control()
	w.silent()

	for ; fake > first; fake-- {
		if err := bindings.Delete(fake - 1); err != nil {
			t.Fatal(err)
		}
	}
	room := w.web.Probe(w.node.Cgroup("/lab/web/room"))
	room.Socket("u", "udp4")
	room.Connect("u", w.decoy.At4(7000).String())
	room.Echoed("u", "with room again")
}
