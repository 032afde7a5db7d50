package bench

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/image/encode"
	"github.com/demarc/demarc/policy/policytest"
	"github.com/demarc/demarc/test/netlab"
)

// changesVariable says how often one rule is declared and revoked, at 100,000 rules.
// Without it there are a few changes of a small policy, for the controls' sake.
const changesVariable = "CHANGES"

// Ports of the server: one that is declared now and then, one that always is.
const (
	changingPort = 7300
	steadyPort   = 7301
)

// TestChange declares one rule among many and revokes it, again and again, through the
// agent as demarc apply does, and times with real packets when that can be felt:
//
//	client (/large/w000000)  ----switch----  server (/large/w000001)
//
// The policy is replaced as a whole each time; there is no other way to change it. Every
// other time it is previewed first, as demarc apply does, and timed from the call behind
// that.
func TestChange(t *testing.T) {
	changes, workloads, crossings := 3, 50, 200
	if text := os.Getenv(changesVariable); text != "" {
		var err error
		if changes, err = strconv.Atoi(text); err != nil || changes < 1 {
			t.Fatalf("%s=%q is no number of changes", changesVariable, text)
		}
		workloads, crossings = 2500, 26_000
	}
	outcome := Changes{Machine: describeMachine()}
	lab := netlab.New(t)
	client, server := lab.Namespace("client"), lab.Namespace("server")
	node := lab.Node("", netlab.NodeOptions{})
	var images [2]*image.Image // without the rule, and with it
	for i := range images {
		images[i] = changing(t, workloads, crossings, i == 1)
	}
	outcome.Rules = len(images[1].Rules)

	agent, err := api.NewClient(filepath.Join(node.Dir(), "agent", "agent.sock"))
	check(t, err)
	defer agent.Close()
	version := uint64(0)
	// apply puts one of the images in force and says when it was asked for, and when
	// that was answered; and what the preview took, 0 without one.
	apply := func(which int, previewed bool) (asked, answered time.Duration, preview float64) {
		t.Helper()
		version++
		img := images[which]
		img.Version, img.Digest = version, sha256.Sum256(fmt.Append(nil, version))
		encoded, err := encode.Image(img)
		check(t, err)
		outcome.Image = len(encoded)
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if previewed {
			begun := monotonic()
			_, err = agent.Preview(ctx, encoded)
			preview = milliseconds(monotonic() - begun)
			check(t, err)
		}
		put := agent.ApplySparing
		if previewed {
			put = agent.ApplyPreviewed
		}
		asked = monotonic()
		_, err = put(ctx, encoded, 0, 0)
		answered = monotonic()
		check(t, err)
		return asked, answered, preview
	}
	apply(0, false)

	receiver := startPeer(t, server, node.Cgroup("/large/w000001"), "receive")
	address := func(port int) string { return net.JoinHostPort(server.IP4.String(), strconv.Itoa(port)) }
	receiver.await("ready")
	steady := startPeer(t, client, node.Cgroup("/large/w000000"), "steady", address(steadyPort))
	steady.await("connected")
	sender := startPeer(t, client, node.Cgroup("/large/w000000"), "send", address(changingPort))
	agentBefore, coreBefore := cpuTime(t, node.Agent), cpuTime(t, node.Core)
	for i := range 2 * changes {
		previewed := i%2 == 0
		sender.ask("connect")
		sender.await("refused")
		var one Changed
		asked, answered, preview := apply(1, previewed)
		one.Preview[0] = preview
		one.Replaced[0] = milliseconds(answered - asked)
		came := sender.await("connected")
		one.Declared = milliseconds(came - asked)
		receiver.await("received")

		asked, answered, one.Preview[1] = apply(0, previewed)
		one.Replaced[1] = milliseconds(answered - asked)
		// What was on its way at the answer has arrived when the sender has tried twenty
		// times more; twenty times later nothing else has.
		var reads [2]int
		for i := range reads {
			sender.ask("more")
			sender.await("tried")
			receiver.ask("last")
			one.Revoked = max(milliseconds(receiver.await("last")-asked), 0)
			reads[i] = receiver.made
		}
		if reads[0] != reads[1] {
			t.Errorf("the revoked connection goes on: %d bytes received, then %d", reads[0], reads[1])
		}
		sender.ask("stop")
		sender.await("stopped")
		outcome.Raw = append(outcome.Raw, one)
		t.Logf("previewed in %.0f ms; %.0f until declared, %.0f until revoked, %.0f until answered", one.Preview, one.Declared, one.Revoked, one.Replaced)
	}
	outcome.Agent = milliseconds(cpuTime(t, node.Agent)-agentBefore) / float64(4*changes)
	outcome.Core = milliseconds(cpuTime(t, node.Core)-coreBefore) / float64(4*changes)
	steady.ask("stop")
	steady.await("stopped")
	if steady.refused != 0 || steady.made == 0 {
		t.Errorf("a connection that every policy declares: %d came about, %d did not: a change made a window", steady.made, steady.refused)
	}
	outcome.Controls = []string{
		fmt.Sprintf("OK before each change the connection was refused, after it its bytes arrived; %d times", 2*changes),
		fmt.Sprintf("OK a connection that every policy declares came about each of %d times during the changes", steady.made),
	}
	outcome.Machine.After = loadAverage()
	outcome.sum()
	fmt.Println(&outcome)
	for _, g := range outcome.Goals {
		if g.Outcome == Missed {
			t.Errorf("goal missed: %s", g)
		}
	}
	writeJSON(t, &outcome)
}

