package bench

import (
	"testing"

	"github.com/gopacket/gopacket/layers"

	"github.com/demarc/demarc/bpf/abi"
)

// pendingSYN is struct demarc_pending_syn of maps.h.
type pendingSYN struct {
	Mark                                   uint64
	Tuple                                  abi.Tuple
	Cgroup, Until                          uint64
	Self, Peer, Seq, Crossing, Epoch, Born uint32
	Proof, Reason, Slot                    uint8
	_                                      [5]uint8
}

type pendingBucket [8]pendingSYN

// Where all places are taken, an admitted SYN gets that of the oldest handshake of its
// bucket, and keeps it when it is admitted again. A SYN that is refused gets none. One
// in front is nobody's but the first's, until it is free.
func TestPendingPlaces(t *testing.T) {
	const (
		oldest  = 5
		buckets = 8192 // the rest are in front of them
		given   = 1    // mark of a place that somebody is writing
	)
	b := build(t, 400)
	b.addDemarc()
	c := b.private()
	ids := b.identities()
	var state abi.State
	check(t, c.Maps["state"].Lookup(uint32(0), &state))
	var key abi.Key
	check(t, c.Maps["keys"].Lookup(uint32(state.TagEpoch), &key))
	signed := synFrame(ids["client"], uint32(state.TagEpoch), key)
	wrong := append([]byte(nil), signed...)
	wrong[len(wrong)-1] ^= 1

	pending := c.Maps["pending_syns"]
	indices := make([]uint32, pending.MaxEntries())
	full := make([]pendingBucket, len(indices))
	for i := range full {
		indices[i] = uint32(i)
		for j := range full[i] {
			full[i][j] = pendingSYN{Mark: uint64(i*8+j+1) * 2, Born: uint32(100 + j)}
		}
		full[i][oldest].Born = 1
		for j := range full[i] {
			if i >= buckets {
				full[i][j].Mark = given
			}
		}
	}
	_, err := pending.BatchUpdate(indices, full, nil)
	check(t, err)
	// changed are the places that somebody else has.
	changed := func() (places [][2]int, last pendingSYN) {
		for i := range full {
			var now pendingBucket
			check(t, pending.Lookup(uint32(i), &now))
			for j := range now {
				if now[j] != full[i][j] {
					places, last = append(places, [2]int{i, j}), now[j]
				}
			}
		}
		return places, last
	}
	arrives := func(frame []byte, verdict uint32) {
		t.Helper()
		once := &Packets{Repeat: 1, Best: 1}
		b.inside(b.node.Cgroup("/bench/server"), func() { b.best(once, c, "packet_syn", frame, verdict) })
	}

	arrives(wrong, 0)
	if places, _ := changed(); len(places) != 0 {
		t.Fatalf("a SYN that was refused has places %v", places)
	}
	arrives(signed, 1)
	first, syn := changed()
	if len(first) != 1 || first[0][1] != oldest {
		t.Fatalf("an admitted SYN has places %v, want one, the oldest of its bucket", first)
	}
	if syn.Seq != 7 || syn.Tuple.DestinationPort != firstPort || syn.Peer != uint32(ids["client"]) || syn.Self != uint32(ids["server"]) {
		t.Errorf("what is noted: %+v", syn)
	}
	arrives(signed, 1)
	again, next := changed()
	if len(again) != 1 || again[0] != first[0] || next.Epoch == syn.Epoch {
		t.Errorf("admitted again it has places %v, noted %+v, and had %v", again, next, first)
	}

	for i := range full[buckets:] {
		full[buckets+i] = pendingBucket{}
		check(t, pending.Put(uint32(buckets+i), full[buckets+i]))
	}
	arrives(signed, 1)
	front, _ := changed()
	if len(front) != 2 || front[0] != first[0] || front[1][0] < buckets {
		t.Errorf("with room in front it has places %v, want a new one there", front)
	}
}

// Between a connection's last ACK and its verdict another processor may take in its
// data: those pass by the handshake that was admitted, and by nothing else.
func TestAcceptedElsewhere(t *testing.T) {
	b := build(t, 400)
	b.addDemarc()
	c := b.private()
	once := &Packets{Repeat: 1, Best: 1}
	arrives := func(program string, frame []byte, verdict uint32) {
		t.Helper()
		b.inside(b.node.Cgroup("/bench/server"), func() { b.best(once, c, program, frame, verdict) })
	}
	segment := func(seq uint32, port layers.TCPPort) []byte {
		return frame(&layers.TCP{SrcPort: port, DstPort: firstPort, ACK: true, PSH: true, Seq: seq, Ack: 9}, []byte{1})
	}
	const syn, later = 7, 5000 // synFrame's own number, and one further on
	arrives("packet_accepting", segment(syn+1, 40000), 0)
	arrives("packet_syn", b.signed(c), 1)
	arrives("packet_accepting", segment(syn+1, 40000), 1)
	arrives("packet_accepting", segment(later, 40000), 1)
	arrives("packet_accepting", segment(syn+1, 40001), 0)
	arrives("packet_listener", segment(syn+1, 40000), 1)
	arrives("packet_listener", segment(later, 40000), 0)
}
