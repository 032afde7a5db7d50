package e2e_test

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// through puts a router between web and db, both ways and in both families.
func (w *wired) through() *netlab.Namespace {
	w.t.Helper()
	router := w.lab.Namespace("router")
	router.Sysctl("ipv4/ip_forward", "1")
	router.Sysctl("ipv6/conf/all/forwarding", "1")
	// Everybody is a neighbour here: nobody is to be told of a shorter way.
	for _, conf := range []string{"all", "eth0"} {
		router.Sysctl("ipv4/conf/"+conf+"/send_redirects", "0")
	}
	for _, ends := range [][2]*netlab.Namespace{{w.web, w.db}, {w.db, w.web}} {
		ends[0].Sysctl("ipv6/conf/eth0/accept_redirects", "0")
		ip(w.t, ends[0], fmt.Sprintf("route add %s/32 via %s", ends[1].IP4, router.IP4))
		ip(w.t, ends[0], fmt.Sprintf("-6 route add %s/128 via %s", ends[1].IP6, router.IP6))
	}
	return router
}

// A router takes the tag out. Nothing falls back to addresses: the side that needed
// the proof refuses, and says that it is missing.
func TestE05StrippedTag(t *testing.T) {
	for _, c := range []struct {
		name, rule string
		refuses    string // the host that refuses
	}{
		{"nothing", "", ""},
		{"the SYN's", "tcp flags & (syn | ack) == syn ", "listener"},
		{"the SYN-ACK's", "tcp flags & (syn | ack) == syn | ack ", "caller"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, client, server := connected(t)
			router := w.through()
			if c.rule != "" {
				nft(t, router, "add table inet t; add chain inet t c { type filter hook forward priority 0; }; add rule inet t c "+c.rule+"reset tcp option 253")
			}
			passing := router.Wire()
			for _, to := range w.both(7000) {
				node, direction := w.listener, abi.Ingress
				if c.refuses == "caller" {
					node, direction = w.caller, abi.Egress
				}
				before := node.Denied(abi.TagMissing)
				got := patient(client, to)
				if connects := c.refuses == ""; (got.Error == "") != connects {
					t.Errorf("dial %s: %q", to, got.Error)
				}
				if got.Error != "" {
					f := node.AwaitDenied(abi.TagMissing, tcp, netlab.Place{Address: to.Addr(), Port: to.Port()})
					if f.Direction != direction || node.Denied(abi.TagMissing) == before {
						t.Errorf("denied %s", netlab.Describe(f))
					}
				}
				if n := passing.Count(netlab.And(handshakes, func(p netlab.Packet) bool { return p.Dst.Addr() == to.Addr() && p.Sent })); n == 0 {
					t.Errorf("no SYN to %s passes the router: this test shows nothing", to)
				}
			}
			if got := server.served("tcp", 7000); c.refuses != "" && got.Bytes != 0 {
				t.Errorf("the listener got %d bytes", got.Bytes)
			}
		})
	}
}

