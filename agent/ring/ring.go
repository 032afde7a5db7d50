// Package ring reads BPF ring buffers, with little of them mapped.
//
// A buffer is mapped through a window that moves with its reader. Mapped whole, and
// twice as libraries do so that no record is cut at its end, the agent's buffers
// would be a third of its resident memory.
package ring

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// windowSize is how much of a buffer is mapped at a time: so large that moving it
// costs nothing beside what is read.
const windowSize = 256 << 10

// Reader takes the records out of one buffer. Make one with Open. Read is for one
// goroutine at a time.
type Reader struct {
	file   *os.File
	conn   syscall.RawConn
	size   uint64 // of the buffer, a power of two
	closed atomic.Bool

	mu       sync.Mutex // held while what is mapped is used
	consumer []byte     // page of the reader's position
	producer []byte     // page of the kernel's position
	window   []byte     // nil while nothing is mapped
	start    uint64     // where in the buffer the window begins
}

// Open takes over the descriptor of a ring buffer of size bytes; it closes it also
// when it fails.
func Open(fd int, size uint32) (_ *Reader, err error) {
	// The Go runtime waits for files that do not block by themselves.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("do not block: %w", err), unix.Close(fd))
	}
	r := &Reader{file: os.NewFile(uintptr(fd), "ring buffer"), size: uint64(size)}
	defer func() {
		if err != nil {
			r.Close()
		}
	}()
	if r.conn, err = r.file.SyscallConn(); err != nil {
		return nil, err
	}
	page := os.Getpagesize()
	if r.consumer, err = unix.Mmap(fd, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map the reader's position: %w", err)
	}
	if r.producer, err = unix.Mmap(fd, int64(page), page, unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map the kernel's position: %w", err)
	}
	return r, nil
}

// position is the number at the start of one of the two pages.
func position(page []byte) *uint64 { return (*uint64)(unsafe.Pointer(&page[0])) }

// Close ends a Read that waits, which returns os.ErrClosed.
func (r *Reader) Close() error {
	r.closed.Store(true)
	errs := []error{r.file.Close()}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range []*[]byte{&r.consumer, &r.producer, &r.window} {
		if *m != nil {
			errs = append(errs, unix.Munmap(*m))
			*m = nil
		}
	}
	return errors.Join(errs...)
}

// Available is how many bytes wait to be read, those of headers too.
func (r *Reader) Available() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.consumer == nil {
		return 0
	}
	return int(atomic.LoadUint64(position(r.producer)) - atomic.LoadUint64(position(r.consumer)))
}

// Read waits for the next record and returns it in buf, which it makes larger if
// need be. More says that others were there already.
func (r *Reader) Read(buf []byte) (record []byte, more bool, err error) {
	var problem error
	err = r.conn.Read(func(fd uintptr) (done bool) {
		record, more, done, problem = r.take(int(fd), buf)
		return done
	})
	if r.closed.Load() {
		return nil, false, os.ErrClosed
	}
	return record, more, errors.Join(err, problem)
}

// Take is Read that does not wait, and does not ask the runtime, which costs more than
// what it does for a record: found is false where nothing is there, and where only Read
// can tell.
func (r *Reader) Take(buf []byte) (record []byte, more, found bool, err error) {
	return r.take(stay, buf)
}

// stay stands for a descriptor where the window may not be moved: who does not wait by the
// runtime does not know that the file is still open.
const stay = -1

var errMove = errors.New("the window would have to be moved")

// Of a record's header, see bpf_ringbuf_hdr of the kernel.
const (
	headerSize = 8
	busy       = uint32(unix.BPF_RINGBUF_BUSY_BIT)
	discarded  = uint32(unix.BPF_RINGBUF_DISCARD_BIT)
)

// take returns the next record, if there is one.
func (r *Reader) take(fd int, buf []byte) (record []byte, more, found bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	record, more, found, err = r.next(fd, buf)
	if errors.Is(err, errMove) {
		return nil, false, false, nil
	}
	return record, more, found, err
}

func (r *Reader) next(fd int, buf []byte) (record []byte, more, found bool, err error) {
	if r.consumer == nil {
		return nil, false, false, nil
	}
	at := atomic.LoadUint64(position(r.consumer))
	for {
		// Looked at anew behind each record that was skipped: the kernel wakes nobody for
		// what it wrote while the reader's position was still before that.
		end := atomic.LoadUint64(position(r.producer))
		if at == end {
			return nil, false, false, nil
		}
		b, err := r.at(fd, at)
		if err != nil {
			return nil, false, true, err
		}
		// Headers lie at multiples of eight, so none is cut by the window's end.
		header := atomic.LoadUint32((*uint32)(unsafe.Pointer(&b[0])))
		if header&busy != 0 {
			// It is still being written. The kernel takes the mark away before it looks
			// where the reader is, and wakes one that is here.
			return nil, false, false, nil
		}
		length := uint64(header &^ discarded)
		next := at + headerSize + (length+7)&^7
		if next-at > end-at {
			return nil, false, true, fmt.Errorf("a record of %d bytes: %w", length, io.ErrUnexpectedEOF)
		}
		if header&discarded != 0 {
			atomic.StoreUint64(position(r.consumer), next)
			at = next
			continue
		}
		if record, err = r.copy(fd, buf[:0], at+headerSize, length); err != nil {
			return nil, false, true, err
		}
		atomic.StoreUint64(position(r.consumer), next)
		return record, next != end, true, nil
	}
}

// copy appends what lies at a position, also over the window's and the buffer's end.
func (r *Reader) copy(fd int, to []byte, at, length uint64) ([]byte, error) {
	for length > 0 {
		b, err := r.at(fd, at)
		if err != nil {
			return nil, err
		}
		n := min(length, uint64(len(b)))
		to = append(to, b[:n]...)
		at, length = at+n, length-n
	}
	return to, nil
}

// at is what the window holds from a position on; it is moved there if it has to be.
func (r *Reader) at(fd int, position uint64) ([]byte, error) {
	width := min(windowSize, r.size)
	offset := position & (r.size - 1)
	start := offset &^ (width - 1)
	if r.window == nil || start != r.start {
		if fd == stay {
			return nil, errMove
		}
		if r.window != nil {
			if err := unix.Munmap(r.window); err != nil {
				return nil, fmt.Errorf("move the window: %w", err)
			}
			r.window = nil
		}
		// The two pages of positions come first.
		window, err := unix.Mmap(fd, int64(start)+2*int64(os.Getpagesize()), int(width), unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return nil, fmt.Errorf("move the window: %w", err)
		}
		r.window, r.start = window, start
	}
	return r.window[offset-start:], nil
}
