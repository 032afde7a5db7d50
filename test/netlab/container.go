package netlab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Host is a machine on the switch with containers behind it, which it forwards
// for. A node that has it as its Home guards their doors.
//
//	switch ---- eth0 host door1 ---- eth0 routed container    10.100.H.129, fd67:0:H:2::1
//	                 host br0
//	                       `- door2 ---- eth0 bridged container  10.100.H.2, fd67:0:H:1::2
type Host struct {
	*Namespace
	bridge     *netlink.Bridge // br0; nil until the first container is bridged
	containers int
}

// Container is a namespace whose only way out is a veth to its host. The host's end
// of it, the door, has no global address. Root in the namespace may do there what
// it likes: devices, routes, rules, packet sockets.
type Container struct {
	*Namespace
	Host *Host
	Door string // the door's name in the host's namespace

	door int // the door's index
}

// gateway is the next hop of routed containers, which nobody has.
var (
	gateway4 = netip.AddrFrom4([4]byte{169, 254, 1, 1})
	gateway6 = netip.MustParseAddr("fe80::1") // of every door
)

// Host makes a host on the switch. It checks no source addresses by itself
// (rp_filter), so that what stops a false one is demarc.
func (l *Lab) Host(name string) *Host {
	l.t.Helper()
	h := &Host{Namespace: l.Namespace(name)}
	h.Sysctl("ipv4/ip_forward", "1")
	h.Sysctl("ipv6/conf/all/forwarding", "1")
	h.Sysctl("ipv4/conf/all/rp_filter", "0")
	return h
}

// number tells hosts apart in the addresses of their containers.
func (h *Host) number() byte { return h.IP4.As4()[3] }

// Space is every address of the host's containers.
func (h *Host) Space() []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 100, h.number(), 0}), 24),
		netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x67, 5: h.number()}), 48),
	}
}

// Known tells other machines on the switch the way to the host's containers.
func (h *Host) Known(to ...*Namespace) {
	h.lab.t.Helper()
	for _, ns := range to {
		for _, p := range h.Space() {
			via := h.IP4
			if p.Addr().Is6() {
				via = h.IP6
			}
			h.lab.check(ns.route(ns.device, p, via), "add route in %s", ns.Name)
		}
	}
}

// ForgetNeighbours makes the host ask again where its neighbours are.
func (h *Host) ForgetNeighbours() {
	h.lab.t.Helper()
	all, err := h.links.NeighList(0, netlink.FAMILY_ALL)
	h.lab.check(err, "list neighbours of %s", h.Name)
	for _, n := range all {
		if n.State&(netlink.NUD_PERMANENT|netlink.NUD_NOARP) == 0 {
			h.lab.check(h.links.NeighDel(&n), "forget neighbour of %s", h.Name)
		}
	}
}

// Routed makes a container that the host has a route to, as Calico and Cilium do:
// it has one address of each family, and everything else is behind a gateway.
func (h *Host) Routed(name string) *Container {
	h.lab.t.Helper()
	return h.Plug(h.lab.Island(name))
}

// Plug makes a routed container of a namespace that is there already: its eth0
// appears while it runs.
func (h *Host) Plug(ns *Namespace) *Container {
	h.lab.t.Helper()
	h.containers++
	name := ns.Name
	c := h.container(ns,
		netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 100, h.number(), byte(128 + h.containers)}), 32),
		netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x67, 5: h.number(), 7: 2, 15: byte(h.containers)}), 128), nil)
	for _, a := range []netip.Addr{c.IP4, c.IP6} {
		h.lab.check(h.route(c.door, netip.PrefixFrom(a, a.BitLen()), netip.Addr{}), "add route to %s", name)
	}
	door, err := h.links.LinkByIndex(c.door)
	h.lab.check(err, "find door of %s", name)
	h.lab.check(errors.Join(
		h.links.AddrAdd(door, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(gateway6, 64)), Flags: unix.IFA_F_NODAD}),
		c.links.NeighSet(&netlink.Neigh{
			LinkIndex: c.device, IP: gateway4.AsSlice(), State: netlink.NUD_PERMANENT, HardwareAddr: door.Attrs().HardwareAddr,
		}),
		c.route(c.device, netip.PrefixFrom(gateway4, 32), netip.Addr{}),
		c.route(c.device, everything4, gateway4),
		c.route(c.device, everything6, gateway6),
	), "add default routes in %s", name)
	return c
}

// Crowd gives a namespace many devices, crowd0 and so on, each with a door of the
// same name at the host, as fast as the kernel makes them.
func (h *Host) Crowd(ns *Namespace, size int) {
	h.lab.t.Helper()
	for i := range size {
		name := fmt.Sprintf("crowd%d", i)
		h.lab.check(h.links.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: name, Group: crowdGroup}, PeerName: name, PeerNamespace: netlink.NsFd(ns.file.Fd()),
		}), "make door %s", name)
	}
}

// crowdGroup is the device group of crowds.
const crowdGroup = 77