// With SYN cookies a listener keeps nothing of a SYN. What was proved is kept by
// demarc, for SYNs that proved something; a flood of others costs the declared
// connections nothing, and an ACK whose SYN was never judged opens none, however
// good its cookie.
func TestE06Cookies(t *testing.T) {
	w := newWired(t)
	client := startActor(t, w.web, w.caller.Cgroup("/lab/web"))
	server := startActor(t, w.db, w.listener.Cgroup("/lab/db"))
	w.db.Sysctl("ipv4/tcp_syncookies", "2")
	server.serve(7000)
	served := 0
	// Each of these has a cookie from before there was a policy.
	var late []tcpFrame
	for i, to := range append(w.both(7000), w.both(7000)...) {
		s := segmentOf{from: nobody(to, uint16(30000+i)), to: to, seq: 1000, flags: flagSYN}
		syn := w.frame(s)
		w.cable.send(syn)
		s.seq, s.ack, s.flags = 1001, w.answerTo(syn).seq+1, flagACK
		if i < 2 {
			w.cable.send(w.frame(s)) // control: without a policy it opens a connection
			served++
			eventually(t, timeToAnswer, "connection by a cookie", func() bool { return server.served("tcp", 7000).Count == served })
			continue
		}
		late = append(late, w.frame(s))
	}
	w.enforce()
	w.refused(abi.NoState, late...)
	if got := server.served("tcp", 7000).Count; got != served {
		t.Errorf("%d connections by cookies of SYNs that nobody judged", got-served)
	}

	const flood, connections = 2000, 20
	before := w.listener.Denied(abi.TagMissing)
	w.cable.segments()
	done := make(chan string)
	go func() {
		defer close(done)
		for i := range connections {
			for _, to := range w.both(7000) {
				var r DialReply
				if err := client.calls.Call("Actor.Dial", DialArgs{To: to.String(), Timeout: timeToAnswer}, &r); err != nil || r.Error != "" {
					done <- fmt.Sprintf("connection %d to %s in the flood: %q %v", i, to, r.Error, err)
				}
			}
		}
	}()
	for i := range flood {
		to := w.both(7000)[i%2]
		w.cable.send(w.frame(segmentOf{from: nobody(to, uint16(10000+i)), to: to, seq: uint32(i), flags: flagSYN}))
	}
	for problem := range done {
		t.Error(problem)
	}
	eventually(t, timeToAnswer, "denials of the flood", func() bool { return w.listener.Denied(abi.TagMissing)-before >= flood })
	if n := w.listener.Denied(abi.TagMissing) - before; n != flood {
		t.Errorf("%d denials, want %d", n, flood)
	}
	w.unanswered()
	accepted := func() int { return server.served("tcp", 7000).Count - served }
	eventually(t, timeToAnswer, "the listener to take what it was given", func() bool { return accepted() >= 2*connections })
	if got := accepted(); got != 2*connections {
		t.Errorf("the listener got %d connections, want %d", got, 2*connections)
	}
}

// What is lost is sent again and judged again: a SYN, with a tag of its own or the
// same, and a SYN-ACK. Also where the listener keeps nothing of the SYN.
func TestE08Retransmission(t *testing.T) {
	for _, cookies := range []string{"1", "2"} {
		for _, lost := range []struct{ name, flags string }{{"SYN", "syn"}, {"SYN-ACK", "syn | ack"}, {"last ACK", "ack"}} {
			t.Run(fmt.Sprintf("%s lost, cookies %s", lost.name, cookies), func(t *testing.T) {
				w, client, _ := connected(t)
				w.db.Sysctl("ipv4/tcp_syncookies", cookies)
				at, wire := w.db, w.web.Wire()
				if lost.name == "SYN-ACK" {
					at = w.web
				}
				// The first of each family, on its way in.
				for _, family := range []string{"ip", "ip6"} {
					nft(t, at, fmt.Sprintf("add table %[1]s t; add chain %[1]s t c { type filter hook prerouting priority -300; }; "+
						"add rule %[1]s t c tcp flags & (syn | ack | psh) == %[2]s numgen inc mod 1000000000 == 0 drop", family, lost.flags))
				}
				for _, to := range w.both(7000) {
					r := patient(client, to)
					if r.Error != "" {
						t.Fatalf("dial %s: %s", to, r.Error)
					}
					w.exchanged(client, r)
				}
				want := 4
				if lost.name != "last ACK" {
					want = 6 // each family's SYN left twice, and one of the SYN-ACKs
				}
				if n := w.allTagged(wire); n < want {
					t.Errorf("%d segments of handshakes, want %d or more: nothing was lost", n, want)
				}
				for _, node := range []*netlab.Node{w.caller, w.listener} {
					for _, f := range node.Flows() {
						if f.Verdict != abi.Allow {
							t.Errorf("%s", netlab.Describe(f))
						}
					}
				}
			})
		}
	}
}

