package e2e_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// signedIn is the segment with web's tag as it is in a time slot.
func (w *wired) signedIn(s segmentOf, slot uint32) tcpFrame {
	claim := w.id["web"]<<8 | uint32(w.epoch)<<4
	mac := w.frame(s).macIn(w.key, claim, slot)
	return w.tagged(s, append(binary.BigEndian.AppendUint32([]byte{253, 16, 0xd3, 0xac}, claim), mac[:]...))
}

// slotOf is the time slot that a SYN of web was sent in.
func (w *wired) slotOf(syn tcpFrame) uint32 {
	w.t.Helper()
	tags := syn.tags()
	if len(tags) != 1 {
		w.t.Fatalf("%d tags on the SYN", len(tags))
	}
	now := timeSlot(time.Now())
	for _, slot := range []uint32{now, now - 1} {
		if mac := syn.macIn(w.key, binary.BigEndian.Uint32(tags[0][4:]), slot); bytes.Equal(mac[:], tags[0][8:]) {
			return slot
		}
	}
	w.t.Fatal("the SYN's tag is not of this time")
	return 0
}

// moved is a captured segment in other places, with the options that it had.
func (w *wired) moved(s tcpFrame, change func(*segmentOf)) tcpFrame {
	m := segmentOf{from: s.src, to: s.dst, seq: s.seq, ack: s.ack, flags: s.flags, options: s.options()}
	change(&m)
	return w.frame(m)
}

// again is a captured segment as outside sends it. What was seen on a virtual cable
// has no checksum yet.
func (w *wired) again(s tcpFrame) tcpFrame { return w.moved(s, func(*segmentOf) {}) }

// captured opens a connection of web, exchanges a few bytes, ends it with a reset,
// so that nothing of it stands, and returns its SYN.
func (w *wired) captured(p *netlab.Probe, to netip.AddrPort, port uint16) tcpFrame {
	w.t.Helper()
	kind, from := "tcp4", w.web.At4(port)
	if to.Addr().Is6() {
		kind, from = "tcp6", w.web.At6(port)
	}
	w.tap.segments()
	bound(p, "s", kind, from)
	p.Connect("s", to.String())
	p.Echoed("s", "honest")
	p.Must(probe.Call{Op: "settext", Socket: "s", Level: unix.SOL_SOCKET, Option: unix.SO_LINGER, Data: []byte{1, 0, 0, 0, 0, 0, 0, 0}})
	p.Must(probe.Call{Op: "close", Socket: "s"})
	var syn tcpFrame
	ended := false
	eventually(w.t, timeToAnswer, "the reset", func() bool {
		for _, s := range w.tap.segments() {
			if s.flags == flagSYN {
				syn = s
			}
			ended = ended || s.dst == to && s.flags&flagRST != 0
		}
		return ended
	})
	if syn.dst != to {
		w.t.Fatal("the SYN was not seen")
	}
	return w.again(syn)
}

// wallMinusBoot is what abi.State has as Wall where the wall clock shows a time.
func wallMinusBoot(t *testing.T, show int64) uint64 {
	t.Helper()
	var boot unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		t.Fatal(err)
	}
	return uint64(show - boot.Nano())
}

// setWall makes a host's programs believe a wall clock. Its core must be stopped: it
// would set it right.
func setWall(t *testing.T, state *ebpf.Map, wall uint64) {
	t.Helper()
	var s abi.State
	err := state.Lookup(uint32(0), &s)
	if err == nil {
		s.Wall = wall
		err = state.Put(uint32(0), s)
	}
	if err != nil {
		t.Fatalf("set the clock: %v", err)
	}
}

