package netlab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Namespace is a network namespace without a name, and the thread that lives in
// it. Its interface eth0, if it is joined to the lab's switch, has one address of
// each family; lo is up.
type Namespace struct {
	Name string     // for messages
	IP4  netip.Addr // of eth0, in 10.66.0.0/16; invalid if not joined
	IP6  netip.Addr // of eth0, in fd66::/64; invalid if not joined

	lab    *Lab
	file   *os.File // the namespace
	links  *netlink.Handle
	port   int // index of the switch's port that eth0 hangs on
	device int // index of eth0
	cables int // without a switch
	work   chan func()
	ended  chan struct{}
}

// Namespace makes a namespace and joins it to the lab's switch.
func (l *Lab) Namespace(name string) *Namespace {
	l.t.Helper()
	if l.network == nil {
		l.network = l.Island("switch")
		off := false
		l.check(l.network.links.LinkAdd(&netlink.Bridge{
			LinkAttrs: netlink.LinkAttrs{Name: "switch"}, MulticastSnooping: &off,
		}), "make switch")
		l.network.up("switch")
	}
	ns := l.Island(name)
	l.hosts++
	ns.IP4 = netip.AddrFrom4([4]byte{10, 66, 0, byte(l.hosts)})
	ns.IP6 = netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x66, 15: byte(l.hosts)})
	l.check(ns.join(l.network, fmt.Sprintf("port%d", l.hosts)), "join %s to the switch", name)
	return ns
}

// Island makes a namespace with nothing but lo.
func (l *Lab) Island(name string) *Namespace {
	l.t.Helper()
	ns := &Namespace{Name: name, lab: l, work: make(chan func()), ended: make(chan struct{})}
	made := make(chan error)
	go ns.live(made)
	l.check(<-made, "make namespace %s", name)
	l.later(ns.close)
	var err error
	ns.links, err = netlink.NewHandleAt(netns.NsHandle(ns.file.Fd()), unix.NETLINK_ROUTE)
	l.check(err, "open netlink in %s", name)
	ns.up("lo")
	return ns
}

// live is the namespace's thread. It is never given back to other goroutines; it
// ends, and the kernel kills the children that it made.
func (ns *Namespace) live(made chan<- error) {
	defer close(ns.ended)
	runtime.LockOSThread()
	err := unix.Unshare(unix.CLONE_NEWNET)
	if err == nil {
		// Duplicate address detection would keep IPv6 addresses back for a second.
		err = errors.Join(
			os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0),
			os.WriteFile("/proc/sys/net/ipv6/conf/all/accept_dad", []byte("0"), 0))
	}
	if err == nil {
		ns.file, err = os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
	}
	made <- err
	if err != nil {
		return
	}
	for f := range ns.work {
		f()
	}
}

func (ns *Namespace) close() error {
	if ns.links != nil {
		ns.links.Close()
	}
	close(ns.work)
	<-ns.ended
	return ns.file.Close()
}

// Do calls f on the namespace's thread: sockets that f makes are in the
// namespace, and belong to no managed cgroup.
func (ns *Namespace) Do(f func() error) error {
	done := make(chan error)
	ns.work <- func() { done <- f() }
	return <-done
}

// Sysctl sets a variable below /proc/sys/net of the namespace.
func (ns *Namespace) Sysctl(name, value string) {
	ns.lab.t.Helper()
	ns.lab.check(ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0)
	}), "set %s in %s", name, ns.Name)
}

// Address gives eth0 one more address.
func (ns *Namespace) Address(prefix netip.Prefix) {
	ns.lab.t.Helper()
	ns.lab.check(ns.address(prefix), "add address in %s", ns.Name)
}

func (ns *Namespace) address(prefix netip.Prefix) error {
	device, err := ns.links.LinkByIndex(ns.device)
	if err != nil {
		return err
	}
	return ns.links.AddrAdd(device, &netlink.Addr{
		IPNet: &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())},
		Flags: unix.IFA_F_NODAD,
	})
}

