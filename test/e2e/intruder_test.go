package e2e_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What root in a container can do with devices and packet sockets: methods of an
// actor, so that the workload's own process does it.

// RunArgs is a program to run, with its standard input.
type RunArgs struct {
	Args  []string
	Input string
}

// RunReply is what the program said, and whether it failed.
type RunReply struct {
	Output string
	Failed bool
}

// Run runs a program to its end.
func (a *Actor) Run(args RunArgs, reply *RunReply) error {
	c := exec.Command(args.Args[0], args.Args[1:]...)
	c.Stdin = strings.NewReader(args.Input)
	out, err := c.CombinedOutput()
	reply.Output, reply.Failed = string(out), err != nil
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return err
	}
	return nil
}

// run runs commands in the actor, a line each, which must work.
func (a *actor) run(lines ...string) {
	a.t.Helper()
	for _, line := range lines {
		if r := a.tries(line); r.Failed {
			a.t.Fatalf("%s: %s", line, r.Output)
		}
	}
}

// tries runs a command that may fail.
func (a *actor) tries(line string) RunReply {
	a.t.Helper()
	return call[RunReply](a, "Run", RunArgs{Args: strings.Fields(line)})
}

// nft puts rules in force in the actor's namespace, a line each.
func (a *actor) nft(rules ...string) {
	a.t.Helper()
	r := call[RunReply](a, "Run", RunArgs{Args: []string{"nft", "-f", "-"}, Input: strings.Join(rules, "\n") + "\n"})
	if r.Failed {
		a.t.Fatalf("nft: %s\n%s", r.Output, strings.Join(rules, "\n"))
	}
}

// Ways to put a frame on a device.
const (
	byPacket   = "packet"   // AF_PACKET, SOCK_RAW
	byDatagram = "datagram" // AF_PACKET, SOCK_DGRAM: the kernel writes the Ethernet header
	byBypass   = "bypass"   // AF_PACKET with PACKET_QDISC_BYPASS
	byXDP      = "xdp"      // AF_XDP, copied
)

// FrameArgs are Ethernet frames to send from a device.
type FrameArgs struct {
	By, Device string
	Frames     [][]byte
}

// Frames sends them.
func (a *Actor) Frames(args FrameArgs, reply *string) error {
	device, err := net.InterfaceByName(args.Device)
	if err != nil {
		return err
	}
	if args.By == byXDP {
		err = sendXDP(device.Index, args.Frames)
	} else {
		err = sendFrames(args.By, device.Index, args.Frames)
	}
	if err != nil {
		*reply = err.Error()
	}
	return nil
}

// frames sends frames from eth0, which must work as far as the sender can see.
func (a *actor) frames(by string, frames ...[]byte) {
	a.t.Helper()
	if problem := call[string](a, "Frames", FrameArgs{By: by, Device: "eth0", Frames: frames}); problem != "" {
		a.t.Fatalf("send frames by %s: %s", by, problem)
	}
}