// A tag opens one connection. The SYN of one that is over opens no other: not at
// once, not in the next time slot, in which its MAC is still good, and not later,
// when it is not; from or to another place it never was good.
func TestE03Replay(t *testing.T) {
	w, _, server := connected(t)
	server.serve(7001)
	w.db.Address(netip.MustParsePrefix("10.66.8.8/16"))
	p := w.web.Probe(w.caller.Cgroup("/lab/web"))
	syns := map[netip.AddrPort]tcpFrame{}
	for _, to := range w.both(7000) {
		syn := w.captured(p, to, 5000)
		syns[to] = syn
		w.refused(abi.TagReplayed, syn)
		w.refused(abi.TagReplayed, syn, syn)
		w.refused(abi.TagBadMAC,
			w.moved(syn, func(s *segmentOf) { s.from = netip.AddrPortFrom(s.from.Addr(), 5001) }),
			w.moved(syn, func(s *segmentOf) { s.from = nobody(to, 5000) }),
			w.moved(syn, func(s *segmentOf) { s.to = netip.AddrPortFrom(s.to.Addr(), 7001) }),
			w.moved(syn, func(s *segmentOf) { s.seq++ }))
		// Control: the same ports are free to an honest SYN.
		if again := w.captured(p, to, 5000); bytes.Equal(again.tags()[0], syn.tags()[0]) {
			t.Error("two connections have the same tag")
		}
		w.refused(abi.TagReplayed, syn)
	}
	w.refused(abi.TagBadMAC, w.moved(syns[w.both(7000)[0]], func(s *segmentOf) { s.to = netip.MustParseAddrPort("10.66.8.8:7000") }))

	// From here on, the listener's clock is the test's.
	state := pinned(t, w.listener, "state")
	w.listener.StopCore()
	const slot = int64(1) << abi.TagSlotShift
	port := uint16(20000)
	for to, syn := range syns {
		sent := w.slotOf(syn)
		for _, c := range []struct {
			name  string
			shows int64 // the listener's clock, from the beginning of the SYN's slot
			good  bool  // whether the MAC is
		}{
			{"same slot", slot / 8, true},
			{"next slot, early", slot + slot/8, true},
			{"next slot, late", slot + slot*5/8, false},
			{"slot before, early", -slot + slot/8, false},
			{"slot before, late", -slot + slot*5/8, true},
			{"an hour later", slot * 53, false},
			{"an hour before", -slot * 53, false},
		} {
			t.Run(fmt.Sprintf("%s, %s", c.name, to.Addr()), func(t *testing.T) {
				setWall(t, state, wallMinusBoot(t, int64(sent)*slot+c.shows))
				port++
				unused := w.signedIn(segmentOf{from: nobody(to, port), to: to, seq: 1, flags: flagSYN}, sent)
				if !c.good {
					w.refused(abi.TagBadMAC, syn, unused)
					return
				}
				w.refused(abi.TagReplayed, syn)
				w.cable.send(unused) // control: it is for having been used
				w.answerTo(unused)
			})
		}
	}
	if got := server.served("tcp", 7000); got.Count != 4 {
		t.Errorf("the listener got %d connections, want the 4 honest ones", got.Count)
	}
}

// While a handshake is pending, its SYN can come again, from whoever: it is the
// same handshake. It ends as one connection, and then its SYN opens no other.
func TestE03ReplayWhilePending(t *testing.T) {
	for _, cookies := range []string{"1", "2"} {
		t.Run("cookies "+cookies, func(t *testing.T) {
			w, client, server := connected(t)
			w.db.Sysctl("ipv4/tcp_syncookies", cookies)
			for i, to := range w.both(7000) {
				nft(t, w.db, "add table inet t; add chain inet t c { type filter hook prerouting priority -300; }; add rule inet t c tcp flags & (syn | ack) == ack drop")
				w.tap.segments()
				r := patient(client, to)
				if r.Error != "" {
					t.Fatalf("dial %s: %s", to, r.Error)
				}
				syn := w.again(w.tap.segments()[0])
				again := 0
				for range 3 {
					w.cable.send(syn)
					eventually(t, timeToAnswer, "another SYN-ACK of the same handshake", func() bool {
						for _, s := range w.tap.segments() {
							if s.dst == syn.src && s.flags == flagSYN|flagACK && s.ack == syn.seq+1 {
								again++
							}
						}
						return again > 0
					})
				}
				nft(t, w.db, "delete table inet t")
				w.exchanged(client, r)
				w.cable.send(syn) // the connection's own socket has to do with it now
				w.exchanged(client, r)
				if got := server.served("tcp", 7000).Count; got != i+1 {
					t.Errorf("the listener got %d connections, want %d", got, i+1)
				}
				call[bool](client, "Close", r.Stream)
				eventually(t, timeToAnswer, "the end of the connection", func() bool {
					for _, s := range w.tap.segments() {
						if s.dst == to && s.flags&(flagACK|1) == flagACK && s.seq == syn.seq+34 {
							return true // the ACK of the listener's FIN
						}
					}
					return false
				})
				w.refused(abi.TagReplayed, syn)
			}
			if n := w.denied(abi.TagReplayed); n != 2 {
				t.Errorf("%d replays, want 2", n)
			}
		})
	}
}

// A captured datagram says nothing new while its flow lives, and when the flow is
// forgotten it does not come to life again.
func TestE03ReplayedDatagram(t *testing.T) {
	w, client, server := connected(t)
	forget := editor(t, pinned(t, w.listener, "flows"), true)
	for i, to := range w.both(7000) {
		w.tap.frames()
		if r := client.datagrams(to, 1); r.Answered != 1 {
			t.Fatalf("datagrams to %s: %+v", to, r)
		}
		var tagged []byte
		var tuple abi.Tuple
		for _, b := range w.tap.frames() {
			h := 14 + 20
			tuple = abi.Tuple{Proto: udp}
			switch {
			case b[12] == 0x08 && b[13] == 0 && b[14+9] == udp:
				tuple.Source, tuple.Destination = netip.AddrFrom4([4]byte(b[26:])).As16(), netip.AddrFrom4([4]byte(b[30:])).As16()
			case b[12] == 0x86 && b[14+6] == udp:
				h = 14 + 40
				tuple.Source, tuple.Destination = [16]byte(b[22:]), [16]byte(b[38:])
			default:
				continue
			}
			tuple.SourcePort, tuple.DestinationPort = binary.BigEndian.Uint16(b[h:]), binary.BigEndian.Uint16(b[h+2:])
			length := int(binary.BigEndian.Uint16(b[h+4:]))
			if tuple.DestinationPort != 7000 || len(b) <= h+length {
				continue
			}
			tagged = b
			copy(tagged, w.mac.db)
			copy(tagged[6:], w.mac.outside)
			copy(tagged[h+6:], []byte{0, 0})
			pseudo := append(append(tuple.Source[:], tuple.Destination[:]...), 0, udp, byte(length>>8), byte(length))
			if h == 14+20 {
				pseudo = append(append(b[26:34:34], 0, udp), byte(length>>8), byte(length))
			}
			binary.BigEndian.PutUint16(tagged[h+6:], checksum(pseudo, b[h:h+length]))
			break
		}
		if tagged == nil {
			t.Fatal("no tagged datagram was seen")
		}
		w.cable.send(tcpFrame{frame: tagged}) // as for TCP, who can repeat can repeat within a flow
		eventually(t, timeToAnswer, "a datagram of a flow that lives", func() bool { return server.served("udp", 7000).Count == 2*i+2 })
		forget(tuple)
		before := w.denied(abi.TagReplayed)
		w.cable.send(tcpFrame{frame: tagged})
		eventually(t, timeToAnswer, "a replayed datagram", func() bool { return w.denied(abi.TagReplayed) > before })
		if got := server.served("udp", 7000).Count; got != 2*i+2 {
			t.Errorf("%s: the server got %d datagrams, want %d", to, got, 2*i+2)
		}
	}
}

