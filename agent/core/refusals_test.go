package core

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/demarc/demarc/bpf/abi"
)

func refusalOf(proto uint8, opener, acceptor string) abi.Refusal {
	from, to := netip.MustParseAddrPort(opener), netip.MustParseAddrPort(acceptor)
	return abi.Refusal{Ack: 0x01020305, Tuple: abi.Tuple{
		Source: from.Addr().As16(), Destination: to.Addr().As16(), SourcePort: from.Port(), DestinationPort: to.Port(), Proto: proto,
	}}
}

// What a caller is sent reads as what it should be with somebody else's decoder, and
// its checksums are those that somebody else's encoder makes.
func TestRefusalAnswers(t *testing.T) {
	for _, c := range []struct {
		name     string
		refusal  abi.Refusal
		first    gopacket.LayerType
		want     []string // layers
		from, to string
	}{
		{"a SYN, IPv4", refusalOf(6, "10.0.1.2:40000", "10.0.2.2:8080"), layers.LayerTypeIPv4, []string{"IPv4", "TCP"}, "10.0.2.2", "10.0.1.2"},
		{"a SYN, IPv6", refusalOf(6, "[2001:db8::1]:40000", "[2001:db8::2]:8080"), layers.LayerTypeIPv6, []string{"IPv6", "TCP"}, "2001:db8::2", "2001:db8::1"},
		{"a datagram, IPv4", refusalOf(17, "10.0.1.2:40000", "10.0.2.2:53"), layers.LayerTypeIPv4, []string{"IPv4", "ICMPv4", "Payload"}, "10.0.2.2", "10.0.1.2"},
		{"a datagram, IPv6", refusalOf(17, "[2001:db8::1]:40000", "[2001:db8::2]:53"), layers.LayerTypeIPv6, []string{"IPv6", "ICMPv6", "Payload"}, "2001:db8::2", "2001:db8::1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := answer(c.refusal)
			p := gopacket.NewPacket(b, c.first, gopacket.Default)
			var got []string
			var all []gopacket.SerializableLayer
			for _, l := range p.Layers() {
				got = append(got, l.LayerType().String())
				all = append(all, l.(gopacket.SerializableLayer))
			}
			if diff := cmp.Diff(c.want, got); diff != "" || p.ErrorLayer() != nil {
				t.Fatalf("layers (-want +got):\n%s%v", diff, p.ErrorLayer())
			}
			flow := p.NetworkLayer().NetworkFlow()
			if flow.Src().String() != c.from || flow.Dst().String() != c.to {
				t.Errorf("from %v to %v, want from %s to %s", flow.Src(), flow.Dst(), c.from, c.to)
			}
			switch l := p.Layers()[1].(type) {
			case *layers.TCP:
				if !l.RST || !l.ACK || l.SYN || l.Ack != 0x01020305 || l.SrcPort != 8080 || l.DstPort != 40000 {
					t.Errorf("segment %+v", l)
				}
				_ = l.SetNetworkLayerForChecksum(p.NetworkLayer())
			case *layers.ICMPv4:
				if l.TypeCode != layers.CreateICMPv4TypeCode(3, 3) {
					t.Errorf("message %v", l.TypeCode)
				}
			case *layers.ICMPv6:
				if l.TypeCode != layers.CreateICMPv6TypeCode(1, 4) {
					t.Errorf("message %v", l.TypeCode)
				}
				_ = l.SetNetworkLayerForChecksum(p.NetworkLayer())
			}
			if quoted := b[len(b)-8:]; len(got) == 3 && (binary.BigEndian.Uint16(quoted) != 40000 || binary.BigEndian.Uint16(quoted[2:]) != 53) {
				t.Errorf("quotes ports % x", quoted)
			}
			again := gopacket.NewSerializeBuffer()
			if err := gopacket.SerializeLayers(again, gopacket.SerializeOptions{ComputeChecksums: true}, all...); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(again.Bytes(), b); diff != "" {
				t.Errorf("checksums (-want +got):\n%s", diff)
			}
		})
	}
	if b := answer(refusalOf(132, "10.0.1.2:1", "10.0.2.2:2")); b != nil {
		t.Errorf("SCTP is answered with % x", b)
	}
	if _, ok := parseRefusal(make([]byte, 47)); ok {
		t.Error("a short record is taken")
	}
}
