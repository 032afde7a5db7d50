package e2e_test

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
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/netlab"
)

// actorName is what the test binary is called where it acts for a workload.
const actorName = "demarc-actor"

func init() {
	if os.Args[0] == actorName {
		actorMain()
	}
}

// actorMain serves the test's calls on standard input and output until they end.
func actorMain() {
	server := rpc.NewServer()
	a := &Actor{streams: map[int]net.Conn{}, servers: map[string]*echoServer{}}
	if err := server.Register(a); err != nil {
		fmt.Fprintln(os.Stderr, "actor:", err)
		os.Exit(1)
	}
	server.ServeConn(stdio{})
	os.Exit(0)
}

type stdio struct{}

func (stdio) Read(b []byte) (int, error)  { return os.Stdin.Read(b) }
func (stdio) Write(b []byte) (int, error) { return os.Stdout.Write(b) }
func (stdio) Close() error                { return os.Stdin.Close() }

// actor is a process in a namespace and a cgroup that does what the test says. It
// ends with the test.
type actor struct {
	t     testing.TB
	calls *rpc.Client
	cmd   *exec.Cmd
	dir   string // its cgroup's directory
}

// startActor starts one. The child is in its cgroup from its first instruction on.
func startActor(t testing.TB, ns *netlab.Namespace, cgroup *netlab.Cgroup) *actor {
	t.Helper()
	dir, err := os.Open(cgroup.Dir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{actorName}
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
		t.Fatalf("start actor: %v", err)
	}
	a := &actor{t: t, calls: rpc.NewClient(pipes{out, in}), cmd: cmd, dir: cgroup.Dir()}
	t.Cleanup(a.stop)
	return a
}

type pipes struct {
	io.ReadCloser
	io.WriteCloser
}

func (p pipes) Close() error { return errors.Join(p.WriteCloser.Close(), p.ReadCloser.Close()) }

// stop ends the actor. It may be called twice.
func (a *actor) stop() {
	_ = a.calls.Close()
	_ = a.cmd.Process.Kill()
	_ = a.cmd.Wait()
}

// call is one call that must be answered; what it found is in the reply.
func call[R any](a *actor, method string, args any) R {
	a.t.Helper()
	var reply R
	if err := a.calls.Call("Actor."+method, args, &reply); err != nil {
		a.t.Fatalf("actor in %s: %s: %v", filepath.Base(a.dir), method, err)
	}
	return reply
}

// timeToAnswer is how long a loaded machine may take for what happens at once;
// timeOfSilence is how long who should get no answer waits for one.
const (
	timeToAnswer  = 10 * time.Second
	timeOfSilence = 200 * time.Millisecond
)

// patience is how long to wait for an answer that has to come, or must not.
func patience(comes bool) time.Duration {
	if comes {
		return timeToAnswer
	}
	return timeOfSilence
}

// dial connects, and keeps the connection as a stream if it came about.
func (a *actor) dial(to netip.AddrPort) DialReply {
	a.t.Helper()
	return call[DialReply](a, "Dial", DialArgs{To: to.String(), Timeout: time.Second})
}

// reaches says whether a connection comes about, by the first SYN, and its first
// bytes come back.
func (a *actor) reaches(to netip.AddrPort) bool {
	a.t.Helper()
	return a.reachesWithin(to, timeToAnswer)
}

// reachesWithin gives up earlier than reaches, for who may get no answer.
func (a *actor) reachesWithin(to netip.AddrPort, patience time.Duration) bool {
	a.t.Helper()
	r := call[DialReply](a, "Dial", DialArgs{To: to.String(), Timeout: patience})
	if r.Error != "" {
		return false
	}
	ok := call[string](a, "Exchange", ExchangeArgs{Stream: r.Stream, Bytes: 16, Timeout: timeToAnswer}) == ""
	call[bool](a, "Close", r.Stream)
	return ok && r.Lost == 0
}

// datagrams sends that many, one after the other has been answered or given up.
func (a *actor) datagrams(to netip.AddrPort, count int) DatagramReply {
	a.t.Helper()
	return a.datagramsWithin(to, count, timeToAnswer)
}

// datagramsWithin gives each up earlier.
func (a *actor) datagramsWithin(to netip.AddrPort, count int, patience time.Duration) DatagramReply {
	a.t.Helper()
	return call[DatagramReply](a, "Datagrams", DatagramArgs{To: to.String(), Count: count, Timeout: patience})
}

// serve answers TCP and UDP on a port of every address.
func (a *actor) serve(port uint16) {
	a.t.Helper()
	at := netip.AddrPortFrom(netip.IPv6Unspecified(), port).String()
	for _, network := range []string{"tcp", "udp"} {
		if problem := call[string](a, "Serve", ServeArgs{Network: network, At: at}); problem != "" {
			a.t.Fatalf("serve %s %s: %s", network, at, problem)
		}
	}
}

