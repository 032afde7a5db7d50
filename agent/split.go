package agent

import (
	"bytes"
	"errors"
	"net"
	"sync"
	"time"
)

// preface begins every HTTP/2 connection, and no request of HTTP/1.
var preface = []byte("PRI ")

// prefaced is a connection of which a few bytes were read.
type prefaced struct {
	*guest
	read []byte
}

func (c *prefaced) Read(b []byte) (int, error) {
	if len(c.read) > 0 {
		n := copy(b, c.read)
		c.read = c.read[n:]
		return n, nil
	}
	return c.guest.Read(b)
}

// speaks reads as much of a connection as says what it speaks, within a time. What
// says nothing is closed, and nil.
func speaks(g *guest, within time.Duration) (c *prefaced, http2 bool) {
	b := make([]byte, len(preface))
	n := 0
	_ = g.SetReadDeadline(time.Now().Add(within))
	for n < len(b) && bytes.Equal(b[:n], preface[:n]) {
		m, err := g.Read(b[n:])
		n += m
		if err != nil {
			g.Close()
			return nil, false
		}
	}
	_ = g.SetReadDeadline(time.Time{})
	return &prefaced{g, b[:n]}, bytes.Equal(b, preface)
}

// handed is a listener whose connections somebody else accepted.
type handed struct {
	net.Listener
	conns chan net.Conn
	end   chan struct{}
	once  sync.Once
}

func newHanded(l net.Listener) *handed {
	return &handed{Listener: l, conns: make(chan net.Conn), end: make(chan struct{})}
}

// give hands a connection over, or closes it where nobody accepts any more.
func (h *handed) give(c net.Conn) {
	select {
	case h.conns <- c:
	case <-h.end:
		c.Close()
	}
}

func (h *handed) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.end:
		return nil, net.ErrClosed
	}
}

// Close ends this listener and leaves the one below to its owner.
func (h *handed) Close() error {
	h.once.Do(func() { close(h.end) })
	return nil
}

var errNoTLS = errors.New("this server is no client")
