package e2e_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// identitiesOf are the numbers of the two workloads.
func identitiesOf(t *testing.T, e *ends, body string) (web, db uint32) {
	t.Helper()
	for _, w := range decoded(t, e.node, document(1, webAndDB+body)).Workloads {
		if w.Name == "web" {
			web = uint32(w.ID)
		} else {
			db = uint32(w.ID)
		}
	}
	return web, db
}

const tagPolicy = `networks:
  outside: {zone: app, cidrs: [10.66.0.3/32, "fd66::3/128"]}
crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000-7001]}
  - {name: web-outside, from: [workload/web], to: [network/outside], ports: [tcp/7100]}
`

// The tag is on SYN and SYN-ACK as abi.h says, with a MAC that another
// implementation computes the same, and peers without demarc never see one.
func TestTagOnTheWire(t *testing.T) {
	e := newEnds(t, tagPolicy, netlab.NodeOptions{CoreOnly: true})
	outside := e.lab.Namespace("outside")
	outside.Echo(7100)
	e.server.serve(7000)
	key, epoch := tagKey(t, e.lab)
	web, db := identitiesOf(t, e, tagPolicy)
	door, far := openCable(t, e.db), openCable(t, outside)
	for _, cookies := range []string{"0", "1", "2"} {
		e.db.Sysctl("ipv4/tcp_syncookies", cookies)
		for _, to := range e.both(7000) {
			t.Run(fmt.Sprintf("cookies %s %s", cookies, to.Addr()), func(t *testing.T) {
				door.segments()
				if !e.client.reaches(to) {
					t.Fatal("the declared connection does not come about")
				}
				var syns, answers, others int
				var all []tcpFrame
				eventually(t, timeToAnswer, "both ends of the connection", func() bool {
					all = append(all, door.segments()...)
					ends := map[netip.AddrPort]bool{}
					for _, s := range all {
						if s.flags&1 != 0 {
							ends[s.src] = true
						}
					}
					return len(ends) == 2
				})
				for _, s := range all {
					var want [][]byte
					switch s.flags & (flagSYN | flagACK) {
					case flagSYN:
						syns++
						want = [][]byte{s.tagOf(key, web, epoch, 0)}
					case flagSYN | flagACK:
						answers++
						want = [][]byte{s.tagOf(key, db, epoch, tagAnswer)}
					default:
						others++
					}
					if got := s.tags(); !equalBytes(got, want) {
						t.Errorf("%s > %s flags %#x: options 253 %x, want %x", s.src, s.dst, s.flags, got, want)
					}
				}
				if syns != 1 || answers != 1 || others < 4 {
					t.Errorf("%d SYNs, %d SYN-ACKs, %d other segments", syns, answers, others)
				}
			})
		}
	}
	for _, to := range []netip.AddrPort{netip.AddrPortFrom(outside.IP4, 7100), netip.AddrPortFrom(outside.IP6, 7100)} {
		if !e.client.reaches(to) {
			t.Errorf("%s is not reached", to)
		}
	}
	all := far.segments()
	if len(all) < 12 {
		t.Errorf("only %d segments seen outside", len(all))
	}
	for _, s := range all {
		if tags := s.tags(); len(tags) > 0 {
			t.Errorf("%s > %s carries %x to a peer without demarc", s.src, s.dst, tags)
		}
	}
}

func equalBytes(a, b [][]byte) bool {
	return len(a) == len(b) && bytes.Equal(bytes.Join(a, nil), bytes.Join(b, nil))
}

