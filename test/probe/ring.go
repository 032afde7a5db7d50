package probe

import (
	"errors"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ring is an io_uring with room for a few entries. Numbers and layouts are those
// of include/uapi/linux/io_uring.h.
type ring struct {
	fd      int
	flags   uint32
	entries []byte // of submission
	sq, cq  []byte
	params  ringParams
}

const (
	setupSQPoll = 1 << 1

	opConnect = 16
	opSend    = 26
	opSocket  = 45

	enterGetEvents = 1 << 0
	enterSQWakeup  = 1 << 1
	needWakeup     = 1 << 0
)

type ringParams struct {
	sqEntries, cqEntries, flags, threadCPU, threadIdle, features, workqueue uint32
	_                                                                       [3]uint32
	sq                                                                      struct {
		head, tail, mask, entries, flags, dropped, array, _ uint32
		_                                                   uint64
	}
	cq struct {
		head, tail, mask, entries, overflow, cqes, flags, _ uint32
		_                                                   uint64
	}
}

type submission struct {
	opcode, flags uint8
	priority      uint16
	fd            int32
	offset        uint64
	address       uint64
	length        uint32
	opFlags       uint32
	data          uint64
	_             [3]uint64
}

type completion struct {
	data   uint64
	result int32
	flags  uint32
}

// newRing makes a ring; Flags as for io_uring_setup.
func newRing(p *prober, c *Call) (Result, error) {
	r := &ring{flags: uint32(c.Flags)}
	r.params.flags, r.params.threadIdle = uint32(c.Flags), 1000
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&r.params)), 0)
	if errno != 0 {
		return Result{}, errno
	}
	r.fd = int(fd)
	for _, area := range []struct {
		to     *[]byte
		offset int64
		size   uint32
	}{
		{&r.sq, 0, r.params.sq.array + r.params.sqEntries*4},
		{&r.cq, 0x8000000, r.params.cq.cqes + r.params.cqEntries*uint32(unsafe.Sizeof(completion{}))},
		{&r.entries, 0x10000000, r.params.sqEntries * uint32(unsafe.Sizeof(submission{}))},
	} {
		b, err := unix.Mmap(r.fd, area.offset, int(area.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			return Result{}, err
		}
		*area.to = b
	}
	p.rings[c.New] = r
	return Result{N: r.fd}, nil
}

func word(b []byte, at uint32) *uint32 { return (*uint32)(unsafe.Pointer(&b[at])) }

// submit hands one entry to the kernel and waits for its completion.
func (r *ring) submit(s submission, timeout int) (int, error) {
	tail := atomic.LoadUint32(word(r.sq, r.params.sq.tail))
	index := tail & *word(r.sq, r.params.sq.mask)
	*(*submission)(unsafe.Pointer(&r.entries[index*uint32(unsafe.Sizeof(s))])) = s
	*word(r.sq, r.params.sq.array+index*4) = index
	atomic.StoreUint32(word(r.sq, r.params.sq.tail), tail+1)
	switch {
	case r.flags&setupSQPoll == 0:
		if err := r.enter(1, 0); err != nil {
			return 0, err
		}
	case atomic.LoadUint32(word(r.sq, r.params.sq.flags))&needWakeup != 0:
		if err := r.enter(0, enterSQWakeup); err != nil {
			return 0, err
		}
	}
	for end := time.Now().Add(time.Duration(timeout) * time.Millisecond); ; {
		head := atomic.LoadUint32(word(r.cq, r.params.cq.head))
		if head != atomic.LoadUint32(word(r.cq, r.params.cq.tail)) {
			at := r.params.cq.cqes + head&*word(r.cq, r.params.cq.mask)*uint32(unsafe.Sizeof(completion{}))
			result := (*completion)(unsafe.Pointer(&r.cq[at])).result
			atomic.StoreUint32(word(r.cq, r.params.cq.head), head+1)
			if result < 0 {
				return 0, unix.Errno(-result)
			}
			return int(result), nil
		}
		if time.Now().After(end) {
			return 0, errTimeout
		}
		// Waiting in io_uring_enter would have no end; the ring itself can be polled.
		if err := await(r.fd, unix.POLLIN, 10); err != nil && !errors.Is(err, errTimeout) {
			return 0, err
		}
	}
}

func (r *ring) enter(submit, flags uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), submit, 0, flags, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// onRing finds the ring, named by Path, and the socket of a call.
func onRing(p *prober, c *Call) (*ring, int, error) {
	r := p.rings[c.Path]
	if r == nil {
		return nil, 0, errors.New("no such ring")
	}
	fd, err := p.fd(c)
	return r, fd, err
}

func ringSocket(p *prober, c *Call) (Result, error) {
	r := p.rings[c.Path]
	if r == nil {
		return Result{}, errors.New("no such ring")
	}
	fd, err := r.submit(submission{
		opcode: opSocket, fd: int32(c.Domain), offset: uint64(c.Type | unix.SOCK_NONBLOCK), length: uint32(c.Proto),
	}, c.Timeout)
	if err != nil {
		return Result{}, err
	}
	return p.keep(c, fd)
}

func ringConnect(p *prober, c *Call) (Result, error) {
	r, fd, err := onRing(p, c)
	if err != nil {
		return Result{}, err
	}
	to, err := address(c, c.Address)
	if err != nil {
		return Result{}, err
	}
	_, err = r.submit(submission{
		opcode: opConnect, fd: int32(fd), address: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(to)))), offset: uint64(len(to)),
	}, c.Timeout)
	runtime.KeepAlive(to)
	return Result{}, err
}

// ringSend sends, to an address if there is one.
func ringSend(p *prober, c *Call) (Result, error) {
	r, fd, err := onRing(p, c)
	if err != nil {
		return Result{}, err
	}
	data := content(c)
	s := submission{
		opcode: opSend, fd: int32(fd), address: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(data)))),
		length: uint32(len(data)), opFlags: unix.MSG_NOSIGNAL,
	}
	var to []byte
	if c.Address != "" { // addr2 and its length, since Linux 6.0
		if to, err = address(c, c.Address); err != nil {
			return Result{}, err
		}
		s.offset = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(to))))
		*(*uint16)(unsafe.Pointer(uintptr(unsafe.Pointer(&s)) + 44)) = uint16(len(to))
	}
	n, err := r.submit(s, c.Timeout)
	runtime.KeepAlive(data)
	runtime.KeepAlive(to)
	return Result{N: n}, err
}
