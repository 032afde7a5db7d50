package e2e_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/audit"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// auditOf is the audit log, as the command line shows it. It must be unbroken.
func auditOf(t *testing.T, node *netlab.Node) (records []audit.Record) {
	t.Helper()
	out, problems, status := node.Demarc("audit", "show", "-o", "json")
	if status != 0 {
		t.Fatalf("audit show: %d\n%s", status, problems)
	}
	if err := json.Unmarshal([]byte(out), &records); err != nil {
		t.Fatal(err)
	}
	return records
}

// drifts are what records tell of drift, one a line.
func drifts(records []audit.Record) (all string) {
	for _, r := range records {
		if r.What == "drift" {
			all += r.Detail + "\n"
		}
	}
	return all
}

// Root takes away what enforces, in every way that there is. The core undoes it while
// the traffic goes on, tells of it, and from then on nothing undeclared is on the wire
// again, also when the core is killed right after. It looks every second: what was done
// is in its log 1.5 s later, in the median.
//
//	web -> db   7000 declared: a stream kept open; 7001 not
func TestX21TamperUnderTraffic(t *testing.T) {
	e := newEnds(t, `crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000], log: none}
`, netlab.NodeOptions{})
	e.server.serve(7000)
	e.server.serve(7001)
	wire := e.web.Wire()
	dir := filepath.Join(e.node.Dir(), "bpf", "demarc")
	four := e.at4(7000).String()
	call[bool](e.client, "StartTraffic", TrafficArgs{Streams: []string{four}})
	undeclared := func(p netlab.Packet) bool { return p.Sent && p.Dst.Port() == 7001 }
	silent := func(what string) {
		t.Helper()
		before := wire.Count(undeclared)
		for _, to := range e.both(7001) {
			if r := e.client.dial(to); r.Error == "" {
				t.Errorf("%s: connected to %s", what, to)
			}
			e.client.datagramsWithin(to, 3, timeOfSilence)
		}
		if n := wire.Count(undeclared) - before; n != 0 {
			t.Errorf("%s: %d undeclared packets on the wire", what, n)
		}
	}
	detach := func(names ...string) {
		for _, name := range names {
			l, err := link.LoadPinnedLink(filepath.Join(dir, "links", name), nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := l.(interface{ Detach() error }).Detach(); err != nil {
				t.Fatalf("detach %s: %v", name, err)
			}
			l.Close()
		}
	}
	// Before the first of them the tests must be able to fail.
	if !e.client.reaches(e.at4(7000)) {
		t.Fatal("what is declared does not work")
	}
	silent("untouched")
	var took []time.Duration
	for _, c := range []struct {
		name  string
		do    func()
		want  string
		times int
	}{
		{"links detached", func() { detach("egress", "ingress", "connect4", "connect6") }, "link egress was detached", 3},
		{"state written", func() {
			state := pinned(t, e.node, "state")
			var s abi.State
			if err := state.Lookup(uint32(0), &s); err != nil {
				t.Fatal(err)
			}
			s.Active = abi.MakeActive(abi.ActiveSlot(s.Active), abi.ActiveOn|abi.ActiveObserve, abi.ActiveEpoch(s.Active)+1)
			if err := state.Put(uint32(0), &s); err != nil {
				t.Fatal(err)
			}
		}, "somebody else wrote the state", 3},
		{"pins removed", func() {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}, " pins were gone", 3},
		{"file system unmounted", func() {
			mount := filepath.Dir(dir)
			if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil {
				t.Fatal(err)
			}
			eventually(t, 30*time.Second, "the mount is missed", func() bool { return strings.Contains(drifts(auditOf(t, e.node)), "is not in a BPF file system") })
			silent("unmounted")
			if err := unix.Mount("bpf", mount, "bpf", 0, "mode=0700"); err != nil {
				t.Fatal(err)
			}
		}, " pins were gone, or led elsewhere, the first ", 1},
	} {
		for i := range c.times {
			time.Sleep(time.Duration(i) * 300 * time.Millisecond) // at other moments between two looks
			seen := len(auditOf(t, e.node))
			start := time.Now()
			c.do()
			eventually(t, 30*time.Second, c.name+" is told", func() bool {
				told := drifts(auditOf(t, e.node)[seen:])
				return strings.Contains(told, ": mended") && strings.Contains(told, c.want)
			})
			for _, r := range auditOf(t, e.node)[seen:] {
				if r.What == "drift" {
					took = append(took, r.Time.Sub(start))
					t.Logf("%s: seen after %s", c.name, took[len(took)-1].Round(time.Millisecond))
					break
				}
			}
			silent(c.name)
			// The same again before a look that finds nothing would be told once.
			eventually(t, 30*time.Second, c.name+": the status is good again", func() bool { return e.node.Status().State == "enforcing" })
		}
		e.node.KillCore()
		silent(c.name + ", the core killed")
		e.node.StartCore()
		e.node.AwaitAgent()
	}
	slices.Sort(took)
	if median := took[len(took)/2]; median >= 1500*time.Millisecond {
		t.Errorf("what was done was seen after %v, want less than 1.5 s in the median", took)
	}
	t.Logf("seen after %s in the median, %s at most", took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
	r := call[TrafficReply](e.client, "StopTraffic", true)
	for _, problem := range r.Problems {
		t.Error(problem)
	}
	if _, problems, status := e.node.Demarc("audit", "verify"); status != 0 {
		t.Errorf("audit verify: %d\n%s", status, problems)
	}
}

// A program of somebody else's, attached after ours to the same hook, rewrites where
// a connection goes and says that all is well. Packets are judged by where they go,
// and the program is named. (I18, X20)
func TestI18ReturnValueReset(t *testing.T) {
	w := enforced(t)
	w.control()
	spec := &ebpf.ProgramSpec{
		Name: "rewriter", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R1, 0), asm.FnSetRetval.Call(), asm.Mov.Imm(asm.R0, 1), asm.Return(),
		},
	}
	p, err := ebpf.NewProgram(spec)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	l, err := link.AttachCgroup(link.CgroupOptions{Path: w.node.Root().Dir(), Attach: spec.AttachType, Program: p})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	w.p.Socket("s", "tcp4")
	r := w.p.Do(connect("s", w.peer.At4(7001)))
	if r.Error == "" || r.Error == "EPERM" {
		t.Errorf("a call whose refusal was undone ends with %+v", r)
	}
	w.denied(abi.NoCrossingFor, tcp, w.peer.At4(7001))
	w.silent()
	w.control()
	eventually(t, 30*time.Second, "the program is named", func() bool {
		return strings.Contains(strings.Join(w.node.Status().Limits, "; "), " at connect4 is not ours")
	})
	if s := w.node.Status(); s.State != "enforcing" {
		t.Errorf("%v, %v", s.State, s.Problems)
	}
}
