package core

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// nla is one attribute, padded.
func nla(kind uint16, value ...[]byte) []byte {
	b := binary.NativeEndian.AppendUint16(make([]byte, 2), kind)
	for _, v := range value {
		b = append(b, v...)
	}
	binary.NativeEndian.PutUint16(b, uint16(len(b)))
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// ifinfo is the payload of RTM_NEWLINK for device 7.
func ifinfo(hardware uint16, attributes ...[]byte) []byte {
	b := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint16(b[2:], hardware)
	binary.NativeEndian.PutUint32(b[4:], 7)
	for _, a := range attributes {
		b = append(b, a...)
	}
	return b
}

func TestParseLink(t *testing.T) {
	name := nla(unix.IFLA_IFNAME, []byte("eth0\x00"))
	master := nla(unix.IFLA_MASTER, []byte{3, 0, 0, 0})
	away := nla(unix.IFLA_LINK_NETNSID, []byte{0, 0, 0, 0})
	kind := func(kind string) []byte {
		return nla(unix.IFLA_LINKINFO|unix.NLA_F_NESTED, nla(unix.IFLA_INFO_KIND, []byte(kind+"\x00")))
	}
	slave := func(kind string) []byte {
		return nla(unix.IFLA_LINKINFO, nla(unix.IFLA_INFO_KIND, []byte("veth")), nla(unix.IFLA_INFO_SLAVE_KIND, []byte(kind)))
	}
	tests := []struct {
		name string
		in   []byte
		want netdev
		bad  bool
	}{
		{name: "OK Ethernet", in: ifinfo(unix.ARPHRD_ETHER, name), want: netdev{index: 7, name: "eth0", ethernet: true}},
		{name: "OK loopback", in: ifinfo(unix.ARPHRD_LOOPBACK, name), want: netdev{index: 7, name: "eth0"}},
		{name: "OK veth here", in: ifinfo(1, name, kind("veth")), want: netdev{index: 7, name: "eth0", ethernet: true}},
		{name: "OK veth to elsewhere", in: ifinfo(1, away, kind("veth"), name),
			want: netdev{index: 7, name: "eth0", ethernet: true, hostSide: true}},
		{name: "OK VLAN of a device elsewhere", in: ifinfo(1, away, kind("vlan"), name), want: netdev{index: 7, name: "eth0", ethernet: true}},
		{name: "OK port of a bridge", in: ifinfo(1, name, master, slave("bridge")),
			want: netdev{index: 7, name: "eth0", ethernet: true, enslaved: true, master: 3}},
		{name: "OK port of something", in: ifinfo(1, name, master), want: netdev{index: 7, name: "eth0", ethernet: true, enslaved: true, master: 3}},
		{name: "OK in a VRF", in: ifinfo(1, name, master, slave("vrf")), want: netdev{index: 7, name: "eth0", ethernet: true, master: 3}},
		{name: "OK junk behind", in: append(ifinfo(1, name), 1, 0, 3), want: netdev{index: 7, name: "eth0", ethernet: true}},
		{name: "bad empty", bad: true},
		{name: "bad short", in: ifinfo(1)[:15], bad: true},
		{name: "bad no name", in: ifinfo(1, master), bad: true},
		{name: "bad attribute longer than the message", in: ifinfo(1, name)[:22], bad: true},
		{name: "bad attribute shorter than its header", in: ifinfo(1, []byte{3, 0, 3, 0}, name), bad: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := parseLink(tt.in)
			if ok == tt.bad {
				t.Fatalf("read as %+v, %v", got, ok)
			}
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(netdev{})); ok && diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestParseAddress(t *testing.T) {
	header := []byte{unix.AF_INET, 24, 0, 0, 7, 0, 0, 0}
	mine, theirs := nla(unix.IFA_LOCAL, []byte{10, 0, 0, 1}), nla(unix.IFA_ADDRESS, []byte{10, 0, 0, 2})
	six := netip.MustParseAddr("fd00::1")
	join := func(parts ...[]byte) (b []byte) {
		for _, p := range parts {
			b = append(b, p...)
		}
		return b
	}
	tests := []struct {
		name  string
		in    []byte
		index int
		want  netip.Addr
	}{
		{"OK one", join(header, theirs), 7, netip.MustParseAddr("10.0.0.2")},
		{"OK point to point", join(header, theirs, mine), 7, netip.MustParseAddr("10.0.0.1")},
		{"OK point to point, other order", join(header, mine, theirs), 7, netip.MustParseAddr("10.0.0.1")},
		{"OK IPv6", join(header, nla(unix.IFA_ADDRESS, six.AsSlice())), 7, six},
		{"bad length", join(header, nla(unix.IFA_ADDRESS, []byte{1, 2, 3})), 7, netip.Addr{}},
		{"bad no address", header, 7, netip.Addr{}},
		{"bad short", header[:7], 0, netip.Addr{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if index, got := parseAddress(tt.in); index != tt.index || got != tt.want {
				t.Errorf("got %d, %v; want %d, %v", index, got, tt.index, tt.want)
			}
		})
	}
}

// The listing agrees with that of a well-kept library, also where it takes more
// than one message.
func TestListDevices(t *testing.T) {
	for i := range 40 {
		plug(t, cable(string(rune('a'+i%26))+string(rune('a'+i/26))))
	}
	address(t, "ab", "10.9.0.1/24")
	got, err := listDevices()
	must(t, err)
	all, err := netlink.LinkList()
	must(t, err)
	var want []netdev
	for _, l := range all {
		a := l.Attrs()
		want = append(want, netdev{index: a.Index, name: a.Name, ethernet: a.EncapType == "ether", enslaved: a.MasterIndex != 0, master: a.MasterIndex,
			hostSide: l.Type() == "veth" && a.NetNsID >= 0, routed: a.Name == "ab"})
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(netdev{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func FuzzNetlink(f *testing.F) {
	f.Add(ifinfo(1, nla(unix.IFLA_IFNAME, []byte("eth0\x00"))))
	f.Add([]byte{2, 24, 0, 0, 7, 0, 0, 0, 8, 0, 2, 0, 10, 0, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		parseLink(b)
		parseAddress(b)
	})
}
