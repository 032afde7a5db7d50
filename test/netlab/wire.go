package netlab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Wire is the truth about what a namespace sent and was sent: a capture at the far
// end of its cable, or on its lo, out of reach of anything that demarc does.
type Wire struct {
	ns     *Namespace
	device int // index in ns that sentinels are sent on
	file   *os.File
	own    bool // the capture is on the namespace's own device: what it sends goes out

	mu      sync.Mutex
	packets []Packet
	seen    map[uint64]int // sentinels by number
	sent    uint64         // number of the last sentinel
	news    chan struct{}  // closed and replaced at every packet
	failed  error
}

// sentinelType is "local experimental" of IEEE 802.
const sentinelType = 0x88b5

// Wire captures at the switch's end of the namespace's cable.
func (ns *Namespace) Wire() *Wire {
	ns.lab.t.Helper()
	return ns.lab.wire(ns.lab.network, ns, ns.port, ns.device, false)
}

// Loopback captures on the namespace's lo.
func (ns *Namespace) Loopback() *Wire {
	ns.lab.t.Helper()
	return ns.lab.wire(ns, ns, 1, 1, true)
}

// wire captures on a device of one namespace what another one sends through it.
func (l *Lab) wire(at, of *Namespace, index, device int, own bool) *Wire {
	l.t.Helper()
	w := &Wire{ns: of, device: device, own: own, seen: make(map[uint64]int), news: make(chan struct{})}
	l.check(at.Do(func() error {
		fd, err := packetSocket(index)
		if err != nil {
			return err
		}
		w.file = os.NewFile(uintptr(fd), "wire")
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20)
	}), "capture on %s", of.Name)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.read()
	}()
	l.later(func() error {
		err := w.file.Close()
		<-ended
		return err
	})
	return w
}

func packetSocket(index int) (int, error) {
	// Bound before it has a protocol, so that it never sees another device.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: index}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func (w *Wire) read() {
	raw, err := w.file.SyscallConn()
	b := make([]byte, 512)
	for err == nil {
		var n int
		var from unix.Sockaddr
		var bad error
		err = raw.Read(func(fd uintptr) bool {
			n, from, bad = unix.Recvfrom(int(fd), b, unix.MSG_DONTWAIT)
			return !errors.Is(bad, unix.EAGAIN)
		})
		if err = errors.Join(err, bad); err == nil {
			outgoing := from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OUTGOING
			w.see(b[:n], outgoing)
		}
	}
	if !errors.Is(err, os.ErrClosed) {
		w.mu.Lock()
		w.failed = err
		w.mu.Unlock()
	}
}

// see takes a frame. At the far end of a cable, what the namespace sends comes in;
// on lo every frame goes out and comes in again.
func (w *Wire) see(frame []byte, outgoing bool) {
	p := parseFrame(frame)
	p.Sent = outgoing == w.own
	w.mu.Lock()
	defer w.mu.Unlock()
	if p.EtherType == sentinelType && len(frame) >= 22 {
		if p.Sent {
			w.seen[binary.BigEndian.Uint64(frame[14:])]++
		}
	} else {
		w.packets = append(w.packets, p)
	}
	close(w.news)
	w.news = make(chan struct{})
}

// Settle waits until everything that the namespace has sent so far was seen: a
// frame is sent behind it on every CPU, and waited for.
func (w *Wire) Settle() {
	w.ns.lab.t.Helper()
	w.mu.Lock()
	w.sent++
	number := w.sent
	w.mu.Unlock()
	var cpus int
	w.ns.lab.check(w.ns.Do(func() (err error) {
		cpus, err = sendSentinels(w.device, number)
		return err
	}), "send sentinels in %s", w.ns.Name)
	err := w.await(func() bool { return w.seen[number] >= cpus }, 10*time.Second)
	w.ns.lab.check(err, "wait for sentinels of %s", w.ns.Name)
	w.ns.lab.check(w.lossless(), "capture on %s", w.ns.Name)
}

func sendSentinels(device int, number uint64) (cpus int, err error) {
	fd, err := packetSocket(device)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	var before unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unix.SchedSetaffinity(0, &before)) }()
	frame := make([]byte, 60)
	copy(frame, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2})
	binary.BigEndian.PutUint16(frame[12:], sentinelType)
	binary.BigEndian.PutUint64(frame[14:], number)
	for cpu := range 1024 {
		if !before.IsSet(cpu) {
			continue
		}
		var one unix.CPUSet
		one.Set(cpu)
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			return 0, err
		}
		if _, err := unix.Write(fd, frame); err != nil {
			return 0, err
		}
		cpus++
	}
	return cpus, nil
}

// lossless checks that the capture itself lost nothing.
func (w *Wire) lossless() error {
	w.mu.Lock()
	failed := w.failed
	w.mu.Unlock()
	if failed != nil {
		return failed
	}
	raw, err := w.file.SyscallConn()
	if err != nil {
		return err
	}
	var bad error
	err = raw.Control(func(fd uintptr) {
		var stats *unix.TpacketStats
		if stats, bad = unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); bad == nil && stats.Drops > 0 {
			bad = fmt.Errorf("lost %d packets", stats.Drops)
		}
	})
	return errors.Join(err, bad)
}

// Packets settles and returns what matches, in the order in which it was seen.
func (w *Wire) Packets(match Match) []Packet {
	w.ns.lab.t.Helper()
	w.Settle()
	w.mu.Lock()
	defer w.mu.Unlock()
	var found []Packet
	for _, p := range w.packets {
		if match(p) {
			found = append(found, p)
		}
	}
	return found
}

// Count settles and says how many packets match.
func (w *Wire) Count(match Match) int {
	w.ns.lab.t.Helper()
	return len(w.Packets(match))
}

// Forget settles and forgets what was seen so far.
func (w *Wire) Forget() {
	w.ns.lab.t.Helper()
	w.Settle()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.packets = nil
}

// Await waits until a packet matches.
func (w *Wire) Await(match Match) {
	w.ns.lab.t.Helper()
	err := w.await(func() bool {
		for _, p := range w.packets {
			if match(p) {
				return true
			}
		}
		return false
	}, 10*time.Second)
	w.ns.lab.check(err, "wait for a packet on %s", w.ns.Name)
}

// await waits until the condition, which is asked with the lock held, holds.
func (w *Wire) await(holds func() bool, timeout time.Duration) error {
	end := time.After(timeout)
	for {
		w.mu.Lock()
		done, news := holds(), w.news
		w.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-news:
		case <-end:
			return fmt.Errorf("not seen within %s", timeout)
		}
	}
}
