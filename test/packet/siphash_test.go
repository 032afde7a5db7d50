package packet_test

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/dchest/siphash"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
)

// covered is what a MAC covers, as bytes.
func covered(claim, seq, acked uint32, t abi.Tuple) []byte {
	b := binary.BigEndian.AppendUint32(nil, claim)
	b = binary.BigEndian.AppendUint32(b, seq)
	b = binary.BigEndian.AppendUint32(b, acked)
	b = binary.BigEndian.AppendUint16(b, t.SourcePort)
	b = binary.BigEndian.AppendUint16(b, t.DestinationPort)
	return append(append(b, t.Source[:]...), t.Destination[:]...)
}

// keyed gives a host a key, and the epoch that it sends with.
func (h *host) keyed(key [16]byte, epoch uint32, wall uint64) {
	h.t.Helper()
	h.put("keys", epoch, abi.Key{Key: [2]uint64{binary.LittleEndian.Uint64(key[:]), binary.LittleEndian.Uint64(key[8:])}, Valid: 1})
	h.put("state", uint32(0), abi.State{Active: abi.MakeActive(0, abi.ActiveOn, 1), TagEpoch: uint64(epoch), Wall: wall})
}

// anyTuple is two places of one family, by chance.
func anyTuple(r *rand.Rand, proto uint8) abi.Tuple {
	t := abi.Tuple{SourcePort: uint16(r.Uint32()), DestinationPort: uint16(r.Uint32()), Proto: proto}
	for _, a := range []*[16]byte{&t.Source, &t.Destination} {
		binary.NativeEndian.PutUint64(a[:], r.Uint64())
		binary.NativeEndian.PutUint64(a[8:], r.Uint64())
	}
	if r.IntN(2) == 0 {
		for _, a := range []*[16]byte{&t.Source, &t.Destination} {
			*a = netip.AddrFrom4([4]byte(a[12:])).As16()
		}
	}
	return t
}

// packetOf is a frame between the places of a tuple.
func packetOf(t abi.Tuple, transport []byte) []byte {
	source, destination := netip.AddrFrom16(t.Source).Unmap(), netip.AddrFrom16(t.Destination).Unmap()
	b := make([]byte, 12, 14+40+len(transport))
	if source.Is4() {
		b = append(b, 0x08, 0, 0x45, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(20+len(transport)))
		b = append(b, 0, 0, 0, 0, 64, t.Proto, 0, 0)
	} else {
		b = append(b, 0x86, 0xdd, 0x60, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(len(transport)))
		b = append(b, t.Proto, 64)
	}
	b = append(append(b, source.AsSlice()...), destination.AsSlice()...)
	return append(b, transport...)
}

// segmentOf is a TCP header with options.
func segmentOf(t abi.Tuple, seq, ack uint32, flags uint8, options []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, t.SourcePort)
	b = binary.BigEndian.AppendUint16(b, t.DestinationPort)
	b = binary.BigEndian.AppendUint32(b, seq)
	b = binary.BigEndian.AppendUint32(b, ack)
	b = append(b, byte(5+len(options)/4)<<4, flags, 0xff, 0xff, 0, 0, 0, 0)
	return append(b, options...)
}

func tagBytes(claim uint32, mac []byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{abi.TagKind, abi.TagLength, 0xd3, 0xac}, claim)
	return append(b, mac...)
}