// changing is a large policy in which client may reach server on the steady port, and
// on the changing one if the rule is there.
func changing(t testing.TB, workloads, crossings int, with bool) *image.Image {
	t.Helper()
	p := policytest.Large(workloads, crossings)
	for _, port := range []uint16{steadyPort, changingPort} {
		if port == changingPort && !with {
			continue
		}
		p.Crossings = append(p.Crossings, policy.Crossing{
			Pos: policy.Pos{Line: len(p.Crossings) + 1}, Name: fmt.Sprintf("x%d", port), Ports: []image.Span{policytest.TCP(port)},
			From: []policy.Term{policytest.Workload("w000000")}, To: []policy.Term{policytest.Workload("w000001")},
		})
	}
	img, err := policy.Compile(p)
	check(t, err)
	return img
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// cpuTime is what a process has used, in steps of 10 ms.
func cpuTime(t testing.TB, p *netlab.Process) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID()))
	check(t, err)
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	ticks := 0
	for _, field := range fields[11:13] { // utime and stime: 14th and 15th of all
		n, err := strconv.Atoi(field)
		check(t, err)
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// monotonic is the clock that all processes share.
func monotonic() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		panic(err)
	}
	return time.Duration(now.Nano())
}

// peer is a process of a workload. What it says is a word, a time of monotonic, and two
// numbers.
type peer struct {
	t             testing.TB
	in            io.Writer
	out           *bufio.Reader
	made, refused int
}

const peerProcess = "demarc-bench-peer"

func init() {
	if os.Args[0] == peerProcess {
		peerMain(os.Args[1:])
		os.Exit(0)
	}
}

// startPeer starts one; it ends with the test.
func startPeer(t testing.TB, ns *netlab.Namespace, cgroup *netlab.Cgroup, args ...string) *peer {
	t.Helper()
	dir, err := os.Open(cgroup.Dir())
	check(t, err)
	defer dir.Close()
	c := exec.Command("/proc/self/exe")
	c.Args = append([]string{peerProcess}, args...)
	c.Stderr = os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL}
	in, err := c.StdinPipe()
	check(t, err)
	out, err := c.StdoutPipe()
	check(t, err)
	check(t, ns.Do(c.Start))
	t.Cleanup(func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	})
	return &peer{t: t, in: in, out: bufio.NewReader(out)}
}

func (p *peer) ask(word string) {
	p.t.Helper()
	_, err := fmt.Fprintln(p.in, word)
	check(p.t, err)
}

