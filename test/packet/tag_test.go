package packet_test

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/dchest/siphash"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
)

const (
	opener   = uint32(100) // subjects of the loaded generation
	acceptor = uint32(200)

	udpSurplus = 26 // bytes that a tag adds to a datagram of even length
)

var tagKey = [16]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}

// host is the programs of one host, with a key, a clock and a generation that
// allows everything to those that it knows.
type host struct {
	t *testing.T
	*ebpf.Collection
	spec *ebpf.CollectionSpec
}

func newHost(t *testing.T) *host {
	t.Helper()
	spec, err := ebpf.LoadCollectionSpec("../../agent/core/demarc_bpfel.o")
	if err != nil {
		t.Fatal(err)
	}
	c, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	h := &host{t, c, spec}
	subject := abi.Subject{Flags: ^uint16(abi.SubjectOutbound | abi.SubjectInbound)}
	h.table("subjects", opener, subject, acceptor, subject)
	h.table("crossings", uint32(0), abi.Crossing{Number: 1})
	h.admits(acceptor, opener, abi.Ingress) // only proof of the opener
	h.put("keys", uint32(3), abi.Key{Key: [2]uint64{binary.LittleEndian.Uint64(tagKey[:]), binary.LittleEndian.Uint64(tagKey[8:])}, Valid: 1})
	h.put("state", uint32(0), abi.State{Active: abi.MakeActive(0, abi.ActiveOn, 1), TagEpoch: 3, Wall: uint64(wall(t))})
	return h
}

// table gives the generation a table with these keys and their values.
func (h *host) table(name string, entries ...any) {
	h.t.Helper()
	s := h.spec.Maps[name].InnerMap.Copy()
	s.MaxEntries = uint32(len(entries) / 2)
	m, err := ebpf.NewMap(s)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { m.Close() })
	for ; len(entries) > 0; entries = entries[2:] {
		if err := m.Put(entries[0], entries[1]); err != nil {
			h.t.Fatalf("fill %s: %v", name, err)
		}
	}
	h.put(name, uint32(0), m)
}

// admits lets an end admit the other one for its proof, and nobody else.
func (h *host) admits(subject, peer uint32, direction abi.Direction) {
	h.t.Helper()
	h.table("rules", abi.RuleKey{Subject: subject, Peer: 1<<24 | peer, Direction: direction},
		abi.Rule{Crossing: [abi.Alternatives]uint32{0, abi.NoCrossing, abi.NoCrossing, abi.NoCrossing}})
}

// wall is Unix time minus boot time, in ns.
func wall(t *testing.T) int64 {
	t.Helper()
	var boot unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		t.Fatal(err)
	}
	return time.Now().UnixNano() - boot.Nano()
}

func (h *host) put(name string, key, value any) {
	h.t.Helper()
	if err := h.Maps[name].Put(key, value); err != nil {
		h.t.Fatalf("write %s: %v", name, err)
	}
}

// flow is struct demarc_flow of abi.h.
type flow struct {
	Opener, Acceptor, EpochOut, EpochIn         uint32
	VerdictOut, VerdictIn, SenderOnly, Provable uint8
	Unproven                                    uint32
	Last, UntilOut, UntilIn, Tagged             uint64
	Owed, Omits                                 uint8
	_                                           [2]uint8
	Nonce                                       uint32
}

func (h *host) flow(t abi.Tuple) (f flow, found bool) {
	h.t.Helper()
	err := h.Maps["flows"].Lookup(t, &f)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		h.t.Fatal(err)
	}
	return f, err == nil
}

// run gives a frame to a program and returns the verdict and the frame after it.
func (h *host) run(program string, frame []byte) (verdict int32, after []byte) {
	h.t.Helper()
	out := make([]byte, len(frame)+64)
	o := &ebpf.RunOptions{Data: frame, DataOut: out}
	v, err := h.Programs[program].Run(o)
	if err != nil {
		h.t.Fatalf("run %s: %v", program, err)
	}
	return int32(v), o.DataOut
}

// mac is SipHash-2-4 of what a tag covers, by a Go implementation of another hand.
func mac(claim, seq, acked uint32, t abi.Tuple) []byte {
	b := binary.BigEndian.AppendUint32(nil, claim)
	b = binary.BigEndian.AppendUint32(b, seq)
	b = binary.BigEndian.AppendUint32(b, acked)
	b = binary.BigEndian.AppendUint16(b, t.SourcePort)
	b = binary.BigEndian.AppendUint16(b, t.DestinationPort)
	b = append(append(b, t.Source[:]...), t.Destination[:]...)
	s := siphash.New(tagKey[:])
	s.Write(b)
	return s.Sum(nil)
}

