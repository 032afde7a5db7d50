package e2e_test

// The tests named after a letter and a number each hold one way around a boundary
// that somebody found: a row of the bypass catalogue. Each runs under a policy that
// lets web reach decoy on one port and nothing else, shows that this works, so that
// the test can fail, and then that the way around leaves the wire silent, is
// reported with the right reason, and fails for the application as it should.

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// policyText lets web reach decoy on 7000 (echo) and 7002 (sink). `other` is a
// workload without rights on the wire but one that names it.
func policyText(version int, crossings ...string) string {
	return fmt.Sprintf(`apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: lab, version: %d}
trustDomain: lab.example
zones:
  edge: {trust: 10}
workloads:
  web: {zone: edge, match: [{cgroup: /lab/web}]}
  decoy: {zone: edge, match: [{cgroup: /lab/decoy}]}
  other: {zone: edge, match: [{cgroup: /lab/other}]}
networks:
  decoy4: {zone: edge, cidrs: [10.66.0.2/32]}
crossings:
  - {name: other-web, from: [workload/other], to: [workload/web], ports: [tcp/9], log: all, purpose: nothing}
  - {name: other-decoy, from: [workload/other], to: [workload/decoy], ports: [tcp/9], log: all, purpose: nothing}
%s`, version, strings.Join(crossings, ""))
}

const webDecoy = "  - {name: web-decoy, from: [workload/web], to: [workload/decoy], ports: [tcp/7000, udp/7000, tcp/7002], log: all, purpose: test}\n"

// allowed is version 1 of the policy, revoked the one that takes its only useful
// crossing away.
var (
	allowed = policyText(1, webDecoy)
	revoked = policyText(2)
)

// world is
//
//	web (managed) ----+
//	decoy (managed) --+-- switch
//	peer (no demarc) -+
//
// where decoy and peer answer on 7000 and 7001, decoy swallows on 7002.
type world struct {
	t                *testing.T
	lab              *netlab.Lab
	node             *netlab.Node
	web, decoy, peer *netlab.Namespace
	wire             *netlab.Wire  // of web
	p                *netlab.Probe // in web
	echo             *netlab.Echo  // of peer on 7001
}

// newWorld makes the world without a policy in force, so that what is older than
// enforcement can be made; enforce starts it.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, lab: netlab.New(t)}
	w.web, w.decoy, w.peer = w.lab.Namespace("web"), w.lab.Namespace("decoy"), w.lab.Namespace("peer")
	w.peer.Echo(7000)
	w.echo = w.peer.Echo(7001)
	w.wire = w.web.Wire()
	w.node = w.lab.Node("", netlab.NodeOptions{CoreOnly: true})
	w.p = w.web.Probe(w.node.Cgroup("/lab/web"))
	return w
}

// enforce applies the policy and starts the decoy's servers.
func (w *world) enforce() *world {
	w.t.Helper()
	w.node.Apply(allowed)
	w.serveDecoy(w.decoy)
	return w
}

func enforced(t *testing.T) *world {
	t.Helper()
	return newWorld(t).enforce()
}

func (w *world) serveDecoy(ns *netlab.Namespace) *netlab.Probe {
	w.t.Helper()
	p := ns.Probe(w.node.Cgroup("/lab/decoy"))
	p.Must(probe.Call{Op: "serve", Address: ":7000"})
	p.Must(probe.Call{Op: "serve", Address: ":7001"})
	p.Must(probe.Call{Op: "serve", Address: ":7002", Value: 1})
	return p
}

// control shows that what is declared works, over both protocols and families.
func (w *world) control() {
	w.t.Helper()
	p := w.web.Probe(w.node.Cgroup("/lab/web"))
	for _, kind := range []string{"tcp4", "tcp6", "udp4", "udp6"} {
		to := w.decoy.At4(7000)
		if strings.HasSuffix(kind, "6") {
			to = w.decoy.At6(7000)
		}
		p.Socket(kind, kind)
		p.Connect(kind, to.String())
		p.Echoed(kind, "declared, over "+kind)
		p.Must(probe.Call{Op: "close", Socket: kind})
	}
}

