package e2e_test

import (
	"testing"

	"github.com/demarc/demarc/test/netlab"
)

// towards matches what is sent to a namespace.
func towards(ns *netlab.Namespace) netlab.Match {
	return func(p netlab.Packet) bool { return p.Dst.Addr() == ns.IP4 || p.Dst.Addr() == ns.IP6 }
}

// frameWays are frames that no socket of the workload's made: to where it may go,
// to where it may not, and to its neighbour.
func frameWays(by ...string) (all []way) {
	for _, by := range by {
		for _, c := range []struct {
			name  string
			frame func(e *estate) []byte
		}{
			{"UDP to peer", func(e *estate) []byte { return whole(udp, place(e.web.IP4, 5000), place(e.peer.IP4, 7001), 0) }},
			{"UDP over IPv6 to peer", func(e *estate) []byte { return whole(udp, place(e.web.IP6, 5000), place(e.peer.IP6, 7001), 0) }},
			{"UDP to partner", func(e *estate) []byte { return whole(udp, place(e.web.IP4, 5000), place(e.partner.IP4, 7000), 0) }},
			{"UDP to its neighbour", func(e *estate) []byte { return whole(udp, place(e.web.IP4, 5000), place(e.api.IP4, 7400), 0) }},
			{"SYN to partner", func(e *estate) []byte { return whole(tcp, place(e.web.IP4, 5000), place(e.partner.IP4, 7000), flagSYN) }},
			{"SYN over IPv6 to its neighbour", func(e *estate) []byte { return whole(tcp, place(e.web.IP6, 5000), place(e.api.IP6, 7400), flagSYN) }},
		} {
			all = append(all, way{
				name: by + " " + c.name,
				try:  func(e *estate) { e.a.frames(by, e.toward(c.frame(e))) },
				seen: func(p netlab.Packet) bool { return p.Src.Port() == 5000 },
				why:  []string{"raw-socket"},
			})
		}
	}
	return all
}

// toward is a frame of web's that finds its way also to a neighbour on the bridge,
// where no gateway helps.
func (e *estate) toward(packet []byte) []byte {
	f := e.frame(packet)
	if dst, ok := parseAddresses(packet); ok && (dst == e.api.IP4 || dst == e.api.IP6) && !e.web.IsRouted() {
		copy(f, e.api.MAC())
	}
	return f
}

// Packet sockets send nothing, whatever they are made of.
func TestB05PacketSocket(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) { e.ways(frameWays(byPacket, byDatagram)) })
}

// The queue discipline is where a container's own device could have been watched;
// the host's end of it is not to be gone around.
func TestB06QdiscBypass(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) { e.ways(frameWays(byBypass)) })
}

// AF_XDP goes around even more of the container's own stack.
func TestB08XDPSocket(t *testing.T) {
	estates(t, func(t *testing.T, e *estate) { e.ways(frameWays(byXDP)) })
}
