package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/flow"
)

// The caller is a process of the probed workload: this program, in a cgroup below
// one of the workload's own. It connects when it is asked to, one line of JSON for
// each question, and says what the kernel made of it.

// callRequest asks for a connection, or to give the one up that is being made.
type callRequest struct {
	To   netip.AddrPort `json:"to"`
	Hops int            `json:"hops,omitempty"` // hop limit; 0 = the system's
	Stop bool           `json:"stop,omitempty"`
}

// callReply is sent twice for each connection: with its port before the SYN leaves,
// and with its end.
type callReply struct {
	Port   uint16 `json:"port,omitempty"`
	Result string `json:"result,omitempty"` // connected, stopped, or errno's name
}

const (
	callConnected = "connected"
	callStopped   = "stopped"
)

func newProbeCallerCommand(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "probe-caller", Hidden: true, Args: noArguments,
		Short: "Connect for demarc probe, which starts it",
		RunE:  func(c *cobra.Command, _ []string) error { return callerRun(c.Context(), env) },
	}
}

// callerRun serves requests until its input ends.
func callerRun(ctx context.Context, env *environment) error {
	requests := make(chan callRequest)
	go func() {
		defer close(requests)
		for d := json.NewDecoder(env.Stdin); ; {
			var r callRequest
			if d.Decode(&r) != nil {
				return
			}
			requests <- r
		}
	}()
	replies := json.NewEncoder(env.Stdout)
	for r := range requests {
		if r.Stop {
			continue // it had ended by itself
		}
		dialing, stop := context.WithCancel(ctx)
		done := make(chan string)
		go func() { done <- dialOnce(dialing, r, func(port uint16) { _ = replies.Encode(callReply{Port: port}) }) }()
		var result string
		select {
		case result = <-done:
		case _, ok := <-requests: // to stop, whatever it is
			stop()
			if result = <-done; !ok {
				return nil
			}
		}
		stop()
		if err := replies.Encode(callReply{Result: result}); err != nil {
			return err
		}
	}
	return nil
}

// dialOnce makes one connection, sends nothing on it, and closes it.
func dialOnce(ctx context.Context, r callRequest, bound func(port uint16)) string {
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var port uint16
		var bad error
		if err := c.Control(func(fd uintptr) { port, bad = prepareCall(int(fd), r) }); err != nil {
			return err
		}
		if bad == nil {
			bound(port)
		}
		return bad
	}}
	d.SetMultipathTCP(false)
	c, err := d.DialContext(ctx, "tcp", r.To.String())
	var errno syscall.Errno
	switch {
	case err == nil:
		c.Close()
		return callConnected
	case ctx.Err() != nil:
		return callStopped
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	}
	return flow.Escape(err.Error())
}

// prepareCall gives a socket its port before it connects, so that its packets can
// be told from others', and its hop limit.
func prepareCall(fd int, r callRequest) (port uint16, err error) {
	var any unix.Sockaddr = &unix.SockaddrInet4{}
	level, option := unix.IPPROTO_IP, unix.IP_TTL
	if r.To.Addr().Is6() {
		any, level, option = &unix.SockaddrInet6{}, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS
	}
	if r.Hops > 0 {
		if err := unix.SetsockoptInt(fd, level, option, r.Hops); err != nil {
			return 0, os.NewSyscallError("setsockopt", err)
		}
	}
	if err := unix.Bind(fd, any); err != nil {
		return 0, os.NewSyscallError("bind", err)
	}
	own, err := unix.Getsockname(fd)
	switch own := own.(type) {
	case *unix.SockaddrInet4:
		port = uint16(own.Port)
	case *unix.SockaddrInet6:
		port = uint16(own.Port)
	}
	return port, os.NewSyscallError("getsockname", err)
}

// caller is the parent's end of one.
type caller struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	out     *os.File
	pending []byte
	parent  *os.File // directory of the workload's cgroup
	cgroup  string   // name of its own, below
}

// callerCgroup starts the names of the cgroups of callers; their parent's process id
// follows.
const callerCgroup = "demarc-probe-"