// served is what came in on a port so far.
func (a *actor) served(network string, port uint16) Served {
	a.t.Helper()
	at := netip.AddrPortFrom(netip.IPv6Unspecified(), port).String()
	return call[Served](a, "Served", ServeArgs{Network: network, At: at})
}

// Actor is the other end: its methods run in the workload's process.
type Actor struct {
	mu       sync.Mutex
	streams  map[int]net.Conn
	last     int
	servers  map[string]*echoServer
	traffic  *traffic
	attempts *attempts
	tuns     map[string]*os.File
	ear      int // a packet socket
	pester   *pester
}

// DialArgs is a connection to make, from an address of its own choice if From is
// empty.
type DialArgs struct {
	To, From string
	Timeout  time.Duration
}

// DialReply is a stream's number, or what the application was told.
type DialReply struct {
	Stream int
	Local  string
	Lost   int    // SYNs that were sent again
	Error  string // errno's text, or "timeout"
	Took   time.Duration
}

// Dial makes a TCP connection.
func (a *Actor) Dial(args DialArgs, reply *DialReply) error {
	start := time.Now()
	c, err := dialStream(args)
	reply.Took = time.Since(start)
	if err != nil {
		reply.Error = problem(err)
		return nil
	}
	if reply.Lost, err = lostOf(c); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last++
	reply.Stream, reply.Local = a.last, c.LocalAddr().String()
	a.streams[a.last] = c
	return nil
}

// dialStream connects. Its time begins at connect(2) and not before: however late a
// loaded machine gets there, a SYN leaves.
func dialStream(args DialArgs) (net.Conn, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	d := net.Dialer{Control: func(string, string, syscall.RawConn) error {
		if args.Timeout > 0 {
			time.AfterFunc(args.Timeout, cancel)
		}
		return nil
	}}
	d.SetMultipathTCP(false)
	if args.From != "" {
		from, err := netip.ParseAddrPort(args.From)
		if err != nil {
			return nil, err
		}
		d.LocalAddr = net.TCPAddrFromAddrPort(from)
	}
	return d.DialContext(ctx, "tcp", args.To)
}

// lostOf is how many segments of a stream's own way were lost: sent again, and not
// because the machine was too slow for the first ones to be acknowledged in time.
func lostOf(c net.Conn) (lost int, err error) {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var bad error
	err = raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, bad = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); bad == nil {
			lost = int(info.Total_retrans) - int(info.Dsack_dups)
		}
	})
	return lost, errors.Join(err, bad)
}

// problem is an error as the application would name it.
func problem(err error) string {
	var errno syscall.Errno
	var timeout net.Error
	switch {
	case errors.As(err, &errno):
		return errno.Error()
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, context.Canceled):
		return "timeout"
	}
	return err.Error()
}

func (a *Actor) stream(number int) (net.Conn, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.streams[number]
	if c == nil {
		return nil, fmt.Errorf("no stream %d", number)
	}
	return c, nil
}

// ExchangeArgs is data to send on a stream and to get back.
type ExchangeArgs struct {
	Stream, Bytes int
	Timeout       time.Duration
}

// Exchange sends bytes to an echo server and reads them back.
func (a *Actor) Exchange(args ExchangeArgs, reply *string) error {
	c, err := a.stream(args.Stream)
	if err != nil {
		return err
	}
	if err := exchange(c, args.Bytes, args.Timeout); err != nil {
		*reply = problem(err)
	}
	return nil
}

func exchange(c net.Conn, n int, timeout time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	b := make([]byte, n)
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b)
	return err
}

// Push writes to a stream without waiting for an answer, until the socket takes no
// more or the time is over; it returns what the kernel took.
func (a *Actor) Push(args ExchangeArgs, reply *int) error {
	c, err := a.stream(args.Stream)
	if err != nil {
		return err
	}
	if err := c.SetDeadline(time.Now().Add(args.Timeout)); err != nil {
		return err
	}
	*reply, _ = c.Write(make([]byte, args.Bytes))
	return nil
}

// Vanish ends a stream as a crash of its host does: the peer is told nothing. See
// TCP_REPAIR in tcp(7) of the kernel.
func (a *Actor) Vanish(stream int, _ *bool) error {
	c, err := a.stream(stream)
	if err != nil {
		return err
	}
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	var bad error
	err = raw.Control(func(fd uintptr) {
		bad = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, unix.TCP_REPAIR, 1)
	})
	if err := errors.Join(err, bad); err != nil {
		return err
	}
	return a.Close(stream, nil)
}

// Close closes a stream.
func (a *Actor) Close(stream int, _ *bool) error {
	c, err := a.stream(stream)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.streams, stream)
	return c.Close()
}

// DatagramArgs is a conversation from one socket.
type DatagramArgs struct {
	To, From string
	Count    int
	Bytes    int           // of each; 0 = 16
	Timeout  time.Duration // for each answer; 0 = do not wait for any
	Every    time.Duration // between two, without waiting for answers
}

