package main

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/demarc/demarc/agent/core/proto"
)

func TestSSHConnection(t *testing.T) {
	ends := func(local, remote string) proto.Ends {
		return proto.Ends{Local: netip.MustParseAddrPort(local), Remote: netip.MustParseAddrPort(remote)}
	}
	for _, tt := range []struct {
		text string
		want proto.Ends // zero = none
	}{
		{"192.0.2.9 50112 192.0.2.1 22", ends("192.0.2.1:22", "192.0.2.9:50112")},
		{"::ffff:192.0.2.9 50112 ::ffff:192.0.2.1 22", ends("192.0.2.1:22", "192.0.2.9:50112")},
		{"fe80::9%eth0 50112 fe80::1%eth0 22", ends("[fe80::1]:22", "[fe80::9]:50112")},
		{"", proto.Ends{}},
		{"192.0.2.9 50112 22", proto.Ends{}}, // SSH_CLIENT
		{"UNKNOWN 65535 UNKNOWN 65535", proto.Ends{}},
		{"192.0.2.9 65536 192.0.2.1 22", proto.Ends{}},
	} {
		got, found := sshConnection(tt.text)
		if got != tt.want || found != (tt.want != proto.Ends{}) {
			t.Errorf("%q: %v, %v", tt.text, got, found)
		}
	}
}

// What this process holds is its session, what SSH_CONNECTION says comes first, and
// beyond the bound it is not known.
func TestCurrentSession(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	none := func(string) string { return "" }
	before := currentSession(none)
	var dialled []proto.Ends
	for range proto.MaxOwn + 1 {
		c, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		dialled = append(dialled, proto.Ends{Local: netip.MustParseAddrPort(c.LocalAddr().String()), Remote: netip.MustParseAddrPort(c.RemoteAddr().String())})
		if len(dialled) > 1 {
			continue
		}
		if s := currentSession(none); !slices.Contains(s.ends, dialled[0]) || slices.Contains(before.ends, dialled[0]) {
			t.Errorf("%v is not among %v", dialled[0], s.ends)
		}
		if slices.ContainsFunc(before.ends, func(e proto.Ends) bool { return e.Remote.Port() == 0 }) {
			t.Errorf("a listener is among %v", before.ends)
		}
	}
	last := dialled[proto.MaxOwn]
	s := currentSession(func(name string) string {
		if name != "SSH_CONNECTION" {
			return ""
		}
		return fmt.Sprintf("%s %d %s %d", last.Remote.Addr(), last.Remote.Port(), last.Local.Addr(), last.Local.Port())
	})
	if len(s.ends) != proto.MaxOwn || s.ends[0] != last || s.known {
		t.Errorf("%d connections, known %v, %v first; want %d, false, %v", len(s.ends), s.known, s.ends[0], proto.MaxOwn, last)
	}
}
