package core

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fileCalls are the system calls that change files or read them, as Go makes them.
var fileCalls = map[int32]string{
	unix.SYS_OPENAT: "open", unix.SYS_READ: "read", unix.SYS_WRITE: "write", unix.SYS_FSYNC: "fsync",
	unix.SYS_RENAMEAT: "rename", unix.SYS_RENAMEAT2: "rename", unix.SYS_UNLINKAT: "unlink", unix.SYS_CLOSE: "close",
}

// Layouts of include/uapi/linux/seccomp.h.
type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

type verdict struct {
	id    uint64
	value int64
	errno int32
	flags uint32
}

// watched runs do on a thread of its own. Before each system call that touches a
// file below the directory, decide is asked, with the call's number from 1 on and its
// name; what it returns is the call's error, 0 lets it pass. It returns how many
// calls there were.
func watched(t *testing.T, dir string, do func(), decide func(n int, call string) unix.Errno) (calls int) {
	t.Helper()
	listener, finished := make(chan int), make(chan struct{})
	var thread atomic.Int64
	go func() {
		defer close(finished)
		runtime.LockOSThread() // never unlocked: the filter dies with the thread
		thread.Store(int64(unix.Gettid()))
		fd, err := filterCalls()
		if err != nil {
			t.Errorf("filter system calls: %v", err)
			fd = -1
		}
		listener <- fd
		if fd >= 0 {
			do()
		}
	}()
	fd := <-listener
	if fd < 0 {
		<-finished
		t.FailNow()
	}
	defer unix.Close(fd)
	for {
		// When the thread has ended nothing comes any more, and nothing wakes a receiver.
		ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(ready, 10); err != nil && !errors.Is(err, unix.EINTR) {
			t.Fatalf("await call: %v", err)
		}
		if ready[0].Revents&unix.POLLIN == 0 {
			select {
			case <-finished:
				return calls
			default:
				continue
			}
		}
		n := notification{}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n)))
		switch {
		case errno == unix.ENOENT, errno == unix.EINTR: // a signal took the call back
			continue
		case errno != 0:
			t.Fatalf("receive call: %v", errno)
		}
		a := verdict{id: n.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		if strings.HasPrefix(n.path(int(thread.Load())), dir) {
			calls++
			if errno := decide(calls, fileCalls[n.nr]); errno != 0 {
				a.flags, a.errno = 0, -int32(errno)
			}
		}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&a))); errno == unix.ENOENT {
			calls-- // a signal interrupted it; it comes again
		} else if errno != 0 {
			t.Fatalf("answer call: %v", errno)
		}
	}
}

// path is the file that a call is about.
func (n *notification) path(thread int) string {
	switch n.nr {
	case unix.SYS_OPENAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_UNLINKAT: // by name, all of them absolute
		var name [unix.PathMax]byte
		local := []unix.Iovec{{Base: &name[0]}}
		local[0].SetLen(len(name))
		// A read that crosses into memory that is not there comes back short.
		got, err := unix.ProcessVMReadv(thread, local, []unix.RemoteIovec{{Base: uintptr(n.args[1]), Len: len(name)}}, 0)
		if err != nil {
			return ""
		}
		return unix.ByteSliceToString(name[:got])
	}
	file, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", n.args[0]))
	if err != nil {
		return ""
	}
	return file
}

// filterCalls has the file calls of this thread told to the returned descriptor.
func filterCalls() (int, error) {
	// Load the call's number; compare with each; tell, or let it pass.
	program := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}}
	left := len(fileCalls)
	for nr := range fileCalls {
		program = append(program, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(nr), Jt: uint8(left)})
		left--
	}
	program = append(program, unix.SockFilter{Code: unix.BPF_RET, K: unix.SECCOMP_RET_ALLOW}, unix.SockFilter{Code: unix.BPF_RET, K: unix.SECCOMP_RET_USER_NOTIF})
	f := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&f)))
	runtime.KeepAlive(program)
	if errno != 0 {
		return 0, errno
	}
	return int(fd), nil
}

// The tool itself: calls are seen in their order, and fail as they are told to.
func TestWatched(t *testing.T) {
	dir := t.TempDir()
	var seen []string
	var err error
	watched(t, dir, func() { err = os.WriteFile(filepath.Join(dir, "x"), []byte("x"), 0o600) }, func(n int, call string) unix.Errno {
		seen = append(seen, call)
		if call == "write" {
			return unix.ENOSPC
		}
		return 0
	})
	if got := strings.Join(seen, " "); !errors.Is(err, unix.ENOSPC) || got != "open write close" {
		t.Errorf("calls %q, error %v", got, err)
	}
}
