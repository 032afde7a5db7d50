package agent

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/api"
)

// pair is a connection of some user, and its other end.
func pair(t *testing.T, g *gate, uid uint32) (*guest, net.Conn, error) {
	t.Helper()
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	in, err := g.admitAs(a, &unix.Ucred{Uid: uid})
	return in, b, err
}

func closed(c *guest) bool {
	_ = c.SetReadDeadline(time.Now())
	_, err := c.Conn.Read(make([]byte, 1))
	return err == io.ErrClosedPipe
}

func TestGateMakesRoomOfWhatIsIdle(t *testing.T) {
	g := newGate()
	var mine []*guest
	for range maxUserConnections {
		c, _, err := pair(t, g, 7)
		if err != nil {
			t.Fatal(err)
		}
		c.asking.Add(1)
		mine = append(mine, c)
	}
	if _, _, err := pair(t, g, 7); err == nil || err.Error() != "user 7 has 64 connections that are all in use, which is as many as there may be" {
		t.Errorf("beyond the bound: %v", err)
	}
	if _, _, err := pair(t, g, 8); err != nil {
		t.Errorf("another user: %v", err)
	}
	// The longest idle goes first.
	mine[5].asking.Add(-1)
	mine[6].asking.Add(-1)
	mine[6].since.Store(1)
	if _, _, err := pair(t, g, 7); err != nil || !closed(mine[6]) || closed(mine[5]) {
		t.Errorf("idle: %v", err)
	}
	if c, _, err := pair(t, g, 7); err != nil || !closed(mine[5]) {
		t.Errorf("idle: %v", err)
	} else {
		c.asking.Add(1)
	}
	// So does a reader that does not read.
	mine[9].writing.Store(time.Now().Add(-2 * stalledAfter).UnixNano())
	mine[9].since.Store(1)
	if _, _, err := pair(t, g, 7); err != nil || !closed(mine[9]) {
		t.Errorf("stalled: %v", err)
	}
	for _, c := range mine {
		c.Close()
		c.Close()
	}
	if n := g.count(7); n != 3 { // those that came in the place of others
		t.Errorf("%d connections are left", n)
	}
}

func TestGateTakesRoomFromWhoHasTheMost(t *testing.T) {
	g := newGate()
	for uid := range uint32(maxConnections / maxUserConnections) {
		for range maxUserConnections {
			if c, _, err := pair(t, g, uid); err != nil {
				t.Fatal(err)
			} else if uid != 2 {
				c.asking.Add(1)
			}
		}
	}
	g.users[2]++ // as if it had one more
	if _, _, err := pair(t, g, 99); err != nil || g.count(2) != maxUserConnections {
		t.Errorf("%v, user 2 has %d", err, g.count(2))
	}
}

// TestTurnedAway has one user hold every connection that it may, each reading flows.
func TestTurnedAway(t *testing.T) {
	r := start(t, newStandIn(), nil)
	for range maxUserConnections {
		c, err := net.Dial("unix", r.config.Server)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprintf(c, "GET %s?follow=true HTTP/1.1\r\nHost: x\r\n\r\n", api.PathFlows)
		if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || !strings.Contains(line, "200") {
			t.Fatalf("%q, %v", line, err)
		}
	}
	_, err := r.client.Status(t.Context())
	refused, ok := err.(*api.Error)
	if !ok || refused.Code != http.StatusServiceUnavailable || !strings.HasSuffix(refused.Message, "which is as many as there may be") {
		t.Errorf("turned away: %v", err)
	}
}