// A SYN that comes again because its answer was lost is judged under the policy that
// is in force by then; that it came before is not held against it.
func TestE08RetransmissionOverPolicyChange(t *testing.T) {
	for i := range 2 {
		w, _, _ := connected(t)
		to := w.both(7000)[i]
		nft(t, w.web, "add table inet t; add chain inet t c { type filter hook prerouting priority -300; }; "+
			"add rule inet t c tcp flags & (syn | ack) == syn | ack drop")
		p := w.web.Probe(w.caller.Cgroup("/lab/web"))
		p.Socket("s", []string{"tcp4", "tcp6"}[i])
		p.Send(probe.Call{Op: "connect", Socket: "s", Address: to.String(), Timeout: int(timeToAnswer.Milliseconds())})
		eventually(t, timeToAnswer, "SYN-ACK that is lost", func() bool {
			for _, s := range w.tap.segments() {
				if s.src == to && s.flags == flagSYN|flagACK {
					return true
				}
			}
			return false
		})
		w.listener.Apply(document(2, wiredPolicy))
		nft(t, w.web, "delete table inet t")
		if r := p.Result(); r.Error != "" {
			t.Fatalf("connect %s: %s", to, r.Error)
		}
		p.Echoed("s", "under the next policy")
		for _, f := range w.listener.Flows() {
			if f.Verdict != abi.Allow {
				t.Errorf("%s", netlab.Describe(f))
			}
		}
	}
}

// Whoever answers a SYN in two parts, an ACK and a SYN of his own, has nobody's
// proof: there is no tag for it, and a good one of a SYN does not help.
func TestE08SplitHandshake(t *testing.T) {
	w, _, _ := connected(t)
	p := w.web.Probe(w.caller.Cgroup("/lab/web"))
	mac := hardware(t, w.web)
	for i, tagged := range []bool{false, true} {
		for j, family := range w.both(0) {
			from := netip.AddrPortFrom([]netip.Addr{w.web.IP4, w.web.IP6}[j], uint16(5000+10*i+j))
			to := nobody(family, 7000)
			kind := []string{"tcp4", "tcp6"}[j]
			p.Socket("s", kind)
			p.Must(probe.Call{Op: "bind", Socket: "s", Address: from.String()})
			w.cable.segments()
			p.Send(probe.Call{Op: "connect", Socket: "s", Address: to.String(), Timeout: 500})
			syn := w.awaited("SYN", func(s tcpFrame) bool { return s.src == from && s.flags&(flagSYN|flagACK) == flagSYN })
			w.mac.db = mac
			before := w.caller.Denied(abi.Protocol)
			answer := segmentOf{from: to, to: from, seq: 5000, ack: syn.seq + 1, flags: flagACK}
			w.cable.send(w.frame(answer))
			answer.ack, answer.flags = 0, flagSYN
			if tagged {
				w.cable.send(w.signed(answer, w.id["db"]))
			} else {
				w.cable.send(w.frame(answer))
			}
			eventually(t, timeToAnswer, "denial of a SYN to a caller", func() bool { return w.caller.Denied(abi.Protocol) > before })
			if r := p.Result(); r.Error == "" {
				t.Errorf("%s, tagged %v: connected", to, tagged)
			}
			for _, s := range w.cable.segments() {
				if s.src == from && s.flags&(flagSYN|flagACK) == flagSYN|flagACK {
					t.Errorf("%s, tagged %v: answered with a SYN-ACK", to, tagged)
				}
			}
			p.Must(probe.Call{Op: "close", Socket: "s"})
		}
	}
}

