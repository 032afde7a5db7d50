package netpol_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/rpc"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/demarc/demarc/test/netlab"
)

// podName is what the test binary is called where it is a pod.
const podName = "demarc-pod"

func init() {
	if os.Args[0] == podName {
		podMain()
	}
}

func podMain() {
	server := rpc.NewServer()
	if err := server.Register(&Pod{got: map[Arrival]bool{}, streams: map[string]net.Conn{}}); err != nil {
		fmt.Fprintln(os.Stderr, "pod:", err)
		os.Exit(1)
	}
	server.ServeConn(stdio{})
	os.Exit(0)
}

type stdio struct{}

func (stdio) Read(b []byte) (int, error)  { return os.Stdin.Read(b) }
func (stdio) Write(b []byte) (int, error) { return os.Stdout.Write(b) }
func (stdio) Close() error                { return os.Stdin.Close() }

// Pod is the process in a pod: it echoes on its ports, and calls others. Its exported
// methods are the calls that the test makes.
type Pod struct {
	mu      sync.Mutex
	got     map[Arrival]bool
	streams map[string]net.Conn
}

// Arrival is data that came to a port.
type Arrival struct {
	From     string // address
	Protocol string
	Port     uint16
}

// Target is one connection to try.
type Target struct {
	Protocol string // TCP or UDP
	Source   string // address
	To       netip.AddrPort
	Patience time.Duration
}

// Serve echoes on a port of an address.
func (p *Pod) Serve(at Target, _ *bool) error {
	note := func(from net.Addr) {
		address := netip.MustParseAddrPort(from.String()).Addr().Unmap().String()
		p.mu.Lock()
		defer p.mu.Unlock()
		p.got[Arrival{address, at.Protocol, at.To.Port()}] = true
	}
	if at.Protocol == "UDP" {
		c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at.To))
		if err != nil {
			return err
		}
		go func() {
			b := make([]byte, 64)
			for {
				n, from, err := c.ReadFrom(b)
				if err != nil {
					return
				}
				note(from)
				_, _ = c.WriteTo(b[:n], from)
			}
		}()
		return nil
	}
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	l, err := config.Listen(context.Background(), "tcp4", at.To.String())
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b := make([]byte, 64)
				for {
					n, err := c.Read(b)
					if err != nil {
						return
					}
					note(c.RemoteAddr())
					if _, err := c.Write(b[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
	return nil
}

// Arrivals tells what came since the last call.
func (p *Pod) Arrivals(_ bool, out *[]Arrival) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for a := range p.got {
		*out = append(*out, a)
	}
	clear(p.got)
	return nil
}

// Try tries connections, all at once, and tells of each whether a byte came back.
func (p *Pod) Try(targets []Target, out *[]bool) error {
	*out = make([]bool, len(targets))
	var all sync.WaitGroup
	for i, t := range targets {
		all.Go(func() {
			end := time.Now().Add(t.Patience)
			for again := true; again && !(*out)[i]; again = t.Protocol == "UDP" && time.Now().Before(end) {
				(*out)[i] = exchange(t, end) == nil
			}
		})
	}
	all.Wait()
	return nil
}

func dial(t Target, end time.Time) (net.Conn, error) {
	source := netip.AddrPortFrom(netip.MustParseAddr(t.Source), 0)
	if t.Protocol == "UDP" {
		return net.DialUDP("udp4", net.UDPAddrFromAddrPort(source), net.UDPAddrFromAddrPort(t.To))
	}
	d := net.Dialer{Deadline: end, LocalAddr: net.TCPAddrFromAddrPort(source)}
	d.SetMultipathTCP(false)
	return d.Dial("tcp4", t.To.String())
}

// exchange sends a byte and waits for it to come back. A datagram may be lost on a
// loaded machine: it is sent again after a while.
func exchange(t Target, end time.Time) error {
	c, err := dial(t, end)
	if err != nil {
		return refused(err, t)
	}
	defer c.Close()
	if t.Protocol == "UDP" {
		if soon := time.Now().Add(500 * time.Millisecond); soon.Before(end) {
			end = soon
		}
	}
	if err := c.SetDeadline(end); err != nil {
		return err
	}
	if _, err := c.Write([]byte("x")); err != nil {
		return refused(err, t)
	}
	b := make([]byte, 1)
	_, err = io.ReadFull(c, b)
	return err
}

// refused waits a little where a datagram was refused at once, so that trying again
// does not burn the machine.
func refused(err error, t Target) error {
	if t.Protocol == "UDP" {
		time.Sleep(50 * time.Millisecond)
	}
	return err
}

// Open opens a connection and keeps it under a name.
func (p *Pod) Open(t Target, name *string) error {
	c, err := dial(t, time.Now().Add(t.Patience))
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	*name = t.To.String()
	p.streams[*name] = c
	return nil
}

// Echo sends a byte on a connection that was kept, and waits for it.
func (p *Pod) Echo(t Target, _ *bool) error {
	p.mu.Lock()
	c := p.streams[t.To.String()]
	p.mu.Unlock()
	if err := c.SetDeadline(time.Now().Add(t.Patience)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// process is a pod's process, as the test has it.
type process struct {
	t     testing.TB
	name  string
	calls *rpc.Client
	cmd   *exec.Cmd
}

func startProcess(t testing.TB, name string, ns *netlab.Namespace, cgroup *netlab.Cgroup) *process {
	t.Helper()
	dir, err := os.Open(cgroup.Dir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{podName}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := ns.Do(cmd.Start); err != nil {
		t.Fatalf("start pod %s: %v", name, err)
	}
	p := &process{t: t, name: name, calls: rpc.NewClient(pipes{out, in}), cmd: cmd}
	t.Cleanup(p.stop)
	return p
}

type pipes struct {
	io.ReadCloser
	io.WriteCloser
}

func (p pipes) Close() error { return errors.Join(p.WriteCloser.Close(), p.ReadCloser.Close()) }

// stop ends the pod. It may be called twice.
func (p *process) stop() {
	_ = p.calls.Close()
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// call is one call that must succeed.
func call[R any](p *process, method string, args any) R {
	p.t.Helper()
	var reply R
	if err := p.calls.Call("Pod."+method, args, &reply); err != nil {
		p.t.Fatalf("pod %s: %s: %v", p.name, method, err)
	}
	return reply
}
