package fault

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/netlab"
)

// Answer is what becomes of a system call. The zero value lets it happen.
type Answer struct {
	Kill  bool       // SIGKILL, before it happens
	Errno unix.Errno // it does not happen, and the program is told this
}

// Supervised is a program whose system calls are decided one by one.
type Supervised struct {
	*netlab.Process

	mu     sync.Mutex
	decide func(*Call) Answer
	calls  []string // since it was last told how to decide
	broken error    // what the supervisor itself could not do
	over   chan struct{}
}

// Supervise starts a program in a machine of the test's making, and decides all
// its watched calls from the first on.
func Supervise(t testing.TB, lab *netlab.Lab, ns *netlab.Namespace, c *netlab.Cgroup, command netlab.Command, m Machine, decide func(*Call) Answer) *Supervised {
	t.Helper()
	dir, err := os.MkdirTemp(lab.Dir(), "s")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	told, err := json.Marshal(shim{Socket: socket, Path: command.Path, Args: command.Args, Machine: m})
	if err != nil {
		t.Fatal(err)
	}
	s := &Supervised{decide: decide, over: make(chan struct{})}
	command.Path, command.Args = "/proc/self/exe", nil
	command.Env = append(command.Env, shimVariable+"="+string(told))
	s.Process = ns.Start(c, command)
	// The program may fail before it has a filter: then nobody calls.
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-s.Ended():
			l.Close()
		case <-done:
		}
	}()
	listener, err := receive(l)
	if err != nil {
		t.Fatalf("supervise: %v; the program said:\n%s", err, s.Output())
	}
	go s.serve(listener)
	return s
}

// receive takes the descriptor that the shim sends.
func receive(l *net.UnixListener) (int, error) {
	conn, err := l.AcceptUnix()
	if err != nil {
		return -1, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return -1, err
	}
	b, control := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(b, control)
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil || len(messages) != 1 {
		return -1, fmt.Errorf("no descriptor came: %v", err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("no descriptor came: %v", err)
	}
	return fds[0], nil
}

// Decide makes the supervisor decide otherwise from now on, and count anew.
func (s *Supervised) Decide(decide func(*Call) Answer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.decide, s.calls = decide, nil
}

// Calls are those since the supervisor was last told how to decide.
func (s *Supervised) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.calls...)
}

// Gone waits until the program has ended and all its calls are accounted for.
func (s *Supervised) Gone(t testing.TB, within time.Duration) int {
	t.Helper()
	status := s.Wait(within)
	<-s.over
	if s.broken != nil {
		t.Fatalf("supervise: %v", s.broken)
	}
	return status
}

// notification and response are struct seccomp_notif and seccomp_notif_resp.
type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

type response struct {
	id    uint64
	value int64
	errno int32
	flags uint32
}

func (s *Supervised) serve(listener int) {
	defer close(s.over)
	defer unix.Close(listener)
	for {
		fds := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			s.broken = err
			return
		}
		if fds[0].Revents&unix.POLLIN == 0 {
			return // nobody is left
		}
		var n notification
		if err := control(listener, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n)); err != nil {
			if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINTR) { // the caller was killed meanwhile
				continue
			}
			s.broken = fmt.Errorf("receive: %w", err)
			return
		}
		a := s.see(&n)
		if a.Kill {
			_ = unix.Kill(s.PID(), unix.SIGKILL) // also if it is dead already
			continue
		}
		r := response{id: n.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		if a.Errno != 0 {
			r.errno, r.flags = -int32(a.Errno), 0
		}
		if err := control(listener, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r)); err != nil && !errors.Is(err, unix.ENOENT) {
			s.broken = fmt.Errorf("answer: %w", err)
			return
		}
	}
}

func (s *Supervised) see(n *notification) Answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := newCall(len(s.calls)+1, int(n.pid), uint32(n.nr), n.args)
	s.calls = append(s.calls, c.String())
	if s.decide == nil {
		return Answer{}
	}
	return s.decide(c)
}

func control(fd int, request uint, p unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(p)); errno != 0 {
		return errno
	}
	return nil
}
