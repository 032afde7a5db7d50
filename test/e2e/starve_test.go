package e2e_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/test/netlab"
)

// What the daemons suffer, and how it ends. Enforcement is the kernel's: it does not
// notice, and they go on by themselves or after their service manager, which is the
// test here, started them again.
//
//	web  ->  db    7000 declared: streams kept open, new connections all the time
//	web  ->  db    7001 not: tried all the time
//	peer ->  db    7000 without a proof: tried, and never answered
var sufferings = []struct {
	name   string
	suffer func(*testing.T, *ends) (end func())
}{
	{"I11 agent killed again and again", func(t *testing.T, e *ends) func() {
		for range 10 {
			e.node.KillAgent()
			e.node.StartAgent()
		}
		e.node.KillAgent()
		return e.node.StartAgent
	}},
	{"X19 agent stopped", func(t *testing.T, e *ends) func() { return stopped(e.node.Agent) }},
	{"X19 core stopped", func(t *testing.T, e *ends) func() { return stopped(e.node.Core) }},
	{"X19 both frozen", func(t *testing.T, e *ends) func() {
		freeze := filepath.Join(e.lab.Cgroup("daemons").Dir(), "cgroup.freeze")
		write(t, freeze, "1")
		return func() { write(t, freeze, "0") }
	}},
	{"X19 agent out of memory", func(t *testing.T, e *ends) func() {
		outOfMemory(t, e, e.node.Agent)
		e.node.KillAgent()
		return e.node.StartAgent
	}},
	{"X19 core out of memory", func(t *testing.T, e *ends) func() {
		outOfMemory(t, e, e.node.Core)
		e.node.KillCore()
		return e.node.StartCore
	}},
	{"X19 no CPU for the core", func(t *testing.T, e *ends) func() {
		hog := e.lab.Island("hog").Start(e.lab.Cgroup("hog"), netlab.Command{Path: "/bin/sh", Args: []string{"-c", "while :; do :; done"}})
		var one unix.CPUSet
		one.Set(0)
		for _, pid := range []int{e.node.Core.PID(), hog.PID()} {
			threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
			if err != nil {
				t.Fatal(err)
			}
			for _, thread := range threads {
				var id int
				if _, err := fmt.Sscan(filepath.Base(thread), &id); err != nil {
					t.Fatal(err)
				}
				if err := unix.SchedSetaffinity(id, &one); err != nil && err != unix.ESRCH {
					t.Fatal(err)
				}
			}
		}
		if err := unix.SchedSetAttr(hog.PID(), &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 50}, 0); err != nil {
			t.Fatal(err)
		}
		return func() {
			hog.Kill()
			e.node.RestartCore() // on every CPU again
		}
	}},
	{"X24 agent hostile", hostile},
}

func stopped(p *netlab.Process) func() {
	p.Signal(syscall.SIGSTOP)
	return func() { p.Signal(syscall.SIGCONT) }
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// outOfMemory moves a process where there is no memory, and waits for its death.
func outOfMemory(t *testing.T, e *ends, p *netlab.Process) {
	t.Helper()
	dir, limit := noMemory(t, e)
	defer func() {
		if err := os.Remove(dir); err != nil {
			t.Errorf("remove cgroup: %v", err)
		}
	}()
	write(t, filepath.Join(dir, "cgroup.procs"), fmt.Sprint(p.PID()))
	// What it holds was charged to where it came from: it is what it asks for next
	// that it does not get.
	write(t, filepath.Join(dir, limit), "4096")
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		select {
		case <-p.Ended():
			return
		default:
		}
		if time.Now().After(end) {
			p.Kill()
			t.Fatal("the process lives without memory")
		}
		// It has to ask for some.
		if p == e.node.Agent {
			go e.node.Demarc("status")
		} else if c, err := net.Dial("unix", filepath.Join(e.node.Dir(), "core", "core.sock")); err == nil {
			_, _ = c.Write(binary.BigEndian.AppendUint32(nil, 1<<20))
			_, _ = c.Write(make([]byte, 1<<19))
			c.Close()
		}
	}
}

// noMemory makes a cgroup of the memory controller, in the unified hierarchy or in
// that of version 1, whichever has it.
func noMemory(t *testing.T, e *ends) (dir, limit string) {
	t.Helper()
	unified := e.lab.Cgroup("starved").Dir()
	var above []string
	for d := filepath.Dir(unified); strings.Contains(d, "/demarc-lab-"); d = filepath.Dir(d) {
		above = append([]string{d}, above...)
	}
	if text, err := os.ReadFile(filepath.Join(above[0], "cgroup.controllers")); err == nil && strings.Contains(string(text), "memory") {
		for _, d := range above {
			write(t, filepath.Join(d, "cgroup.subtree_control"), "+memory")
		}
		dir = filepath.Join(unified, "none")
		limit = "memory.max"
	} else {
		mounts, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(mounts)) {
			if f := strings.Fields(line); f[2] == "cgroup" && strings.Contains(","+f[3]+",", ",memory,") {
				dir = filepath.Join(f[1], filepath.Base(above[0]))
			}
		}
		limit = "memory.limit_in_bytes"
	}
	if dir == "" {
		t.Fatal("this machine has no memory controller")
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir, limit
}