// The programs' SipHash is that of an implementation of another hand, on what comes by
// chance: what they sign, and what they take for signed. Keys, claims, times, ports and
// addresses are all of chance, so that each bit of what is hashed has both values.
func TestSipHash(t *testing.T) {
	const each = 20_000
	r := rand.New(rand.NewPCG(11, 12))
	h := newHost(t)
	var ones [48 * 8]int
	look := func(b []byte) {
		for i := range ones {
			ones[i] += int(b[i/8] >> (i % 8) & 1)
		}
	}
	random := func() (key [16]byte) {
		binary.NativeEndian.PutUint64(key[:], r.Uint64())
		binary.NativeEndian.PutUint64(key[8:], r.Uint64())
		return key
	}
	sum := func(key [16]byte, b []byte) []byte {
		return binary.LittleEndian.AppendUint64(nil, siphash.Hash(binary.LittleEndian.Uint64(key[:]), binary.LittleEndian.Uint64(key[8:]), b))
	}
	for range each { // signed
		key, epoch, tuple := random(), r.Uint32N(abi.Epochs), anyTuple(r, unix.IPPROTO_UDP)
		h.keyed(key, epoch, r.Uint64()>>3)
		identity := 16 + r.Uint32N(1<<24-16)
		h.put("flows", tuple, flow{Opener: identity, EpochOut: 1, VerdictOut: uint8(abi.Provisional), Provable: 1})
		datagram := binary.BigEndian.AppendUint16(nil, tuple.SourcePort)
		datagram = binary.BigEndian.AppendUint16(datagram, tuple.DestinationPort)
		datagram = append(datagram, 0, 12, 0, 0, 'f', 'o', 'u', 'r')
		question := packetOf(tuple, datagram)
		_, tagged := h.run("tc_egress", question)
		if err := h.Maps["flows"].Delete(tuple); err != nil {
			t.Fatal(err)
		}
		if len(tagged) != len(question)+udpSurplus {
			t.Fatalf("%d bytes became %d", len(question), len(tagged))
		}
		option := tagged[len(tagged)-20:] // claim, time, nonce, MAC
		b := covered(binary.BigEndian.Uint32(option), binary.BigEndian.Uint32(option[4:]), binary.BigEndian.Uint32(option[8:]), tuple)
		if want := sum(key, b); string(option[12:]) != string(want) {
			t.Fatalf("key %x, input %x: the program makes %x, want %x", key, b, option[12:], want)
		}
		look(b)
	}

	// Taken for signed: the answer is yes for the true MAC, and no for one that differs
	// in a bit.
	var boot unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		program       string
		subject, peer uint32
		direction     abi.Direction
		answer        bool
	}{{"selftest_ingress", acceptor, opener, abi.Ingress, false}, {"selftest_egress", opener, acceptor, abi.Egress, true}} {
		h.admits(c.subject, c.peer, c.direction)
		h.put("selftest", uint32(0), []uint32{c.subject, 0, 0, uint32(abi.ProofUnknown)})
		for range each / 2 {
			key, epoch, tuple := random(), r.Uint32N(abi.Epochs), anyTuple(r, unix.IPPROTO_TCP)
			slot := 1 + r.Uint32()>>4
			// The middle of the slot is a while from now.
			h.keyed(key, epoch, uint64(slot)<<abi.TagSlotShift+1<<(abi.TagSlotShift-2)-uint64(boot.Nano()))
			claim, seq, acked, flags := c.peer<<8|epoch<<4, r.Uint32(), slot, uint8(0x02)
			ack := uint32(0)
			if c.answer {
				ack, flags = r.Uint32(), 0x12
				claim, acked = claim|answers, ack
			}
			b := covered(claim, seq, acked, tuple)
			mac := sum(key, b)
			segment := func() []byte { return packetOf(tuple, segmentOf(tuple, seq, ack, flags, tagBytes(claim, mac))) }
			if got, _ := h.run(c.program, segment()); got != pass {
				t.Fatalf("key %x, input %x: %x is refused", key, b, mac)
			}
			mac[r.IntN(8)] ^= 1 << r.IntN(8)
			if got, _ := h.run(c.program, segment()); got != drop {
				t.Fatalf("key %x, input %x: %x is accepted", key, b, mac)
			}
			look(b)
		}
	}
	for bit, n := range ones {
		constant := bit/8 == 3 && bit%8 < 4 // the flags
		if !constant && (n == 0 || n == 2*each) {
			t.Errorf("bit %d of byte %d is the same in all inputs: nothing is shown of it", bit%8, bit/8)
		}
	}
}
