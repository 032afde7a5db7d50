package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// hostileUser is somebody who may open the agent's socket, and nothing else.
const hostileUser = 12345

// nuisances are the things that a client says which wants to be in the way. What follows
// is silence, with the connection held open.
var nuisances = []string{
	"",                       // nothing at all
	"GET /v1/flows?follow=t", // half a request
	"GET /v1/flows?follow=true HTTP/1.1\r\nHost: x\r\n\r\n", // and its answer is never read
	"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",                      // gRPC, and then nothing
	"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00" + strings.Repeat("\xff\xff\xff\x01\x25\x00\x00\x00\x01", 8),
	"GET / HTTP/1.1\r\nA: " + strings.Repeat("a", 20_000),
	"POST /v1/policy HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n",
	"\x00\x01\x02\x03\x04\x05\x06\x07",
}

// TestH11HostileClients has 10,000 connections of one user to the agent's socket, held
// open as long as the agent lets them. Meanwhile what is declared works and what is not
// is refused, the command line of another user answers, and a reader who came before
// misses nothing.
func TestH11HostileClients(t *testing.T) {
	const clients = 10_000
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Max < clients+1000 {
		t.Fatalf("this test needs %d open files, %d are allowed", clients+1000, limit.Max)
	}
	before := limit
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &before)

	e := newEnds(t, cliBody, netlab.NodeOptions{})
	e.server.serve(7000)
	if err := os.Chmod(e.node.AgentSocket(), 0o666); err != nil {
		t.Fatal(err)
	}

	// The reader who came before.
	client, err := api.NewClient("unix://" + e.node.AgentSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var seen, lost atomic.Uint64
	var reading sync.WaitGroup
	defer reading.Wait()
	defer cancel()
	reading.Go(func() {
		for l, err := range client.Flows(ctx, url.Values{"follow": {"true"}, "port": {"7001"}, "reason": {abi.NoCrossingFor.String()}}) {
			if err != nil {
				if ctx.Err() == nil {
					t.Errorf("the reader who came before: %v", err)
				}
				return
			}
			if lost.Add(l.Lost); l.Flow != nil {
				seen.Add(1)
			}
		}
	})
	tried := uint64(0)
	try := func() {
		t.Helper()
		if !e.client.reaches(e.at4(7000)) {
			t.Error("the declared connection does not come about")
		}
		tried++
		if e.client.reaches(e.at4(7001)) {
			t.Error("an undeclared connection came about")
		}
	}
	eventually(t, 20*time.Second, "the reader reads", func() bool { try(); return seen.Load() > 0 })
	quiet := slowest(t, e.node, 5)

	// A thread of the hostile user's own makes the connections, and ends with it.
	var made atomic.Int64
	var held []net.Conn
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends
		if _, _, errno := syscall.RawSyscall(unix.SYS_SETRESUID, hostileUser, hostileUser, hostileUser); errno != 0 {
			done <- fmt.Errorf("become another user: %w", errno)
			return
		}
		for made.Load() < clients {
			c, err := net.Dial("unix", e.node.AgentSocket())
			if errors.Is(err, syscall.EAGAIN) { // the agent has as many waiting as the kernel holds
				time.Sleep(time.Millisecond)
				continue
			}
			if err != nil {
				done <- err
				return
			}
			_ = c.SetWriteDeadline(time.Now().Add(time.Second))
			_, _ = c.Write([]byte(nuisances[int(made.Add(1))%len(nuisances)]))
			held = append(held, c)
		}
		done <- nil
	}()
	var worst time.Duration
	for ended := false; !ended; {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			ended = true
		default:
		}
		try()
		worst = max(worst, slowest(t, e.node, 1))
	}
	defer func() {
		for _, c := range held {
			c.Close()
		}
	}()
	worst = max(worst, slowest(t, e.node, 5))
	t.Logf("%d hostile connections; status took %s at most, %s before", made.Load(), worst, quiet)
	if worst > 10*time.Second {
		t.Errorf("status took %s beside them", worst)
	}
	eventually(t, 20*time.Second, "the reader has seen everything", func() bool { return seen.Load() >= tried })
	if seen.Load() != tried || lost.Load() != 0 {
		t.Errorf("%d refused, the reader saw %d and lost %d", tried, seen.Load(), lost.Load())
	}
	// What is left open is bounded.
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", e.node.Agent.PID()))
	if err != nil || len(entries) > 400 {
		t.Errorf("the agent has %d open files, %v", len(entries), err)
	}
}

// slowest asks for the status so often, as the command does, and returns the longest
// time that it took.
func slowest(t *testing.T, n *netlab.Node, times int) (longest time.Duration) {
	t.Helper()
	for range times {
		start := time.Now()
		if out, problems, status := n.Demarc("status"); status != 0 {
			t.Errorf("status: %d %s%s", status, out, problems)
		}
		longest = max(longest, time.Since(start))
	}
	return longest
}
