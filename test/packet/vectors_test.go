package packet_test

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
)

// vector is a tag that docs/identity.md shows down to bytes.
type vector struct {
	name            string
	tuple           abi.Tuple // sender first
	identity, epoch uint32
	flags           uint32
	seq, acked      uint32 // or the time and the nonce
	data            []byte // of a datagram
	bytes           []byte // the option, or the surplus area
}

// vectors reads them from the page.
func vectors(t *testing.T) (all []vector) {
	t.Helper()
	text, err := os.ReadFile("../../docs/identity.md")
	if err != nil {
		t.Fatal(err)
	}
	number := func(s string, base int) uint32 {
		t.Helper()
		n, err := strconv.ParseUint(s, base, 32)
		if err != nil {
			t.Fatal(err)
		}
		return uint32(n)
	}
	shape := regexp.MustCompile("(?m)^\\*\\*(.+)\\*\\*\n\n```\n(\\S+) -> (\\S+), identity (\\w{6}), epoch (\\d+), flags (\\d+)\n" +
		"input   \\w+ (\\w+) (\\w+) \\w+\n.*\n.*\n(?:data    \"(\\w+!?)\".*\n.*\noption.*\n)?(?:option|bytes)  +([\\w ]+)\n```$")
	for _, m := range shape.FindAllStringSubmatch(string(text), -1) {
		from, to := netip.MustParseAddrPort(m[2]), netip.MustParseAddrPort(m[3])
		v := vector{name: m[1], identity: number(m[4], 16), epoch: number(m[5], 10), flags: number(m[6], 10), seq: number(m[7], 16), acked: number(m[8], 16), data: []byte(m[9])}
		v.tuple = abi.Tuple{Source: from.Addr().As16(), Destination: to.Addr().As16(), SourcePort: from.Port(), DestinationPort: to.Port(), Proto: unix.IPPROTO_TCP}
		if v.bytes, err = hex.DecodeString(strings.ReplaceAll(m[10], " ", "")); err != nil {
			t.Fatal(err)
		}
		all = append(all, v)
	}
	if shown := strings.Count(string(text), "\ninput   "); len(all) != shown || shown < 11 {
		t.Fatalf("the page shows %d vectors, of which %d are read", shown, len(all))
	}
	return all
}

// The programs make, or take for good, what docs/identity.md shows, to the byte. (That
// the page is right is shown beside, with a SipHash of another hand.)
func TestVectors(t *testing.T) {
	h := newHost(t)
	subject := abi.Subject{Flags: ^uint16(abi.SubjectOutbound | abi.SubjectInbound)}
	const here = uint32(99)
	// at sets the clock to a time in ns.
	at := func(v vector, when uint64) {
		t.Helper()
		var boot unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
			t.Fatal(err)
		}
		h.keyed(tagKey, v.epoch, when-uint64(boot.Nano()))
	}
	for _, v := range vectors(t) {
		h.table("subjects", here, subject, v.identity, subject)
		switch {
		case v.flags&datagrms == 0:
			program, direction, flags, ack := "selftest_ingress", abi.Ingress, uint8(0x02), uint32(0)
			slot := uint64(v.acked)
			if v.flags&answers != 0 {
				program, direction, flags, ack = "selftest_egress", abi.Egress, 0x12, v.acked
				slot = 25716517
			}
			at(v, slot<<abi.TagSlotShift+1<<(abi.TagSlotShift-2))
			h.admits(here, v.identity, direction)
			h.put("selftest", uint32(0), []uint32{here, 0, 0, uint32(abi.ProofUnknown)})
			for i := range v.bytes {
				b := append([]byte(nil), v.bytes...)
				b[i] ^= 1
				if got, _ := h.run(program, packetOf(v.tuple, segmentOf(v.tuple, v.seq, ack, flags, b))); got != drop {
					t.Errorf("%s, with byte %d another: accepted", v.name, i)
				}
			}
			if got, _ := h.run(program, packetOf(v.tuple, segmentOf(v.tuple, v.seq, ack, flags, v.bytes))); got != pass {
				t.Errorf("%s: refused", v.name)
			}
		default:
			omits := uint8(v.flags & (noSource | noDestination))
			f, key := flow{Opener: v.identity, EpochOut: 1, VerdictOut: uint8(abi.Provisional), Provable: 1, Omits: omits, Nonce: v.acked}, v.tuple
			if v.flags&answers != 0 { // to a question that left out the other end
				if omits != 0 {
					omits ^= noSource | noDestination
				}
				f, key = flow{Opener: here, Acceptor: v.identity, EpochIn: 1, VerdictIn: uint8(abi.Allow), Owed: 1, Omits: omits, Nonce: v.acked}, turned(v.tuple)
			}
			key.Proto, v.tuple.Proto = unix.IPPROTO_UDP, unix.IPPROTO_UDP
			b := binary.BigEndian.AppendUint16(nil, v.tuple.SourcePort)
			b = binary.BigEndian.AppendUint16(b, v.tuple.DestinationPort)
			b = append(binary.BigEndian.AppendUint16(b, uint16(8+len(v.data))), 0, 0)
			question := packetOf(v.tuple, append(b, v.data...))
			var made []byte
			for range 20 { // a machine may stand still for a second
				at(v, uint64(v.seq)*1e9+1e8)
				h.put("flows", key, f)
				_, after := h.run("tc_egress", question)
				if made = after[len(question):]; string(made) == string(v.bytes) {
					break
				}
			}
			if string(made) != string(v.bytes) {
				t.Errorf("%s: the program makes % x, the page shows % x", v.name, made, v.bytes)
			}
		}
	}
}
