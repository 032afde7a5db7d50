// Package calls limits the system calls of a process to a list (seccomp). A call
// that is not listed is the doing of somebody else than the program: it ends the
// process, which the kernel logs where it audits.
package calls

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Rule admits a call by one of its arguments: by the lower half of it, which is
// all that the kernel looks at in those that are of use here.
type Rule struct {
	Call     uint32
	Argument uint32
	Mask     uint32 // what of it counts
	Values   []uint32
	Else     uint32 // what happens otherwise; SECCOMP_RET_KILL_PROCESS is 0x80000000
}

// runtimeCalls are what a Go program needs, whatever it does.
var runtimeCalls = []uint32{
	// Waiting, timers, threads, signals, memory.
	unix.SYS_FUTEX, unix.SYS_EPOLL_PWAIT, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOCK_GETTIME, unix.SYS_SCHED_YIELD,
	unix.SYS_SCHED_GETAFFINITY, unix.SYS_GETTID, unix.SYS_GETPID, unix.SYS_TGKILL, unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK,
	unix.SYS_RT_SIGRETURN, unix.SYS_SIGALTSTACK, unix.SYS_RESTART_SYSCALL, unix.SYS_SETITIMER, unix.SYS_TIMER_CREATE, unix.SYS_TIMER_SETTIME,
	unix.SYS_TIMER_DELETE, unix.SYS_MADVISE, unix.SYS_MUNMAP, unix.SYS_MINCORE, unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_GETRANDOM,
	unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EVENTFD2, unix.SYS_PIPE2, unix.SYS_UNAME, unix.SYS_GETUID, unix.SYS_GETEUID,
	// Descriptors, whatever they are of. No ioctl: that would be a device's.
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_PREAD64, unix.SYS_PWRITE64, unix.SYS_CLOSE, unix.SYS_FCNTL, unix.SYS_FSTAT, unix.SYS_LSEEK,
	// Files as they are, and sockets once they are made.
	unix.SYS_OPENAT, unix.SYS_READLINKAT, unix.SYS_STATFS, unix.SYS_GETDENTS64, unix.SYS_MEMFD_CREATE, unix.SYS_BIND, unix.SYS_CONNECT,
	unix.SYS_LISTEN, unix.SYS_ACCEPT4, unix.SYS_SENDTO, unix.SYS_RECVFROM, unix.SYS_SENDMSG, unix.SYS_RECVMSG, unix.SYS_GETSOCKNAME,
	unix.SYS_GETPEERNAME, unix.SYS_GETSOCKOPT, unix.SYS_SETSOCKOPT, unix.SYS_SHUTDOWN,
}

// runtimeRules make threads and no processes, and no new memory that can be
// executed.
var runtimeRules = []Rule{
	{unix.SYS_CLONE, 0, unix.CLONE_THREAD, []uint32{unix.CLONE_THREAD}, unix.SECCOMP_RET_KILL_PROCESS},
	{unix.SYS_MMAP, 2, unix.PROT_EXEC, []uint32{0}, unix.SECCOMP_RET_KILL_PROCESS},
	// The C library, where a program is linked with it for a test. clone3 hides its flags: it falls back.
	{unix.SYS_MPROTECT, 2, unix.PROT_EXEC, []uint32{0}, unix.SECCOMP_RET_KILL_PROCESS},
	{unix.SYS_CLONE3, 0, 0, nil, unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
}

// processor is what differs between processors.
type processor struct{ arch, fstatat uint32 }

var processors = map[string]processor{
	"amd64": {unix.AUDIT_ARCH_X86_64, 262},
	"arm64": {unix.AUDIT_ARCH_AARCH64, 79},
}

// Limit leaves every thread of this process what Go needs, and the given calls. It
// needs no_new_privs.
func Limit(calls []uint32, rules []Rule) error {
	p, known := processors[runtime.GOARCH]
	if !known {
		return fmt.Errorf("no system calls are listed for %s", runtime.GOARCH)
	}
	all := filter(p, calls, rules)
	program := unix.SockFprog{Len: uint16(len(all)), Filter: &all[0]}
	// A thread that cannot take it is the result, not an error.
	thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return errno
	}
	if thread != 0 {
		return fmt.Errorf("thread %d is under another filter", thread)
	}
	return nil
}

// Offsets into struct seccomp_data (include/uapi/linux/seccomp.h), on a
// little-endian machine.
const (
	offsetCall      = 0
	offsetArch      = 4
	offsetArguments = 16
)

// filter is the program that the kernel runs before each call.
func filter(p processor, calls []uint32, rules []Rule) []unix.SockFilter {
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	unless := func(value uint32, skip int) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: uint8(skip), K: value}
	}
	end := func(action uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
	}

	all := []unix.SockFilter{
		load(offsetArch), unless(p.arch, 1), load(offsetCall), // another architecture's number is none of these
	}
	for _, list := range [][]uint32{runtimeCalls, {p.fstatat}, calls} {
		for _, call := range list {
			all = append(all, unless(call, 1), end(unix.SECCOMP_RET_ALLOW))
		}
	}
	for _, rules := range [][]Rule{runtimeRules, rules} {
		for _, r := range rules {
			all = append(all, unless(r.Call, 3+2*len(r.Values)), load(offsetArguments+8*r.Argument),
				unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: r.Mask})
			for _, value := range r.Values {
				all = append(all, unless(value, 1), end(unix.SECCOMP_RET_ALLOW))
			}
			all = append(all, end(r.Else))
		}
	}
	return append(all, end(unix.SECCOMP_RET_KILL_PROCESS))
}
