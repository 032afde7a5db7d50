package e2e_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/netlab"
)

// births is how often a cgroup is made and used at once.
const births = 10000

// A cgroup has its identity before anything can happen in it: what is not declared
// does not reach the wire even from a cgroup that is a fraction of a millisecond
// old, and what is declared works at the first attempt.
//
//	web (new cgroups /lab/web/N)  ->  db  udp/7000, tcp/7000 declared; 7001 not
func TestX13FirstPacket(t *testing.T) {
	e := newEnds(t, `crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000], log: none}
`, netlab.NodeOptions{CoreOnly: true})
	e.server.serve(7000)
	e.server.serve(7001)
	wire := e.web.Wire()
	forker := startActor(t, e.web, e.node.Cgroup("/forker"))

	r := call[BirthReply](forker, "Births", BirthArgs{Dir: e.node.Cgroup("/lab/web").Dir(), To: e.db.IP4.String(), Want: births, Limit: 5 * time.Minute})
	t.Logf("%d cgroups, %d sent within 1 ms of mkdir; median %s; retried %d datagrams; refused %v", r.Made, r.InTime, r.Median, r.Retried, r.Refused)
	if r.InTime < births {
		t.Errorf("only %d of %d cgroups sent within 1 ms: too slow to prove anything", r.InTime, births)
	}
	if r.Echoed != r.Made || r.Connected != r.Made {
		t.Errorf("of %d cgroups, %d had their datagram answered and %d connected; the first failure: %s", r.Made, r.Echoed, r.Connected, r.Failure)
	}
	if r.Refused["operation not permitted"] != 2*r.Made {
		t.Errorf("undeclared calls ended with %v, want %d refused", r.Refused, 2*r.Made)
	}
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		if n := wire.Count(netlab.To(proto, e.db.IP4, 7001)); n != 0 {
			t.Errorf("%d undeclared packets of protocol %d on the wire", n, proto)
		}
		if n := wire.Count(netlab.To(proto, e.db.IP4, 7000)); n < r.Made {
			t.Errorf("the wire saw %d declared packets of protocol %d, at least %d were sent", n, proto, r.Made)
		}
	}
}

// BirthArgs asks for cgroups below a directory until Want of them sent in time.
type BirthArgs struct {
	Dir, To string
	Want    int
	Limit   time.Duration
}

// BirthReply is what came of them.
type BirthReply struct {
	Made, InTime      int
	Echoed, Connected int
	Retried           int            // datagrams sent again
	Refused           map[string]int // undeclared calls by what the application was told
	Median, Late      time.Duration  // from before mkdir to the end of the first send; 99 in 100 were faster than Late
	Failure           string
}

// newborn is memory shared with a child: what it is to do, and what it saw.
type newborn struct {
	cloneArgs cloneArgs
	allowed   [16]byte // sockaddr_in
	denied    [16]byte
	timeout   unix.Timeval
	buffer    [16]byte
	turn      uint32 // what goes first: bit 0 TCP, bit 1 declared
	_         uint32

	first                  unix.Timespec // end of the first send
	deniedUDP, deniedTCP   uint64        // errno
	allowedUDP, allowedTCP uint64        // errno of the last attempt
	retried                uint64
}

// cloneArgs is struct clone_args of the kernel's include/uapi/linux/sched.h.
type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
}

// Births makes cgroups and children in them.
func (a *Actor) Births(args BirthArgs, reply *BirthReply) error {
	to, err := netip.ParseAddr(args.To)
	if err != nil {
		return err
	}
	shared, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANON)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(shared) }()
	parent, err := unix.Open(args.Dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	b := (*newborn)(unsafe.Pointer(unsafe.SliceData(shared)))
	b.allowed, b.denied = sockaddr4(to, 7000), sockaddr4(to, 7001)
	b.timeout = unix.Timeval{Sec: 3}
	reply.Refused = map[string]int{}
	var took []time.Duration
	growStack(0)
	for end := time.Now().Add(args.Limit); reply.InTime < args.Want && time.Now().Before(end); reply.Made++ {
		b.turn = uint32(reply.Made)
		age, err := bear(b, parent, strconv.Itoa(reply.Made))
		if err != nil {
			return err
		}
		took = append(took, age)
		reply.count(b, age)
	}
	reply.Median = median(took) // and sorted now
	if len(took) > 0 {
		reply.Late = took[len(took)*99/100]
	}
	return nil
}

func (r *BirthReply) count(b *newborn, age time.Duration) {
	if age <= time.Millisecond {
		r.InTime++
	}
	if b.allowedUDP == 0 {
		r.Echoed++
	}
	if b.allowedTCP == 0 {
		r.Connected++
	}
	if (b.allowedUDP != 0 || b.allowedTCP != 0) && r.Failure == "" {
		r.Failure = fmt.Sprintf("cgroup %d: udp %v, tcp %v", r.Made, unix.Errno(b.allowedUDP), unix.Errno(b.allowedTCP))
	}
	r.Retried += int(b.retried)
	r.Refused[unix.Errno(b.deniedUDP).Error()]++
	r.Refused[unix.Errno(b.deniedTCP).Error()]++
}

