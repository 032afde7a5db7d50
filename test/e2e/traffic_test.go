package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"
)

// TrafficArgs is traffic that goes on until it is stopped.
type TrafficArgs struct {
	Streams   []string      // servers that a connection is kept open to, and used all the time
	Datagrams []string      // servers that datagrams go to and come from all the time, by one socket each
	Connect   []string      // servers that connections are made to, one after the other
	Denied    []string      // where nothing may go: connections and datagrams are tried all the time
	Every     time.Duration // between two denied tries
}

// TrafficReply is what came of it.
type TrafficReply struct {
	Exchanged int                  // round trips on the streams that were kept open
	Connected int                  // connections made and used
	Tried     int                  // denied calls
	Last      map[string]time.Time // of the last round trip, by "tcp " or "udp " and server
	Lost      map[string]int       // segments, or datagrams without an answer, by the same; of datagrams when it has stopped
	Problems  []string
}

// traffic runs in an actor.
type traffic struct {
	cancel context.CancelFunc
	all    sync.WaitGroup
	mu     sync.Mutex
	reply  TrafficReply
}

// StartTraffic opens the streams, which must work, and starts everything.
func (a *Actor) StartTraffic(args TrafficArgs, _ *bool) error {
	ctx, cancel := context.WithCancel(context.Background())
	f := &traffic{cancel: cancel}
	f.reply.Last, f.reply.Lost = map[string]time.Time{}, map[string]int{}
	for _, to := range args.Streams {
		c, err := dialStream(DialArgs{To: to, Timeout: 5 * time.Second})
		if err != nil {
			cancel()
			return err
		}
		f.all.Go(func() { f.use(ctx, c, "tcp "+to) })
	}
	for _, to := range args.Datagrams {
		c, err := net.Dial("udp", to)
		if err != nil {
			cancel()
			return err
		}
		f.all.Go(func() { f.converse(ctx, c, "udp "+to) })
	}
	for _, to := range args.Connect {
		f.repeat(ctx, 10*time.Millisecond, func() error { return f.connect(to) })
	}
	for _, to := range args.Denied {
		at, err := netip.ParseAddrPort(to)
		if err != nil {
			cancel()
			return err
		}
		f.repeat(ctx, args.Every, func() error { return f.denyStream(to) })
		f.repeat(ctx, args.Every, func() error { return f.denyDatagram(at) })
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.traffic = f
	return nil
}

// StopTraffic ends it and tells what came of it.
func (a *Actor) StopTraffic(_ bool, reply *TrafficReply) error {
	a.mu.Lock()
	f := a.traffic
	a.mu.Unlock()
	f.cancel()
	f.all.Wait()
	*reply = f.reply
	return nil
}

// Traffic tells what came of it so far.
func (a *Actor) Traffic(_ bool, reply *TrafficReply) error {
	a.mu.Lock()
	f := a.traffic
	a.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	*reply = f.reply
	reply.Last, reply.Lost, reply.Problems = maps.Clone(f.reply.Last), maps.Clone(f.reply.Lost), slices.Clone(f.reply.Problems)
	return nil
}

func (f *traffic) repeat(ctx context.Context, every time.Duration, do func() error) {
	f.all.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if err := do(); err != nil {
				f.fail(err)
			}
		}
	})
}

func (f *traffic) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.reply.Problems) < 20 {
		f.reply.Problems = append(f.reply.Problems, fmt.Sprintf("%s %s", time.Now().Format("15:04:05.000"), err))
	}
}

func (f *traffic) note(n *int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	*n++
}

// use exchanges data on a stream until it is told to stop, or the stream breaks.
func (f *traffic) use(ctx context.Context, c net.Conn, name string) {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now()) })()
	defer func() {
		lost, err := lostOf(c)
		if err != nil {
			f.fail(err)
		}
		f.lose(name, lost)
	}()
	for ctx.Err() == nil {
		if err := exchange(c, 200, 2*timeToAnswer); err != nil {
			if ctx.Err() == nil {
				f.fail(fmt.Errorf("stream %s > %s broke: %w", c.LocalAddr(), c.RemoteAddr(), err))
			}
			return
		}
		f.exchanged(name)
	}
}

// converse does the same with datagrams, of which some may be lost or refused. An
// answer that comes late is no loss.
func (f *traffic) converse(ctx context.Context, c net.Conn, name string) {
	defer c.Close()
	open := 0 // sent, and not answered yet
	answered := func(within time.Duration) bool {
		if c.SetReadDeadline(time.Now().Add(within)) != nil {
			return false
		}
		if _, err := c.Read(make([]byte, 200)); err != nil {
			return false
		}
		open--
		f.exchanged(name)
		return true
	}
	for ctx.Err() == nil {
		if _, err := c.Write(make([]byte, 200)); err != nil {
			time.Sleep(time.Millisecond)
			continue
		}
		open++
		for answered(100*time.Millisecond) && open > 0 {
		}
	}
	for open > 0 && answered(time.Second) {
	}
	f.lose(name, open)
}

func (f *traffic) lose(name string, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reply.Lost[name] += n
}

func (f *traffic) exchanged(name string) {
	f.mu.Lock()
	f.reply.Exchanged++
	f.reply.Last[name] = time.Now()
	f.mu.Unlock()
	time.Sleep(2 * time.Millisecond)
}

func (f *traffic) connect(to string) error {
	c, err := dialStream(DialArgs{To: to, Timeout: 5 * time.Second})
	if err != nil {
		return fmt.Errorf("allowed connection: %w", err)
	}
	defer c.Close()
	if err := exchange(c, 16, 5*time.Second); err != nil {
		return fmt.Errorf("allowed connection %s > %s: %w", c.LocalAddr(), to, err)
	}
	f.note(&f.reply.Connected)
	return nil
}

func (f *traffic) denyStream(to string) error {
	f.note(&f.reply.Tried)
	c, err := dialStream(DialArgs{To: to, Timeout: time.Second})
	if err == nil {
		c.Close()
	}
	return wantDenied("connect to "+to, err)
}

func (f *traffic) denyDatagram(to netip.AddrPort) error {
	f.note(&f.reply.Tried)
	network := "udp4"
	if to.Addr().Is6() {
		network = "udp6"
	}
	c, err := net.ListenUDP(network, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.WriteToUDPAddrPort(make([]byte, 16), to)
	return wantDenied("send to "+to.String(), err)
}

func wantDenied(what string, err error) error {
	if errors.Is(err, syscall.EPERM) {
		return nil
	}
	return fmt.Errorf("%s: %v, want it denied", what, err)
}