// silent shows that nothing at all reached the peer from web.
func (w *world) silent() {
	w.t.Helper()
	for _, a := range []netip.Addr{w.peer.IP4, w.peer.IP6} {
		if got := w.wire.Packets(netlab.ToAddress(a)); len(got) > 0 {
			w.t.Errorf("%d undeclared packets on the wire, the first: %v", len(got), got[0])
		}
	}
	if n := w.echo.Received.Load(); n > 0 {
		w.t.Errorf("the peer received %d bytes", n)
	}
}

// nothing shows that no packet matches.
func (w *world) nothing(match netlab.Match) {
	w.t.Helper()
	if got := w.wire.Packets(match); len(got) > 0 {
		w.t.Errorf("%d undeclared packets on the wire, the first: %v", len(got), got[0])
	}
}

// denied waits for the report of a denial of web.
func (w *world) denied(reason abi.Reason, proto uint8, to netlab.Place) netlab.Flow {
	w.t.Helper()
	f := w.node.AwaitDenied(reason, proto, to)
	if who := f.Source.Workload; f.Direction == abi.Egress && who != "web" {
		w.t.Errorf("denied %q, want web: %s", who, netlab.Describe(f))
	}
	return f
}

// send is a call that sends a few bytes to a place.
func send(socket string, to netlab.Place) probe.Call {
	return probe.Call{Op: "send", Socket: socket, Address: to.String(), Data: []byte("undeclared")}
}

func connect(socket string, to netlab.Place) probe.Call {
	return probe.Call{Op: "connect", Socket: socket, Address: to.String(), Timeout: 500}
}

const (
	tcp = unix.IPPROTO_TCP
	udp = unix.IPPROTO_UDP
)

// both are a port of a namespace in both families.
func both(ns *netlab.Namespace, port uint16) []netlab.Place {
	return []netlab.Place{ns.At4(port), ns.At6(port)}
}

// streamTo is the kind of TCP socket that goes to a place.
func streamTo(to netlab.Place) string {
	if to.Address.Is4() {
		return "tcp4"
	}
	return "tcp6"
}

// anywhere is any place.
var anywhere = netlab.Place{}

// checksum is that of the internet (RFC 1071).
func checksum(parts ...[]byte) uint16 {
	var sum uint32
	for _, b := range parts {
		for i := 0; i < len(b); i += 2 {
			var pair [2]byte
			copy(pair[:], b[i:])
			sum += uint32(binary.BigEndian.Uint16(pair[:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// ipv4 is a packet of a protocol; the kernel fills in the checksum of its header.
func ipv4(from, to netip.Addr, proto uint8, fragment uint16, payload []byte) []byte {
	b := []byte{0x45, 0, 0, 0, 0x12, 0x34, 0, 0, 64, proto, 0, 0}
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
	binary.BigEndian.PutUint16(b[6:], fragment)
	b = append(append(b, from.AsSlice()...), to.AsSlice()...)
	return append(b, payload...)
}

// datagram is a UDP header and a few bytes, without a checksum.
func datagram(from, to uint16) []byte {
	b := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, from), to)
	return append(b, 0, 12, 0, 0, 'f', 'o', 'u', 'r')
}

// segment is a TCP header between two IPv4 places.
func segment(from, to netlab.Place, seq, ack uint32, flags uint8) []byte {
	b := make([]byte, 20)
	binary.BigEndian.PutUint16(b, from.Port)
	binary.BigEndian.PutUint16(b[2:], to.Port)
	binary.BigEndian.PutUint32(b[4:], seq)
	binary.BigEndian.PutUint32(b[8:], ack)
	b[12], b[13] = 5<<4, flags
	binary.BigEndian.PutUint16(b[14:], 65535)
	pseudo := append(from.Address.AsSlice(), to.Address.AsSlice()...)
	pseudo = append(pseudo, 0, tcp, 0, byte(len(b)))
	binary.BigEndian.PutUint16(b[16:], checksum(pseudo, b))
	return b
}