func turned(t abi.Tuple) abi.Tuple {
	return abi.Tuple{Source: t.Destination, Destination: t.Source, SourcePort: t.DestinationPort, DestinationPort: t.SourcePort, Proto: t.Proto}
}

// datagram is a frame with checksums, and its five-tuple.
func datagram(t *testing.T, ipv6 bool, back bool, payload int) ([]byte, abi.Tuple) {
	t.Helper()
	tuple := abi.Tuple{SourcePort: 40000, DestinationPort: 53, Proto: 17}
	var network gopacket.NetworkLayer
	var l3 gopacket.SerializableLayer
	kind := layers.EthernetTypeIPv4
	if ipv6 {
		ip := ip6(layers.IPProtocolUDP)
		copy(tuple.Source[:], ip.SrcIP)
		copy(tuple.Destination[:], ip.DstIP)
		if back {
			ip.SrcIP, ip.DstIP = ip.DstIP, ip.SrcIP
		}
		network, l3, kind = ip, ip, layers.EthernetTypeIPv6
	} else {
		ip := ip4(layers.IPProtocolUDP)
		copy(tuple.Source[:], ip.SrcIP.To16())
		copy(tuple.Destination[:], ip.DstIP.To16())
		if back {
			ip.SrcIP, ip.DstIP = ip.DstIP, ip.SrcIP
		}
		network, l3 = ip, ip
	}
	u := udp()
	if back {
		u.SrcPort, u.DstPort = u.DstPort, u.SrcPort
	}
	if err := u.SetNetworkLayerForChecksum(network); err != nil {
		t.Fatal(err)
	}
	b := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, l3, u,
		gopacket.Payload(slices.Repeat([]byte{0xa5}, payload)))
	if err != nil {
		t.Fatal(err)
	}
	return frame(kind, b.Bytes()), tuple
}

// checkTagged compares what an egress program made of a datagram with the format, and
// returns its nonce.
func checkTagged(t *testing.T, before, after []byte, identity uint32, flags uint32, tuple abi.Tuple) uint32 {
	t.Helper()
	ipv6 := before[12] == 0x86
	l3 := 14
	transport := l3 + 20
	if ipv6 {
		transport = l3 + 40
	}
	length := int(binary.BigEndian.Uint16(before[transport+4:]))
	pad := length & 1
	if len(after) != len(before)+udpSurplus+pad {
		t.Fatalf("%d bytes became %d", len(before), len(after))
	}
	if !slices.Equal(after[transport:transport+length], before[transport:transport+length]) {
		t.Error("the datagram itself was changed")
	}
	if ipv6 {
		if got := int(binary.BigEndian.Uint16(after[l3+4:])); got != len(after)-l3-40 {
			t.Errorf("IPv6 payload length %d of %d bytes", got, len(after)-l3-40)
		}
	} else {
		if got := int(binary.BigEndian.Uint16(after[l3+2:])); got != len(after)-l3 {
			t.Errorf("IPv4 total length %d of %d bytes", got, len(after)-l3)
		}
		if sum := fold(after[l3:transport]); sum != 0xffff {
			t.Errorf("IPv4 header sums up to %#x", sum)
		}
	}
	surplus := after[transport+length:]
	// RFC 9868, section 9: the surplus area and its length add up to zero. It is
	// summed at the alignment that it has in the packet.
	aligned := append(make([]byte, length&1), surplus...)
	if sum := fold(binary.BigEndian.AppendUint16(slices.Clone(aligned), uint16(len(surplus)))); sum != 0xffff {
		t.Errorf("the surplus area and its length sum up to %#x", sum)
	}
	option := surplus[pad+2:]
	claim, when, nonce := binary.BigEndian.Uint32(option[4:]), binary.BigEndian.Uint32(option[8:]), binary.BigEndian.Uint32(option[12:])
	if option[0] != 127 || option[1] != 24 || binary.BigEndian.Uint16(option[2:]) != abi.TagExID {
		t.Errorf("option starts % x", option[:4])
	}
	if want := identity<<8 | 3<<4 | flags; claim != want {
		t.Errorf("claim %08x, want %08x", claim, want)
	}
	if age := time.Now().Unix() - int64(when); age < 0 || age > 5 {
		t.Errorf("tag is %d seconds old", age)
	}
	if flags&noSource != 0 {
		tuple.Source, tuple.SourcePort = [16]byte{}, 0
	}
	if flags&noDestination != 0 {
		tuple.Destination, tuple.DestinationPort = [16]byte{}, 0
	}
	if want := mac(claim, when, nonce, tuple); !slices.Equal(option[16:24], want) {
		t.Errorf("mac % x, want % x", option[16:24], want)
	}
	if nonce == 0 {
		t.Error("no nonce")
	}
	return nonce
}

