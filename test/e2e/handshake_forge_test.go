package e2e_test

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// kinds counts the denials of a host since the last call, by reason.
type kinds map[string]uint64

func kindsOf(node *netlab.Node) kinds {
	all := kinds{}
	for key, n := range node.Counts() {
		if key.Verdict == abi.Deny {
			all[key.Reason.String()] += n
		}
	}
	return all
}

func (k kinds) since(before kinds) kinds {
	fresh := kinds{}
	for reason, n := range k {
		if n > before[reason] {
			fresh[reason] = n - before[reason]
		}
	}
	return fresh
}

func (k kinds) total() (n uint64) {
	for _, v := range k {
		n += v
	}
	return n
}

// Whoever has no key makes no tag: random ones, and those that a reader of the
// specification would try first. Each is refused and counted as what it is, and the
// listener hears of none.
func TestE01ForgedTags(t *testing.T) {
	w, client, server := connected(t)
	w.control(client, 7000)
	r := rand.New(rand.NewPCG(7, 8))
	web := w.id["web"]

	// mac is web's with a key, of a segment or of one that is like it.
	mac := func(s segmentOf, key [16]byte) uint64 {
		return binary.LittleEndian.Uint64(w.frame(s).tagOf(key, web, w.epoch, 0)[8:])
	}
	guesses := map[string]func(s segmentOf) uint64{
		"zero":   func(segmentOf) uint64 { return 0 },
		"ones":   func(segmentOf) uint64 { return ^uint64(0) },
		"no key": func(s segmentOf) uint64 { return mac(s, [16]byte{}) },
		"key of the test vectors": func(s segmentOf) uint64 {
			return mac(s, [16]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
		},
		"other byte order":   func(s segmentOf) uint64 { return bits.ReverseBytes64(mac(s, w.key)) },
		"halves exchanged":   func(s segmentOf) uint64 { return bits.RotateLeft64(mac(s, w.key), 32) },
		"complement":         func(s segmentOf) uint64 { return ^mac(s, w.key) },
		"upper half alone":   func(s segmentOf) uint64 { return mac(s, w.key) &^ 0xffffffff },
		"lower half alone":   func(s segmentOf) uint64 { return mac(s, w.key) & 0xffffffff },
		"one more":           func(s segmentOf) uint64 { return mac(s, w.key) + 1 },
		"of the next number": func(s segmentOf) uint64 { s.seq++; return mac(s, w.key) },
		"of the next port": func(s segmentOf) uint64 {
			s.from = netip.AddrPortFrom(s.from.Addr(), s.from.Port()+1)
			return mac(s, w.key)
		},
		"of another destination": func(s segmentOf) uint64 {
			s.to = netip.AddrPortFrom(s.to.Addr().Next(), s.to.Port())
			return mac(s, w.key)
		},
		"of the way back": func(s segmentOf) uint64 { s.from, s.to = s.to, s.from; return mac(s, w.key) },
		"sequence number": func(s segmentOf) uint64 { return uint64(s.seq)<<32 | uint64(s.seq) },
	}
	for i := range 64 {
		guesses[fmt.Sprint("bit ", i)] = func(s segmentOf) uint64 { return mac(s, w.key) ^ 1<<i }
	}

	want, before := kinds{}, kindsOf(w.listener)
	w.cable.segments()
	var port uint16
	send := func(to netip.AddrPort, forge func(s segmentOf) []byte) {
		port++
		s := segmentOf{from: nobody(to, port), to: to, seq: r.Uint32(), flags: flagSYN}
		options := forge(s)
		w.cable.send(w.tagged(s, options))
		want[w.fault(options).String()]++
	}
	for _, to := range w.both(7000) {
		for _, guess := range guesses {
			send(to, func(s segmentOf) []byte {
				tag := w.tag(s, web, 0)
				binary.LittleEndian.PutUint64(tag[8:], guess(s))
				return tag
			})
		}
		for range 1000 { // a claim and a MAC of chance
			send(to, func(segmentOf) []byte {
				tag := binary.BigEndian.AppendUint32([]byte{253, 16, 0xd3, 0xac}, r.Uint32())
				return binary.BigEndian.AppendUint64(tag, r.Uint64())
			})
		}
		// Options of chance, which are a tag here and there. Where they do not add up
		// and there are more of them, the stack itself drops the segment, looking for
		// a signature.
		for range 1000 {
			send(to, func(segmentOf) []byte {
				options := make([]byte, 4*(1+r.IntN(4)))
				for i := range options {
					options[i] = byte(r.Uint32() >> r.IntN(9))
				}
				if at := r.IntN(2); r.IntN(4) > 0 && len(options) >= 8 {
					options[0] = 1
					copy(options[at:], []byte{253, byte(4 + r.IntN(20)), 0xd3, 0xac})
				}
				return options
			})
			send(to, func(segmentOf) (options []byte) {
				for {
					kind := []byte{1, 3, 5, 8, 34, 253, 253, 254}[r.IntN(8)]
					option := append([]byte{kind, 0}, make([]byte, 2+r.IntN(17))...)
					if kind == 253 {
						option = binary.BigEndian.AppendUint64([]byte{253, 0, 0xd3, 0xac, 0, 0, byte(r.Uint32()), byte(r.Uint32())}, r.Uint64())
						option = option[:len(option)-r.IntN(4)/3] // a few are short
					}
					option[1] = byte(len(option))
					if kind == 1 {
						option = option[:1]
					}
					if len(options)+len(option) > 40 {
						return options
					}
					options = append(options, option...)
				}
			})
		}
	}
	if len(want) != 4 {
		t.Fatalf("this test forges only %v", want)
	}
	total := want.total()
	eventually(t, timeToAnswer, "denials", func() bool { return kindsOf(w.listener).since(before).total() >= total })
	if d := cmp.Diff(want, kindsOf(w.listener).since(before)); d != "" {
		t.Errorf("denials by kind (-want +got)\n%s", d)
	}
	w.unanswered()
	if got := server.served("tcp", 7000); got.Count != 2 {
		t.Errorf("the listener got %d connections, want the two honest ones", got.Count)
	}
	w.control(client, 7000)
}

// fault is what is wrong with the options of a SYN whose MAC, if there is one, is
// not right: docs/identity.md, read by another hand than that of the programs.
func (w *wired) fault(options []byte) abi.Reason {
	var tag []byte
	cookie := false
	for o := options; len(o) > 0 && o[0] != 0; {
		if o[0] == 1 {
			o = o[1:]
			continue
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			return abi.TagMalformed
		}
		option := o[:o[1]]
		o = o[o[1]:]
		cookie = cookie || option[0] == 34 && len(option) > 2
		if option[0] != 253 || len(option) < 4 || option[2] != 0xd3 || option[3] != 0xac {
			continue
		}
		if tag != nil || len(option) != abi.TagLength {
			return abi.TagMalformed
		}
		tag = option
	}
	if tag == nil {
		return abi.TagMissing
	}
	const omissions = tagNoSource | tagNoDestination
	switch flags := tag[7] & 15; {
	case cookie || flags&^omissions != 0 || flags&omissions == omissions:
		return abi.TagMalformed
	case tag[7]>>4 != w.epoch:
		return abi.TagWrongEpoch
	}
	return abi.TagBadMAC
}

// Every failed proof is counted once and by its kind, on the side that it failed
// on, and told with the address that it came from and the identity that it claims,
// as a claim. So guessing cannot go on unseen; docs/identity.md computes how long it
// would take.
func TestE11FailuresAreCounted(t *testing.T) {
	w, _, _ := connected(t)
	web, other := w.id["web"], w.id["other"]
	flip := func(tag []byte) []byte { tag[15] ^= 0x80; return tag }
	var crossing uint32
	for _, c := range decoded(t, w.listener, document(1, wiredPolicy)).Crossings {
		if c.Name == "web-db" {
			crossing = c.Number
		}
	}
	want := map[abi.CountKey]uint64{}
	type told struct {
		Reason  abi.Reason
		From    netip.AddrPort
		Claims  uint32
		Claimed bool
	}
	var wantTold []told
	port := uint16(20000)
	for i, c := range []struct {
		reason abi.Reason
		claims uint32
		tag    func(s segmentOf) []byte
	}{
		{abi.TagMissing, 0, func(segmentOf) []byte { return nil }},
		{abi.TagMalformed, web, func(s segmentOf) []byte { return w.tag(s, web, tagAnswer) }},
		{abi.TagBadMAC, web, func(s segmentOf) []byte { return flip(w.tag(s, web, 0)) }},
		{abi.TagWrongEpoch, other, func(s segmentOf) []byte { return w.frame(s).tagOf(w.key, other, w.epoch^1, 0) }},
		{abi.TagBadIdentity, web ^ 1, func(s segmentOf) []byte { return w.tag(s, web^1, 0) }},
		{abi.TagUnbound, web, func(s segmentOf) []byte { return w.tag(s, web, tagNoSource) }},
	} {
		key := abi.CountKey{Subject: w.id["db"], Direction: abi.Ingress, Verdict: abi.Deny, Reason: c.reason}
		proven := c.reason == abi.TagUnbound // the proof is good, and not good enough
		if proven {
			key.Peer, key.Crossing = web, crossing
		}
		var all []tcpFrame
		for range i + 1 {
			for _, to := range w.both(7000) {
				port++
				s := segmentOf{from: nobody(to, port), to: to, seq: 1000, flags: flagSYN}
				all = append(all, w.tagged(s, c.tag(s)))
				wantTold = append(wantTold, told{c.reason, s.from, c.claims, c.claims != 0 && !proven})
			}
		}
		want[key] = uint64(len(all))
		w.refused(c.reason, all...)
	}
	denied := func(node *netlab.Node) map[abi.CountKey]uint64 {
		found := map[abi.CountKey]uint64{}
		for key, n := range node.Counts() {
			if key.Verdict == abi.Deny {
				found[key] = n
			}
		}
		return found
	}
	if d := cmp.Diff(want, denied(w.listener)); d != "" {
		t.Errorf("denials of the listener's host (-want +got)\n%s", d)
	}
	eventually(t, timeToAnswer, "events", func() bool { return len(w.listener.Flows()) >= len(wantTold) })
	var gotTold []told
	for _, f := range w.listener.Flows() {
		gotTold = append(gotTold, told{f.Reason, netip.AddrPortFrom(f.Source.Address, f.Source.Port), f.Source.Identity, f.Source.Claimed})
	}
	byPort := cmpopts.SortSlices(func(a, b told) bool { return a.From.Port() < b.From.Port() })
	if d := cmp.Diff(wantTold, gotTold, byPort, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); d != "" {
		t.Errorf("events of the listener's host (-want +got)\n%s", d)
	}

	// The other way: somebody answers web in db's place.
	p := w.web.Probe(w.caller.Cgroup("/lab/web"))
	w.mac.db = hardware(t, w.web)
	for i, to := range []netip.AddrPort{netip.AddrPortFrom(nowhere4, 7000), netip.AddrPortFrom(nowhere6, 7000)} {
		p.Socket("s", []string{"tcp4", "tcp6"}[i])
		w.cable.segments()
		p.Send(probe.Call{Op: "connect", Socket: "s", Address: to.String(), Timeout: 500})
		syn := w.awaited("SYN", func(s tcpFrame) bool { return s.dst == to && s.flags == flagSYN })
		answer := segmentOf{from: to, to: syn.src, seq: 1, ack: syn.seq + 1, flags: flagSYN | flagACK}
		before := w.caller.Denied(abi.TagBadMAC)
		w.cable.send(w.tagged(answer, flip(w.tag(answer, w.id["db"], tagAnswer))))
		eventually(t, timeToAnswer, "denial of an answer", func() bool { return w.caller.Denied(abi.TagBadMAC) > before })
		if r := p.Result(); r.Error == "" {
			t.Errorf("connected to nobody at %s", to)
		}
	}
	callers := map[abi.CountKey]uint64{{Subject: web, Direction: abi.Egress, Verdict: abi.Deny, Reason: abi.TagBadMAC}: 2}
	if d := cmp.Diff(callers, denied(w.caller)); d != "" {
		t.Errorf("denials of the caller's host (-want +got)\n%s", d)
	}
}

// A tag is for one connection: no two of them have a MAC in common, also where
// they are between the same two ports, and none of its bits can be foretold. (That
// it is compared in one step is for the reader of check_claim in bpf/tag.h: it is
// one word, and so is what it is compared with.)
func TestE15NoMACTwice(t *testing.T) {
	w, _, _ := connected(t)
	p := w.web.Probe(w.caller.Cgroup("/lab/web"))
	const each = 100
	seen := map[string]bool{}
	var ones [64]int // by bit of the MAC
	for i := range 2 * each {
		to, from, kind := w.both(7000)[i%2], w.web.At4(5000), "tcp4"
		if i%2 == 1 {
			from, kind = w.web.At6(5000), "tcp6"
		}
		bound(p, "s", kind, from)
		p.Connect("s", to.String())
		// A reset, so that the ports are free at once.
		p.Must(probe.Call{Op: "settext", Socket: "s", Level: unix.SOL_SOCKET, Option: unix.SO_LINGER, Data: []byte{1, 0, 0, 0, 0, 0, 0, 0}})
		p.Must(probe.Call{Op: "close", Socket: "s"})
		var fresh []string
		for _, s := range w.tap.segments() {
			for _, tag := range s.tags() {
				fresh = append(fresh, string(tag[8:]))
			}
		}
		if len(fresh) != 2 {
			t.Fatalf("connection %d: %d tags", i, len(fresh))
		}
		for _, mac := range fresh {
			if seen[mac] {
				t.Errorf("connection %d: MAC %x is used again", i, mac)
			}
			seen[mac] = true
			for bit := range ones {
				ones[bit] += int(mac[bit/8] >> (bit % 8) & 1)
			}
		}
	}
	// Six standard deviations of as many throws of a coin.
	for bit, n := range ones {
		if d := float64(n) - 2*each; d*d > 36*each {
			t.Errorf("bit %d is set in %d of %d MACs", bit, n, 4*each)
		}
	}
}