// await reads what the peer says next, which has to be the word, and returns its time.
func (p *peer) await(word string) time.Duration {
	p.t.Helper()
	line, err := p.out.ReadString('\n')
	check(p.t, err)
	var said string
	var at int64
	if _, err := fmt.Sscan(line, &said, &at, &p.made, &p.refused); err != nil || said != word {
		p.t.Fatalf("peer said %q, want %s", strings.TrimSpace(line), word)
	}
	return time.Duration(at)
}

func say(word string, at time.Duration, made, refused int) {
	fmt.Println(word, int64(at), made, refused)
}

// peerMain is the process itself.
func peerMain(args []string) {
	lines := bufio.NewScanner(os.Stdin)
	var stopped atomic.Bool
	switch args[0] {
	case "receive":
		receive(lines)
	case "steady":
		made, refused := 0, 0
		done := make(chan struct{})
		go func() {
			defer close(done)
			for !stopped.Load() {
				c, err := net.DialTimeout("tcp", args[1], 10*time.Second)
				if err != nil {
					fmt.Fprintln(os.Stderr, "steady:", err)
					refused++
				} else if c.Close(); made == 0 {
					made++
					say("connected", monotonic(), made, refused)
				} else {
					made++
				}
				time.Sleep(5 * time.Millisecond)
			}
		}()
		lines.Scan()
		stopped.Store(true)
		<-done
		say("stopped", monotonic(), made, refused)
	case "probe":
		for lines.Scan() { // await
			for before := ""; before != "refused"; time.Sleep(time.Millisecond) {
				said := "open"
				if _, err := net.Dial("tcp", "127.0.0.1:1"); errors.Is(err, unix.EPERM) {
					said = "refused"
				}
				if said != before {
					say(said, monotonic(), 0, 0)
				}
				before = said
			}
		}
	case "send":
		for lines.Scan() { // connect
			c := connectWhenAllowed(args[1])
			stopped.Store(false)
			tried, done := make(chan struct{}), make(chan struct{})
			go func() { // a byte each millisecond
				defer close(done)
				for !stopped.Load() {
					_ = c.SetWriteDeadline(time.Now().Add(time.Millisecond))
					_, _ = c.Write([]byte{1})
					select {
					case tried <- struct{}{}:
					default:
					}
					time.Sleep(time.Millisecond)
				}
			}()
			for lines.Scan() && lines.Text() == "more" {
				for range 20 {
					<-tried
				}
				say("tried", monotonic(), 0, 0)
			}
			stopped.Store(true)
			<-done
			_ = c.(*net.TCPConn).SetLinger(0)
			c.Close()
			say("stopped", monotonic(), 0, 0)
		}
	}
}

// connectWhenAllowed tries each millisecond. A refused call fails at once.
func connectWhenAllowed(to string) net.Conn {
	for tries := 0; ; tries++ {
		c, err := net.DialTimeout("tcp", to, 100*time.Millisecond)
		if err == nil {
			say("connected", monotonic(), 0, 0)
			return c
		}
		if tries == 0 {
			say("refused", monotonic(), 0, 0)
		}
		time.Sleep(time.Millisecond)
	}
}

// receive serves both ports. On the changing one it says when the first byte of a
// connection came, and when it is asked, when the last one did.
func receive(lines *bufio.Scanner) {
	var last, reads atomic.Int64
	for _, port := range []int{changingPort, steadyPort} {
		l, err := net.Listen("tcp", fmt.Sprintf("0.0.0.0:%d", port))
		if err != nil {
			fmt.Fprintln(os.Stderr, "receive:", err)
			os.Exit(1)
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					b := make([]byte, 4096)
					for first := true; ; first = false {
						n, err := c.Read(b)
						if err != nil {
							return
						}
						reads.Add(int64(n))
						last.Store(int64(monotonic()))
						if first {
							say("received", monotonic(), 0, 0)
						}
					}
				}()
			}
		}()
	}
	say("ready", monotonic(), 0, 0)
	for lines.Scan() { // last
		say("last", time.Duration(last.Load()), int(reads.Load()), 0)
	}
}
