// Command confined gives up what a running core gives up, and then does what it is
// told: one thing that whoever took a core over might try. It prints what came of it.
package main

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core"
)

var attempts = map[string]func() error{
	"nothing":                func() error { return nil },
	"execve":                 func() error { return unix.Exec("/bin/true", []string{"true"}, nil) },
	"fork":                   call(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0),
	"clone3":                 call(unix.SYS_CLONE3, 0, 0, 0),
	"ptrace":                 call(unix.SYS_PTRACE, unix.PTRACE_ATTACH, 1, 0),
	"memory of others":       call(unix.SYS_PROCESS_VM_READV, 1, 0, 0),
	"kernel module":          call(unix.SYS_FINIT_MODULE, 0, 0, 0),
	"kernel module in bytes": call(unix.SYS_INIT_MODULE, 0, 0, 0),
	"kexec":                  call(unix.SYS_KEXEC_LOAD, 0, 0, 0),
	"mount":                  call(unix.SYS_MOUNT, 0, 0, 0),
	"new mount":              call(unix.SYS_FSOPEN, 0, 0, 0),
	"unshare":                call(unix.SYS_UNSHARE, unix.CLONE_NEWUSER, 0, 0),
	"setns":                  call(unix.SYS_SETNS, 0, 0, 0),
	"setuid":                 call(unix.SYS_SETUID, 1, 0, 0),
	"capset":                 call(unix.SYS_CAPSET, 0, 0, 0),
	"prctl":                  call(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 1, 0),
	"another filter":         call(unix.SYS_SECCOMP, 0, 0, 0),
	"keys of the kernel":     call(unix.SYS_KEYCTL, 0, 0, 0),
	"file by handle":         call(unix.SYS_OPEN_BY_HANDLE_AT, 0, 0, 0),
	"perf":                   call(unix.SYS_PERF_EVENT_OPEN, 0, 0, 0),
	"io_uring":               call(unix.SYS_IO_URING_SETUP, 1, 0, 0),
	"signal to others":       call(unix.SYS_KILL, 1, 0, 0),
	"clock":                  call(unix.SYS_CLOCK_SETTIME, 0, 0, 0),
	"reboot":                 call(unix.SYS_REBOOT, 0, 0, 0),
	"call of another ABI":    call(1<<30|unix.SYS_GETPID, 0, 0, 0),
	"packet socket":          call(unix.SYS_SOCKET, unix.AF_PACKET, unix.SOCK_RAW, 0),
	"vsock":                  call(unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM, 0),
	"executable memory": func() error {
		_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
		return err
	},
	"executable later": func() error {
		b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			return err
		}
		return unix.Mprotect(b, unix.PROT_READ|unix.PROT_EXEC)
	},
	"program":        call(unix.SYS_BPF, unix.BPF_PROG_LOAD, 0, 128), // none: EFAULT where that is admitted
	"raw socket":     call(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW),
	"file of others": func() error { return open("/proc/1/mem", unix.O_RDWR) },
}

func call(number, a, b, c uintptr) func() error {
	return func() error {
		if _, _, errno := unix.Syscall(number, a, b, c); errno != 0 {
			return errno
		}
		return nil
	}
}

func open(path string, flags int) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func main() {
	attempt := attempts[os.Args[1]]
	if attempt == nil {
		fmt.Println("there is no such attempt")
		return
	}
	// On a thread that is older than the filter: it is under it all the same.
	ready, start, result := make(chan bool), make(chan bool), make(chan error)
	go func() {
		runtime.LockOSThread()
		ready <- true
		<-start
		result <- attempt()
	}()
	<-ready
	if err := core.DropPrivileges(); err != nil {
		fmt.Println("drop:", err)
		return
	}
	close(start)
	fmt.Println(<-result)
}
