package core

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// netdev is a network device as the kernel lists it. Numbers in netlink messages
// are in host byte order (rtnetlink(7), include/uapi/linux/rtnetlink.h).
type netdev struct {
	index    int
	name     string
	ethernet bool // frames begin with an Ethernet header
	enslaved bool // to a bridge, a bond or the like, which carries its packets too
	master   int  // index of that, or of a VRF; 0 = none
	hostSide bool // a veth whose other end is in another namespace
	routed   bool // has a global unicast address
}

// door says whether a workload's network is behind it: the host's end of a veth. One
// with an address of the host's own leads to other hosts.
func (d netdev) door() bool { return d.hostSide && !d.routed }

// via is the device that routes to what is behind it name.
func (d netdev) via() int {
	if d.enslaved {
		return d.master
	}
	return d.index
}

// listDevices lists the devices of the namespace that the calling thread is in.
func listDevices() ([]netdev, error) {
	const tries = 20 // a change during a listing spoils it
	var err error
	for range tries {
		var all []netdev
		if all, err = listOnce(); !errors.Is(err, errChanged) {
			return all, err
		}
	}
	return nil, err
}

var errChanged = errors.New("list devices: they change all the time")

func listOnce() ([]netdev, error) {
	s, err := openRoute(0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(s)
	var all []netdev
	place := map[int]int{}
	// Statistics are most of an answer, and nobody reads them: RTEXT_FILTER_SKIP_STATS.
	link := flat(struct {
		unix.IfInfomsg
		unix.NlAttr
		Mask uint32
	}{NlAttr: unix.NlAttr{Len: unix.SizeofNlAttr + 4, Type: unix.IFLA_EXT_MASK}, Mask: 1 << 3})
	err = dump(s, unix.RTM_GETLINK, unix.RTM_NEWLINK, link, func(b []byte) {
		if d, ok := parseLink(b); ok {
			place[d.index] = len(all)
			all = append(all, d)
		}
	})
	if err != nil {
		return nil, err
	}
	err = dump(s, unix.RTM_GETADDR, unix.RTM_NEWADDR, make([]byte, unix.SizeofIfAddrmsg), func(b []byte) {
		index, address := parseAddress(b)
		if i, found := place[index]; found && address.IsGlobalUnicast() {
			all[i].routed = true
		}
	})
	return all, err
}

// openRoute makes a rtnetlink socket that hears of the groups. The caller closes
// it.
func openRoute(groups uint32) (int, error) {
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return -1, fmt.Errorf("open netlink: %w", err)
	}
	if err := unix.Bind(s, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(s)
		return -1, fmt.Errorf("bind netlink: %w", err)
	}
	return s, nil
}

// dump asks for everything of a kind, and calls each with the payload of every
// answer.
func dump(s int, ask, want uint16, payload []byte, each func([]byte)) error {
	header := unix.NlMsghdr{Type: ask, Flags: unix.NLM_F_REQUEST | unix.NLM_F_DUMP, Seq: uint32(ask), Len: uint32(unix.SizeofNlMsghdr + len(payload))}
	if err := unix.Sendto(s, append(flat(header), payload...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	b := make([]byte, 64<<10)
	changed := false
	for {
		// A dump is made as it is read, so there is nothing to wait for.
		n, _, flags, from, err := unix.Recvmsg(s, b, nil, 0)
		if err == nil && flags&unix.MSG_TRUNC != 0 {
			err = errors.New("an answer is too long")
		}
		if err != nil {
			return fmt.Errorf("list devices: %w", err)
		}
		if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
			continue // not the kernel
		}
		messages, err := syscall.ParseNetlinkMessage(b[:n])
		if err != nil {
			return fmt.Errorf("list devices: read an answer: %w", err)
		}
		for _, m := range messages {
			if m.Header.Seq != uint32(ask) {
				continue
			}
			changed = changed || m.Header.Flags&unix.NLM_F_DUMP_INTR != 0
			switch m.Header.Type {
			case want:
				each(m.Data)
			case unix.NLMSG_ERROR:
				if len(m.Data) < 4 {
					return errors.New("list devices: an answer is too short")
				}
				return fmt.Errorf("list devices: %w", unix.Errno(-int32(binary.NativeEndian.Uint32(m.Data))))
			case unix.NLMSG_DONE:
				if changed {
					return errChanged
				}
				return nil
			}
		}
	}
}

// attributes walks struct nlattr. What does not fit ends it.
func attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofNlAttr {
			length := int(binary.NativeEndian.Uint16(b))
			kind := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
			if length < unix.SizeofNlAttr || length > len(b) || !yield(kind, b[unix.SizeofNlAttr:length]) {
				return
			}
			b = b[min((length+3)&^3, len(b)):] // where the next one begins
		}
	}
}

