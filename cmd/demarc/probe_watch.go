package main

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// watch sees the handshakes and the ICMP errors of this network namespace, as they
// are on its devices: behind all that demarc does with what leaves, and before all
// that it does with what arrives.
type watch struct {
	fd   int
	room []byte
}

// openWatch needs CAP_NET_RAW. The caller closes it.
func openWatch() (*watch, error) {
	// Bound only when it has its filter: nothing else is ever queued.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	// Room for bursts of others' handshakes; without it, as much as there is by itself.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)
	program := &unix.SockFprog{Len: uint16(len(handshakes)), Filter: &handshakes[0]}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, program); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("filter packets: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind packet socket: %w", err)
	}
	return &watch{fd: fd, room: make([]byte, 2048)}, nil
}

func (w *watch) close() { unix.Close(w.fd) }

// next returns what was seen next, nil if nothing of interest; ok is false when
// there is no more for now.
func (w *watch) next() (s *sighting, ok bool, err error) {
	n, from, err := unix.Recvfrom(w.fd, w.room, 0)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return nil, false, nil
	case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENETDOWN): // a device went away
		return nil, true, nil
	case err != nil:
		return nil, false, fmt.Errorf("read packet socket: %w", err)
	}
	link, isLink := from.(*unix.SockaddrLinklayer)
	return readPacket(w.room[:n], isLink && link.Pkttype == unix.PACKET_OUTGOING), true, nil
}

// handshakes is a filter for SYN and RST segments and for ICMP errors, over the
// network header: a busy host must not fill the socket's buffer with anything else.
var handshakes = []unix.SockFilter{
	0:  {Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 0},
	1:  {Code: unix.BPF_ALU | unix.BPF_RSH | unix.BPF_K, K: 4},
	2:  {Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 4, Jt: 0, Jf: 11}, // IPv4: 3, else 14
	3:  {Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: 6},
	4:  {Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: 0x1fff, Jt: 19, Jf: 0}, // a later fragment: 24
	5:  {Code: unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH, K: 0},
	6:  {Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 9},
	7:  {Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.IPPROTO_ICMP, Jt: 0, Jf: 3}, // ICMP: 8, else 11
	8:  {Code: unix.BPF_LD | unix.BPF_B | unix.BPF_IND, K: 0},
	9:  {Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 3, Jt: 13, Jf: 0},                  // unreachable: 23
	10: {Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 11, Jt: 12, Jf: 13},                // expired: 23, else 24
	11: {Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.IPPROTO_TCP, Jt: 0, Jf: 12},   // TCP: 12, else 24
	12: {Code: unix.BPF_LD | unix.BPF_B | unix.BPF_IND, K: 13},                                 // flags
	13: {Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: tcpSYN | tcpRST, Jt: 9, Jf: 10},   // 23, else 24
	14: {Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 6, Jt: 0, Jf: 9},                   // IPv6: 15, else 24
	15: {Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 6},                                  // next header
	16: {Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.IPPROTO_ICMPV6, Jt: 0, Jf: 3}, // 17, else 20
	17: {Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 40},
	18: {Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 1, Jt: 4, Jf: 0},                // unreachable: 23
	19: {Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 3, Jt: 3, Jf: 4},                // expired: 23, else 24
	20: {Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.IPPROTO_TCP, Jt: 0, Jf: 3}, // 21, else 24
	21: {Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 53},                              // flags
	22: {Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: tcpSYN | tcpRST, Jt: 0, Jf: 1}, // 23, else 24
	23: {Code: unix.BPF_RET | unix.BPF_K, K: 2048},
	24: {Code: unix.BPF_RET | unix.BPF_K, K: 0},
}
