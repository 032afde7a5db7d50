package agent

import (
	"cmp"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of the connections to the API. What a connection costs is bounded, and so is
// what one user can take from the others.
const (
	maxConnections     = 256
	maxUserConnections = 64
	stalledAfter       = 2 * time.Second // a reader that takes nothing for so long has to go first
)

// gate admits connections. Everybody gets in who asks something: when there is no
// room, one has to go that asks nothing, the longest idle first, or one that does not
// read its answer. A user whose connections all do something waits, and nobody else.
type gate struct {
	mu    sync.Mutex
	open  map[*guest]struct{}
	users map[uint32]int

	refused atomic.Uint64 // connections that found no room
	evicted atomic.Uint64 // idle ones that made some
}

func newGate() *gate {
	return &gate{open: make(map[*guest]struct{}), users: make(map[uint32]int)}
}

// guest is a connection that was admitted.
type guest struct {
	net.Conn
	gate *gate
	cred *unix.Ucred // of the peer when it connected; nil where unknown

	asking  atomic.Int32 // requests that are being answered
	since   atomic.Int64 // ns of when a byte last moved, or the connection began
	writing atomic.Int64 // ns of when the write that still waits began; 0 = none
	once    sync.Once
}

// nobody is the user of a connection whose peer is not known.
const nobody = ^uint32(0)

func (g *guest) user() uint32 {
	if g.cred == nil {
		return nobody
	}
	return g.cred.Uid
}

// admit takes a connection over; one that it refuses is still the caller's to close.
func (g *gate) admit(c net.Conn) (*guest, error) { return g.admitAs(c, peerOf(c)) }

func (g *gate) admitAs(c net.Conn, cred *unix.Ucred) (*guest, error) {
	in := &guest{Conn: c, gate: g, cred: cred}
	in.since.Store(time.Now().UnixNano())
	g.mu.Lock()
	user := in.user()
	full := g.users[user] >= maxUserConnections
	if !full && len(g.open) >= maxConnections {
		full = true
		for u, n := range g.users { // whoever has the most makes room
			if n > g.users[user] || n == g.users[user] && u == user {
				user = u
			}
		}
	}
	var out *guest
	if full {
		if out = g.leastOf(user); out == nil {
			g.mu.Unlock()
			g.refused.Add(1)
			err := fmt.Errorf("user %d has %d connections that are all in use, which is as many as there may be", in.user(), g.count(in.user()))
			return in, err
		}
		g.forget(out)
		g.evicted.Add(1)
	}
	g.open[in] = struct{}{}
	g.users[in.user()]++
	g.mu.Unlock()
	if out != nil {
		out.Close()
	}
	return in, nil
}

func (g *gate) count(user uint32) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.users[user]
}

// leastOf is the connection of a user that is the least in use, or nil.
func (g *gate) leastOf(user uint32) *guest {
	now := time.Now().UnixNano()
	var idle []*guest
	for c := range g.open {
		writing := c.writing.Load()
		stalled := writing != 0 && now-writing > int64(stalledAfter)
		if c.user() == user && (c.asking.Load() == 0 || stalled) {
			idle = append(idle, c)
		}
	}
	if len(idle) == 0 {
		return nil
	}
	return slices.MinFunc(idle, func(a, b *guest) int { return cmp.Compare(a.since.Load(), b.since.Load()) })
}

// closeSilent closes the connections that have not asked anything yet, at the end.
func (g *gate) closeSilent() {
	g.mu.Lock()
	var silent []*guest
	for c := range g.open {
		if c.asking.Load() == 0 {
			silent = append(silent, c)
		}
	}
	g.mu.Unlock()
	for _, c := range silent {
		c.Close()
	}
}

// forget is called with the gate locked.
func (g *gate) forget(c *guest) {
	if _, ok := g.open[c]; !ok {
		return
	}
	delete(g.open, c)
	if g.users[c.user()]--; g.users[c.user()] == 0 {
		delete(g.users, c.user())
	}
}

func (c *guest) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.since.Store(time.Now().UnixNano())
	}
	return n, err
}

func (c *guest) Write(b []byte) (int, error) {
	c.writing.Store(time.Now().UnixNano())
	n, err := c.Conn.Write(b)
	c.writing.Store(0)
	if n > 0 {
		c.since.Store(time.Now().UnixNano())
	}
	return n, err
}

func (c *guest) Close() error {
	c.once.Do(func() {
		c.gate.mu.Lock()
		c.gate.forget(c)
		c.gate.mu.Unlock()
	})
	return c.Conn.Close()
}

// peerOf is who is at the other end, as the kernel recorded them when it connected.
func peerOf(c net.Conn) (cred *unix.Ucred) {
	conn, ok := c.(*net.UnixConn)
	if !ok {
		return nil
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil
	}
	_ = raw.Control(func(fd uintptr) {
		if is, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			cred = is
		}
	})
	return cred
}
