package e2e_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// datagramOf is a datagram to be sent by hand, from outside to db.
type datagramOf struct {
	from, to    netip.AddrPort
	when, nonce uint32
}

// tag is the surplus area behind it, with a tag of an identity.
func (d datagramOf) tag(key [16]byte, identity uint32, epoch, flags uint8) []byte {
	claim := identity<<8 | uint32(epoch)<<4 | uint32(flags)
	// The MAC has the time where a SYN-ACK has its sequence number, and the nonce where
	// it has what it acknowledges.
	mac := tcpFrame{flags: flagACK, seq: d.when, ack: d.nonce, src: d.from, dst: d.to}.macOf(key, claim)
	option := binary.BigEndian.AppendUint32([]byte{127, 24, 0xd3, 0xac}, claim)
	option = binary.BigEndian.AppendUint32(option, d.when)
	option = append(binary.BigEndian.AppendUint32(option, d.nonce), mac[:]...)
	return append(binary.BigEndian.AppendUint16(nil, internetSum(option, 26)), option...)
}

// frame is the datagram with a surplus area, between two devices.
func (d datagramOf) frame(to, from net.HardwareAddr, surplus []byte) tcpFrame {
	u := datagram(d.from.Port(), d.to.Port())
	pseudo := append(append(d.from.Addr().AsSlice(), d.to.Addr().AsSlice()...), 0, udp, 0, byte(len(u)))
	binary.BigEndian.PutUint16(u[6:], checksum(pseudo, u))
	b := append(append([]byte(nil), to...), from...)
	if payload := append(u, surplus...); d.from.Addr().Is4() {
		packet := ipv4(d.from.Addr(), d.to.Addr(), udp, 0, payload)
		binary.BigEndian.PutUint16(packet[10:], internetSum(packet[:20], 0))
		b = append(append(b, 0x08, 0), packet...)
	} else {
		b = append(append(b, 0x86, 0xdd), ipv6(d.from.Addr(), d.to.Addr(), udp, payload)...)
	}
	return tcpFrame{frame: b, src: d.from, dst: d.to}
}

func (w *wired) datagramTag(d datagramOf, identity uint32, epoch, flags uint8) []byte {
	return d.tag(w.key, identity, epoch, flags)
}

func (w *wired) datagramFrame(d datagramOf, surplus []byte) tcpFrame {
	return d.frame(w.mac.db, w.mac.outside, surplus)
}