func sendFrames(by string, device int, frames [][]byte) error {
	kind := unix.SOCK_RAW
	if by == byDatagram {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(unix.AF_PACKET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if by == byBypass {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
			return err
		}
	}
	for _, frame := range frames {
		to := &unix.SockaddrLinklayer{Ifindex: device, Halen: 6, Protocol: binary.NativeEndian.Uint16(frame[12:])}
		copy(to.Addr[:], frame[:6])
		if by == byDatagram {
			frame = frame[14:]
		}
		if err := unix.Sendto(fd, frame, 0, to); err != nil {
			return err
		}
	}
	return nil
}

// sendXDP sends frames through an AF_XDP socket in copy mode; see
// Documentation/networking/af_xdp.rst of the kernel.
func sendXDP(device int, frames [][]byte) error {
	const slots, size = 64, 2048
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make socket: %w", err)
	}
	defer unix.Close(fd)
	area, err := unix.Mmap(-1, 0, slots*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(area)
	memory := unix.XDPUmemReg{Addr: uint64(uintptr(unsafe.Pointer(&area[0]))), Len: slots * size, Size: size}
	if err := setXDP(fd, unix.XDP_UMEM_REG, unsafe.Pointer(&memory), unsafe.Sizeof(memory)); err != nil {
		return fmt.Errorf("give memory: %w", err)
	}
	for _, ring := range []int{unix.XDP_UMEM_FILL_RING, unix.XDP_UMEM_COMPLETION_RING, unix.XDP_TX_RING} {
		if err := unix.SetsockoptInt(fd, unix.SOL_XDP, ring, slots); err != nil {
			return fmt.Errorf("make ring %d: %w", ring, err)
		}
	}
	var offsets unix.XDPMmapOffsets
	length := uint32(unsafe.Sizeof(offsets))
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_XDP, unix.XDP_MMAP_OFFSETS,
		uintptr(unsafe.Pointer(&offsets)), uintptr(unsafe.Pointer(&length)), 0); errno != 0 {
		return fmt.Errorf("ask for offsets: %w", errno)
	}
	ring, err := unix.Mmap(fd, unix.XDP_PGOFF_TX_RING, int(offsets.Tx.Desc)+slots*int(unsafe.Sizeof(unix.XDPDesc{})),
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("map ring: %w", err)
	}
	defer unix.Munmap(ring)
	if err := unix.Bind(fd, &unix.SockaddrXDP{Flags: unix.XDP_COPY, Ifindex: uint32(device)}); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	for i, frame := range frames {
		copy(area[i*size:], frame)
		desc := (*unix.XDPDesc)(unsafe.Pointer(&ring[int(offsets.Tx.Desc)+i*int(unsafe.Sizeof(unix.XDPDesc{}))]))
		desc.Addr, desc.Len = uint64(i*size), uint32(len(frame))
	}
	*(*uint32)(unsafe.Pointer(&ring[offsets.Tx.Producer])) = uint32(len(frames))
	consumed := (*uint32)(unsafe.Pointer(&ring[offsets.Tx.Consumer]))
	for range 100 {
		err := unix.Sendto(fd, nil, unix.MSG_DONTWAIT, nil)
		if *consumed == uint32(len(frames)) {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOBUFS) {
			return fmt.Errorf("send: %w", err)
		}
	}
	return fmt.Errorf("%d of %d frames sent", *consumed, len(frames))
}

func setXDP(fd, option int, value unsafe.Pointer, size uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_XDP, uintptr(option), uintptr(value), size, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// TunArgs is a device that frames or packets come out of as if from a network.
type TunArgs struct {
	Name string
	Tap  bool // Ethernet frames; otherwise IP packets
}

// Tun makes the device, which lives as long as the actor.
func (a *Actor) Tun(args TunArgs, reply *bool) error {
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	request, err := unix.NewIfreq(args.Name)
	if err != nil {
		return err
	}
	flags := unix.IFF_TUN
	if args.Tap {
		flags = unix.IFF_TAP
	}
	request.SetUint16(uint16(flags | unix.IFF_NO_PI))
	if err := unix.IoctlIfreq(int(f.Fd()), unix.TUNSETIFF, request); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.tuns == nil {
		a.tuns = map[string]*os.File{}
	}
	a.tuns[args.Name] = f
	return nil
}

// tun makes such a device and sets it up.
func (a *actor) tun(name string, tap bool) {
	a.t.Helper()
	call[bool](a, "Tun", TunArgs{Name: name, Tap: tap})
	a.run("ip link set " + name + " up")
}

// InjectArgs are packets that come out of a device.
type InjectArgs struct {
	Name    string
	Packets [][]byte
}

// Inject writes them.
func (a *Actor) Inject(args InjectArgs, reply *bool) error {
	a.mu.Lock()
	f := a.tuns[args.Name]
	a.mu.Unlock()
	if f == nil {
		return fmt.Errorf("no device %s", args.Name)
	}
	for _, p := range args.Packets {
		if _, err := unix.Write(int(f.Fd()), p); err != nil {
			return err
		}
	}
	return nil
}

func (a *actor) inject(name string, packets ...[]byte) {
	a.t.Helper()
	call[bool](a, "Inject", InjectArgs{Name: name, Packets: packets})
}

// CaptureArgs is an ear at a device.
type CaptureArgs struct{ Device string }

// Listen opens a packet socket that hears every frame of eth0; Heard returns them.
func (a *Actor) Listen(args CaptureArgs, reply *bool) error {
	device, err := net.InterfaceByName(args.Device)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: device.Index}); err != nil {
		unix.Close(fd)
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ear = fd
	return nil
}

// Heard returns the frames that came since the last call.
func (a *Actor) Heard(_ bool, reply *[][]byte) error {
	a.mu.Lock()
	fd := a.ear
	a.mu.Unlock()
	b := make([]byte, 2048)
	for {
		n, err := unix.Read(fd, b)
		if errors.Is(err, unix.EAGAIN) {
			return nil
		}
		if err != nil {
			return err
		}
		*reply = append(*reply, append([]byte(nil), b[:n]...))
	}
}