// startCaller starts a caller below the first of these cgroups that takes one. The
// paths are below root, escaped, and come from the agent, which is not trusted:
// nothing is made outside of cgroup2. The caller stops it.
func startCaller(root string, paths []string) (*caller, error) {
	err := errors.New("no cgroup is bound to it")
	for _, path := range paths {
		var c *caller
		if c, err = startCallerAt(filepath.Join(root, filepath.Clean("/"+unescape(path)))); err == nil {
			return c, nil
		}
	}
	return nil, err
}

// startCallerAt holds on to the directory that it looked at: a path may lead
// elsewhere a moment later.
func startCallerAt(dir string) (_ *caller, err error) {
	c := &caller{cgroup: fmt.Sprintf("%s%d", callerCgroup, os.Getpid())}
	if c.parent, err = os.OpenFile(dir, unix.O_DIRECTORY, 0); err != nil {
		return nil, fmt.Errorf("find cgroup: %w", err)
	}
	defer func() {
		if err != nil {
			c.parent.Close()
		}
	}()
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(c.parent.Fd()), &fs); err != nil {
		return nil, fmt.Errorf("find cgroup %s: %w", dir, err)
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return nil, fmt.Errorf("find cgroup %s: it is no cgroup2 directory", dir)
	}
	if err := unix.Mkdirat(int(c.parent.Fd()), c.cgroup, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup below %s: %w", dir, err)
	}
	if err := c.start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start a process below %s: %w", dir, err), c.remove())
	}
	return c, nil
}

func (c *caller) start() error {
	at, err := unix.Openat(int(c.parent.Fd()), c.cgroup, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(at)
	out, answers, err := os.Pipe()
	if err != nil {
		return err
	}
	defer answers.Close()
	c.cmd = exec.Command("/proc/self/exe", "probe-caller")
	c.cmd.Stdout, c.cmd.Stderr = answers, os.Stderr
	// In its cgroup from its first instruction on, and gone when this thread is.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: at, Pdeathsig: syscall.SIGKILL}
	if c.in, err = c.cmd.StdinPipe(); err == nil {
		err = c.cmd.Start()
	}
	if err != nil {
		out.Close()
		return err
	}
	c.out = out
	return nil
}

// stop ends it and removes its cgroup.
func (c *caller) stop() error {
	c.in.Close()
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
	c.out.Close()
	defer c.parent.Close()
	return c.remove()
}

// remove removes its cgroup, which the kernel may still be burying a process in.
func (c *caller) remove() error {
	var err error
	for range 100 {
		if err = unix.Unlinkat(int(c.parent.Fd()), c.cgroup, unix.AT_REMOVEDIR); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("remove cgroup %s/%s: %w", c.parent.Name(), c.cgroup, err)
	}
	return nil
}

func (c *caller) ask(r callRequest) error {
	if err := json.NewEncoder(c.in).Encode(r); err != nil {
		return fmt.Errorf("ask caller: %w", err)
	}
	return nil
}

// reply reads the next reply; ok is false while there is no whole one. It must only
// be called when its output is readable, or a line is kept.
func (c *caller) reply(readable bool) (r callReply, ok bool, err error) {
	if readable {
		b := make([]byte, 512)
		n, err := c.out.Read(b)
		if err != nil {
			return r, false, fmt.Errorf("caller in %s ended: %w", c.cgroup, err)
		}
		c.pending = append(c.pending, b[:n]...)
	}
	line, rest, ok := strings.Cut(string(c.pending), "\n")
	if !ok {
		return r, false, nil
	}
	c.pending = []byte(rest)
	if err := json.NewDecoder(bufio.NewReader(strings.NewReader(line))).Decode(&r); err != nil {
		return r, false, fmt.Errorf("read caller's reply: %w", err)
	}
	return r, true, nil
}

// unescape undoes flow.Escape.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		var c byte
		if s[i] == '\\' && len(s) >= i+4 && s[i+1] == 'x' {
			if _, err := fmt.Sscanf(s[i+2:i+4], "%02x", &c); err == nil {
				b.WriteByte(c)
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