// fold is the one's complement sum of 16-bit words.
func fold(b []byte) uint32 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		word := uint32(b[i]) << 8
		if i+1 < len(b) {
			word |= uint32(b[i+1])
		}
		sum += word
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return sum
}

const (
	tcxNext = -1
	tcxDrop = 2

	answers       = 1
	noSource      = 2
	noDestination = 4
	datagrms      = 8
)

// A datagram leaves one host with its opener's tag, and the other host knows the
// opener; the answer goes back with the acceptor's.
func TestDatagramTags(t *testing.T) {
	here, there := newHost(t), newHost(t)
	for _, c := range []struct {
		name    string
		ipv6    bool
		payload int
		omits   uint8 // of the question; the answer leaves out the same end
	}{
		{"v4 even", false, 16, 0}, {"v4 odd", false, 17, 0}, {"v4 empty", false, 0, 0}, {"v6 even", true, 16, 0}, {"v6 odd", true, 1, 0},
		{"v4 without its source", false, 16, noSource}, {"v6 without its destination", true, 17, noDestination},
	} {
		turnedOmits := map[uint8]uint32{noSource: noDestination, noDestination: noSource}[c.omits]
		t.Run(c.name, func(t *testing.T) {
			question, tuple := datagram(t, c.ipv6, false, c.payload)
			here.t, there.t = t, t
			here.put("flows", tuple, flow{Opener: opener, EpochOut: 1, VerdictOut: uint8(abi.Provisional), Provable: 1, Omits: c.omits})
			verdict, tagged := here.run("tc_egress", question)
			if verdict != tcxNext {
				t.Fatalf("tc_egress: %d", verdict)
			}
			nonce := checkTagged(t, question, tagged, opener, datagrms|uint32(c.omits), tuple)
			asked := tagged[len(tagged)-8:]

			if verdict, _ := there.run("tc_ingress", tagged); verdict != tcxNext {
				t.Fatalf("tc_ingress: %d", verdict)
			}
			f, _ := there.flow(tuple)
			if f.Opener != opener || f.Owed != 1 || f.EpochOut != 0 || f.Omits != c.omits || f.Nonce != nonce {
				t.Fatalf("the other host knows %+v", f)
			}

			f.Acceptor, f.VerdictIn, f.EpochIn = acceptor, uint8(abi.Allow), 1
			there.put("flows", tuple, f)
			answer, _ := datagram(t, c.ipv6, true, c.payload)
			_, tagged = there.run("tc_egress", answer)
			if got := checkTagged(t, answer, tagged, acceptor, datagrms|answers|turnedOmits, turned(tuple)); got != nonce {
				t.Errorf("the answer's nonce is %08x, the question's %08x", got, nonce)
			}
			answered := tagged[len(tagged)-8:]
			if _, again := there.run("tc_egress", answer); len(again) != len(answer) {
				t.Error("an answer that owes no proof is tagged")
			}
			if verdict, _ := here.run("tc_ingress", tagged); verdict != tcxNext {
				t.Fatalf("tc_ingress of the answer: %d", verdict)
			}
			if f, _ := here.flow(tuple); f.Acceptor != acceptor {
				t.Errorf("the opener's host knows %+v", f)
			}
			if _, again := here.run("tc_egress", question); len(again) != len(question) {
				t.Error("a proven flow is tagged again at once")
			}
			// The next case may have the same tuple in the same second.
			here.forget(tuple, answered)
			there.forget(tuple, asked)
		})
	}
}