// DatagramReply is what the application saw of it.
type DatagramReply struct {
	Sent     int
	Answered int
	Local    string
	Errors   map[string]int
}

// Ask sends one datagram from a connected socket, and says what comes of it: ""
// for an answer, else errno's text, or "timeout".
func (a *Actor) Ask(args DialArgs, reply *string) error {
	c, err := net.Dial("udp", args.To)
	if err != nil {
		*reply = problem(err)
		return nil
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(args.Timeout)); err != nil {
		return err
	}
	if _, err = c.Write([]byte("question")); err == nil {
		_, err = c.Read(make([]byte, 64))
	}
	if err != nil {
		*reply = problem(err)
	}
	return nil
}

// Datagrams sends datagrams from one unconnected socket.
func (a *Actor) Datagrams(args DatagramArgs, reply *DatagramReply) error {
	to, err := netip.ParseAddrPort(args.To)
	if err != nil {
		return err
	}
	from := &net.UDPAddr{}
	if args.From != "" {
		at, err := netip.ParseAddrPort(args.From)
		if err != nil {
			return err
		}
		from = net.UDPAddrFromAddrPort(at)
	}
	network := "udp4"
	if to.Addr().Is6() {
		network = "udp6"
	}
	c, err := net.ListenUDP(network, from)
	if err != nil {
		return err
	}
	defer c.Close()
	reply.Local, reply.Errors = c.LocalAddr().String(), map[string]int{}
	size := max(args.Bytes, 16)
	b := make([]byte, size+64)
	for range args.Count {
		if _, err := c.WriteToUDPAddrPort(b[:size], to); err != nil {
			reply.Errors[problem(err)]++
			continue
		}
		reply.Sent++
		if args.Timeout == 0 {
			time.Sleep(args.Every)
			continue
		}
		if err := c.SetReadDeadline(time.Now().Add(args.Timeout)); err != nil {
			return err
		}
		if n, _, err := c.ReadFromUDPAddrPort(b); err == nil && n == size {
			reply.Answered++
		}
	}
	return nil
}

// ServeArgs is a socket that answers.
type ServeArgs struct {
	Network, At string
	Silent      bool // do not answer datagrams
}

// Served is what came in: connections, or datagrams and the last sender.
type Served struct {
	Count int
	Bytes int
	Last  string
}

type echoServer struct {
	mu     sync.Mutex
	served Served
	packet net.PacketConn // of UDP
}

func (s *echoServer) note(count, bytes int, from net.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.served.Count += count
	s.served.Bytes += bytes
	s.served.Last = from.String()
}

// Serve listens and sends back what comes in.
func (a *Actor) Serve(args ServeArgs, reply *string) error {
	s := &echoServer{}
	var err error
	if args.Network == "tcp" {
		var config net.ListenConfig
		config.SetMultipathTCP(false)
		var l net.Listener
		if l, err = config.Listen(context.Background(), "tcp", args.At); err == nil {
			go s.streams(l)
		}
	} else if s.packet, err = net.ListenPacket("udp", args.At); err == nil {
		go s.datagrams(s.packet, args.Silent)
	}
	if err != nil {
		*reply = problem(err)
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.servers[args.Network+args.At] = s
	return nil
}

func (s *echoServer) streams(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		s.note(1, 0, c.RemoteAddr())
		go func() {
			defer c.Close()
			b := make([]byte, 32<<10)
			for {
				n, err := c.Read(b)
				s.note(0, n, c.RemoteAddr())
				if err != nil {
					return
				}
				if _, err := c.Write(b[:n]); err != nil {
					return
				}
			}
		}()
	}
}

func (s *echoServer) datagrams(c net.PacketConn, silent bool) {
	b := make([]byte, 64<<10)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		s.note(1, n, from)
		if !silent {
			_, _ = c.WriteTo(b[:n], from)
		}
	}
}

// Served says what a server has got.
func (a *Actor) Served(args ServeArgs, reply *Served) error {
	a.mu.Lock()
	s := a.servers[args.Network+args.At]
	a.mu.Unlock()
	if s == nil {
		return fmt.Errorf("nothing serves %s %s", args.Network, args.At)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	*reply = s.served
	return nil
}

// SendArgs is one datagram from a server's own socket.
type SendArgs struct{ At, To string }

// SendFrom sends a datagram that nobody asked for from a server's socket.
func (a *Actor) SendFrom(args SendArgs, reply *string) error {
	a.mu.Lock()
	s := a.servers["udp"+args.At]
	a.mu.Unlock()
	to, err := net.ResolveUDPAddr("udp", args.To)
	if s == nil || err != nil {
		return fmt.Errorf("nothing serves %s, or %v", args.At, err)
	}
	if _, err := s.packet.WriteTo(make([]byte, 16), to); err != nil {
		*reply = problem(err)
	}
	return nil
}

func median(all []time.Duration) time.Duration {
	if len(all) == 0 {
		return 0
	}
	slices.Sort(all)
	return all[len(all)/2]
}
