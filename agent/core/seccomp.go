package core

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// processor is what differs between processors. The zero value admits nothing.
type processor struct{ arch, fstatat uint32 }

var processors = map[string]processor{
	"amd64": {unix.AUDIT_ARCH_X86_64, 262},
	"arm64": {unix.AUDIT_ARCH_AARCH64, 79},
}

// runtimeCalls are the system calls of a running core: every other one ends it.
// None starts a program, changes who it is, loads code, mounts, traces, or enters
// a namespace.
var runtimeCalls = []uint32{
	// The Go runtime: waiting, timers, threads, signals, memory.
	unix.SYS_FUTEX, unix.SYS_EPOLL_PWAIT, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOCK_GETTIME, unix.SYS_SCHED_YIELD,
	unix.SYS_SCHED_GETAFFINITY, unix.SYS_GETTID, unix.SYS_GETPID, unix.SYS_TGKILL, unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK,
	unix.SYS_RT_SIGRETURN, unix.SYS_SIGALTSTACK, unix.SYS_RESTART_SYSCALL, unix.SYS_SETITIMER, unix.SYS_TIMER_CREATE, unix.SYS_TIMER_SETTIME,
	unix.SYS_TIMER_DELETE, unix.SYS_MADVISE, unix.SYS_MUNMAP, unix.SYS_MINCORE, unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_GETRANDOM,
	unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EVENTFD2, unix.SYS_PIPE2, unix.SYS_UNAME,
	// Descriptors, whatever they are of. An ioctl would need a device: there is none.
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_PREAD64, unix.SYS_PWRITE64, unix.SYS_CLOSE, unix.SYS_FCNTL, unix.SYS_FSTAT, unix.SYS_LSEEK,
	// Files: images and keys, cgroups as they are listed, pins. Devices, and files of others, are beyond a root without capabilities.
	unix.SYS_OPENAT, unix.SYS_OPENAT2, unix.SYS_READLINKAT, unix.SYS_STATFS, unix.SYS_GETDENTS64, unix.SYS_MKDIRAT, unix.SYS_UNLINKAT,
	unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_LINKAT, unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_FTRUNCATE, unix.SYS_FLOCK,
	unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_MEMFD_CREATE, unix.SYS_GETEUID, unix.SYS_GETUID,
	// Sockets: the agent's, rtnetlink, refusals, the service manager's.
	unix.SYS_BIND, unix.SYS_CONNECT, unix.SYS_LISTEN, unix.SYS_ACCEPT4, unix.SYS_SENDTO, unix.SYS_RECVFROM, unix.SYS_SENDMSG, unix.SYS_RECVMSG,
	unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME, unix.SYS_GETSOCKOPT, unix.SYS_SETSOCKOPT, unix.SYS_SHUTDOWN,
}

// limitedCall is one that depends on an argument: on its lower half, which is all
// that the kernel looks at in these.
type limitedCall struct {
	call     uint32
	argument uint32
	mask     uint32 // what of it counts
	values   []uint32
	other    uint32 // what happens otherwise
}

var limitedCalls = []limitedCall{
	// Threads, no processes.
	{unix.SYS_CLONE, 0, unix.CLONE_THREAD, []uint32{unix.CLONE_THREAD}, unix.SECCOMP_RET_KILL_PROCESS},
	// No new memory that can be executed.
	{unix.SYS_MMAP, 2, unix.PROT_EXEC, []uint32{0}, unix.SECCOMP_RET_KILL_PROCESS},
	{unix.SYS_SOCKET, 0, ^uint32(0), []uint32{unix.AF_UNIX, unix.AF_NETLINK, unix.AF_INET, unix.AF_INET6}, unix.SECCOMP_RET_KILL_PROCESS},
	// Maps and links, no programs: whoever takes the core over brings no code of his own into the kernel. Refused only, because
	// cilium/ebpf loads small programs to find out why something else failed.
	{unix.SYS_BPF, 0, ^uint32(0), []uint32{
		unix.BPF_MAP_LOOKUP_ELEM, unix.BPF_MAP_UPDATE_ELEM, unix.BPF_MAP_DELETE_ELEM, unix.BPF_MAP_GET_NEXT_KEY, unix.BPF_MAP_LOOKUP_BATCH,
		unix.BPF_MAP_UPDATE_BATCH, unix.BPF_MAP_CREATE, unix.BPF_MAP_FREEZE, unix.BPF_BTF_LOAD, unix.BPF_PROG_TEST_RUN, unix.BPF_PROG_QUERY,
		unix.BPF_LINK_CREATE, unix.BPF_LINK_UPDATE, unix.BPF_LINK_DETACH, unix.BPF_ITER_CREATE, unix.BPF_OBJ_PIN, unix.BPF_OBJ_GET,
		unix.BPF_OBJ_GET_INFO_BY_FD,
	}, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
}

// Offsets into struct seccomp_data (include/uapi/linux/seccomp.h), on a
// little-endian machine.
const (
	seccompCall      = 0
	seccompArch      = 4
	seccompArguments = 16
)

// filter is the program that the kernel runs before each system call. A call that
// is not listed is the doing of somebody else: it ends the core, which is logged
// and harmless, since enforcement goes on without.
func (p processor) filter() []unix.SockFilter {
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	unless := func(value uint32, skip int) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: uint8(skip), K: value}
	}
	end := func(action uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
	}

	all := []unix.SockFilter{load(seccompArch), {Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 1, K: p.arch},
		end(unix.SECCOMP_RET_KILL_PROCESS), load(seccompCall)}
	for _, call := range append(runtimeCalls, p.fstatat) {
		all = append(all, unless(call, 1), end(unix.SECCOMP_RET_ALLOW))
	}
	for _, l := range limitedCalls {
		all = append(all, unless(l.call, 3+2*len(l.values)), load(seccompArguments+8*l.argument),
			unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: l.mask})
		for _, value := range l.values {
			all = append(all, unless(value, 1), end(unix.SECCOMP_RET_ALLOW))
		}
		all = append(all, end(l.other))
	}
	return append(all, end(unix.SECCOMP_RET_KILL_PROCESS))
}

// limitCalls puts every thread under the filter. It needs no_new_privs.
func limitCalls() error {
	p, known := processors[runtime.GOARCH]
	if !known {
		return fmt.Errorf("no system calls are listed for %s", runtime.GOARCH)
	}
	filter := p.filter()
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
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
