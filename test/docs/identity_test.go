package docs_test

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"github.com/dchest/siphash"

	"github.com/demarc/demarc/bpf/abi"
)

// Flags of a claim, as docs/identity.md has them.
const (
	answer        = 1
	noSource      = 2
	noDestination = 4
	datagram      = 8
)

// slot is that of 1 January 2026, 00:00 UTC.
const slot = 1767225600_000000000 >> abi.TagSlotShift

// tagVector is one tag that docs/identity.md shows down to bytes.
type tagVector struct {
	name        string
	identity    uint32
	epoch       uint32
	flags       uint32
	seq, acked  uint32 // a datagram's time is its seq, its nonce, or a SYN's slot, what it acknowledges
	source      string
	destination string
	payload     string // of a datagram
}

var tagVectors = []tagVector{
	{"SYN, IPv4", 0x434589, 3, 0, 0x11223344, slot, "10.0.1.2:40000", "10.0.2.2:8080", ""},
	{"SYN-ACK to it", 0xb1638c, 3, answer, 0x55667788, 0x11223345, "10.0.2.2:8080", "10.0.1.2:40000", ""},
	{"SYN, IPv6", 0x434589, 3, 0, 0x11223344, slot, "[2001:db8:1::2]:40000", "[2001:db8:2::2]:8080", ""},
	{"SYN, `nat: source`", 0x434589, 3, noSource, 0x11223344, slot, "10.0.1.2:40000", "10.0.2.2:8080", ""},
	{"SYN-ACK, `nat: source`", 0xb1638c, 3, answer | noDestination, 0x55667788, 0x11223345, "10.0.2.2:8080", "192.0.2.1:61000", ""},
	{"SYN, `nat: destination`", 0x434589, 3, noDestination, 0x11223344, slot, "10.0.1.2:40000", "10.96.0.10:80", ""},
	{"SYN-ACK, `nat: destination`", 0xb1638c, 3, answer | noSource, 0x55667788, 0x11223345, "10.0.2.2:8080", "10.0.1.2:40000", ""},
	{"UDP, IPv4, odd length", 0x434589, 3, datagram, 1767225600, 0xc0ffee01, "10.0.1.2:40000", "10.0.2.2:53", "demarc!"},
	{"UDP answer, IPv6, even length", 0xb1638c, 15, answer | datagram, 1767225601, 0xc0ffee02, "[2001:db8:2::2]:53", "[2001:db8:1::2]:40000", "demarc"},
	{"UDP, `nat: source`", 0x434589, 3, datagram | noSource, 1767225600, 0xc0ffee03, "10.0.1.2:40000", "10.0.2.2:53", "demarc"},
	{"UDP answer, `nat: source`", 0xb1638c, 3, answer | datagram | noDestination, 1767225600, 0xc0ffee03, "10.0.2.2:53", "192.0.2.1:61000", "demarc"},
}

// words writes bytes as groups of four.
func words(b []byte) string {
	var groups []string
	for len(b) > 4 {
		groups, b = append(groups, hex.EncodeToString(b[:4])), b[4:]
	}
	return strings.Join(append(groups, hex.EncodeToString(b)), " ")
}

