package netlab

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// frame is an Ethernet frame of a type.
func frame(kind uint16, b ...byte) []byte {
	return append([]byte{12: byte(kind >> 8), 13: byte(kind)}, b...)
}

func TestParseFrame(t *testing.T) {
	ipv4 := func(change func(b []byte)) []byte {
		b := []byte{0x45, 0, 0, 44, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
			0, 80, 0, 81, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0, 'd', 'a', 't', 'a'}
		change(b)
		return frame(unix.ETH_P_IP, b...)
	}
	a, z := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	portless := Packet{EtherType: unix.ETH_P_IP, Proto: 6, Src: netip.AddrPortFrom(a, 0), Dst: netip.AddrPortFrom(z, 0)}
	full := Packet{
		EtherType: unix.ETH_P_IP, Proto: 6, Flags: 2, Payload: 4, Src: netip.AddrPortFrom(a, 80), Dst: netip.AddrPortFrom(z, 81),
	}
	fragment, liar := portless, full
	fragment.Fragment = true
	liar.Payload = 20
	for _, c := range []struct {
		name  string
		frame []byte
		want  Packet
	}{
		{"bad: nothing", nil, Packet{}},
		{"bad: IPv4 header cut", frame(unix.ETH_P_IP, 0x45), Packet{EtherType: unix.ETH_P_IP}},
		{"bad: IPv6 header cut", frame(unix.ETH_P_IPV6, 0x60), Packet{EtherType: unix.ETH_P_IPV6}},
		{"bad: IPv4 header of 4 bytes", ipv4(func(b []byte) { b[0] = 0x41 }), portless},
		{"bad: IPv4 header of 60 bytes", ipv4(func(b []byte) { b[0] = 0x4f }), portless},
		{"bad: TCP header of 4 bytes", ipv4(func(b []byte) { b[32] = 0x10 }), liar},
		{"OK: TCP", ipv4(func([]byte) {}), full},
		{"OK: second fragment", ipv4(func(b []byte) { b[7] = 1 }), fragment},
		{"OK: ARP", frame(unix.ETH_P_ARP, make([]byte, 28)...), Packet{EtherType: unix.ETH_P_ARP}},
	} {
		t.Run(c.name, func(t *testing.T) {
			equal := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
			if diff := cmp.Diff(c.want, parseFrame(c.frame), equal); diff != "" {
				t.Errorf("packet (-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzParseFrame(f *testing.F) {
	f.Add(frame(unix.ETH_P_IP, make([]byte, 40)...))
	f.Add(frame(unix.ETH_P_IPV6, make([]byte, 60)...))
	f.Fuzz(func(_ *testing.T, b []byte) { parseFrame(b) })
}