// join makes a cable from eth0 to a port of the switch and waits until both ends
// carry traffic.
func (ns *Namespace) join(sw *Namespace, port string) error {
	cable := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: port}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.file.Fd()),
	}
	if err := sw.links.LinkAdd(cable); err != nil {
		return err
	}
	near, err := ns.links.LinkByName("eth0")
	if err != nil {
		return err
	}
	far, err := sw.links.LinkByName(port)
	if err != nil {
		return err
	}
	bridge, err := sw.links.LinkByName("switch")
	if err != nil {
		return err
	}
	ns.device, ns.port = near.Attrs().Index, far.Attrs().Index
	err = errors.Join(sw.links.LinkSetMaster(far, bridge), sw.links.LinkSetUp(far), ns.links.LinkSetUp(near),
		ns.address(netip.PrefixFrom(ns.IP4, 16)), ns.address(netip.PrefixFrom(ns.IP6, 64)))
	if err != nil {
		return err
	}
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		near, nearErr := ns.links.LinkByName("eth0")
		far, farErr := sw.links.LinkByName(port)
		if err := errors.Join(nearErr, farErr); err != nil {
			return err
		}
		if near.Attrs().OperState == netlink.OperUp && far.Attrs().OperState == netlink.OperUp {
			return nil
		}
	}
	return errors.New("cable does not come up")
}

// LinkLocal is the address of eth0 that the kernel chose.
func (ns *Namespace) LinkLocal() netip.Addr {
	ns.lab.t.Helper()
	device, err := ns.links.LinkByIndex(ns.device)
	ns.lab.check(err, "find eth0 in %s", ns.Name)
	all, err := ns.links.AddrList(device, netlink.FAMILY_V6)
	ns.lab.check(err, "list addresses in %s", ns.Name)
	for _, a := range all {
		if ip, _ := netip.AddrFromSlice(a.IP); ip.IsLinkLocalUnicast() {
			return ip
		}
	}
	ns.lab.t.Fatalf("eth0 in %s has no link-local address", ns.Name)
	return netip.Addr{}
}

func (ns *Namespace) up(device string) {
	ns.lab.t.Helper()
	link, err := ns.links.LinkByName(device)
	ns.lab.check(err, "find %s in %s", device, ns.Name)
	ns.lab.check(ns.links.LinkSetUp(link), "set %s up in %s", device, ns.Name)
}

// Device gives the namespace one more device, with an address, and returns the
// wire behind it. Nobody is there; neighbours are known of those that are named.
func (ns *Namespace) Device(name string, prefix netip.Prefix, neighbours ...netip.Addr) *Wire {
	ns.lab.t.Helper()
	far := ns.lab.Island(ns.Name + " behind " + name)
	ns.lab.check(ns.links.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "far", PeerNamespace: netlink.NsFd(far.file.Fd()),
	}), "make %s in %s", name, ns.Name)
	far.up("far")
	ns.up(name)
	link, err := ns.links.LinkByName(name)
	ns.lab.check(err, "find %s in %s", name, ns.Name)
	end, err := far.links.LinkByName("far")
	ns.lab.check(err, "find far end of %s", name)
	index := link.Attrs().Index
	ns.lab.check(ns.links.AddrAdd(link, &netlink.Addr{
		IPNet: &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())},
		Flags: unix.IFA_F_NODAD,
	}), "add address in %s", ns.Name)
	for _, a := range neighbours {
		ns.lab.check(ns.links.NeighSet(&netlink.Neigh{
			LinkIndex: index, IP: a.AsSlice(), State: netlink.NUD_PERMANENT, HardwareAddr: end.Attrs().HardwareAddr,
		}), "add neighbour in %s", ns.Name)
	}
	return ns.lab.wire(far, ns, end.Attrs().Index, index, false)
}

// Neighbours makes every IPv4 address a neighbour on the switch, reached from one
// address of the namespace: namespaces of unlike networks can then talk.
func (ns *Namespace) Neighbours(source netip.Addr) {
	ns.lab.t.Helper()
	ns.lab.check(ns.links.RouteAdd(&netlink.Route{
		Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, Src: source.AsSlice(), LinkIndex: ns.device, Scope: netlink.SCOPE_LINK,
	}), "add route in %s", ns.Name)
}

// Lead sends everything for a prefix to another namespace, which need not have an
// address in it: what nobody answers can be sent there without waiting for a
// neighbour.
func (ns *Namespace) Lead(prefix netip.Prefix, to *Namespace) {
	ns.lab.t.Helper()
	ns.lab.check(ns.links.RouteAdd(&netlink.Route{
		Dst: &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())},
		Gw:  to.IP4.AsSlice(), LinkIndex: ns.device,
	}), "add route in %s", ns.Name)
}

// SendIP sends an IPv4 packet as it is, header and all; the kernel fills in
// checksum and, where it is zero, length and identifier of the header.
func (ns *Namespace) SendIP(packet []byte) {
	ns.lab.t.Helper()
	ns.lab.check(ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Addr: [4]byte(packet[16:20])})
	}), "send packet in %s", ns.Name)
}