// hostile talks to the running core as an agent that an attacker has taken over:
// requests and nonsense at random, torn and whole, with descriptors of all kinds.
func hostile(t *testing.T, e *ends) func() {
	fds := func() int {
		all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", e.node.Core.PID()))
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	before := fds()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	dir, err := os.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	kinds := []int{int(r.Fd()), int(w.Fd()), int(dir.Fd())}
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 24))
	requests := []string{
		fmt.Sprintf(`{"op":"hello","version":%d}`, proto.Version), `{"op":"hello","version":1}`, `{"op":"status"}`, `{"op":"apply"}`, `{"op":"apply","within":1}`,
		`{"op":"confirm"}`, `{"op":"rollback"}`, `{"op":"image"}`, `{"op":"bind","path":"/lab/web","identity":1}`, `{"op":"unbind","path":"/lab/web"}`, `{"op":"forget"}`,
		`{"op":"preview"}`, `{"op":"reboot"}`, `{}`, `[`, `{"op":"status"}{"op":"status"}`, "\x00", strings.Repeat("x", 4096), `{"op":"audit"}`, `{"op":"audit","path":"/"}`,
		`{"op":"quarantine","identity":1,"for":60000,"reason":"x"}`, `{"op":"quarantine","identity":16,"for":60000}`, `{"op":"quarantine","identity":16,"for":-1,"reason":"x"}`,
		`{"op":"quarantine","identity":16,"reason":"x","automatic":true}`, `{"op":"release","identity":16}`, `{"op":"release"}`,
	}
	greeting := fmt.Appendf(binary.BigEndian.AppendUint32(nil, uint32(len(requests[0]))), "%s", requests[0])
	for range 300 {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: filepath.Join(e.node.Dir(), "core", "core.sock"), Net: "unix"})
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if random.IntN(2) == 0 {
			_, _ = conn.Write(greeting) // or it hung up: too many wait
		}
		for range random.IntN(6) {
			text := requests[random.IntN(len(requests))]
			length := uint32(len(text))
			if random.IntN(20) == 0 {
				length = random.Uint32()
			}
			frame := append(binary.BigEndian.AppendUint32(nil, length), text...)
			frame = frame[:len(frame)-min(len(frame), max(0, random.IntN(40)-30))]
			var rights []byte
			if random.IntN(3) == 0 {
				rights = unix.UnixRights(kinds[random.IntN(len(kinds))])
			}
			if _, _, err := conn.WriteMsgUnix(frame, rights, nil); err != nil {
				break // it hung up
			}
		}
		conn.Close()
	}
	eventually(t, time.Minute, "the core gives up what it was sent", func() bool { return fds() <= before })
	if q := e.node.Status().Quarantines; len(q) > 0 {
		t.Errorf("seed %d: quarantined %+v", seed, q)
	}
	return func() {}
}

// TestX19Starved holds rows I11, X19 and, on the wire, X24.
func TestX19Starved(t *testing.T) {
	e := newEnds(t, `crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000], log: none}
`, netlab.NodeOptions{})
	e.server.serve(7000)
	e.server.serve(7001)
	peer := e.lab.Namespace("peer")
	stranger := startActor(t, peer, e.lab.Cgroup("peer"))
	wire, door := e.web.Wire(), e.db.Wire()
	four, six := e.at4(7000).String(), e.at6(7000).String()
	for _, s := range sufferings {
		t.Run(s.name, func(t *testing.T) {
			call[bool](e.client, "StartTraffic", TrafficArgs{
				Streams: []string{four, six}, Connect: []string{four, six},
				Denied: []string{e.at4(7001).String(), e.at6(7001).String()}, Every: 20 * time.Millisecond,
			})
			end := s.suffer(t, e)
			for range 20 { // while it suffers
				for _, to := range e.both(7000) {
					if r := call[DialReply](e.client, "Dial", DialArgs{To: to.String(), Timeout: time.Minute}); r.Error != "" {
						t.Errorf("declared: %s", r.Error)
					}
				}
				for _, to := range e.both(7001) {
					if r := call[DialReply](e.client, "Dial", DialArgs{To: to.String(), Timeout: time.Minute}); r.Error != unix.EPERM.Error() {
						t.Errorf("undeclared: %q", r.Error)
					}
				}
			}
			if r := call[DialReply](stranger, "Dial", DialArgs{To: four, Timeout: 20 * time.Millisecond}); r.Error != "timeout" {
				t.Errorf("without a proof: %q", r.Error)
			}
			end()
			e.node.AwaitAgent()
			if out, problems, status := e.node.Demarc("status", "--wait", "enforcing", "--timeout", "60s"); status != 0 {
				t.Errorf("status %d: %s%s", status, out, problems)
			}
			r := call[TrafficReply](e.client, "StopTraffic", true)
			for _, problem := range r.Problems {
				t.Error(problem)
			}
			if r.Exchanged == 0 || r.Connected == 0 || r.Tried == 0 {
				t.Errorf("too little traffic to prove anything: %+v", r)
			}
		})
	}
	undeclared := func(p netlab.Packet) bool { return p.Sent && p.Dst.Port() == 7001 }
	if got := wire.Packets(undeclared); len(got) != 0 {
		t.Errorf("%d undeclared packets, the first: %s", len(got), got[0])
	}
	answer := func(p netlab.Packet) bool { return p.Sent && p.Dst.Addr() == peer.IP4 && p.Proto == unix.IPPROTO_TCP }
	if got := door.Packets(answer); len(got) != 0 {
		t.Errorf("%d answers to a caller without proof, the first: %s", len(got), got[0])
	}
}
