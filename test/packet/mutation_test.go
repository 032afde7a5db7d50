package packet_test

import (
	"encoding/binary"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
)

// One million tags, or packets that carry them, changed in one or more bits of the tag
// or of what it is bound to, cut off, doubled or mixed up: an eighth each in SYNs, in
// SYN-ACKs, in datagrams that ask and in datagrams that answer, over IPv4 and IPv6. None
// is accepted.
func TestE02MutatedTags(t *testing.T) {
	const all = 1_000_000
	m := &mutations{host: newHost(t), r: rand.New(rand.NewPCG(5, 6))}
	for _, ipv6 := range []bool{false, true} {
		for _, answer := range []bool{false, true} {
			m.datagrams(ipv6, answer, all/8)
			m.segments(ipv6, answer, all/8)
		}
	}
	if m.tried != all {
		t.Errorf("%d mutations were tried, want %d", m.tried, all)
	}
}

// mutations gives one host packets with changed tags.
type mutations struct {
	*host
	r     *rand.Rand
	tried int // each differs from the good one
}

// flip changes up to three bits.
func (m *mutations) flip(b []byte) {
	for range 1 + m.r.IntN(3) {
		b[m.r.IntN(len(b))] ^= 1 << m.r.IntN(8)
	}
}

// swap exchanges two words of four bytes.
func (m *mutations) swap(b []byte) {
	i, j := 4*m.r.IntN(len(b)/4), 4*m.r.IntN(len(b)/4)
	was := [4]byte(b[i:])
	copy(b[i:i+4], b[j:])
	copy(b[j:j+4], was[:])
}

// datagrams tries that many datagrams that ask, or that answer. One whose tag is not in
// its place, or is not called one any more, is a datagram without a tag: it passes the
// device and proves nothing.
func (m *mutations) datagrams(ipv6, answer bool, count int) {
	t, r := m.t, m.r
	t.Helper()
	question, asked := datagram(t, ipv6, false, 16)
	known := flow{Opener: opener, EpochOut: 1, VerdictOut: uint8(abi.Provisional), Provable: 1}
	m.put("flows", asked, known)
	_, tagged := m.run("tc_egress", question)
	known, _ = m.flow(asked)
	surplus := slices.Clone(tagged[len(question):])
	tuple, identity, flags, length := asked, opener, uint32(datagrms), 14+2
	if ipv6 {
		length = 14 + 4
	}
	// resize says in the IP header how long the packet has become.
	resize := func(b []byte) []byte {
		was := binary.BigEndian.Uint16(tagged[length:])
		binary.BigEndian.PutUint16(b[length:], uint16(int(was)+len(b)-len(tagged)))
		return b
	}
	if answer {
		back, _ := datagram(t, ipv6, true, 16)
		copy(back[length:], tagged[length:length+2])
		tagged = append(back, surplus...)
		tuple, identity, flags = turned(asked), acceptor, datagrms|answers
	}
	sign := func() []byte {
		return retagged(tagged, tuple, identity, 3, flags, uint32(time.Now().Unix()), known.Nonce)
	}
	// ask makes as if the question had just been asked, here or by the other host.
	ask := func() {
		if answer {
			m.put("flows", asked, known)
		} else if err := m.Maps["flows"].Delete(asked); err != nil {
			t.Fatal(err)
		}
	}
	// proved says whether anything was proved of the flow since.
	proved := func() bool {
		f, found := m.flow(asked)
		return found && !answer || answer && f != known
	}

	ask()
	good := sign()
	if verdict, _ := m.run("tc_ingress", good); verdict != tcxNext || !proved() {
		t.Fatalf("a good tag proves nothing (%d): the mutations would not, either", verdict)
	}
	m.forget(asked, good[len(good)-8:])
	m.put("flows", asked, known)
	ask()
	addresses, ports := 14+12, len(question)-24
	if ipv6 {
		addresses = 14 + 8
	}
	for end := m.tried + count; m.tried < end; {
		good := sign()
		b := slices.Clone(good)
		option := b[len(b)-24:]
		switch r.IntN(8) {
		case 0, 1: // what it is bound to: addresses and ports
			m.flip(b[addresses : ports+4])
		case 2: // cut off
			b = resize(b[:len(b)-1-r.IntN(len(surplus)-1)])
		case 3: // doubled, the second as good or changed
			again := slices.Clone(surplus)
			copy(again[2:], option)
			if r.IntN(2) == 0 {
				m.flip(again[2:])
			}
			b = resize(append(b, again[2*r.IntN(2):]...))
		case 4: // words of it mixed up
			m.swap(option)
		default:
			m.flip(option[4:]) // claim, time, nonce, MAC
		}
		if slices.Equal(b, good) {
			continue
		}
		m.tried++
		want := int32(tcxNext)
		if len(b) == len(good) && slices.Equal(option[:4], good[len(good)-24:len(good)-20]) {
			want = tcxDrop
		}
		if verdict, _ := m.run("tc_ingress", b); verdict != want || want == tcxNext && proved() {
			t.Fatalf("answer %v: verdict %d, want %d, on % x", answer, verdict, want, b)
		}
	}
	// Nor of any other: what was changed in addresses and ports would have another.
	if answer {
		if err := m.Maps["flows"].Delete(asked); err != nil {
			t.Fatal(err)
		}
	}
	var any abi.Tuple
	if err := m.Maps["flows"].NextKey(nil, &any); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("a flow was kept: %+v, %v", any, err)
	}
}

