package e2e_test

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// talkPlace is struct demarc_talk of maps.h. Ports and addresses are as in packets.
type talkPlace struct {
	Owner, Version, Epoch uint32
	Source, Destination   [2]byte
	Admitted, Untagged    uint64
	From, To              [16]byte
}

// talks are the places of sockets that talk now.
func (w *world) talks() (*ebpf.Map, []talkPlace) {
	w.t.Helper()
	m := pinned(w.t, w.node, "talks")
	all := make([]talkPlace, m.MaxEntries())
	for i := range all {
		if err := m.Lookup(uint32(i), &all[i]); err != nil {
			w.t.Fatal(err)
		}
	}
	return m, all
}

// admittedTo finds the place of the one socket that may go on talking to somebody.
func admittedTo(all []talkPlace, to netlab.Place) (index uint32, found bool) {
	for i := range all {
		if all[i].Admitted != 0 && all[i].To == to.Address.As16() && binary.BigEndian.Uint16(all[i].Destination[:]) == to.Port {
			return uint32(i), true
		}
	}
	return 0, false
}

// asksNoTable returns whether a datagram of a socket that talks passes without the flow
// that it opened, which it would write down anew. A talk goes on for 128 jiffies, which
// are 128 ms at least: where all took longer, another socket tries.
func (w *world) asksNoTable(family string, port uint16) bool {
	w.t.Helper()
	from, to := w.web.At4(port), w.decoy.At4(7000)
	if family == "udp6" {
		from, to = w.web.At6(port), w.decoy.At6(7000)
	}
	flows := pinned(w.t, w.node, "flows")
	remove := editor(w.t, flows, true)
	for ; from.Port < port+20; from.Port++ {
		flow := abi.Tuple{
			Source: from.Address.As16(), SourcePort: from.Port,
			Destination: to.Address.As16(), DestinationPort: to.Port, Proto: udp,
		}
		there := func() bool {
			value, err := flows.LookupBytes(flow)
			if err != nil {
				w.t.Fatal(err)
			}
			return value != nil
		}
		name := from.String()
		w.p.Socket(name, family)
		w.p.Must(probe.Call{Op: "bind", Socket: name, Address: from.String()})
		w.p.Connect(name, to.String())
		begun := time.Now()
		for range 4 {
			w.p.Echoed(name, "a word")
		}
		if !there() {
			w.t.Fatal("a flow that was admitted is not in its table")
		}
		remove(flow)
		if there() {
			w.t.Fatal("the flow cannot be deleted")
		}
		w.p.Must(probe.Call{Op: "send", Socket: name, Data: []byte("without its flow")})
		if back, took := there(), time.Since(begun); took < 100*time.Millisecond {
			return !back
		}
	}
	w.t.Fatal("nothing was fast enough")
	return false
}

// A UDP socket's talk is carried in its place, and on the socket where another one has
// that place: its datagrams then ask no table.
func TestTalks(t *testing.T) {
	for _, family := range []string{"udp4", "udp6"} {
		t.Run(family, func(t *testing.T) {
			w := enforced(t)
			to, undeclared := w.decoy.At4(7000), w.peer.At4(7001)
			if family == "udp6" {
				to, undeclared = w.decoy.At6(7000), w.peer.At6(7001)
			}
			if !w.asksNoTable(family, 5000) {
				t.Error("a talk was looked up that has a place")
			}
			m, all := w.talks()
			if _, found := admittedTo(all, to); !found {
				t.Error("a socket that talks has no place")
			}
			write := editor(t, m, false)
			for i := range all {
				all[i] = talkPlace{Owner: 1<<32 - 1, Admitted: 1 << 62}
				write(uint32(i), all[i])
			}
			if !w.asksNoTable(family, 6000) {
				t.Error("a talk was looked up whose socket carries it")
			}
			w.p.Socket("s", family)
			w.p.Refused(send("s", undeclared), "EPERM")
			w.silent()
			_, after := w.talks()
			for i := range after {
				if after[i] != all[i] {
					t.Fatalf("place %d was taken from %+v: %+v", i, all[i], after[i])
				}
			}
		})
	}
}

// What stands in a place counts for the one socket that it is of, under the policy that
// stands, until its time is over or somebody speaks in another's place, and while nobody
// writes it.
func TestTalksCondition(t *testing.T) {
	w := enforced(t)
	w.p.Socket("u", "udp4")
	w.p.Connect("u", w.decoy.At4(7000).String())
	for range 4 {
		w.p.Echoed("u", "a word")
	}
	m, all := w.talks()
	i, found := admittedTo(all, w.decoy.At4(7000))
	if !found {
		t.Fatal("a socket that talks has no place")
	}
	// Nobody declared this; were it admitted, it would look like that.
	good := all[i]
	good.To = w.peer.IP4.As16()
	binary.BigEndian.PutUint16(good.Destination[:], 7001)
	good.Admitted = 1 << 62
	turned := pinned(t, w.node, "turned")
	var before uint64
	if err := turned.Lookup(uint32(0), &before); err != nil {
		t.Fatal(err)
	}
	write, turn := editor(t, m, false), editor(t, turned, false)
	for _, tt := range []struct {
		name   string
		change func(*talkPlace)
		turned uint64
		passes bool
	}{
		{name: "OK its own", passes: true},
		{name: "bad another socket's", change: func(p *talkPlace) { p.Owner++ }},
		{name: "bad another epoch's", change: func(p *talkPlace) { p.Epoch++ }},
		{name: "bad being written", change: func(p *talkPlace) { p.Version |= 1 }},
		{name: "bad over", change: func(p *talkPlace) { p.Admitted = 1 }},
		{name: "bad another port", change: func(p *talkPlace) { p.Destination[1]++ }},
		{name: "bad another source port", change: func(p *talkPlace) { p.Source[1]++ }},
		{name: "bad another address", change: func(p *talkPlace) { p.To[15]++ }},
		{name: "bad another source", change: func(p *talkPlace) { p.From[15]++ }},
		{name: "bad IPv6", change: func(p *talkPlace) { p.From[0] = 0x20 }},
		{name: "bad somebody took a place since", turned: 1 << 62},
		{name: "OK its own again", passes: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			place := good
			if tt.change != nil {
				tt.change(&place)
			}
			write(i, place)
			turn(uint32(0), max(before, tt.turned))
			if tt.passes {
				w.p.Must(send("u", w.peer.At4(7001)))
			} else {
				w.p.Refused(send("u", w.peer.At4(7001)), "EPERM")
			}
		})
	}
}