// ethernet is a frame.
func ethernet(to, from net.HardwareAddr, packet []byte) []byte {
	b := append(append([]byte(nil), to...), from...)
	kind := uint16(unix.ETH_P_IP)
	if packet[0]>>4 == 6 {
		kind = unix.ETH_P_IPV6
	}
	return append(binary.BigEndian.AppendUint16(b, kind), packet...)
}

// whole is an IP packet that is right in every checksum: between two places, of
// UDP, or of TCP with flags.
func whole(proto uint8, from, to netip.AddrPort, flags uint8, options ...byte) []byte {
	var transport []byte
	if proto == tcp {
		transport = make([]byte, 20)
		binary.BigEndian.PutUint32(transport[4:], 1)
		transport[12], transport[13] = byte(20+len(options))<<2, flags
		binary.BigEndian.PutUint16(transport[14:], 65535)
		transport = append(transport, options...)
	} else {
		transport = make([]byte, 12)
		binary.BigEndian.PutUint16(transport[4:], uint16(len(transport)))
		copy(transport[8:], "four")
	}
	binary.BigEndian.PutUint16(transport, from.Port())
	binary.BigEndian.PutUint16(transport[2:], to.Port())
	pseudo := append(from.Addr().AsSlice(), to.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, proto, 0, byte(len(transport)))
	at := 6
	if proto == tcp {
		at = 16
	}
	binary.BigEndian.PutUint16(transport[at:], checksum(pseudo, transport))
	if from.Addr().Is6() {
		return ipv6(from.Addr(), to.Addr(), proto, transport)
	}
	packet := ipv4(from.Addr(), to.Addr(), proto, 0, transport)
	binary.BigEndian.PutUint16(packet[10:], checksum(packet[:20]))
	return packet
}

// parseAddresses reads where an IP packet goes.
func parseAddresses(packet []byte) (dst netip.Addr, ok bool) {
	switch {
	case len(packet) >= 20 && packet[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(packet[16:])), true
	case len(packet) >= 40 && packet[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(packet[24:])), true
	}
	return netip.Addr{}, false
}

// HalfOpen lists the connections of the namespace that wait in SYN_RECV; see
// Documentation/networking/proc_net_tcp.rst of the kernel.
func (a *Actor) HalfOpen(_ bool, reply *string) error {
	for _, table := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile("/proc/self/net/" + table)
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			if fields := strings.Fields(line); len(fields) > 3 && fields[3] == "03" {
				*reply += line
			}
		}
	}
	return nil
}

// Poke sends one datagram from a connected socket, and says what the socket is told.
func (a *Actor) Poke(to string, reply *string) error {
	c, err := net.Dial("udp", to)
	if err != nil {
		*reply = problem(err)
		return nil
	}
	defer c.Close()
	if err = exchange(c, 16, 500*time.Millisecond); err != nil {
		*reply = problem(err)
	}
	return nil
}

// PesterArgs is what to try on eth0 from the moment when there is one.
type PesterArgs struct {
	Frame []byte
	To    string // of datagrams
}

// PesterReply counts the frames that left a packet socket, the datagrams tried, and
// those that the kernel took.
type PesterReply struct{ Frames, Datagrams, Sent int }

type pester struct {
	stop chan struct{}
	done chan PesterReply
}

// Pester tries until StopPester.
func (a *Actor) Pester(args PesterArgs, _ *bool) error {
	to, err := netip.ParseAddrPort(args.To)
	if err != nil {
		return err
	}
	p := &pester{make(chan struct{}), make(chan PesterReply, 1)}
	a.mu.Lock()
	a.pester = p
	a.mu.Unlock()
	go func() {
		var r PesterReply
		tick := time.NewTicker(200 * time.Microsecond)
		defer tick.Stop()
		for {
			select {
			case <-p.stop:
				p.done <- r
				return
			case <-tick.C:
			}
			if device, err := net.InterfaceByName("eth0"); err == nil && sendFrames(byPacket, device.Index, [][]byte{args.Frame}) == nil {
				r.Frames++
			}
			if c, err := net.ListenUDP("udp4", nil); err == nil {
				_, err = c.WriteToUDPAddrPort(make([]byte, 16), to)
				c.Close()
				if r.Datagrams++; err == nil {
					r.Sent++
				}
			}
		}
	}()
	return nil
}

// StopPester ends it.
func (a *Actor) StopPester(_ bool, reply *PesterReply) error {
	a.mu.Lock()
	p := a.pester
	a.mu.Unlock()
	close(p.stop)
	*reply = <-p.done
	return nil
}
