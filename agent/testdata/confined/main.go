// Command confined connects to the core as the agent does, gives up what the agent
// gives up, and then does what it is told: one thing that whoever took an agent over
// might try. It prints what came of it.
//
//	confined CONFIG CORE-PID ATTEMPT
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/coreclient"
)

// world is what an attempt may use.
type world struct {
	config *agent.Config
	core   string // process id
	given  *proto.Descriptors
}

var attempts = map[string]func(w world) error{
	"read a map": func(w world) error {
		var key uint32
		return bpf(unix.BPF_MAP_GET_NEXT_KEY, [4]uint64{uint64(w.given.Bindings.Fd()), 0, uint64(uintptr(unsafe.Pointer(&key)))})
	},
	"write a map": func(w world) error {
		var key [32]byte
		p := uint64(uintptr(unsafe.Pointer(&key)))
		return bpf(unix.BPF_MAP_UPDATE_ELEM, [4]uint64{uint64(w.given.State.Fd()), p, p})
	},
	"open a map by its number": func(world) error { return bpf(unix.BPF_MAP_GET_FD_BY_ID, [4]uint64{1}) },
	"open a pin": func(w world) error {
		pin := append([]byte(filepath.Join(filepath.Dir(w.config.Core), "../bpf/demarc/maps/state")), 0)
		return bpf(unix.BPF_OBJ_GET, [4]uint64{uint64(uintptr(unsafe.Pointer(&pin[0])))})
	},
	"load a program":          func(world) error { return bpf(unix.BPF_PROG_LOAD, [4]uint64{}) },
	"memory of the core":      func(w world) error { return open("/proc/"+w.core+"/mem", unix.O_RDWR) },
	"descriptors of the core": func(w world) error { return open("/proc/"+w.core+"/fd", unix.O_RDONLY) },
	"read a file":             func(world) error { return open("/etc/passwd", unix.O_RDONLY) },
	"write a file": func(w world) error {
		return open(filepath.Join(filepath.Dir(w.config.Server), "x"), unix.O_WRONLY|unix.O_CREAT)
	},
	"run a program":       func(world) error { return unix.Exec("/bin/true", []string{"true"}, nil) },
	"call another host":   func(world) error { return dial("tcp", "127.0.0.1:7777") },
	"call the core again": func(w world) error { return dial("unix", w.config.Core) },
	"trace the core":      func(world) error { return errno(unix.Syscall(unix.SYS_PTRACE, unix.PTRACE_ATTACH, 1, 0)) },
	"signal the core":     func(world) error { return unix.Kill(1, unix.SIGKILL) },
	"new user namespace":  func(world) error { return unix.Unshare(unix.CLONE_NEWUSER) },
	"frames":              func(world) error { return errno(unix.Syscall(unix.SYS_SOCKET, unix.AF_PACKET, unix.SOCK_RAW, 0)) },
}

func errno(_, _ uintptr, e unix.Errno) error {
	if e != 0 {
		return e
	}
	return nil
}

func bpf(command uintptr, attributes [4]uint64) error {
	return errno(unix.Syscall(unix.SYS_BPF, command, uintptr(unsafe.Pointer(&attributes)), unsafe.Sizeof(attributes)))
}

func open(path string, flags int) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// dial fails at once, or it does not.
func dial(network, address string) error {
	c, err := net.DialTimeout(network, address, 10*time.Second)
	if err == nil {
		c.Close()
	}
	var cause unix.Errno
	if errors.As(err, &cause) {
		return cause
	}
	return err
}

func main() {
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Println("confined:", err)
		os.Exit(1)
	}
}

func run(file, core, name string) error {
	config, err := agent.ReadConfig(file)
	if err != nil {
		return err
	}
	client, err := coreclient.Dial(context.Background(), config.Core)
	if err != nil {
		return err
	}
	_, given, err := client.Hello()
	if err != nil {
		return err
	}
	a, err := agent.New(config, zap.NewNop())
	if err != nil {
		return err
	}
	if err := a.Confine(false); err != nil {
		return err
	}
	attempt := attempts[name]
	if attempt == nil {
		return errors.New("there is no such attempt")
	}
	fmt.Println(attempt(world{config, core, given}))
	return nil
}