// What is not proof of an opener stops at the device.
func TestBadDatagramTags(t *testing.T) {
	here, there := newHost(t), newHost(t)
	question, tuple := datagram(t, false, false, 17)
	here.put("flows", tuple, flow{Opener: opener, EpochOut: 1, VerdictOut: uint8(abi.Provisional), Provable: 1})
	_, tagged := here.run("tc_egress", question)
	const nonce = 0x5eed
	now := uint32(time.Now().Unix())
	for _, c := range []struct {
		name  string
		frame []byte
		want  int32
	}{
		{"OK signed here", retagged(tagged, tuple, opener, 3, datagrms, now, nonce), tcxNext},
		{"OK 20 s old", retagged(tagged, tuple, opener, 3, datagrms, now-20, nonce), tcxNext},
		{"OK no tag", question, tcxNext},
		{"OK without its source", retagged(tagged, tuple, opener, 3, datagrms|noSource, now, nonce), tcxNext}, // what is declared is asked later
		{"OK without its destination", retagged(tagged, tuple, opener, 3, datagrms|noDestination, now, nonce), tcxNext},
		{"bad identity of nobody", retagged(tagged, tuple, 300, 3, datagrms, now, nonce), tcxDrop},
		{"bad reserved identity", retagged(tagged, tuple, 1, 3, datagrms, now, nonce), tcxDrop},
		{"bad epoch without key", retagged(tagged, tuple, opener, 4, datagrms, now, nonce), tcxDrop},
		{"bad flags of TCP", retagged(tagged, tuple, opener, 3, 0, now, nonce), tcxDrop},
		{"bad flags that leave out both addresses", retagged(tagged, tuple, opener, 3, datagrms|noSource|noDestination, now, nonce), tcxDrop},
		{"bad 2 minutes old", retagged(tagged, tuple, opener, 3, datagrms, now-120, nonce), tcxDrop},
		{"bad 2 minutes ahead", retagged(tagged, tuple, opener, 3, datagrms, now+120, nonce), tcxDrop},
		{"bad answer to nothing", retagged(tagged, tuple, opener, 3, datagrms|answers, now, nonce), tcxDrop},
	} {
		if got, _ := there.run("tc_ingress", c.frame); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
		if err := there.Maps["flows"].Delete(tuple); err != nil && c.want == tcxNext && len(c.frame) != len(question) {
			t.Errorf("%s: no flow was kept", c.name)
		}
	}
	// Where a flow is opened here, nobody else opens it.
	there.put("flows", tuple, flow{Opener: acceptor, EpochOut: 1})
	if got, _ := there.run("tc_ingress", tagged); got != tcxDrop {
		t.Errorf("a tag from outside for a flow opened here: %d", got)
	}
}

// An answer is one to this question, and leaves out what the question did. Whoever
// answers then in another's place is judged anew.
func TestBadDatagramAnswers(t *testing.T) {
	h := newHost(t)
	question, tuple := datagram(t, false, false, 16)
	h.put("flows", tuple, flow{Opener: opener, EpochOut: 1, VerdictOut: uint8(abi.Provisional), Provable: 1, Omits: noSource})
	_, tagged := h.run("tc_egress", question)
	nonce := binary.BigEndian.Uint32(tagged[len(tagged)-12:])
	answer, _ := datagram(t, false, true, 16)
	answer = append(answer, tagged[len(question):]...) // of which the tag is another
	binary.BigEndian.PutUint16(answer[14+2:], uint16(len(answer)-14))
	now := uint32(time.Now().Unix())
	const good = datagrms | answers | noDestination
	for _, c := range []struct {
		name     string
		frame    []byte
		want     int32
		acceptor uint32
		verdict  abi.Verdict
	}{
		{"bad of another question", retagged(answer, turned(tuple), acceptor, 3, good, now, nonce+1), tcxDrop, 0, abi.Provisional},
		{"bad bound to all", retagged(answer, turned(tuple), acceptor, 3, datagrms|answers, now, nonce), tcxDrop, 0, abi.Provisional},
		{"bad without the other end", retagged(answer, turned(tuple), acceptor, 3, datagrms|answers|noSource, now, nonce), tcxDrop, 0, abi.Provisional},
		{"bad no answer", retagged(answer, turned(tuple), acceptor, 3, datagrms|noDestination, now, nonce), tcxNext, 0, abi.Provisional}, // a question of its own
		{"OK", retagged(answer, turned(tuple), acceptor, 3, good, now, nonce), tcxNext, acceptor, abi.Provisional},
		{"OK again", retagged(answer, turned(tuple), acceptor, 3, good, now, nonce), tcxNext, acceptor, abi.Provisional},
		{"OK admitted", nil, tcxNext, acceptor, abi.Allow},
		{"OK once more", retagged(answer, turned(tuple), acceptor, 3, good, now+1, nonce), tcxNext, acceptor, abi.Allow},
		{"OK somebody else", retagged(answer, turned(tuple), opener, 3, good, now, nonce), tcxNext, opener, abi.Provisional},
	} {
		if c.frame == nil { // by the socket hook
			f, _ := h.flow(tuple)
			f.VerdictOut = uint8(abi.Allow)
			h.put("flows", tuple, f)
		} else if got, _ := h.run("tc_ingress", c.frame); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
		if f, _ := h.flow(tuple); f.Acceptor != c.acceptor || f.VerdictOut != uint8(c.verdict) {
			t.Errorf("%s: the flow is %+v", c.name, f)
		}
	}
}

