package e2e_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/netlab"
)

const flagRST = 0x04

// refusals are two hosts and one without demarc. The web may call the API on 8080,
// and so knows no more of the database's 8080 than that somebody will prove
// himself there.
func refusals(t *testing.T, webAPI string) *fleet {
	t.Helper()
	f := newFleet(t, webAPI)
	f.serve()
	return f
}

// A caller of the fleet that is refused learns it at once, at whichever end it is
// refused, over both families, and nothing of what it says arrives. To everybody
// else a refusal looks like nothing.
func TestRefusedAtOnce(t *testing.T) {
	f := refusals(t, "")
	db, api, outside := f.hosts["db"], f.hosts["api"], f.outside
	wire := outside.Wire()
	for _, address := range []func(*netlab.Namespace) netip.Addr{
		func(ns *netlab.Namespace) netip.Addr { return ns.IP4 },
		func(ns *netlab.Namespace) netip.Addr { return ns.IP6 },
	} {
		cases := []struct {
			name   string
			caller *actor
			to     netip.AddrPort
			want   string
		}{
			{"a proven caller, by the listener's side", f.actors["web"], netip.AddrPortFrom(address(db), 8080), unix.ECONNREFUSED.Error()},
			{"an answer without proof, by the caller's side", f.actors["web"], netip.AddrPortFrom(address(outside), 8080), unix.ECONNREFUSED.Error()},
			{"a caller without proof where it is asked for", f.stranger, netip.AddrPortFrom(address(api), 8080), unix.ECONNREFUSED.Error()},
			{"OK what nobody declared", f.stranger, netip.AddrPortFrom(address(db), 443), "timeout"},
		}
		for _, c := range cases {
			t.Run(fmt.Sprintf("%s, %s", c.name, c.to), func(t *testing.T) {
				if r := c.caller.dial(c.to); r.Error != c.want {
					t.Errorf("dial ends with %q after %v, want %q", r.Error, r.Took, c.want)
				}
			})
		}
		if n := wire.Count(func(p netlab.Packet) bool {
			return !p.Sent && p.Src == netip.AddrPortFrom(address(db), 443)
		}); n > 0 {
			t.Errorf("whom nobody declared got %d answers", n)
		}
	}
	for name, a := range f.actors {
		for _, port := range []uint16{8080, 443} {
			if got := a.served("tcp", port); got != (Served{}) {
				t.Errorf("%s:%d served %+v", name, port, got)
			}
		}
	}
}

// Where a crossing says drop, its callers wait.
func TestRefusedSilently(t *testing.T) {
	f := refusals(t, ", refuse: drop")
	wire := f.outside.Wire()
	if r := f.stranger.dial(netip.AddrPortFrom(f.hosts["api"].IP4, 8080)); r.Error != "timeout" {
		t.Errorf("a caller without proof is told %q", r.Error)
	}
	if r := f.actors["web"].dial(netip.AddrPortFrom(f.outside.IP4, 8080)); r.Error != "timeout" {
		t.Errorf("a caller whose listener proves nothing is told %q", r.Error)
	}
	if n := wire.Count(func(p netlab.Packet) bool { return !p.Sent && p.Flags&flagRST != 0 && p.Src.Port() == 8080 }); n > 0 {
		t.Errorf("%d resets arrived", n)
	}
}

// A sender of datagrams learns it as it would that nobody is there.
func TestRefusedDatagram(t *testing.T) {
	f := refusals(t, "")
	for _, to := range []netlab.Place{f.hosts["db"].At4(8080), f.hosts["db"].At6(8080)} {
		got := call[string](f.actors["web"], "Ask", DialArgs{To: to.String(), Timeout: 5 * time.Second})
		if want := unix.ECONNREFUSED.Error(); got != want {
			t.Errorf("%v: %q, want %q", to, got, want)
		}
	}
	if got := f.actors["db"].served("udp", 8080); got != (Served{}) {
		t.Errorf("the database was given %+v", got)
	}
}
