package fault

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/netlab"
)

// proberVariable makes the test binary a prober.
const proberVariable = "DEMARC_FAULT_PROBER"

func init() {
	if told := os.Getenv(proberVariable); told != "" {
		p := prober{out: json.NewEncoder(os.Stdout)}
		if err := json.Unmarshal([]byte(told), &p.probes); err != nil {
			fmt.Fprintln(os.Stderr, "prober:", err)
			os.Exit(2)
		}
		p.run()
		os.Exit(0)
	}
}

// probes are what a prober does, all the time.
type probes struct {
	Serve   []string      // where it answers, TCP and UDP
	Streams []string      // connections that are kept open, and used
	Connect []string      // connections that are made and used, one after the other
	Denied  []string      // where nothing may go: TCP and UDP are tried
	Strange []string      // where nobody may answer the like of it
	Every   time.Duration // between two denied tries of a kind
}

// said is a line of a prober. Exactly one of its parts is there.
type said struct {
	At      time.Time
	Problem string   `json:",omitempty"` // something that must not be
	Ready   bool     `json:",omitempty"` // everything has begun
	Counts  *counted `json:",omitempty"` // when it is told to end
}

// counted is what went well.
type counted struct{ Exchanged, Connected, Denied, Strange int }

type prober struct {
	probes
	mu     sync.Mutex
	out    *json.Encoder
	counts counted
	all    sync.WaitGroup
}

func (p *prober) say(s said) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.At = time.Now()
	_ = p.out.Encode(s)
}

func (p *prober) fail(format string, args ...any) { p.say(said{Problem: fmt.Sprintf(format, args...)}) }

func (p *prober) count(n *int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	*n++
}

// patience is for what must work: long enough for a machine that is busy.
const patience = 10 * time.Second

func (p *prober) run() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	for _, at := range p.Serve {
		if err := serve(at); err != nil {
			p.fail("serve %s: %v", at, err)
		}
	}
	for _, to := range p.Streams {
		c, err := dial("tcp", to, patience)
		if err != nil {
			p.fail("stream: %v", err)
			continue
		}
		p.all.Go(func() { p.use(ctx, c) })
	}
	for _, to := range p.Connect {
		p.repeat(ctx, 5*time.Millisecond, func() { p.connect(to) })
	}
	for _, to := range p.Denied {
		p.repeat(ctx, p.Every, func() { p.denied(to) })
	}
	for _, to := range p.Strange {
		p.repeat(ctx, 10*time.Millisecond, func() {
			if c, err := dial("tcp", to, 20*time.Millisecond); err == nil {
				c.Close()
				p.fail("a stranger connected to %s", to)
			}
			p.count(&p.counts.Strange)
		})
	}
	p.say(said{Ready: true})
	<-ctx.Done()
	p.all.Wait()
	p.say(said{Counts: &p.counts})
}

func (p *prober) repeat(ctx context.Context, every time.Duration, do func()) {
	p.all.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				do()
			}
		}
	})
}

func dial(network, to string, timeout time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: timeout, KeepAlive: -1}
	d.SetMultipathTCP(false)
	return d.Dial(network, to)
}

// use exchanges data on a connection until it is told to stop, or it breaks.
func (p *prober) use(ctx context.Context, c net.Conn) {
	defer c.Close()
	for ctx.Err() == nil {
		if err := exchange(c); err != nil {
			p.fail("stream %s > %s broke: %v", c.LocalAddr(), c.RemoteAddr(), err)
			return
		}
		p.count(&p.counts.Exchanged)
		time.Sleep(2 * time.Millisecond)
	}
}

func exchange(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	b := []byte("sixteen letters.")
	if _, err := c.Write(b); err != nil {
		return err
	}
	got := make([]byte, len(b))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(got, b) {
		return fmt.Errorf("sent %q, got %q", b, got)
	}
	return nil
}

func (p *prober) connect(to string) {
	c, err := dial("tcp", to, patience)
	if err == nil {
		err = exchange(c)
		c.Close()
	}
	if err != nil {
		p.fail("allowed connection to %s: %v", to, err)
		return
	}
	p.count(&p.counts.Connected)
}

// denied tries to connect and to send. Both must be refused at once.
func (p *prober) denied(to string) {
	c, err := dial("tcp", to, patience)
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, syscall.EPERM) {
		p.fail("connect to %s: %v, want it denied", to, err)
	}
	at := netip.MustParseAddrPort(to)
	network := "udp4"
	if at.Addr().Is6() {
		network = "udp6"
	}
	u, err := net.ListenUDP(network, nil)
	if err != nil {
		p.fail("make a socket: %v", err)
		return
	}
	defer u.Close()
	if _, err = u.WriteToUDPAddrPort(make([]byte, 16), at); !errors.Is(err, syscall.EPERM) {
		p.fail("send to %s: %v, want it denied", to, err)
	}
	p.count(&p.counts.Denied)
}

// serve sends back what comes in.
func serve(at string) error {
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	l, err := config.Listen(context.Background(), "tcp", at)
	if err != nil {
		return err
	}
	u, err := net.ListenPacket("udp", at)
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
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := u.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = u.WriteTo(b[:n], from)
		}
	}()
	return nil
}

// running is a prober, seen from the test.
type running struct {
	t testing.TB
	*netlab.Process
	known int // lines that the test has looked at
}

func startProber(t testing.TB, ns *netlab.Namespace, c *netlab.Cgroup, p probes) *running {
	t.Helper()
	told, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	r := &running{t: t, Process: ns.Start(c, netlab.Command{Path: "/proc/self/exe", Env: []string{proberVariable + "=" + string(told)}})}
	for end := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		for _, s := range r.lines(0) {
			if s.Ready {
				return r
			}
		}
		if time.Now().After(end) {
			t.Fatalf("prober does not begin; it said:\n%s", r.Output())
		}
	}
}

// lines are what it said from the n-th line on.
func (r *running) lines(n int) (all []said) {
	r.t.Helper()
	whole := r.Output()
	whole = whole[:strings.LastIndexByte(whole, '\n')+1]
	for i, line := range strings.Split(strings.TrimSuffix(whole, "\n"), "\n") {
		if i < n || line == "" {
			continue
		}
		var s said
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			r.t.Fatalf("prober said %q", line)
		}
		all = append(all, s)
	}
	return all
}

// problems are those that the test has not heard of yet.
func (r *running) problems() (all []string) {
	r.t.Helper()
	news := r.lines(r.known)
	r.known += len(news)
	for _, s := range news {
		if s.Problem != "" {
			all = append(all, s.At.Format("15:04:05.000 ")+s.Problem)
		}
	}
	return all
}

// stop ends it and says what went well.
func (r *running) stop() counted {
	r.t.Helper()
	r.Signal(unix.SIGTERM)
	if status := r.Wait(time.Minute); status != 0 {
		r.t.Fatalf("prober ended with %d; it said:\n%s", status, r.Output())
	}
	for _, s := range r.lines(0) {
		if s.Counts != nil {
			return *s.Counts
		}
	}
	r.t.Fatalf("prober does not say what went well:\n%s", r.Output())
	return counted{}
}