// Where the memory is full of tags that may still be replayed, nobody new is
// admitted: forgetting one would admit a replay.
func TestE03FullMemory(t *testing.T) {
	w, client, _ := connected(t)
	replays := pinned(t, w.listener, "replays")
	// struct demarc_replay_bucket: 40 bits of a MAC, and when it was admitted in
	// steps of 2^32 ns, of which it counts for 37.
	write := editor(t, replays, false)
	fill := func(ago uint64) {
		var boot unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
			t.Fatal(err)
		}
		stamp := uint64(boot.Nano())>>32 - ago
		for i := range replays.MaxEntries() {
			var bucket [8]uint64
			for j := range bucket {
				bucket[j] = (uint64(i)*8+uint64(j)+1)<<24 | stamp&0xffffff
			}
			write(i, bucket)
		}
	}
	fill(0)
	for _, to := range w.both(7000) {
		s := segmentOf{from: nobody(to, 20000), to: to, seq: 1, flags: flagSYN}
		w.refused(abi.MapFull, w.signed(s, w.id["web"]))
	}
	for _, to := range w.both(7000) {
		if r := client.dial(to); r.Error == "" {
			t.Errorf("dial %s: connected", to)
		}
	}
	if n := w.listener.Faults()[record.FaultReplayFull]; n < 4 {
		t.Errorf("%d faults of a full memory, want 4 or more", n)
	}
	fill(37 + 2) // what is too old to be replayed gives way
	w.control(client, 7000)
}

// What was admitted is remembered through a restart of the core and a change of the
// policy. Before the machine's boot there is no memory, and so no tag of that time
// is good; without a clock, none is, and none is made. A tag of a time that was is
// good again where the clock goes back: the core does not follow it there, which its
// own tests show (TestWall in agent/core), because a test cannot set this machine's
// clock, nor boot it. Here the test writes in the core's place what it would write.
func TestE04ClockGoesBack(t *testing.T) {
	w, client, server := connected(t)
	p := w.web.Probe(w.caller.Cgroup("/lab/web"))
	to := w.both(7000)[0]
	syn := w.captured(p, to, 5000)
	w.refused(abi.TagReplayed, syn)
	w.listener.RestartCore()
	w.refused(abi.TagReplayed, syn)
	w.listener.Apply(document(2, wiredPolicy))
	w.refused(abi.TagReplayed, syn)
	w.control(client, 7000)

	served := server.served("tcp", 7000).Count
	state := pinned(t, w.listener, "state")
	w.listener.StopCore()
	const slot = int64(1) << abi.TagSlotShift
	port := uint16(20000)
	unused := func(slot uint32) tcpFrame {
		port++
		return w.signedIn(segmentOf{from: nobody(to, port), to: to, seq: 1, flags: flagSYN}, slot)
	}
	// The clock shows a time at which this machine was not up: 1970.
	setWall(t, state, wallMinusBoot(t, 5*slot+slot/8))
	w.refused(abi.TagStale, unused(5), unused(4))
	w.refused(abi.TagBadMAC, unused(6), unused(timeSlot(time.Now())))
	// It never showed any.
	setWall(t, state, 0)
	w.refused(abi.TagBadMAC, unused(timeSlot(time.Now())))
	w.refused(abi.TagStale, unused(0))
	if got := server.served("tcp", 7000).Count; got != served {
		t.Errorf("the listener got %d connections more", got-served)
	}

	own := pinned(t, w.caller, "state")
	w.caller.StopCore()
	setWall(t, own, 0)
	wire := w.web.Wire()
	if r := client.dial(to); r.Error == "" {
		t.Error("connected without a clock")
	}
	if n := wire.Count(handshakes); n != 0 {
		t.Errorf("%d SYNs left without a clock to bind them to", n)
	}
}