// Every kind of failed proof, of TCP and UDP, over IPv4 and IPv6, is what `demarc flows`
// shows once, with the peer's address and what it claims to be, and what the metrics
// count.
func TestFailedProofsAreShown(t *testing.T) {
	w := newWiredWith(t, netlab.NodeOptions{Metrics: metricsAt})
	w.enforce()
	server := startActor(t, w.db, w.listener.Cgroup("/lab/db"))
	server.serve(7000)
	forget := editor(t, pinned(t, w.listener, "flows"), true)
	web := w.id["web"]
	now := uint32(time.Now().Unix())
	type shown struct {
		Protocol, From, Reason string
		Claims                 string // what is shown of the peer
	}
	want, counted := map[shown]int{}, map[string]int{}
	port := uint16(20000)
	flip := func(b []byte) []byte { b[len(b)-1] ^= 1; return b }
	for _, to := range w.both(7000) {
		s := func() segmentOf {
			port++
			return segmentOf{from: nobody(to, port), to: to, seq: 1000, flags: flagSYN}
		}
		d := func() datagramOf {
			port++
			return datagramOf{from: nobody(to, port), to: to, when: now, nonce: uint32(port)}
		}
		bad := func(protocol string, f tcpFrame, reason abi.Reason, claims string) {
			w.cable.send(f)
			want[shown{protocol, f.src.String(), reason.String(), claims}]++
			counted[reason.String()]++
		}
		syn := func(reason abi.Reason, claims string, tag func(segmentOf) []byte) {
			one := s()
			bad("tcp", w.tagged(one, tag(one)), reason, claims)
		}
		ask := func(reason abi.Reason, claims string, surplus func(datagramOf) []byte) {
			one := d()
			bad("udp", w.datagramFrame(one, surplus(one)), reason, claims)
		}
		syn(abi.TagMissing, "", func(segmentOf) []byte { return nil })
		syn(abi.TagMalformed, "claims app/web", func(s segmentOf) []byte { return w.tag(s, web, tagAnswer) })
		syn(abi.TagBadMAC, "claims app/web", func(s segmentOf) []byte { return flip(w.tag(s, web, 0)) })
		syn(abi.TagWrongEpoch, "claims app/web", func(s segmentOf) []byte { return w.frame(s).tagOf(w.key, web, w.epoch^1, 0) })
		syn(abi.TagUnbound, "app/web", func(s segmentOf) []byte { return w.tag(s, web, tagNoSource) })
		ask(abi.TagMissing, "", func(datagramOf) []byte { return nil })
		ask(abi.TagMalformed, "claims app/web", func(d datagramOf) []byte { return w.datagramTag(d, web, w.epoch, tagNoSource) })
		ask(abi.TagBadMAC, "claims app/web", func(d datagramOf) []byte { return flip(w.datagramTag(d, web, w.epoch, tagDatagram)) })
		ask(abi.TagWrongEpoch, "claims app/web", func(d datagramOf) []byte { return w.datagramTag(d, web, w.epoch^1, tagDatagram) })
		ask(abi.TagUnbound, "app/web", func(d datagramOf) []byte { return w.datagramTag(d, web, w.epoch, tagDatagram|tagNoSource) })
		ask(abi.TagStale, "claims app/web", func(d datagramOf) []byte {
			d.when -= 120
			return w.datagramTag(d, web, w.epoch, tagDatagram)
		})
		// The same once more: a SYN whose connection was made and reset, a datagram whose
		// flow is forgotten.
		once := s()
		good := w.signed(once, web)
		made := server.served("tcp", 7000).Count
		w.cable.send(good)
		once.seq, once.ack, once.flags = once.seq+1, w.answerTo(good).seq+1, flagACK
		w.cable.send(w.frame(once))
		eventually(t, timeToAnswer, "a proven connection", func() bool { return server.served("tcp", 7000).Count == made+1 })
		once.flags = flagRST
		w.cable.send(w.frame(once))
		bad("tcp", good, abi.TagReplayed, "claims app/web")
		asked := d()
		u := w.datagramFrame(asked, w.datagramTag(asked, web, w.epoch, tagDatagram))
		had := server.served("udp", 7000).Count
		w.cable.send(u)
		eventually(t, timeToAnswer, "a proven datagram", func() bool { return server.served("udp", 7000).Count == had+1 })
		forget(abi.Tuple{Source: asked.from.Addr().As16(), Destination: to.Addr().As16(), SourcePort: asked.from.Port(), DestinationPort: to.Port(), Proto: udp})
		bad("udp", u, abi.TagReplayed, "claims app/web")
	}
	seen := func() map[shown]int {
		got := map[shown]int{}
		for _, f := range w.listener.Flows("--verdict", "deny") {
			who := f.Source.Label()
			if strings.HasPrefix(who, f.Source.Address.String()) || f.Source.Identity == 0 {
				who = ""
			}
			got[shown{f.Protocol, netip.AddrPortFrom(f.Source.Address, f.Source.Port).String(), f.Reason.String(), who}]++
		}
		return got
	}
	for end := time.Now().Add(timeToAnswer); !cmp.Equal(want, seen()) && time.Now().Before(end); {
		time.Sleep(50 * time.Millisecond)
	}
	if d := cmp.Diff(want, seen()); d != "" {
		t.Errorf("demarc flows (-want +got)\n%s", d)
	}
	// As people read it, and by each reason.
	for reason := range counted {
		out, problems, status := w.listener.Demarc("flows", "--all", "--reason", reason)
		lines := 0
		for _, from := range []string{nowhere4.String(), nowhere6.String()} {
			lines += strings.Count(out, from)
		}
		if status != 0 || lines < counted[reason] || !strings.Contains(out, reason) {
			t.Errorf("demarc flows --reason %s: %d\n%s%s", reason, status, out, problems)
		}
	}
	eventually(t, timeToAnswer, "all are counted", func() bool {
		_, text := scrape(t, w.listener, "/metrics")
		got := map[string]int{}
		for labels, n := range series(t, text, "demarc_verdicts_total") {
			for reason := range counted {
				if strings.Contains(labels, fmt.Sprintf("reason=%q", reason)) && strings.Contains(labels, `verdict="deny"`) {
					got[reason] += n
				}
			}
		}
		return cmp.Equal(counted, got)
	})
}
