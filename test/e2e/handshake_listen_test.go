package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// Two sockets of a workload that share a port are one listener to the world:
// whichever the kernel chooses answers with the proof, with cookies as without, and
// a listener on another port has nothing to do with them.
func TestSharedListeners(t *testing.T) {
	for _, cookies := range []string{"1", "2"} {
		t.Run("cookies "+cookies, func(t *testing.T) {
			w := newWired(t).enforce()
			w.db.Sysctl("ipv4/tcp_syncookies", cookies)
			client := startActor(t, w.web, w.caller.Cgroup("/lab/web"))
			p := w.db.Probe(w.listener.Cgroup("/lab/db"))
			for name, port := range map[string]int{"one": 7000, "two": 7000, "elsewhere": 7001, "undeclared": 7200} {
				p.Socket(name, "tcp6")
				p.Must(probe.Call{Op: "set", Socket: name, Level: unix.SOL_SOCKET, Option: unix.SO_REUSEPORT, Value: 1})
				p.Must(probe.Call{Op: "bind", Socket: name, Address: fmt.Sprintf("[::]:%d", port)})
				p.Must(probe.Call{Op: "listen", Socket: name})
			}
			wire := w.db.Wire()
			got := map[string]int{}
			const connections = 40
			for i := range connections {
				to := w.both([]uint16{7000, 7000, 7001}[i%3])[i/3%2]
				if r := patient(client, to); r.Error != "" {
					t.Fatalf("dial %s: %s", to, r.Error)
				}
				for _, name := range []string{"one", "two", "elsewhere"} {
					for p.Do(probe.Call{Op: "accept", Socket: name, New: "a", Timeout: 1}).Error == "" {
						got[name]++
					}
				}
			}
			// The last ones may have been on their way.
			eventually(t, timeToAnswer, "all connections", func() bool {
				for _, name := range []string{"one", "two", "elsewhere"} {
					if p.Do(probe.Call{Op: "accept", Socket: name, New: "a", Timeout: 1}).Error == "" {
						got[name]++
					}
				}
				return got["one"]+got["two"]+got["elsewhere"] == connections
			})
			if got["one"] == 0 || got["two"] == 0 || got["elsewhere"] != connections/3 {
				t.Errorf("accepted %v", got)
			}
			if n := w.allTagged(wire); n < 2*connections {
				t.Errorf("%d segments of handshakes", n)
			}
			// Nobody gets at either of them without a proof.
			for i := range uint16(8) {
				to := w.both(7000)[i%2]
				w.refused(abi.TagMissing, w.frame(segmentOf{from: nobody(to, 20000+i), to: to, seq: 1, flags: flagSYN}))
			}
			caller := w.web.Probe(w.caller.Cgroup("/lab/web"))
			caller.Socket("s", "tcp4")
			caller.Refused(probe.Call{Op: "connect", Socket: "s", Address: w.both(7200)[0].String()}, "EPERM")
		})
	}
}

