package netlab

import (
	"net/netip"

	"github.com/demarc/demarc/agent/flow"
)

// Flow is what the kernel tells of a verdict, in words.
type Flow = flow.Flow

// Place is an address and a port; an invalid address and port 0 stand for any.
type Place struct {
	Address netip.Addr
	Port    uint16
}

// At4 and At6 are places on eth0 of a namespace.
func (ns *Namespace) At4(port uint16) Place { return Place{ns.IP4, port} }

// At6 is At4 for IPv6.
func (ns *Namespace) At6(port uint16) Place { return Place{ns.IP6, port} }

// String is the place as a probe takes it.
func (p Place) String() string { return netip.AddrPortFrom(p.Address, p.Port).String() }

// Mapped is an IPv4 place in the form of IPv6: "[::ffff:10.66.0.2]:7000".
func (p Place) Mapped() string {
	return netip.AddrPortFrom(netip.AddrFrom16(p.Address.As16()), p.Port).String()
}

func (p Place) is(e flow.Endpoint) bool {
	return (!p.Address.IsValid() || p.Address == e.Address) && (p.Port == 0 || p.Port == e.Port)
}