// A tuple whose last connection is in TIME_WAIT at the listener's side can be used
// again within that minute, by whoever proves himself anew and by nobody else.
func TestE08TimeWait(t *testing.T) {
	w := newWired(t).enforce()
	caller, listener := w.web.Probe(w.caller.Cgroup("/lab/web")), w.db.Probe(w.listener.Cgroup("/lab/db"))
	listener.Socket("l", "tcp6")
	listener.Must(probe.Call{Op: "bind", Socket: "l", Address: "[::]:7000"})
	listener.Must(probe.Call{Op: "listen", Socket: "l"})
	for i, to := range w.both(7000) {
		from := netlab.Place{Address: []netip.Addr{w.web.IP4, w.web.IP6}[i], Port: 5000}
		// connection comes about, and its listener's side ends it first. It returns
		// its SYN.
		connection := func() (syn tcpFrame) {
			w.tap.segments()
			bound(caller, "c", []string{"tcp4", "tcp6"}[i], from)
			caller.Connect("c", to.String())
			listener.Must(probe.Call{Op: "accept", Socket: "l", New: "a"})
			caller.Must(probe.Call{Op: "send", Socket: "c", Data: []byte("proven")})
			listener.Must(probe.Call{Op: "recv", Socket: "a"})
			listener.Must(probe.Call{Op: "close", Socket: "a"})
			caller.Must(probe.Call{Op: "swallow", Socket: "c"})
			caller.Must(probe.Call{Op: "close", Socket: "c"})
			eventually(t, timeToAnswer, "TIME_WAIT", func() bool { return waiting(t, w.db) == 1 })
			return w.tap.segments()[0]
		}
		connection()
		connection() // control: on that very tuple
		for _, reason := range []abi.Reason{abi.TagMissing, abi.TagBadMAC, abi.NoCrossingFor} {
			// A number behind all of the last connection's makes it a new one.
			again := segmentOf{from: netip.AddrPortFrom(from.Address, from.Port), to: to, seq: connection().seq + 1<<20, flags: flagSYN}
			tag := map[abi.Reason][]byte{abi.TagBadMAC: w.tag(again, w.id["web"], 0), abi.NoCrossingFor: w.tag(again, w.id["other"], 0)}[reason]
			if reason == abi.TagBadMAC {
				tag[15] ^= 1
			}
			w.refused(reason, w.tagged(again, tag))
			if n := waiting(t, w.db); n != 0 {
				t.Errorf("%s: %d in TIME_WAIT: the stack did not take it for a new connection", reason, n)
			}
		}
	}
	listener.Refused(probe.Call{Op: "accept", Socket: "l", New: "a", Timeout: 1}, probe.Timeout)
}

// After the handshake, whoever is not on the path has to guess: what he sends
// changes nothing. Whoever is on it can say what he likes; SECURITY.md declares
// that, and the last lines of this test show it, so that it is not forgotten.
func TestE09Injection(t *testing.T) {
	w, client, server := connected(t)
	for _, to := range w.both(7000) {
		w.tap.segments()
		r := patient(client, to)
		if r.Error != "" {
			t.Fatalf("dial %s: %s", to, r.Error)
		}
		w.exchanged(client, r)
		next := segmentOf{from: netip.MustParseAddrPort(r.Local), to: to} // of the caller
		for _, s := range w.tap.segments() {
			end := s.seq + uint32(len(s.frame)-s.tcp-int(s.frame[s.tcp+12]>>4)*4)
			if s.src == next.from && s.flags&flagSYN == 0 {
				next.seq = end
			} else if s.src == to && s.flags&flagSYN == 0 {
				next.ack = end
			}
		}
		bytes := server.served("tcp", 7000).Bytes
		blind := next
		for _, off := range []uint32{1 << 20, 1 << 30, 1 << 31, ^uint32(1 << 20)} {
			for _, flags := range []uint8{flagRST, flagRST | flagACK, flagACK, flagSYN, flagACK | 1, flagSYN | flagACK} {
				blind.seq, blind.ack, blind.flags = next.seq+off, next.ack+off, flags
				blind.payload = nil
				if flags == flagACK {
					blind.payload = []byte("injected")
				}
				w.cable.send(w.frame(blind))
			}
		}
		w.exchanged(client, r)
		if n := server.served("tcp", 7000).Bytes - bytes; n != 16 {
			t.Errorf("the listener got %d bytes, want the honest 16", n)
		}

		// The gap.
		next.seq, next.ack, next.flags, next.payload = next.seq+16, next.ack+16, flagACK|8, []byte("injected")
		w.cable.send(w.frame(next))
		eventually(t, timeToAnswer, "what is sent with the right numbers", func() bool { return server.served("tcp", 7000).Bytes-bytes == 16+8 })
	}
}

// waiting counts the connections in TIME_WAIT in a namespace.
func waiting(t *testing.T, ns *netlab.Namespace) (count int) {
	t.Helper()
	err := ns.Do(func() error {
		for _, name := range []string{"tcp", "tcp6"} {
			text, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(text)) {
				if fields := strings.Fields(line); len(fields) > 3 && fields[3] == "06" {
					count++
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatalf("list connections: %v", err)
	}
	return count
}
