package e2e_test

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

const protoMPTCP = 262

// optionListeners are the listeners of this test, from port 7000 on.
var optionListeners = []string{"plain", "fast", "multipath", "signed"}

// optionRow is what came of a handshake with a set of TCP options.
type optionRow struct {
	Connected bool   // and its first bytes came back
	Refused   string // who refused its own segment, and why
}

// A header has room for 40 bytes of options, and the tag takes 16. Whatever else a
// stack puts there, a SYN or a SYN-ACK carries the tag or does not leave, and no
// SYN carries data; where the stack can do without what was in the way, the
// connection comes about at its next attempt.
func TestE10OptionSpace(t *testing.T) {
	w := newWired(t)
	caller, listener := w.web.Probe(w.caller.Cgroup("/lab/web")), w.db.Probe(w.listener.Cgroup("/lab/db"))
	w.multipath(caller, 8)
	listener.Must(probe.Call{Op: "socket", New: "multipath", Domain: unix.AF_INET6, Type: unix.SOCK_STREAM, Proto: protoMPTCP})
	w.enforce()
	for _, ns := range []*netlab.Namespace{w.web, w.db} {
		ns.Sysctl("ipv4/tcp_fastopen", "3")
		ns.Sysctl("mptcp/syn_retrans_before_tcp_fallback", "1")
		ns.Sysctl("mptcp/blackhole_timeout", "0") // do not learn from refusals
	}
	for _, kind := range []string{"plain", "fast", "signed"} {
		listener.Socket(kind, "tcp6")
	}
	listener.Must(probe.Call{Op: "set", Socket: "fast", Level: tcp, Option: unix.TCP_FASTOPEN, Value: 16})
	listener.Must(signature("signed", netip.AddrFrom16(w.web.IP4.As16())))
	listener.Must(signature("signed", w.web.IP6))
	for i, kind := range optionListeners {
		listener.Must(probe.Call{Op: "bind", Socket: kind, Address: netip.AddrPortFrom(netip.IPv6Unspecified(), uint16(7000+i)).String()})
		listener.Must(probe.Call{Op: "listen", Socket: kind})
	}
	wire := w.web.Wire()

	got, want := map[string]optionRow{}, map[string]optionRow{}
	for bits := range 8 {
		stamps, sack, scale := bits&1 != 0, bits&2 != 0, bits&4 != 0
		// The sizes are those of both families, and a stack that has to try again
		// takes a second for it.
		at := w.both(0)[bits%2].Addr()
		for _, extra := range []string{"nothing", "cookie wanted", "cookie and data", "multipath", "signature"} {
			w.stack(false, false, false)
			ip(t, w.web, "tcp_metrics flush")
			if extra == "cookie and data" { // with few options, there is room to get a cookie
				w.converse(caller, listener, "cookie wanted", at, 0)
			}
			w.stack(stamps, sack, scale)
			wire.Forget()
			before := w.ownRefusals()
			name := fmt.Sprintf("stamps %v sack %v scale %v: %s, %s", stamps, sack, scale, extra, at)
			connected := w.converse(caller, listener, extra, at, bits)
			refused := slices.Sorted(maps.Keys(w.ownRefusals().since(before)))
			row := optionRow{connected, strings.Join(refused, ", ")}
			got[name], want[name] = row, expected(stamps, sack, scale, extra)
			if n := w.allTagged(wire); connected && n < 2 {
				t.Errorf("%s: %d segments of a handshake on the wire", name, n)
			}
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

// multipath makes sockets of Multipath TCP, of one family and the other in turn.
// Workloads can have them only from before there was a policy.
func (w *wired) multipath(p *netlab.Probe, count int) {
	w.t.Helper()
	for i := range count {
		domain := []int{unix.AF_INET, unix.AF_INET6}[i%2]
		p.Must(probe.Call{Op: "socket", New: fmt.Sprint("multipath", i), Domain: domain, Type: unix.SOCK_STREAM, Proto: protoMPTCP})
	}
}

// stack sets what both hosts put into their SYNs.
func (w *wired) stack(stamps, sack, scale bool) {
	w.t.Helper()
	for name, on := range map[string]bool{"timestamps": stamps, "sack": sack, "window_scaling": scale} {
		for _, ns := range []*netlab.Namespace{w.web, w.db} {
			ns.Sysctl("ipv4/tcp_"+name, map[bool]string{true: "1", false: "0"}[on])
		}
	}
}

// converse opens a connection with something extra among its options, and says
// whether bytes went there and back.
func (w *wired) converse(caller, listener *netlab.Probe, extra string, to netip.Addr, number int) bool {
	w.t.Helper()
	kind := map[string]string{
		"nothing": "plain", "cookie wanted": "fast", "cookie and data": "fast", "multipath": "multipath", "signature": "signed",
	}[extra]
	at := netip.AddrPortFrom(to, uint16(7000+slices.Index(optionListeners, kind))).String()
	const patience = 10_000
	socket := "s"
	if kind == "multipath" {
		socket = fmt.Sprint("multipath", number)
	} else {
		caller.Socket(socket, map[bool]string{true: "tcp4", false: "tcp6"}[to.Is4()])
	}
	first := probe.Call{Op: "connect", Socket: socket, Address: at, Timeout: patience}
	switch kind {
	case "fast":
		first = probe.Call{Op: "send", Socket: socket, Address: at, Flags: unix.MSG_FASTOPEN, Data: []byte("data"), Timeout: patience}
	case "signed":
		caller.Must(signature(socket, to))
		first.Timeout = 300 // the stack cannot do without: there is nothing to wait for
	}
	r := caller.Do(first)
	if r.Error == probe.Timeout {
		return false
	}
	if r.Error != "" {
		w.t.Errorf("%s to %s: %s", extra, at, r.Error)
		return false
	}
	if r.N == 0 {
		caller.Must(probe.Call{Op: "send", Socket: socket, Data: []byte("data")})
	}
	listener.Must(probe.Call{Op: "accept", Socket: kind, New: "accepted", Timeout: patience})
	listener.Must(probe.Call{Op: "recv", Socket: "accepted", Timeout: patience})
	listener.Must(probe.Call{Op: "send", Socket: "accepted", Data: []byte("back")})
	back := caller.Must(probe.Call{Op: "recv", Socket: socket, Timeout: patience})
	caller.Must(probe.Call{Op: "close", Socket: socket})
	listener.Must(probe.Call{Op: "close", Socket: "accepted"})
	return string(back.Data) == "back"
}

// ownRefusals counts the denials of both hosts, by host and reason.
func (w *wired) ownRefusals() kinds {
	w.t.Helper()
	all := kinds{}
	for name, node := range map[string]*netlab.Node{"caller": w.caller, "listener": w.listener} {
		for reason, n := range kindsOf(node) {
			all[name+" "+reason] = n
		}
	}
	return all
}

// expected is what follows from the kernel's sizes of options (tcp_syn_options and
// tcp_synack_options in net/ipv4/tcp_output.c), each padded to four bytes.
func expected(stamps, sack, scale bool, extra string) optionRow {
	syn := 4 // maximum segment size
	if extra == "signature" {
		stamps = false // the kernel gives them up for it
	}
	if scale {
		syn += 4
	}
	if stamps {
		syn += 12 // with "sack permitted" in place of padding
	} else if sack {
		syn += 4
	}
	answer := syn
	switch extra {
	case "cookie wanted":
		syn, answer = syn+4, answer+12
	case "cookie and data":
		syn += 12
	case "multipath":
		syn, answer = syn+4, answer+12
	case "signature":
		syn, answer = syn+20, answer+20
	}
	const room = 40 - abi.TagLength
	var refused []string
	if syn > room || extra == "cookie and data" {
		refused = append(refused, "caller tag-no-room")
	}
	if extra == "cookie and data" {
		answer += 12 // without data, the stack asks for another cookie
	}
	if answer > room && (refused == nil || extra == "cookie and data") {
		refused = append(refused, "listener tag-no-room")
	}
	return optionRow{extra != "signature" || refused == nil, strings.Join(refused, ", ")}
}

// signature gives a socket a key of RFC 2385 for an address: struct tcp_md5sig.
// A socket of both families knows IPv4 as mapped.
func signature(socket string, peer netip.Addr) probe.Call {
	b := make([]byte, 128+88)
	if peer.Is4() {
		binary.NativeEndian.PutUint16(b, unix.AF_INET)
		copy(b[4:], peer.AsSlice())
	} else {
		binary.NativeEndian.PutUint16(b, unix.AF_INET6)
		copy(b[8:], peer.AsSlice())
	}
	binary.NativeEndian.PutUint16(b[128+2:], 6) // length of the key
	copy(b[128+8:], "secret")
	return probe.Call{Op: "settext", Socket: socket, Level: tcp, Option: unix.TCP_MD5SIG, Data: b}
}