// bear makes a cgroup, a child in it from its first instruction on, waits for the
// child's end and removes the cgroup. It returns the time from before the mkdir to
// the end of the child's first send.
func bear(b *newborn, parent int, name string) (time.Duration, error) {
	var start unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &start); err != nil {
		return 0, err
	}
	if err := unix.Mkdirat(parent, name, 0o755); err != nil {
		return 0, err
	}
	dir, err := unix.Openat(parent, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(dir)
	b.retried = 0
	b.cloneArgs = cloneArgs{flags: unix.CLONE_INTO_CGROUP | unix.CLONE_VFORK, exitSignal: uint64(unix.SIGCHLD), cgroup: uint64(dir)}
	pid, errno := forkChild(b)
	if errno != 0 {
		return 0, fmt.Errorf("clone into cgroup: %w", errno)
	}
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &status, 0, nil)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			return 0, err
		}
	}
	if status.ExitStatus() != 0 {
		return 0, fmt.Errorf("child ended with %#x", status)
	}
	if err := unix.Unlinkat(parent, name, unix.AT_REMOVEDIR); err != nil {
		return 0, err
	}
	return time.Duration(b.first.Nano() - start.Nano()), nil
}

func sockaddr4(ip netip.Addr, port uint16) (a [16]byte) {
	binary.NativeEndian.PutUint16(a[:], unix.AF_INET)
	binary.BigEndian.PutUint16(a[2:], port)
	copy(a[4:], ip.AsSlice())
	return a
}

// growStack makes the goroutine's stack large enough that the functions of the
// child, which check nothing, have room.
//
//go:noinline
func growStack(depth int) byte {
	var frame [16 << 10]byte
	frame[depth] = byte(depth)
	if depth < 4 {
		return growStack(depth+1) + frame[depth]
	}
	return frame[depth]
}

// forkChild makes a child with a copy of this thread only. There is no runtime in
// it that could grow a stack or make way for another goroutine, so its functions
// must not ask for either: they are nosplit, make raw system calls on memory that
// exists already, and end.
//
//go:norace
//go:nosplit
func forkChild(b *newborn) (int, unix.Errno) {
	pid, _, errno := unix.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&b.cloneArgs)), unsafe.Sizeof(b.cloneArgs), 0)
	if errno != 0 || pid != 0 {
		return int(pid), errno
	}
	if b.turn&2 == 0 {
		childDenied(b)
		childAllowed(b)
	} else {
		childAllowed(b)
		childDenied(b)
	}
	for {
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
}

//go:norace
//go:nosplit
func childDenied(b *newborn) {
	if b.turn&1 == 0 {
		b.deniedUDP = childSend(b, &b.denied)
		childSent(b, true)
		b.deniedTCP = childConnect(b, &b.denied)
		return
	}
	b.deniedTCP = childConnect(b, &b.denied)
	childSent(b, true)
	b.deniedUDP = childSend(b, &b.denied)
}

//go:norace
//go:nosplit
func childAllowed(b *newborn) {
	if b.turn&1 == 0 {
		b.allowedUDP = childSend(b, &b.allowed)
		b.allowedTCP = childConnect(b, &b.allowed)
		return
	}
	b.allowedTCP = childConnect(b, &b.allowed)
	b.allowedUDP = childSend(b, &b.allowed)
}

// childSent notes when the first call was over.
//
//go:norace
//go:nosplit
func childSent(b *newborn, first bool) {
	if first != (b.turn&2 == 0) {
		return
	}
	_, _, _ = unix.RawSyscall(unix.SYS_CLOCK_GETTIME, unix.CLOCK_MONOTONIC, uintptr(unsafe.Pointer(&b.first)), 0)
}

// childSend sends a datagram and, if that was allowed, waits for the answer, three
// times at most. It returns the errno.
//
//go:norace
//go:nosplit
func childSend(b *newborn, to *[16]byte) uint64 {
	fd, _, errno := unix.RawSyscall(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_DGRAM, 0)
	if errno != 0 {
		return uint64(errno)
	}
	_, _, _ = unix.RawSyscall6(unix.SYS_SETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, uintptr(unsafe.Pointer(&b.timeout)), unsafe.Sizeof(b.timeout), 0)
	for attempt := 0; attempt < 3; attempt++ {
		_, _, errno = unix.RawSyscall6(unix.SYS_SENDTO, fd, uintptr(unsafe.Pointer(&b.buffer)), 16, 0, uintptr(unsafe.Pointer(to)), 16)
		if to == &b.allowed && attempt == 0 && b.turn&1 == 0 {
			childSent(b, false)
		}
		if errno == 0 {
			_, _, errno = unix.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b.buffer)), 16, 0, 0, 0)
		}
		if errno != unix.EAGAIN {
			break
		}
		b.retried++
	}
	return uint64(errno)
}

// childConnect connects a stream, within three seconds, in which a lost SYN is
// sent again twice. It returns the errno.
//
//go:norace
//go:nosplit
func childConnect(b *newborn, to *[16]byte) uint64 {
	fd, _, errno := unix.RawSyscall(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM, 0)
	if errno != 0 {
		return uint64(errno)
	}
	_, _, _ = unix.RawSyscall6(unix.SYS_SETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, uintptr(unsafe.Pointer(&b.timeout)), unsafe.Sizeof(b.timeout), 0)
	_, _, errno = unix.RawSyscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(to)), 16)
	if to == &b.allowed && b.turn&1 == 1 {
		childSent(b, false)
	}
	return uint64(errno)
}
