package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
)

// session is what can be told of the connections by which the user of this command sits
// here, as sshd's.
type session struct {
	ends  []proto.Ends // this host's first; at most proto.MaxOwn
	known bool         // there is no other one
}

// currentSession looks at what this process and those that it descends from hold, and at
// SSH_CONNECTION. Neither alone is enough: the descriptors of another user's sshd cannot
// be read, the variable does not pass sudo, and goes on after a session of tmux was left.
func currentSession(getenv func(string) string) session {
	inodes, all := heldSockets()
	var open []*netlink.Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := netlink.SocketDiagTCP(family)
		open, all = append(open, sockets...), all && err == nil
	}
	said, isSaid := sshConnection(getenv("SSH_CONNECTION"))
	var s session
	if isSaid {
		s.ends = append(s.ends, said)
	}
	held, live := false, false
	for _, one := range open {
		ends := proto.Ends{Local: addrPort(one.ID.Source, one.ID.SourcePort), Remote: addrPort(one.ID.Destination, one.ID.DestinationPort)}
		if ends.Remote.Port() == 0 { // it listens
			continue
		}
		live = live || isSaid && ends == said
		if inodes[one.INode] {
			held = true
			if !slices.Contains(s.ends, ends) {
				s.ends = append(s.ends, ends)
			}
		}
	}
	s.known = all && held || !all && live
	if len(s.ends) > proto.MaxOwn {
		s.ends, s.known = s.ends[:proto.MaxOwn], false
	}
	return s
}

// heldSockets are the sockets that this process and those it descends from hold, by
// inode, and whether that is all of them.
func heldSockets() (inodes map[uint32]bool, all bool) {
	inodes, all = map[uint32]bool{}, true
	for pid := os.Getpid(); pid > 1; pid = parentOf(pid) {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		fds, err := os.ReadDir(dir)
		if err != nil {
			all = false
		}
		for _, fd := range fds {
			target, err := os.Readlink(filepath.Join(dir, fd.Name()))
			if err != nil {
				continue // closed meanwhile
			}
			if number, found := strings.CutPrefix(target, "socket:["); found {
				if n, err := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 32); err == nil {
					inodes[uint32(n)] = true
				}
			}
		}
	}
	return inodes, all
}

// sshConnection reads what sshd says of a connection: address and port of the client,
// and of the server.
func sshConnection(text string) (proto.Ends, bool) {
	fields := strings.Fields(text)
	if len(fields) != 4 {
		return proto.Ends{}, false
	}
	var ends [2]netip.AddrPort
	for i := range ends {
		a, err := netip.ParseAddr(fields[2*i])
		port, notPort := strconv.ParseUint(fields[2*i+1], 10, 16)
		if err != nil || notPort != nil {
			return proto.Ends{}, false
		}
		ends[i] = netip.AddrPortFrom(a.Unmap().WithZone(""), uint16(port))
	}
	return proto.Ends{Local: ends[1], Remote: ends[0]}, true
}

func addrPort(ip []byte, port uint16) netip.AddrPort {
	a, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port)
}

// parentOf is a process's parent; 0 = none, or it is gone.
func parentOf(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The name, in parentheses, may hold anything.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 2 {
		return 0
	}
	parent, _ := strconv.Atoi(fields[1])
	return parent
}