// Nobody gets in by an address, by a copied tag or by a changed one; a listener
// that is not the workload is not believed either. All of it is counted by kind.
func TestForgedTag(t *testing.T) {
	e := newEnds(t, tagPolicy, netlab.NodeOptions{CoreOnly: true})
	e.server.serve(7000)
	key, epoch := tagKey(t, e.lab)
	web, db := identitiesOf(t, e, tagPolicy)
	door, away := openCable(t, e.db), openCable(t, e.web)

	if !e.client.reaches(e.at4(7000)) || !e.client.reaches(e.at6(7000)) {
		t.Fatal("the declared connection does not come about")
	}
	var models []tcpFrame // one SYN of each family
	for _, s := range door.segments() {
		if s.flags&(flagSYN|flagACK) == flagSYN {
			models = append(models, s)
		}
	}
	if len(models) != 2 {
		t.Fatalf("%d SYNs seen", len(models))
	}

	t.Run("unmanaged caller at the same address", func(t *testing.T) {
		stranger := startActor(t, e.web, e.node.Cgroup("/other"))
		for _, to := range e.both(7000) {
			before := e.node.Denied(abi.TagMissing)
			r := call[DialReply](stranger, "Dial", DialArgs{To: to.String(), Timeout: 100 * time.Millisecond})
			if r.Error != "timeout" {
				t.Errorf("dial %s: %q", to, r.Error)
			}
			if n := e.node.Denied(abi.TagMissing) - before; n != 1 {
				t.Errorf("%d denials with tag-missing, want one for one SYN", n)
			}
		}
		e.node.AwaitDenied(abi.TagMissing, unix.IPPROTO_TCP, e.db.At4(7000))
	})

	t.Run("unmanaged listener at the same address", func(t *testing.T) {
		impostor := startActor(t, e.db, e.node.Cgroup("/other"))
		impostor.serve(7001)
		for _, to := range e.both(7001) {
			r := call[DialReply](e.client, "Dial", DialArgs{To: to.String(), Timeout: 100 * time.Millisecond})
			if r.Error == "" {
				t.Errorf("dial %s: connected to an impostor", to)
			}
		}
		e.node.AwaitFlow("tag-missing at the caller", func(f flow.Flow) bool {
			return f.Reason == abi.TagMissing && f.Direction == abi.Egress && f.Destination.Port == 7001
		})
	})

	for _, model := range models {
		good := model.tags()[0]
		changed := func(at int, with byte) []byte {
			b := bytes.Clone(good)
			b[at] ^= with
			return b
		}
		port := uint16(20000)
		for _, c := range []struct {
			name   string
			tag    func(tcpFrame) []byte // for the segment that will carry it
			reason abi.Reason            // Undecided: accepted
		}{
			{"OK made with the key", func(s tcpFrame) []byte { return s.tagOf(key, web, epoch, 0) }, abi.Undecided},
			{"bad none", func(tcpFrame) []byte { return nil }, abi.TagMissing},
			{"bad copied to another port", func(tcpFrame) []byte { return good }, abi.TagBadMAC},
			{"bad bit of the MAC", func(tcpFrame) []byte { return changed(8, 1) }, abi.TagBadMAC},
			{"bad last bit of the MAC", func(tcpFrame) []byte { return changed(15, 0x80) }, abi.TagBadMAC},
			{"bad identity", func(s tcpFrame) []byte { t := s.tagOf(key, web, epoch, 0); t[6] ^= 1; return t }, abi.TagBadMAC},
			{"bad epoch", func(tcpFrame) []byte { return changed(7, 0x70) }, abi.TagWrongEpoch},
			{"bad key", func(s tcpFrame) []byte { return s.tagOf([16]byte{1}, web, epoch, 0) }, abi.TagBadMAC},
			{"bad unknown identity", func(s tcpFrame) []byte { return s.tagOf(key, web^1, epoch, 0) }, abi.TagBadIdentity},
			{"bad reserved identity", func(s tcpFrame) []byte { return s.tagOf(key, 1, epoch, 0) }, abi.TagBadIdentity},
			{"bad identity without a crossing", func(s tcpFrame) []byte { return s.tagOf(key, db, epoch, 0) }, abi.NoCrossingFor},
			{"bad flags of a SYN-ACK", func(s tcpFrame) []byte { return s.tagOf(key, web, epoch, tagAnswer) }, abi.TagMalformed},
			{"bad flags of a datagram", func(s tcpFrame) []byte { return s.tagOf(key, web, epoch, tagDatagram) }, abi.TagMalformed},
			{"bad without its source", func(s tcpFrame) []byte { return s.tagOf(key, web, epoch, tagNoSource) }, abi.TagUnbound},
			{"bad without its destination", func(s tcpFrame) []byte { return s.tagOf(key, web, epoch, tagNoDestination) }, abi.TagUnbound},
			{"bad without either", func(s tcpFrame) []byte { return s.tagOf(key, web, epoch, tagNoSource|tagNoDestination) }, abi.TagMalformed},
			{"bad flag set afterwards", func(s tcpFrame) []byte { t := s.tagOf(key, web, epoch, 0); t[7] |= tagNoSource; return t }, abi.TagBadMAC},
			{"bad two tags", func(s tcpFrame) []byte {
				t := s.tagOf(key, web, epoch, 0)
				return append(t, t...)
			}, abi.TagMalformed},
			{"bad length", func(s tcpFrame) []byte {
				t := append(s.tagOf(key, web, epoch, 0), 0, 0, 0, 0)
				t[1] = 20
				return t
			}, abi.TagMalformed},
			{"bad cut", func(s tcpFrame) []byte { return s.tagOf(key, web, epoch, 0)[:12] }, abi.TagMalformed},
		} {
			t.Run(fmt.Sprintf("%s %s", model.dst.Addr(), c.name), func(t *testing.T) {
				port++
				forged := model.with(port, c.tag(model.with(port, nil)))
				door.segments()
				before := e.node.Denied(c.reason)
				away.send(forged)
				answered := false
				look := func() bool {
					for _, s := range door.segments() {
						answered = answered || s.dst == forged.src
					}
					return answered
				}
				if c.reason == abi.Undecided {
					eventually(t, timeToAnswer, "answer to a SYN with a true tag", look)
					return
				}
				// Where it was refused, it was refused for good: the answer would
				// have left in the same softirq.
				eventually(t, timeToAnswer, "denial with "+c.reason.String(), func() bool { return e.node.Denied(c.reason) > before })
				look()
				if answered {
					t.Error("the listener answered")
				}
				if n := e.node.Denied(c.reason) - before; n != 1 {
					t.Errorf("%d denials with %s, want 1", n, c.reason)
				}
			})
		}
	}
	if got := e.server.served("tcp", 7000); got.Count != 2 {
		t.Errorf("the listener got %d connections, want the two honest ones", got.Count)
	}
}
