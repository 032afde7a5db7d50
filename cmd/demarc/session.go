package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// socketEnds are the two ends of a TCP connection, this host's first.
type socketEnds struct{ local, remote netip.AddrPort }

// ownSessions are the TCP connections that this process and those it descends from
// hold: by one of them, as sshd's, its user may be sitting here. What cannot be
// read is left out: it is told apart from other connections, nothing depends on it.
func ownSessions() map[socketEnds]bool {
	inodes := map[uint32]bool{}
	for pid := os.Getpid(); pid > 1; pid = parentOf(pid) {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		for _, fd := range fds {
			target, err := os.Readlink(fd)
			if err != nil {
				continue
			}
			if number, found := strings.CutPrefix(target, "socket:["); found {
				if n, err := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 32); err == nil {
					inodes[uint32(n)] = true
				}
			}
		}
	}
	own := map[socketEnds]bool{}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := netlink.SocketDiagTCP(family)
		if err != nil {
			continue
		}
		for _, s := range sockets {
			if inodes[s.INode] {
				own[socketEnds{addrPort(s.ID.Source, s.ID.SourcePort), addrPort(s.ID.Destination, s.ID.DestinationPort)}] = true
			}
		}
	}
	return own
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