// Disperse takes all devices of crowds away in one go.
func (h *Host) Disperse() {
	h.lab.t.Helper()
	h.lab.check(h.Do(func() error {
		out, err := exec.Command("ip", "link", "del", "group", strconv.Itoa(crowdGroup)).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}), "remove the crowd of %s", h.Name)
}

// Bridged makes a container on a bridge of the host's, as Docker does. Its
// neighbours there are reached without the host's routing.
func (h *Host) Bridged(name string) *Container {
	h.lab.t.Helper()
	own4 := netip.AddrFrom4([4]byte{10, 100, h.number(), 1})
	own6 := netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x67, 5: h.number(), 7: 1, 15: 1})
	if h.bridge == nil {
		off := false
		h.bridge = &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}, MulticastSnooping: &off}
		h.lab.check(h.links.LinkAdd(h.bridge), "make bridge in %s", h.Name)
		h.lab.check(errors.Join(
			h.links.AddrAdd(h.bridge, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(own4, 25)), Flags: unix.IFA_F_NODAD}),
			h.links.AddrAdd(h.bridge, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(own6, 64)), Flags: unix.IFA_F_NODAD}),
			h.links.LinkSetUp(h.bridge)), "set up bridge in %s", h.Name)
	}
	h.containers++
	last := byte(1 + h.containers)
	c := h.container(h.lab.Island(name),
		netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 100, h.number(), last}), 25),
		netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x67, 5: h.number(), 7: 1, 15: last}), 64), h.bridge)
	h.lab.check(errors.Join(c.route(c.device, everything4, own4), c.route(c.device, everything6, own6)),
		"add default routes in %s", name)
	return c
}

var everything4, everything6 = netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")

// container makes a namespace's door, which may be a port of a bridge.
func (h *Host) container(ns *Namespace, p4, p6 netip.Prefix, bridge netlink.Link) *Container {
	h.lab.t.Helper()
	name := ns.Name
	c := &Container{Namespace: ns, Host: h, Door: fmt.Sprintf("door%d", h.containers)}
	c.IP4, c.IP6 = p4.Addr(), p6.Addr()
	h.lab.check(h.links.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: c.Door, HardwareAddr: h.NextDoorMAC(0)}, PeerName: "eth0", PeerNamespace: netlink.NsFd(c.file.Fd()),
	}), "make door of %s", name)
	near, nearErr := c.links.LinkByName("eth0")
	door, doorErr := h.links.LinkByName(c.Door)
	h.lab.check(errors.Join(nearErr, doorErr), "find door of %s", name)
	c.device, c.door = near.Attrs().Index, door.Attrs().Index
	if bridge != nil {
		h.lab.check(h.links.LinkSetMaster(door, bridge), "put door of %s on the bridge", name)
	}
	h.lab.check(errors.Join(h.links.LinkSetUp(door), c.links.LinkSetUp(near), c.address(p4), c.address(p6),
		c.awaitUp(c.device), h.awaitUp(c.door)), "set up door of %s", name)
	return c
}

// Wire captures at the door: what the container sends is seen before anything can
// refuse it there, what it is sent after.
func (c *Container) Wire() *Wire {
	c.lab.t.Helper()
	return c.lab.wire(c.Host.Namespace, c.Namespace, c.door, c.device, false)
}

// MAC is the hardware address of a namespace's eth0.
func (ns *Namespace) MAC() net.HardwareAddr {
	ns.lab.t.Helper()
	return ns.hardware(ns.device)
}

// NextDoorMAC is the hardware address that the door of a container to come will
// have: 1 for the next one.
func (h *Host) NextDoorMAC(next int) net.HardwareAddr {
	return net.HardwareAddr{2, 0, 0, 0, h.number(), byte(h.containers + next)}
}

// IsRouted says whether the host routes to the container; otherwise it is bridged.
func (c *Container) IsRouted() bool { return c.IP4.As4()[3] > 128 }

// DoorMAC is the hardware address behind which a routed container finds
// everything; a bridged one finds there what its bridge reaches.
func (c *Container) DoorMAC() net.HardwareAddr {
	c.lab.t.Helper()
	if !c.IsRouted() {
		return c.Host.hardware(c.Host.bridge.Index)
	}
	return c.Host.hardware(c.door)
}

func (ns *Namespace) hardware(index int) net.HardwareAddr {
	ns.lab.t.Helper()
	link, err := ns.links.LinkByIndex(index)
	ns.lab.check(err, "find device %d in %s", index, ns.Name)
	return link.Attrs().HardwareAddr
}

// route adds a route; without a next hop, the prefix is on the link.
func (ns *Namespace) route(device int, prefix netip.Prefix, via netip.Addr) error {
	r := &netlink.Route{Dst: ipNet(prefix), LinkIndex: device, Scope: unix.RT_SCOPE_LINK}
	if via.IsValid() {
		r.Gw, r.Scope = via.AsSlice(), unix.RT_SCOPE_UNIVERSE
	}
	return ns.links.RouteAdd(r)
}

