package e2e_test

import (
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/demarc/demarc/bpf/abi"
)

// youngPlace is struct demarc_young of maps.h.
type youngPlace struct {
	Cookie, Over uint64
	Kept         [40]byte
	Born, Self   uint32
}

func (w *world) young() (*ebpf.Map, []youngPlace) {
	w.t.Helper()
	m := pinned(w.t, w.node, "young")
	all := make([]youngPlace, m.MaxEntries())
	for i := range all {
		if err := m.Lookup(uint32(i), &all[i]); err != nil {
			w.t.Fatal(err)
		}
	}
	return m, all
}

// held counts the places of connections that are not over.
func held(all []youngPlace) (n int) {
	for i := range all {
		if all[i].Cookie != 0 && all[i].Over == 0 {
			n++
		}
	}
	return n
}

// A connection has a place in the table while it is young, gives it up when it lasts
// and when it ends, and needs none where others have them all.
func TestYoungConnections(t *testing.T) {
	w := enforced(t)
	w.p.Socket("t", "tcp4")
	w.p.Connect("t", w.decoy.At4(7000).String())
	w.p.Echoed("t", "first words")
	_, all := w.young()
	if n := held(all); n != 2 { // both ends are here
		t.Errorf("%d places for both ends of a young connection", n)
	}
	time.Sleep(1100 * time.Millisecond)
	w.p.Echoed("t", "it lasts")
	_, all = w.young()
	if n := held(all); n != 0 {
		t.Errorf("%d places for a connection that lasts", n)
	}
	w.control()

	m, all := w.young()
	write := editor(t, m, false)
	for i := range all {
		all[i] = youngPlace{Cookie: 1<<62 + uint64(i)}
		write(uint32(i), all[i])
	}
	w.p.Echoed("t", "those from before go on")
	w.control()
	w.p.Socket("s", "tcp4")
	w.p.Refused(connect("s", w.peer.At4(7001)), "EPERM")
	w.denied(abi.NoCrossingFor, tcp, w.peer.At4(7001))
	w.silent()
	_, after := w.young()
	for i := range after {
		if after[i] != all[i] {
			t.Fatalf("place %d was taken from %+v: %+v", i, all[i], after[i])
		}
	}
}
