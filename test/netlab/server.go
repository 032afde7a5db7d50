package netlab

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
)

// Echo is a server that sends back what it gets. It belongs to no managed cgroup:
// it is the machine on the other side, without demarc.
type Echo struct {
	Accepted atomic.Int64 // TCP connections
	Received atomic.Int64 // datagrams and bytes of streams
}

// Echo serves TCP and UDP on a port of every address of the namespace.
func (ns *Namespace) Echo(port uint16) *Echo {
	ns.lab.t.Helper()
	e := &Echo{}
	var stream net.Listener
	var datagram net.PacketConn
	ns.lab.check(ns.Do(func() (err error) {
		at := netip.AddrPortFrom(netip.IPv6Unspecified(), port)
		if stream, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at)); err != nil {
			return err
		}
		datagram, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	}), "serve port %d in %s", port, ns.Name)
	var all sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	all.Go(func() { e.datagrams(datagram) })
	all.Go(func() {
		for {
			c, err := stream.Accept()
			if err != nil {
				return
			}
			e.Accepted.Add(1)
			mu.Lock()
			open[c] = true
			mu.Unlock()
			all.Go(func() {
				_, _ = io.Copy(c, io.TeeReader(c, counter{&e.Received}))
				mu.Lock()
				delete(open, c)
				mu.Unlock()
				c.Close()
			})
		}
	})
	ns.lab.later(func() error {
		err := errors.Join(stream.Close(), datagram.Close())
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		all.Wait()
		return err
	})
	return e
}

func (e *Echo) datagrams(c net.PacketConn) {
	b := make([]byte, 64<<10)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		e.Received.Add(int64(n))
		_, _ = c.WriteTo(b[:n], from)
	}
}

// counter counts what is written to it.
type counter struct{ n *atomic.Int64 }

func (c counter) Write(b []byte) (int, error) {
	c.n.Add(int64(len(b)))
	return len(b), nil
}
