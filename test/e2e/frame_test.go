package e2e_test

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dchest/siphash"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// tcpFrame is a TCP segment as it was on the wire.
type tcpFrame struct {
	frame    []byte // Ethernet and all
	ip, tcp  int    // offsets
	src, dst netip.AddrPort
	seq, ack uint32
	flags    uint8
}

const (
	flagSYN = 0x02
	flagACK = 0x10
)

// Flags of a claim; enum demarc_tag_flags of abi.h.
const (
	tagAnswer        = 1
	tagNoSource      = 2
	tagNoDestination = 4
	tagDatagram      = 8
)

// parseTCPFrame reads a frame; ok is false if it is no TCP segment.
func parseTCPFrame(b []byte) (s tcpFrame, ok bool) {
	if len(b) < 14+20+20 {
		return s, false
	}
	s.frame, s.ip = b, 14
	var src, dst netip.Addr
	switch binary.BigEndian.Uint16(b[12:]) {
	case unix.ETH_P_IP:
		if b[s.ip+9] != unix.IPPROTO_TCP {
			return s, false
		}
		s.tcp = s.ip + int(b[s.ip]&15)*4
		src, dst = netip.AddrFrom4([4]byte(b[s.ip+12:])), netip.AddrFrom4([4]byte(b[s.ip+16:]))
	case unix.ETH_P_IPV6:
		if b[s.ip+6] != unix.IPPROTO_TCP || len(b) < 14+40+20 {
			return s, false
		}
		s.tcp = s.ip + 40
		src, dst = netip.AddrFrom16([16]byte(b[s.ip+8:])), netip.AddrFrom16([16]byte(b[s.ip+24:]))
	default:
		return s, false
	}
	h := b[s.tcp:]
	s.src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(h))
	s.dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(h[2:]))
	s.seq, s.ack, s.flags = binary.BigEndian.Uint32(h[4:]), binary.BigEndian.Uint32(h[8:]), h[13]
	return s, true
}

// options are the bytes behind the fixed part of the header.
func (s tcpFrame) options() []byte { return s.frame[s.tcp+20 : s.tcp+int(s.frame[s.tcp+12]>>4)*4] }

// tags returns every option of kind 253, with its kind and length.
func (s tcpFrame) tags() (found [][]byte) {
	for o := s.options(); len(o) > 0; {
		switch {
		case o[0] == 0:
			return found
		case o[0] == 1:
			o = o[1:]
		case len(o) < 2 || o[1] < 2 || int(o[1]) > len(o):
			return found
		default:
			if o[0] == 253 {
				found = append(found, o[:o[1]])
			}
			o = o[o[1]:]
		}
	}
	return found
}

// macOf is the MAC of a tag with a claim on this segment, from its definition in
// abi.h: SipHash-2-4 over claim, sequence number, what is acknowledged or else the
// time slot, ports and addresses.
func (s tcpFrame) macOf(key [16]byte, claim uint32) [8]byte {
	var input [48]byte
	binary.BigEndian.PutUint32(input[0:], claim)
	binary.BigEndian.PutUint32(input[4:], s.seq)
	if s.flags&flagACK != 0 {
		binary.BigEndian.PutUint32(input[8:], s.ack)
	} else {
		binary.BigEndian.PutUint32(input[8:], uint32(time.Now().UnixNano()>>abi.TagSlotShift))
	}
	binary.BigEndian.PutUint16(input[12:], s.src.Port())
	binary.BigEndian.PutUint16(input[14:], s.dst.Port())
	src, dst := s.src.Addr().As16(), s.dst.Addr().As16()
	copy(input[16:], src[:])
	copy(input[32:], dst[:])
	// What a claim leaves out counts as zero.
	if claim&uint32(tagNoSource) != 0 {
		clear(input[12:14])
		clear(input[16:32])
	}
	if claim&uint32(tagNoDestination) != 0 {
		clear(input[14:16])
		clear(input[32:48])
	}
	hash := siphash.Hash(binary.LittleEndian.Uint64(key[:]), binary.LittleEndian.Uint64(key[8:]), input[:])
	var mac [8]byte
	binary.LittleEndian.PutUint64(mac[:], hash)
	return mac
}