// Options in front of TCP and UDP (IPv6 hop-by-hop and destination options) hide
// nothing of it: tags are written, found and demanded behind them.
func TestExtensionHeadersBeforeTCP(t *testing.T) {
	w := newWired(t).enforce()
	server := startActor(t, w.db, w.listener.Cgroup("/lab/db"))
	server.serve(7000)
	server.serve(7100)
	padding := []byte{0, 0, 1, 4, 0, 0, 0, 0} // PadN
	for _, header := range []struct {
		name   string
		option int
	}{{"destination options", unix.IPV6_DSTOPTS}, {"hop-by-hop options", unix.IPV6_HOPOPTS}} {
		t.Run(header.name, func(t *testing.T) {
			dial := func(p *netlab.Probe, port uint16) string {
				p.Socket("s", "tcp6")
				p.Must(probe.Call{Op: "settext", Socket: "s", Level: unix.IPPROTO_IPV6, Option: header.option, Data: padding})
				return p.Do(probe.Call{Op: "connect", Socket: "s", Address: w.both(port)[1].String(), Timeout: 10_000}).Error
			}
			w.tap.frames()
			behind := func() (n int) {
				for _, b := range w.tap.frames() {
					if b[12] == 0x86 && b[13] == 0xdd && (b[14+6] == 0 || b[14+6] == 60) && b[14+40] == tcp {
						n++
					}
				}
				return n
			}
			web, other := w.web.Probe(w.caller.Cgroup("/lab/web")), w.web.Probe(w.caller.Cgroup("/lab/other"))
			visitor := w.outside.Probe(w.lab.Cgroup("outside"))
			if problem := dial(web, 7000); problem != "" {
				t.Errorf("a proven caller: %s", problem)
			} else {
				web.Echoed("s", "behind a header")
			}
			if n := behind(); n < 3 {
				t.Errorf("%d segments with a header in front: this test shows nothing", n)
			}
			if problem := dial(visitor, 7100); problem != "" {
				t.Errorf("a visitor of a declared network: %s", problem)
			} else {
				visitor.Echoed("s", "behind a header")
			}
			if problem := dial(other, 7000); problem != "EPERM" {
				t.Errorf("a workload without a crossing: %q", problem)
			}
			before := w.listener.Denied(abi.TagMissing)
			if problem := dial(visitor, 7000); problem == "" {
				t.Error("a visitor without a proof connects")
			}
			if w.listener.Denied(abi.TagMissing) == before {
				t.Error("a visitor without a proof is refused for something else")
			}
			w.listener.AwaitDenied(abi.TagMissing, tcp, netlab.Place{Address: w.db.IP6, Port: 7000})

			ask := func(p *netlab.Probe) string {
				p.Socket("u", "udp6")
				p.Must(probe.Call{Op: "settext", Socket: "u", Level: unix.IPPROTO_IPV6, Option: header.option, Data: padding})
				p.Connect("u", w.both(7000)[1].String())
				p.Must(probe.Call{Op: "send", Socket: "u", Data: []byte("behind a header")})
				patience := 10_000
				if p == visitor {
					patience = 300
				}
				return p.Do(probe.Call{Op: "recv", Socket: "u", Timeout: patience}).Error
			}
			tagged := 0
			if problem := ask(web); problem != "" {
				t.Errorf("a proven datagram: %s", problem)
			}
			for _, b := range w.tap.frames() {
				if b[12] == 0x86 && b[13] == 0xdd && (b[14+6] == 0 || b[14+6] == 60) && b[14+40] == udp && bytes.Contains(b[14+40:], []byte{127, 24, 0xd3, 0xac}) {
					tagged++
				}
			}
			if tagged == 0 {
				t.Error("no datagram with a tag behind a header: this test shows nothing")
			}
			if problem := ask(visitor); problem == "" {
				t.Error("a datagram without a proof is answered")
			}
			w.listener.AwaitDenied(abi.TagMissing, udp, netlab.Place{Address: w.db.IP6, Port: 7000})
		})
	}
	if got := server.served("tcp", 7000); got.Count != 2 {
		t.Errorf("the listener got %d connections, want the two proven ones", got.Count)
	}
}

// A connection outlives the key that it was opened with, and nothing else does.
func TestConnectionOutlivesItsKey(t *testing.T) {
	w, client, _ := connected(t)
	var streams []DialReply
	for _, to := range w.both(7000) {
		r := patient(client, to)
		if r.Error != "" {
			t.Fatalf("dial %s: %s", to, r.Error)
		}
		streams = append(streams, r)
	}
	old, oldEpoch := w.key, w.epoch
	fresh := map[string]any{"keys": []map[string]any{{"epoch": oldEpoch ^ 5, "key": "f0e1d2c3b4a5968778695a4b3c2d1e0f"}}}
	text, err := json.Marshal(fresh)
	if err == nil {
		err = os.WriteFile(filepath.Join(w.lab.Dir(), "fresh"), text, 0o600)
	}
	if err == nil {
		err = os.Rename(filepath.Join(w.lab.Dir(), "fresh"), filepath.Join(w.lab.Dir(), "keyring"))
	}
	if err != nil {
		t.Fatal(err)
	}
	w.key, w.epoch = tagKey(t, w.lab)
	// The old key is gone where a tag of it is of no known epoch.
	port := uint16(20000)
	forged := func(to netip.AddrPort) tcpFrame {
		port++
		s := segmentOf{from: nobody(to, port), to: to, seq: 1, flags: flagSYN}
		return w.tagged(s, w.frame(s).tagOf(old, w.id["web"], oldEpoch, 0))
	}
	for _, node := range []*netlab.Node{w.caller, w.listener} {
		keys := pinned(t, node, "keys")
		eventually(t, timeToAnswer, "the new key alone", func() bool {
			for epoch := range uint32(abi.Epochs) {
				var k abi.Key
				if err := keys.Lookup(epoch, &k); err != nil || (k.Valid != 0) != (epoch == uint32(w.epoch)) {
					return false
				}
			}
			return true
		})
	}
	for i, to := range w.both(7000) {
		w.refused(abi.TagWrongEpoch, forged(to))
		if problem := call[string](client, "Exchange", ExchangeArgs{Stream: streams[i].Stream, Bytes: 1 << 20, Timeout: timeToAnswer}); problem != "" {
			t.Errorf("exchange on the old connection to %s: %s", to, problem)
		}
	}
	w.control(client, 7000)
	if n := w.caller.Denied(abi.TagBadMAC) + w.listener.Denied(abi.TagBadMAC); n != 0 {
		t.Errorf("%d denials of bad MACs: keys were exchanged in disorder", n)
	}
}