// show computes a vector with an implementation of SipHash that is not ours, and
// writes it as the document does.
func (v tagVector) show() string {
	claim := v.identity<<8 | v.epoch<<4 | v.flags
	from, to := netip.MustParseAddrPort(v.source), netip.MustParseAddrPort(v.destination)
	input := binary.BigEndian.AppendUint32(nil, claim)
	input = binary.BigEndian.AppendUint32(input, v.seq)
	input = binary.BigEndian.AppendUint32(input, v.acked)
	source, destination := from.Addr().As16(), to.Addr().As16()
	sport, dport := from.Port(), to.Port()
	if v.flags&noSource != 0 {
		source, sport = [16]byte{}, 0
	}
	if v.flags&noDestination != 0 {
		destination, dport = [16]byte{}, 0
	}
	input = binary.BigEndian.AppendUint16(input, sport)
	input = binary.BigEndian.AppendUint16(input, dport)
	input = append(append(input, source[:]...), destination[:]...)

	key, _ := hex.DecodeString("000102030405060708090a0b0c0d0e0f")
	h := siphash.New(key)
	h.Write(input)
	mac := h.Sum(nil)

	var b strings.Builder
	fmt.Fprintf(&b, "%s -> %s, identity %06x, epoch %d, flags %d\n", v.source, v.destination, v.identity, v.epoch, v.flags)
	for i := 0; i < len(input); i += 16 {
		fmt.Fprintf(&b, "%-8s%s\n", []string{"input", "", ""}[i/16], words(input[i:i+16]))
	}
	if v.flags&datagram == 0 {
		option := append([]byte{abi.TagKind, abi.TagLength, 0xd3, 0xac}, input[:4]...)
		fmt.Fprintf(&b, "%-8s%s\n", "option", words(append(option, mac...)))
		return b.String()
	}
	option := append([]byte{127, 24, 0xd3, 0xac}, input[:12]...)
	option = append(option, mac...)
	// Behind the datagram, at an even offset from its header of 8 bytes.
	pad := make([]byte, (8+len(v.payload))%2)
	sum := uint32(len(pad) + 2 + len(option))
	for i := 0; i < len(option); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(option[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	ocs := ^uint16(sum)
	if ocs == 0 {
		ocs = 0xffff
	}
	fmt.Fprintf(&b, "%-8s%q, UDP length %d\n", "data", v.payload, 8+len(v.payload))
	fmt.Fprintf(&b, "%-8s%spad %d, OCS %04x\n", "surplus", fmt.Sprintf("%d bytes: ", len(pad)+2+len(option)), len(pad), ocs)
	fmt.Fprintf(&b, "%-8s%s\n", "option", words(option))
	surplus := append(binary.BigEndian.AppendUint16(pad, ocs), option...)
	fmt.Fprintf(&b, "%-8s%x\n", "bytes", surplus)
	return b.String()
}

// docs/identity.md shows each vector whole, below its name, and no other.
func TestIdentityVectors(t *testing.T) {
	text := read(t, "../../docs/identity.md")
	shown := 0
	for _, v := range tagVectors {
		want := "\n**" + v.name + "**\n\n```\n" + v.show() + "```\n"
		if !strings.Contains(text, want) {
			t.Errorf("docs/identity.md does not show:\n%s", want)
		}
		shown++
	}
	if n := strings.Count(text, "\ninput   "); n != shown {
		t.Errorf("docs/identity.md shows %d vectors, of which %d are computed here", n, shown)
	}
}

// The numbers of the format are those of abi.h.
func TestIdentityNumbers(t *testing.T) {
	header := read(t, "../../bpf/abi/abi.h")
	for name, value := range map[string]string{
		"DEMARC_TAG_KIND": "253", "DEMARC_TAG_LENGTH": "16", "DEMARC_TAG_EXID": "0xD3AC",
		"DEMARC_UDP_TAG_KIND": "127", "DEMARC_UDP_TAG_LENGTH": "24", "DEMARC_UDP_TAG_SURPLUS": "26",
		"DEMARC_UDP_TAG_WINDOW": "30", "DEMARC_UDP_TAG_REFRESH": "(60ULL * 1000000000ULL)",
	} {
		if !strings.Contains(header, "#define "+name+" "+value) {
			t.Errorf("abi.h: %s is not %s, which docs/identity.md says", name, value)
		}
	}
	for name, value := range map[string]int{
		"DEMARC_TAG_ANSWER": answer, "DEMARC_TAG_NO_SOURCE": noSource,
		"DEMARC_TAG_NO_DESTINATION": noDestination, "DEMARC_TAG_DATAGRAM": datagram,
	} {
		if !strings.Contains(header, fmt.Sprintf("%s = %d,", name, value)) {
			t.Errorf("abi.h: %s is not %d, which docs/identity.md says", name, value)
		}
	}
}

// The table of failures names every reason that a proof can fail for, and none
// that does not exist.
func TestIdentityFailures(t *testing.T) {
	text := read(t, "../../docs/identity.md")
	for r := range abi.Reason(abi.Reasons) {
		if name := r.String(); strings.HasPrefix(name, "tag-") && !strings.Contains(text, "\n| `"+name+"` |") {
			t.Errorf("docs/identity.md does not explain %s", name)
		}
	}
	for _, m := range regexp.MustCompile("`(tag-[a-z-]+)`").FindAllStringSubmatch(text, -1) {
		var r abi.Reason
		if err := r.UnmarshalText([]byte(m[1])); err != nil {
			t.Error(err)
		}
	}
}
