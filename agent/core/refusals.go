package core

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
)

// refusals tells callers that they were refused, as the host would that nobody
// listens on: a reset for TCP (RFC 9293, section 3.10.7.2), port unreachable for
// datagrams (RFC 1122, section 3.2.2.1; RFC 4443, section 3.1). The packet hooks can
// only drop. It sends from the namespace of the core: who cannot be reached from
// there waits in vain. The kernel says whom to tell, and how many.
type refusals struct {
	ring *ringbuf.Reader
	to4  int // raw sockets that take whole IP packets
	to6  int
}

// openRefusals makes the sockets and shows them to the programs, which let nobody
// else's pass.
func openRefusals(o *objects) (_ *refusals, err error) {
	r := &refusals{to4: -1, to6: -1}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	if r.to4, err = answering(o, unix.AF_INET); err != nil {
		return nil, err
	}
	if r.to6, err = answering(o, unix.AF_INET6); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, err
	}
	if r.ring, err = ringbuf.NewReader(o.Maps["refusals"]); err != nil {
		return nil, fmt.Errorf("read refusals: %w", err)
	}
	return r, nil
}

func answering(o *objects, family int) (int, error) {
	s, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if err != nil {
		return -1, fmt.Errorf("make a raw socket: %w", err)
	}
	if err := o.Maps["answering"].Update(int32(s), uint32(1), ebpf.UpdateAny); err != nil {
		unix.Close(s)
		return -1, fmt.Errorf("show the kernel a raw socket: %w", err)
	}
	return s, nil
}

// run answers until the reader is closed.
func (r *refusals) run(log *slog.Logger) {
	var record ringbuf.Record
	for {
		if err := r.ring.ReadInto(&record); errors.Is(err, os.ErrClosed) {
			return
		} else if err != nil {
			log.Error("degraded", "problem", fmt.Sprintf("read refusals: %v", err))
			return
		}
		if refusal, ok := parseRefusal(record.RawSample); ok {
			r.tell(refusal)
		}
	}
}

// tell sends once. Where there is no way to the caller, it waits, as it would have.
func (r *refusals) tell(refusal abi.Refusal) {
	packet := answer(refusal)
	if packet == nil {
		return
	}
	opener := refusal.Tuple.SourceAddr()
	if opener.Is4() {
		_ = unix.Sendto(r.to4, packet, 0, &unix.SockaddrInet4{Addr: opener.As4()})
	} else if r.to6 >= 0 {
		_ = unix.Sendto(r.to6, packet, 0, &unix.SockaddrInet6{Addr: opener.As16()})
	}
}

// halt ends run. It may be called twice, and where there is nothing to end.
func (r *refusals) halt() {
	if r != nil && r.ring != nil {
		r.ring.Close()
	}
}

// close gives the sockets up; run must have ended.
func (r *refusals) close() {
	if r == nil {
		return
	}
	r.halt()
	for _, s := range []int{r.to4, r.to6} {
		if s >= 0 {
			unix.Close(s)
		}
	}
}

func parseRefusal(b []byte) (r abi.Refusal, ok bool) {
	_, err := binary.Decode(b, binary.NativeEndian, &r)
	return r, err == nil
}

const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
)

func ends(t abi.Tuple) (opener, acceptor netip.AddrPort) {
	return netip.AddrPortFrom(t.SourceAddr(), t.SourcePort), netip.AddrPortFrom(t.DestinationAddr(), t.DestinationPort)
}

// answer is the IP packet that tells a caller; nil for protocols without one.
func answer(r abi.Refusal) []byte {
	opener, acceptor := ends(r.Tuple)
	switch {
	case r.Tuple.Proto == protoTCP:
		return ipPacket(acceptor, opener, protoTCP, reset(r))
	case r.Tuple.Proto == protoUDP && opener.Addr().Is4():
		return ipPacket(acceptor, opener, protoICMP, append([]byte{3, 3, 0, 0, 0, 0, 0, 0}, quote(r)...))
	case r.Tuple.Proto == protoUDP:
		return ipPacket(acceptor, opener, protoICMPv6, append([]byte{1, 4, 0, 0, 0, 0, 0, 0}, quote(r)...))
	}
	return nil
}

// reset is a TCP header with RST and ACK.
func reset(r abi.Refusal) []byte {
	b := binary.BigEndian.AppendUint16(nil, r.Tuple.DestinationPort)
	b = binary.BigEndian.AppendUint16(b, r.Tuple.SourcePort)
	b = binary.BigEndian.AppendUint32(b, 0)
	b = binary.BigEndian.AppendUint32(b, r.Ack)
	return append(b, 5<<4, 0x14, 0, 0, 0, 0, 0, 0)
}

// quote is the beginning of the datagram that was refused, as far as its sender's
// stack looks at it.
func quote(r abi.Refusal) []byte {
	b := binary.BigEndian.AppendUint16(nil, r.Tuple.SourcePort)
	b = binary.BigEndian.AppendUint16(b, r.Tuple.DestinationPort)
	b = binary.BigEndian.AppendUint16(b, 8)
	b = append(b, 0, 0)
	opener, acceptor := ends(r.Tuple)
	return ipHeader(opener, acceptor, protoUDP, b)
}

// ipPacket puts a header before a message and fills in its checksum.
func ipPacket(from, to netip.AddrPort, proto byte, message []byte) []byte {
	at := map[byte]int{protoTCP: 16, protoICMP: 2, protoICMPv6: 2}[proto]
	var sum uint32
	if proto != protoICMP { // that has no pseudo header
		source, destination := from.Addr().As16(), to.Addr().As16()
		if from.Addr().Is4() {
			sum = add(add(0, source[12:]), destination[12:])
		} else {
			sum = add(add(0, source[:]), destination[:])
		}
		sum += uint32(proto) + uint32(len(message))
	}
	binary.BigEndian.PutUint16(message[at:], fold(add(sum, message)))
	return ipHeader(from, to, proto, message)
}

// ipHeader puts an IPv4 or IPv6 header before a payload.
func ipHeader(from, to netip.AddrPort, proto byte, payload []byte) []byte {
	const hops = 64
	if !from.Addr().Is4() {
		b := binary.BigEndian.AppendUint16([]byte{6 << 4, 0, 0, 0}, uint16(len(payload)))
		b = append(b, proto, hops)
		return append(append(append(b, from.Addr().AsSlice()...), to.Addr().AsSlice()...), payload...)
	}
	b := binary.BigEndian.AppendUint16([]byte{4<<4 | 5, 0}, uint16(20+len(payload)))
	b = append(b, 0, 0, 0, 0, hops, proto, 0, 0)
	b = append(append(b, from.Addr().AsSlice()...), to.Addr().AsSlice()...)
	binary.BigEndian.PutUint16(b[10:], fold(add(0, b)))
	return append(b, payload...)
}

// add and fold make the Internet checksum (RFC 1071).
func add(sum uint32, b []byte) uint32 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	return sum
}

func fold(sum uint32) uint16 {
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