// awaitUp waits until a device carries traffic.
func (ns *Namespace) awaitUp(device int) error {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		link, err := ns.links.LinkByIndex(device)
		if err != nil || link.Attrs().OperState == netlink.OperUp {
			return err
		}
	}
	return fmt.Errorf("device %d of %s does not come up", device, ns.Name)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Join puts another namespace behind this one: its eth0 has the next addresses
// after those that the near end, which it is named after, has, and everything is
// behind that.
func (ns *Namespace) Join(far *Namespace, near string, own4, own6 netip.Prefix) {
	ns.lab.t.Helper()
	ns.lab.check(ns.links.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: near}, PeerName: "eth0", PeerNamespace: netlink.NsFd(far.file.Fd()),
	}), "make %s in %s", near, ns.Name)
	here, hereErr := ns.links.LinkByName(near)
	there, thereErr := far.links.LinkByName("eth0")
	ns.lab.check(errors.Join(hereErr, thereErr), "find %s in %s", near, ns.Name)
	far.device, far.IP4, far.IP6 = there.Attrs().Index, own4.Addr().Next(), own6.Addr().Next()
	ns.lab.check(errors.Join(
		ns.links.AddrAdd(here, &netlink.Addr{IPNet: ipNet(own4), Flags: unix.IFA_F_NODAD}),
		ns.links.AddrAdd(here, &netlink.Addr{IPNet: ipNet(own6), Flags: unix.IFA_F_NODAD}),
		ns.links.LinkSetUp(here), far.links.LinkSetUp(there),
		far.address(netip.PrefixFrom(far.IP4, own4.Bits())), far.address(netip.PrefixFrom(far.IP6, own6.Bits())),
		ns.awaitUp(here.Attrs().Index), far.awaitUp(far.device),
		far.route(far.device, everything4, own4.Addr()), far.route(far.device, everything6, own6.Addr()),
	), "join %s to %s", far.Name, ns.Name)
}

// Behind tells a host, or a machine on the switch, that a prefix is behind a
// container.
func (c *Container) Behind(prefix netip.Prefix, others ...*Namespace) {
	c.lab.t.Helper()
	near, via, device := c.IP4, c.Host.IP4, c.door
	if !c.IsRouted() {
		device = c.Host.bridge.Index
	}
	if prefix.Addr().Is6() {
		near, via = c.IP6, c.Host.IP6
	}
	c.lab.check(c.Host.links.RouteAdd(&netlink.Route{
		Dst: ipNet(prefix), Gw: near.AsSlice(), LinkIndex: device, Flags: int(netlink.FLAG_ONLINK),
	}), "add route to behind %s", c.Name)
	for _, ns := range others {
		c.lab.check(ns.route(ns.device, prefix, via), "add route in %s", ns.Name)
	}
}

// Give moves the container's eth0 to another namespace, under the same addresses.
// What is behind the door then is that namespace.
func (c *Container) Give(to *Namespace) {
	c.lab.t.Helper()
	link, err := c.links.LinkByIndex(c.device)
	c.lab.check(err, "find eth0 in %s", c.Name)
	c.lab.check(c.links.LinkSetNsFd(link, int(to.file.Fd())), "move eth0 of %s", c.Name)
	moved, err := to.links.LinkByName("eth0")
	c.lab.check(err, "find eth0 in %s", to.Name)
	door, err := c.Host.links.LinkByIndex(c.door)
	c.lab.check(err, "find door of %s", c.Name)
	to.device, to.IP4, to.IP6 = moved.Attrs().Index, c.IP4, c.IP6
	c.lab.check(errors.Join(
		to.links.LinkSetUp(moved), to.address(netip.PrefixFrom(to.IP4, 32)), to.address(netip.PrefixFrom(to.IP6, 128)),
		to.awaitUp(to.device), c.Host.awaitUp(c.door),
		to.links.NeighSet(&netlink.Neigh{
			LinkIndex: to.device, IP: gateway4.AsSlice(), State: netlink.NUD_PERMANENT, HardwareAddr: door.Attrs().HardwareAddr,
		}),
		to.route(to.device, netip.PrefixFrom(gateway4, 32), netip.Addr{}),
		to.route(to.device, everything4, gateway4), to.route(to.device, everything6, gateway6),
	), "set up eth0 in %s", to.Name)
}

// Through tells a machine on the switch that a prefix is behind a host.
func (ns *Namespace) Through(prefix netip.Prefix, h *Host) {
	ns.lab.t.Helper()
	via := h.IP4
	if prefix.Addr().Is6() {
		via = h.IP6
	}
	ns.lab.check(ns.route(ns.device, prefix, via), "add route in %s", ns.Name)
}

// Gateway is the next hop of a container.
func (c *Container) Gateway() netip.Addr {
	if c.IsRouted() {
		return gateway4
	}
	return netip.AddrFrom4([4]byte{10, 100, c.Host.number(), 1})
}
