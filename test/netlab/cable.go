package netlab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Cable is a cable between two namespaces, without a switch.
type Cable struct{ A, B *CableEnd }

// CableEnd is one end of a cable: a device of a namespace, with an address of each
// family.
type CableEnd struct {
	Device   string // eth0, eth1, ... in the order of the namespace's cables
	IP4, IP6 netip.Addr

	ns    *Namespace
	index int
	other *CableEnd
}

// Cable joins two namespaces. Its network is one of its own: 10.70.N.0/24 and
// fd70:0:0:N::/64. The namespace's IP4 and IP6 are those of its first cable, if it
// is not on the switch.
func (l *Lab) Cable(a, b *Namespace) *Cable {
	l.t.Helper()
	l.cables++
	c := &Cable{A: &CableEnd{ns: a}, B: &CableEnd{ns: b}}
	c.A.other, c.B.other = c.B, c.A
	for i, end := range []*CableEnd{c.A, c.B} {
		end.Device = fmt.Sprintf("eth%d", end.ns.cables)
		end.ns.cables++
		end.IP4 = netip.AddrFrom4([4]byte{10, 70, byte(l.cables), byte(i + 1)})
		end.IP6 = netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x70, 7: byte(l.cables), 15: byte(i + 1)})
	}
	l.check(a.links.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: c.A.Device}, PeerName: c.B.Device, PeerNamespace: netlink.NsFd(b.file.Fd()),
	}), "make cable from %s to %s", a.Name, b.Name)
	for _, end := range []*CableEnd{c.A, c.B} {
		l.check(end.up(), "set up %s in %s", end.Device, end.ns.Name)
	}
	for _, end := range []*CableEnd{c.A, c.B} {
		l.check(end.carries(), "set up %s in %s", end.Device, end.ns.Name)
		if !end.ns.IP4.IsValid() {
			end.ns.IP4, end.ns.IP6, end.ns.device = end.IP4, end.IP6, end.index
		}
	}
	return c
}

func (e *CableEnd) up() error {
	link, err := e.ns.links.LinkByName(e.Device)
	if err != nil {
		return err
	}
	e.index = link.Attrs().Index
	return errors.Join(e.ns.links.LinkSetUp(link), e.ns.addressOn(link, netip.PrefixFrom(e.IP4, 24)), e.ns.addressOn(link, netip.PrefixFrom(e.IP6, 64)))
}

// carries waits until it carries traffic.
func (e *CableEnd) carries() error {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		link, err := e.ns.links.LinkByIndex(e.index)
		if err != nil || link.Attrs().OperState == netlink.OperUp {
			return err
		}
	}
	return errors.New("cable does not come up")
}

func (ns *Namespace) addressOn(link netlink.Link, prefix netip.Prefix) error {
	return ns.links.AddrAdd(link, &netlink.Addr{
		IPNet: &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())},
		Flags: unix.IFA_F_NODAD,
	})
}

// Wire captures at the far end of the cable what this end's namespace sends and is
// sent.
func (e *CableEnd) Wire() *Wire {
	e.ns.lab.t.Helper()
	return e.ns.lab.wire(e.other.ns, e.ns, e.other.index, e.index, false)
}

// Lead sends everything for a prefix through this end to the other one.
func (e *CableEnd) Lead(prefix netip.Prefix) {
	e.ns.lab.t.Helper()
	gateway := e.other.IP4
	if prefix.Addr().Is6() {
		gateway = e.other.IP6
	}
	e.ns.lab.check(e.ns.links.RouteAdd(&netlink.Route{
		Dst:       &net.IPNet{IP: prefix.Masked().Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())},
		Gw:        gateway.AsSlice(),
		LinkIndex: e.index,
	}), "add route in %s", e.ns.Name)
}

// LeadAll sends everything that has no other way through this end.
func (e *CableEnd) LeadAll() {
	e.ns.lab.t.Helper()
	e.Lead(netip.MustParsePrefix("0.0.0.0/0"))
	e.Lead(netip.MustParsePrefix("::/0"))
}

// Router makes the namespace pass on what is not for it, and complain without
// limits of what it cannot.
func (ns *Namespace) Router() {
	ns.lab.t.Helper()
	for _, name := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		ns.Sysctl(name, "1")
	}
	for _, name := range []string{"ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"} {
		ns.Sysctl(name, "0")
	}
}