// tagOf is the whole option.
func (s tcpFrame) tagOf(key [16]byte, identity uint32, epoch, flags uint8) []byte {
	claim := identity<<8 | uint32(epoch)<<4 | uint32(flags)
	tag := binary.BigEndian.AppendUint32([]byte{253, 16, 0xd3, 0xac}, claim)
	mac := s.macOf(key, claim)
	return append(tag, mac[:]...)
}

// with is a copy from another port with other options, which are padded, and with
// right lengths and checksums.
func (s tcpFrame) with(port uint16, options []byte) tcpFrame {
	for len(options)%4 != 0 {
		options = append(options, 0)
	}
	b := append([]byte(nil), s.frame[:s.tcp+20]...)
	b = append(b, options...)
	binary.BigEndian.PutUint16(b[s.tcp:], port)
	b[s.tcp+12] = byte(5+len(options)/4) << 4
	length := len(b) - s.tcp
	if s.tcp == s.ip+40 {
		binary.BigEndian.PutUint16(b[s.ip+4:], uint16(length))
	} else {
		binary.BigEndian.PutUint16(b[s.ip+2:], uint16(len(b)-s.ip))
		copy(b[s.ip+10:], []byte{0, 0})
		binary.BigEndian.PutUint16(b[s.ip+10:], internetSum(b[s.ip:s.tcp], 0))
	}
	copy(b[s.tcp+16:], []byte{0, 0})
	src, dst := s.src.Addr().AsSlice(), s.dst.Addr().AsSlice()
	pseudo := uint32(unix.IPPROTO_TCP) + uint32(length)
	for _, half := range [][]byte{src, dst} {
		for i := 0; i < len(half); i += 2 {
			pseudo += uint32(binary.BigEndian.Uint16(half[i:]))
		}
	}
	binary.BigEndian.PutUint16(b[s.tcp+16:], internetSum(b[s.tcp:], pseudo))
	out, _ := parseTCPFrame(b)
	return out
}

// internetSum is that of RFC 1071.
func internetSum(b []byte, sum uint32) uint16 {
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 != 0 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// cable is a socket on a namespace's eth0 that sees every frame and can send any.
// It belongs to no managed cgroup.
type cable struct {
	t  testing.TB
	fd int
}

func openCable(t testing.TB, ns *netlab.Namespace) *cable {
	t.Helper()
	c := &cable{t: t}
	err := ns.Do(func() error {
		device, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		return unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: device.Index})
	})
	if err != nil {
		t.Fatalf("open cable: %v", err)
	}
	t.Cleanup(func() { _ = unix.Close(c.fd) })
	return c
}

func (c *cable) send(s tcpFrame) {
	c.t.Helper()
	if _, err := unix.Write(c.fd, s.frame); err != nil {
		c.t.Fatalf("send frame: %v", err)
	}
}

// segments returns what was seen since the last call.
func (c *cable) segments() (all []tcpFrame) {
	c.t.Helper()
	b := make([]byte, 2048)
	for {
		n, err := unix.Read(c.fd, b)
		if err == unix.EAGAIN {
			return all
		}
		if err != nil {
			c.t.Fatalf("read frame: %v", err)
		}
		if s, ok := parseTCPFrame(append([]byte(nil), b[:n]...)); ok {
			all = append(all, s)
		}
	}
}

// tagKey reads the lab's keyring: the key that tags, and its epoch.
func tagKey(t testing.TB, lab *netlab.Lab) (key [16]byte, epoch uint8) {
	t.Helper()
	var ring struct {
		Keys []struct {
			Epoch uint8
			Key   string
		}
	}
	text, err := os.ReadFile(filepath.Join(lab.Dir(), "keyring"))
	if err == nil {
		err = json.Unmarshal(text, &ring)
	}
	if err != nil || len(ring.Keys) != 1 {
		t.Fatalf("read keyring: %v, %d keys", err, len(ring.Keys))
	}
	b, err := hex.DecodeString(ring.Keys[0].Key)
	if err != nil || len(b) != 16 || ring.Keys[0].Epoch >= abi.Epochs {
		t.Fatalf("read keyring: %v", err)
	}
	return [16]byte(b), ring.Keys[0].Epoch
}