// retagged is a datagram with a tag, and another tag in its place, signed in Go.
func retagged(tagged []byte, t abi.Tuple, identity, epoch, flags, when, nonce uint32) []byte {
	b := slices.Clone(tagged)
	option := b[len(b)-24:]
	claim := identity<<8 | epoch<<4 | flags
	binary.BigEndian.PutUint32(option[4:], claim)
	binary.BigEndian.PutUint32(option[8:], when)
	binary.BigEndian.PutUint32(option[12:], nonce)
	if flags&noSource != 0 {
		t.Source, t.SourcePort = [16]byte{}, 0
	}
	if flags&noDestination != 0 {
		t.Destination, t.DestinationPort = [16]byte{}, 0
	}
	copy(option[16:], mac(claim, when, nonce, t))
	return b
}

// replayBucket is struct demarc_replay_bucket of abi.h.
type replayBucket [8]uint64

const replayBuckets = 1 << 18

// remembered are the two places that may hold a tag's MAC.
func (h *host) remembered(mac []byte) (places [2]uint32, buckets [2]replayBucket) {
	h.t.Helper()
	m := binary.LittleEndian.Uint64(mac)
	first := uint32(m % replayBuckets)
	places = [2]uint32{first, first ^ uint32(m>>17&62) ^ 1}
	for i, place := range places {
		if err := h.Maps["replays"].Lookup(place, &buckets[i]); err != nil {
			h.t.Fatal(err)
		}
	}
	return places, buckets
}

// forget takes a flow away, and the memory of a tag.
func (h *host) forget(t abi.Tuple, mac []byte) {
	h.t.Helper()
	if err := h.Maps["flows"].Delete(t); err != nil {
		h.t.Fatal(err)
	}
	places, _ := h.remembered(mac)
	for _, place := range places {
		h.put("replays", place, replayBucket{})
	}
}

// A tag proves once: again, it proves nothing new, and where nothing could remember
// it, nothing at all. What was remembered long enough gives way.
func TestReplayMemory(t *testing.T) {
	h := newHost(t)
	question, tuple := datagram(t, false, false, 16)
	h.put("flows", tuple, flow{Opener: opener, EpochOut: 1, VerdictOut: uint8(abi.Provisional), Provable: 1})
	_, tagged := h.run("tc_egress", question)
	mac := tagged[len(tagged)-8:]
	forget := func() {
		t.Helper()
		if err := h.Maps["flows"].Delete(tuple); err != nil {
			t.Fatal(err)
		}
	}
	arrives := func(what string, want int32) {
		t.Helper()
		if got, _ := h.run("tc_ingress", tagged); got != want {
			t.Errorf("%s: %d, want %d", what, got, want)
		}
	}
	forget()
	arrives("the first time", tcxNext)
	arrives("again while its flow lives", tcxNext)
	forget()
	arrives("again after its flow", tcxDrop)

	places, buckets := h.remembered(mac)
	entry := func() (found int) {
		for i := range buckets {
			for j, e := range buckets[i] {
				if e != 0 {
					found++
					if e>>24 != binary.LittleEndian.Uint64(mac)>>24 {
						t.Errorf("entry %d of bucket %d is %#x", j, i, e)
					}
				}
			}
		}
		return found
	}
	if n := entry(); n != 1 {
		t.Fatalf("the tag is remembered %d times", n)
	}
	step := func(age uint64) uint64 {
		var boot unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
			t.Fatal(err)
		}
		return (uint64(boot.Nano())>>32 - age) & 0xffffff
	}
	fill := func(age uint64) {
		for i, place := range places {
			for j := range buckets[i] {
				buckets[i][j] = uint64(i*8+j+1)<<40 | step(age)
			}
			h.put("replays", place, buckets[i])
		}
	}
	fill(35)
	arrives("where both places are full", tcxDrop)
	fill(39)
	arrives("where what is there was remembered long enough", tcxNext)
	forget()
	arrives("again after that", tcxDrop)
}