// segments tries that many SYNs, or SYN-ACKs.
func (m *mutations) segments(ipv6, answer bool, count int) {
	t, r := m.t, m.r
	t.Helper()
	_, tuple := datagram(t, ipv6, false, 0)
	tuple.Proto = unix.IPPROTO_TCP
	const seq, acked = 0x11223344, 0x55667788
	program, subject, peer, direction := "selftest_ingress", acceptor, opener, abi.Ingress
	flags, claim, bound := uint8(0x02), opener<<8|3<<4, 4+4 // ports, sequence number
	ack := uint32(0)
	if answer {
		program, subject, peer, direction = "selftest_egress", opener, acceptor, abi.Egress
		flags, claim, bound = 0x12, acceptor<<8|3<<4|answers, 4+8
		tuple, ack = turned(tuple), acked
	}
	m.admits(subject, peer, direction)
	m.put("selftest", uint32(0), []uint32{subject, 0, 0, uint32(abi.ProofUnknown)})
	tag := func() []byte {
		if answer {
			return tagBytes(claim, mac(claim, seq, acked, tuple))
		}
		return tagBytes(claim, mac(claim, seq, uint32(time.Now().UnixNano()>>abi.TagSlotShift), tuple))
	}
	frameOf := func(options []byte) []byte { return packetOf(tuple, segmentOf(tuple, seq, ack, flags, options)) }
	usual := []byte{2, 4, 5, 0xb4, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7} // of Linux
	places := map[string]func(tag []byte) []byte{
		"alone":            func(tag []byte) []byte { return tag },
		"behind the usual": func(tag []byte) []byte { return append(slices.Clone(usual), tag...) },
		"before others":    func(tag []byte) []byte { return append(tag, 2, 4, 5, 0xb4, 1, 1, 4, 2) },
	}
	names := slices.Sorted(maps.Keys(places))
	for _, name := range names {
		if verdict, _ := m.run(program, frameOf(places[name](tag()))); verdict != pass {
			t.Fatalf("a good tag %s is refused: the mutations would prove nothing", name)
		}
	}
	addresses, both := 14+12, 8
	if ipv6 {
		addresses, both = 14+8, 32
	}
	for end := m.tried + count; m.tried < end; {
		name := names[m.tried%len(names)]
		good := tag()
		var b []byte
		switch changed := slices.Clone(good); r.IntN(8) {
		case 0: // what it is bound to: addresses, and what is behind them
			b = frameOf(places[name](changed))
			if at := addresses + both; r.IntN(2) == 0 {
				m.flip(b[addresses:at])
			} else {
				m.flip(b[at : at+bound])
			}
		case 1: // cut off
			changed = changed[:4*(1+r.IntN(3))]
			changed[1] = byte(r.IntN(len(changed) + 1))
			b = frameOf(append(slices.Clone(usual), changed...))
		case 2: // doubled, the second as good or changed
			again := slices.Clone(good)
			if r.IntN(2) == 0 {
				m.flip(again[4:])
			}
			b = frameOf(append(changed, again...))
		case 3: // words of it mixed up
			m.swap(changed)
			b = frameOf(places[name](changed))
		default:
			m.flip(changed)
			b = frameOf(places[name](changed))
		}
		if slices.Equal(b, frameOf(places[name](slices.Clone(good)))) {
			continue
		}
		m.tried++
		if verdict, _ := m.run(program, b); verdict != drop {
			t.Fatalf("%s, %s: accepted % x", program, name, b)
		}
	}
}