// flat is a struct of the kernel's as it goes to it.
func flat(v any) []byte {
	b, _ := binary.Append(nil, binary.NativeEndian, v) // never fails: it has a fixed size
	return b
}

// parseLink reads struct ifinfomsg and the attributes after it.
func parseLink(b []byte) (netdev, bool) {
	if len(b) < unix.SizeofIfInfomsg {
		return netdev{}, false
	}
	d := netdev{index: int(int32(binary.NativeEndian.Uint32(b[4:]))), ethernet: binary.NativeEndian.Uint16(b[2:]) == unix.ARPHRD_ETHER}
	var kind, master string
	elsewhere := false
	for a, v := range attributes(b[unix.SizeofIfInfomsg:]) {
		switch a {
		case unix.IFLA_IFNAME:
			d.name = unix.ByteSliceToString(v)
		case unix.IFLA_MASTER:
			d.enslaved = true
			if len(v) == 4 {
				d.master = int(binary.NativeEndian.Uint32(v))
			}
		case unix.IFLA_LINK_NETNSID:
			elsewhere = true
		case unix.IFLA_LINKINFO:
			for a, v := range attributes(v) {
				switch a {
				case unix.IFLA_INFO_KIND:
					kind = unix.ByteSliceToString(v)
				case unix.IFLA_INFO_SLAVE_KIND:
					master = unix.ByteSliceToString(v)
				}
			}
		}
	}
	d.hostSide = kind == "veth" && elsewhere
	if master == "vrf" { // only routing: packets still come and go here
		d.enslaved = false
	}
	return d, d.name != ""
}

// parseAddress reads struct ifaddrmsg and the attributes after it: the device's
// own address, not that of the other end of a point-to-point link.
func parseAddress(b []byte) (index int, address netip.Addr) {
	if len(b) < unix.SizeofIfAddrmsg {
		return 0, netip.Addr{}
	}
	for a, v := range attributes(b[unix.SizeofIfAddrmsg:]) {
		if a == unix.IFA_LOCAL || a == unix.IFA_ADDRESS && !address.IsValid() {
			address, _ = netip.AddrFromSlice(v)
		}
	}
	return int(int32(binary.NativeEndian.Uint32(b[4:]))), address
}

// deviceWatch rings when devices or their addresses change. What changed is found
// by listing them anew, so that a lost message loses nothing: it rings as well.
type deviceWatch struct {
	file  *os.File
	rings chan struct{} // holds one ring; more of them are the same
}

// watchDevices watches the namespace that the calling thread is in. The caller
// closes it.
func watchDevices() (*deviceWatch, error) {
	s, err := openRoute(unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR)
	if err != nil {
		return nil, err
	}
	return &deviceWatch{file: os.NewFile(uintptr(s), "netlink"), rings: make(chan struct{}, 1)}, nil
}

// run listens until the watch is closed, which is no error.
func (w *deviceWatch) run() error {
	b := make([]byte, 64<<10)
	for {
		_, err := w.file.Read(b)
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return fmt.Errorf("watch devices: %w", err)
		}
		select {
		case w.rings <- struct{}{}:
		default:
		}
	}
}

// close may be called twice, and on a watch that never was.
func (w *deviceWatch) close() {
	if w != nil {
		_ = w.file.Close()
	}
}
