// Package fault breaks a running core from outside: it sees every system call that
// touches the kernel's programs, the disk or the devices, and at one of them kills
// the core or answers in the kernel's place. The core under test is the one that is
// shipped: it has no failpoint of its own.
package fault

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// shimVariable makes the test binary a shim: it becomes the program that it is
// told to, with a filter that asks the supervisor about system calls.
const shimVariable = "DEMARC_FAULT_SHIM"

// shim is what a shim is told. The zero value of each setting changes nothing.
type shim struct {
	Socket  string // of the supervisor, who gets the filter's listener
	Path    string // of the program
	Args    []string
	Machine Machine
}

// Machine is what the program finds itself in.
type Machine struct {
	Unshare  int               // namespaces of its own (CLONE_NEWNS, ...)
	Hide     []string          // directories that an empty file system is mounted over
	ReadOnly []string          // mounts that are read-only
	Replace  map[string]string // files that others are mounted over
	Memlock  uint64            // RLIMIT_MEMLOCK; 0 = as it is
}

func init() {
	if told := os.Getenv(shimVariable); told != "" {
		err := become(told)
		fmt.Fprintln(os.Stderr, "shim:", err)
		os.Exit(127)
	}
}

// become returns only if it fails. It runs in the process's first thread, which
// package netlab keeps it on: the filter is that of one thread, and of all that
// come from it.
func become(told string) error {
	var s shim
	if err := json.Unmarshal([]byte(told), &s); err != nil {
		return err
	}
	if err := s.Machine.enter(); err != nil {
		return err
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.Socket, Net: "unix"})
	if err != nil {
		return err
	}
	listener, err := installFilter()
	if err != nil {
		return fmt.Errorf("install filter: %w", err)
	}
	if _, _, err := conn.WriteMsgUnix([]byte{0}, unix.UnixRights(listener), nil); err != nil {
		return fmt.Errorf("hand over listener: %w", err)
	}
	var env []string
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, shimVariable+"=") {
			env = append(env, v)
		}
	}
	return syscall.Exec(s.Path, append([]string{filepath.Base(s.Path)}, s.Args...), env)
}

func (m Machine) enter() error {
	if err := unix.Unshare(m.Unshare); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if m.Unshare&unix.CLONE_NEWNS != 0 {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("keep mounts to itself: %w", err)
		}
	}
	for _, dir := range m.Hide {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
			return fmt.Errorf("hide %s: %w", dir, err)
		}
	}
	for file, other := range m.Replace {
		if err := unix.Mount(other, file, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("replace %s: %w", file, err)
		}
	}
	for _, dir := range m.ReadOnly {
		if err := unix.MountSetattr(unix.AT_FDCWD, dir, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return fmt.Errorf("make %s read-only: %w", dir, err)
		}
	}
	if m.Memlock != 0 {
		limit := unix.Rlimit{Cur: m.Memlock, Max: m.Memlock}
		if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
			return fmt.Errorf("limit locked memory: %w", err)
		}
	}
	return nil
}

// watched are the system calls that the supervisor is asked about.
var watched = map[uint32]string{
	unix.SYS_BPF: "bpf", unix.SYS_OPENAT: "openat", unix.SYS_OPENAT2: "openat2", unix.SYS_RENAMEAT: "rename", unix.SYS_RENAMEAT2: "rename",
	unix.SYS_UNLINKAT: "unlink", unix.SYS_LINKAT: "link", unix.SYS_MKDIRAT: "mkdir", unix.SYS_FSYNC: "fsync", unix.SYS_FDATASYNC: "fsync",
	unix.SYS_SOCKET: "socket", unix.SYS_BIND: "bind", unix.SYS_SENDTO: "sendto", unix.SYS_WRITE: "write",
}

// installFilter returns the listener. What the program says on its standard
// streams is not asked about.
func installFilter() (int, error) {
	const number, firstArgument = 0, 16 // offsets in struct seccomp_data
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	ret := func(action uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
	}
	equal := func(k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jt: yes, Jf: no}
	}
	program := []unix.SockFilter{load(number),
		equal(unix.SYS_WRITE, 0, 4), load(firstArgument), {Code: unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K, K: 2, Jt: 0, Jf: 1},
		ret(unix.SECCOMP_RET_USER_NOTIF), ret(unix.SECCOMP_RET_ALLOW),
	}
	for n := range watched {
		if n != unix.SYS_WRITE {
			program = append(program, equal(n, 0, 1), ret(unix.SECCOMP_RET_USER_NOTIF))
		}
	}
	program = append(program, ret(unix.SECCOMP_RET_ALLOW))
	f := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	fd, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		// Go interrupts its own threads all the time. What was asked once must not be
		// asked again for that.
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, uintptr(unsafe.Pointer(&f)))
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}