// Nothing is skipped because it is near or large: workloads of one host prove
// themselves to each other as they would across the wire, and what the devices
// gather and cut on the way (GSO, GRO) arrives whole.
func TestE14OneHost(t *testing.T) {
	w, client, _ := connected(t)
	w.control(client, 7000)
	local := w.db.Loopback()
	near := startActor(t, w.db, w.listener.Cgroup("/lab/web"))
	stranger := startActor(t, w.db, w.listener.Cgroup("/elsewhere"))
	other := startActor(t, w.db, w.listener.Cgroup("/lab/other"))
	for _, a := range []netip.Addr{w.db.IP4, w.db.IP6, netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()} {
		to := netip.AddrPortFrom(a, 7000)
		local.Forget()
		if r := patient(near, to); r.Error != "" {
			t.Errorf("dial %s, which is declared: %s", to, r.Error)
		} else {
			w.exchanged(near, r)
		}
		if n := w.allTagged(local); n < 2 {
			t.Errorf("%s: %d segments of a handshake on lo", to, n)
		}
		before := w.listener.Denied(abi.TagMissing)
		if r := call[DialReply](stranger, "Dial", DialArgs{To: to.String(), Timeout: timeToAnswer / 50}); r.Error == "" {
			t.Errorf("%s: a process of no workload connects", to)
		}
		if w.listener.Denied(abi.TagMissing) == before {
			t.Errorf("%s: a process of no workload is refused for something else", to)
		}
		if r := other.dial(to); r.Error != unix.EPERM.Error() {
			t.Errorf("%s: a workload without a crossing: %q", to, r.Error)
		}
	}
	const size, times = 128 << 10, 16 // what an echo holds, and more than once
	wire := w.db.Wire()
	for _, c := range []struct {
		from *actor
		wire *netlab.Wire
	}{{near, local}, {client, wire}} {
		for _, to := range w.both(7000) {
			r := patient(c.from, to)
			if r.Error != "" {
				t.Fatalf("dial %s: %s", to, r.Error)
			}
			c.wire.Forget()
			for range times {
				if problem := call[string](c.from, "Exchange", ExchangeArgs{Stream: r.Stream, Bytes: size, Timeout: timeToAnswer}); problem != "" {
					t.Fatalf("exchange of %d bytes with %s: %s", size, to, problem)
				}
			}
			if c.wire.Count(func(p netlab.Packet) bool { return p.Proto == tcp && p.Payload > 2*1500 }) == 0 {
				t.Errorf("%s: no segment was larger than a device's: this test shows nothing", to)
			}
			call[bool](c.from, "Close", r.Stream)
		}
	}
	for _, f := range w.caller.Flows() {
		if f.Verdict != abi.Allow {
			t.Errorf("%s", netlab.Describe(f))
		}
	}
}

// frames returns what was seen since the last call, of every protocol.
func (c *cable) frames() (all [][]byte) {
	c.t.Helper()
	b := make([]byte, 2048)
	for {
		n, err := unix.Read(c.fd, b)
		if err == unix.EAGAIN {
			return all
		}
		if err != nil {
			c.t.Fatalf("read frame: %v", err)
		}
		all = append(all, append([]byte(nil), b[:n]...))
	}
}
