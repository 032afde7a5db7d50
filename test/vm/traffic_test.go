//go:build kernels

package vm_test

import (
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// caller is whoever makes calls: a workload of a machine, or a process on the host.
type caller func(probe.Call) probe.Result

// Times in milliseconds. What is declared has as long as it takes. What is not has
// long enough to be seen on the wire, which is what decides.
const (
	long  = 60_000
	short = 700
)

// families and networks are the ways between two places.
var families = []string{"IPv4", "IPv6"}

func addressOf(ns *netlab.Namespace, family string) netip.Addr {
	if family == "IPv6" {
		return ns.IP6
	}
	return ns.IP4
}

// reaches says whether a conversation comes about: "" or what the application was
// told.
func (do caller) reaches(network string, to netip.AddrPort, patience int) string {
	kind, domain := unix.SOCK_STREAM, unix.AF_INET
	if network == "udp" {
		kind = unix.SOCK_DGRAM
	}
	if to.Addr().Is6() {
		domain = unix.AF_INET6
	}
	defer do(probe.Call{Op: "close", Socket: "s"})
	for _, c := range []probe.Call{
		{Op: "socket", New: "s", Domain: domain, Type: kind},
		{Op: "connect", Socket: "s", Address: to.String(), Timeout: patience},
		{Op: "send", Socket: "s", Data: []byte("hello")},
	} {
		if r := do(c); r.Error != "" {
			return c.Op + ": " + r.Error
		}
	}
	r := do(probe.Call{Op: "recv", Socket: "s", Timeout: patience})
	switch {
	case r.Error != "":
		return "recv: " + r.Error
	case string(r.Data) != "hello":
		return fmt.Sprintf("recv: got %q", r.Data)
	}
	return ""
}

// serve answers TCP and UDP on a port of every address.
func (do caller) serve(port uint16) string {
	return do(probe.Call{Op: "serve", Address: fmt.Sprintf("[::]:%d", port)}).Error
}

// answers are the conversations that the namespace of a wire accepted, as seen on
// that wire: a SYN-ACK, or a datagram from a port that is served.
func answers(m *machine, ports []uint16, name func(netip.Addr) string) map[string]bool {
	m.settle()
	found := map[string]bool{}
	for _, p := range m.wire.Packets(func(p netlab.Packet) bool { return p.Sent }) {
		network := ""
		switch {
		case p.Proto == unix.IPPROTO_TCP && p.Flags&0x12 == 0x12:
			network = "tcp"
		case p.Proto == unix.IPPROTO_UDP:
			network = "udp"
		}
		family := "IPv4"
		if p.Src.Addr().Is6() {
			family = "IPv6"
		}
		for _, port := range ports {
			if network != "" && p.Src.Port() == port {
				found[way(name(p.Dst.Addr()), name(p.Src.Addr()), network, port, family)] = true
			}
		}
	}
	return found
}

// way names a conversation: "web to api tcp/8080 IPv4".
func way(from, to, network string, port uint16, family string) string {
	return fmt.Sprintf("%s to %s %s/%d %s", from, to, network, port, family)
}

// document is a policy.
func document(rest string) string {
	return `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: machines, version: 1}
trustDomain: lab.example
zones: {app: {trust: 10}}
` + strings.TrimLeft(rest, "\n")
}
