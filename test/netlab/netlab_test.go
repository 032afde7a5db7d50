package netlab

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/test/probe"
)

func TestMain(m *testing.M) { Main(m) }

// What is sent is seen at the far end, with all that a test may ask about it, and
// what is not sent is not.
func TestWire(t *testing.T) {
	l := New(t)
	web, peer := l.Namespace("web"), l.Namespace("peer")
	peer.Echo(7000)
	wire := web.Wire()
	p := web.Probe(l.Cgroup("web"))
	for _, to := range []Place{peer.At4(7000), peer.At6(7000)} {
		kind := "udp4"
		if to.Address.Is6() {
			kind = "udp6"
		}
		p.Socket("u", kind)
		p.Connect("u", to.String())
		if got := wire.Packets(To(unix.IPPROTO_UDP, to.Address, 0)); len(got) != 0 {
			t.Errorf("connect sent %v", got)
		}
		p.Echoed("u", "hello")
		got := wire.Packets(To(unix.IPPROTO_UDP, to.Address, 7000))
		if len(got) != 1 {
			t.Fatalf("one datagram sent, seen %v", got)
		}
		want := got[0]
		want.Sent, want.Proto, want.Payload = true, unix.IPPROTO_UDP, 5
		want.Dst = netip.AddrPortFrom(to.Address, 7000)
		if diff := cmp.Diff(want, got[0], cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
			t.Errorf("packet (-want +got):\n%s", diff)
		}
		if n := wire.Count(func(p Packet) bool { return !p.Sent && p.Proto == unix.IPPROTO_UDP && p.Src.Addr() == to.Address }); n != 1 {
			t.Errorf("one datagram came back, seen %d", n)
		}
	}
	wire.Forget()
	p.Socket("t", "tcp4")
	p.Connect("t", peer.At4(7000).String())
	p.Echoed("t", "over a stream")
	all := To(unix.IPPROTO_TCP, peer.IP4, 7000)
	if got := wire.Packets(And(all, WithPayload)); len(got) != 1 || got[0].Payload != len("over a stream") {
		t.Errorf("segments with payload %v", got)
	}
	if got := wire.Packets(all); len(got) < 3 || got[0].Flags != 2 {
		t.Errorf("handshake %v", got)
	}
}

// A burst on every CPU is seen to its last packet.
func TestWireSettles(t *testing.T) {
	l := New(t)
	web, peer := l.Namespace("web"), l.Namespace("peer")
	peer.Echo(7000)
	wire := web.Wire()
	p := web.Probe(l.Cgroup("web"))
	p.Socket("u", "udp4")
	to := peer.At4(7000).String()
	p.Connect("u", to)
	p.Echoed("u", "the neighbour is known now")
	wire.Forget()
	batch := make([]string, 500)
	for i := range batch {
		batch[i] = to
	}
	if r := p.Must(probe.Call{Op: "sendmmsg", Socket: "u", Data: []byte("x"), Batch: batch}); r.N != len(batch) {
		t.Fatalf("sent %d", r.N)
	}
	if n := wire.Count(To(unix.IPPROTO_UDP, peer.IP4, 7000)); n != len(batch) {
		t.Errorf("sent %d, seen %d", len(batch), n)
	}
}

func TestLoopback(t *testing.T) {
	l := New(t)
	ns := l.Island("host")
	ns.Echo(7000)
	wire := ns.Loopback()
	p := ns.Probe(l.Cgroup("web"))
	p.Socket("u", "udp4")
	p.Connect("u", "127.0.0.1:7000")
	p.Echoed("u", "hello")
	if n := wire.Count(To(unix.IPPROTO_UDP, netip.MustParseAddr("127.0.0.1"), 7000)); n != 1 {
		t.Errorf("one datagram sent, seen %d", n)
	}
}

// A process is in its cgroup and namespace from its first instruction, and gone
// with the lab.
func TestProcess(t *testing.T) {
	var pid int
	var dir, temporary string
	t.Run("lab", func(t *testing.T) {
		l := New(t)
		c := l.Cgroup("deep/below")
		dir, temporary = c.Dir(), l.Dir()
		p := l.Island("x").Start(c, Command{Path: "/bin/sh", Args: []string{"-c", "cat /proc/self/cgroup /proc/net/dev; exit 3"}})
		if status := p.Wait(10 * time.Second); status != 3 {
			t.Errorf("exit status %d", status)
		}
		if out := p.Output(); !strings.Contains(out, "/deep/below\n") || strings.Contains(out, "eth0") {
			t.Errorf("it said %s", out)
		}
		stays := l.Island("y").Start(c, Command{Path: "/bin/sh", Args: []string{"-c", "trap '' TERM; sleep 1000"}})
		pid = stays.PID()
	})
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("process lives on: %v", err)
	}
	for _, path := range []string{dir, filepath.Dir(filepath.Dir(dir)), temporary} {
		if !gone(path) {
			t.Errorf("%s is left", path)
		}
	}
}

// What a killed test left is removed by the next one; what belongs to a living
// process is not.
func TestRemoveStale(t *testing.T) {
	New(t)
	mount, err := cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	parents := []string{mount, os.TempDir()}
	for _, parent := range parents {
		if err := os.MkdirAll(filepath.Join(parent, prefix+strconv.Itoa(1<<30), "a", "b"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mounted := filepath.Join(os.TempDir(), prefix+strconv.Itoa(1<<30), "a")
	if err := unix.Mount("bpf", mounted, "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := removeStale(mount); err != nil {
		t.Fatal(err)
	}
	for _, parent := range parents {
		if dead := filepath.Join(parent, prefix+strconv.Itoa(1<<30)); !gone(dead) {
			t.Errorf("%s of a dead process is left", dead)
		}
		if own := filepath.Join(parent, prefix+strconv.Itoa(os.Getpid())); gone(own) {
			t.Errorf("%s of a living process is gone", own)
		}
	}
}

func gone(path string) bool {
	_, err := os.Stat(path)
	return errors.Is(err, os.ErrNotExist)
}

const smallPolicy = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: lab, version: 1}
trustDomain: lab.example
zones:
  edge: {trust: 10}
workloads:
  web: {zone: edge, match: [{cgroup: /lab/web}]}
  decoy: {zone: edge, match: [{cgroup: /lab/decoy}]}
crossings:
  - {name: web-decoy, from: [workload/web], to: [workload/decoy], ports: [tcp/7000, udp/7000], log: all, purpose: test}
`

// A node enforces, tells, and goes on enforcing without its daemons.
func TestNode(t *testing.T) {
	for _, o := range []NodeOptions{{CoreOnly: true}, {}} {
		t.Run("core only "+strconv.FormatBool(o.CoreOnly), func(t *testing.T) {
			l := New(t)
			web, peer := l.Namespace("web"), l.Namespace("peer")
			peer.Echo(7001)
			n := l.Node(smallPolicy, o)
			wire := web.Wire()
			p := web.Probe(n.Cgroup("/lab/web"))
			refuse := func() {
				t.Helper()
				p.Socket("u", "udp4")
				p.Refused(probe.Call{Op: "send", Socket: "u", Address: peer.At4(7001).String(), Data: []byte("x")}, "EPERM")
			}
			refuse()
			got := n.AwaitDenied(abi.NoCrossingFor, unix.IPPROTO_UDP, peer.At4(7001))
			got.Time, got.CPU, got.Seq, got.Node, got.Source.Address, got.Source.Port, got.Source.Cgroup = time.Time{}, 0, 0, "", netip.Addr{}, 0, ""
			want := flow.Flow{
				Reason: abi.NoCrossingFor, Hook: record.HookEgress, Protocol: "udp", Proof: abi.ProofUnknown, Epoch: 1,
				Source:      flow.Endpoint{Identity: got.Source.Identity, Workload: "web", Zone: "edge"},
				Destination: flow.Endpoint{Address: peer.IP4, Port: 7001},
			}
			if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("flow (-want +got):\n%s", diff)
			}
			n.KillCore()
			if !o.CoreOnly {
				n.KillAgent()
			}
			refuse()
			n.StartCore()
			refuse()
			if n := n.Denied(abi.NoCrossingFor); n != 3 {
				t.Errorf("%d denials", n)
			}
			if got := wire.Packets(ToAddress(peer.IP4)); len(got) != 0 {
				t.Errorf("on the wire: %v", got)
			}
			n.Detach()
			// The kernel puts a link away some time after its last pin is gone.
			free := probe.Call{Op: "send", Socket: "u", Address: peer.At4(7001).String(), Data: []byte("x")}
			for end := time.Now().Add(10 * time.Second); p.Do(free).Error != "" && time.Now().Before(end); {
				time.Sleep(time.Millisecond)
			}
			if r := p.Must(probe.Call{Op: "recv", Socket: "u"}); string(r.Data) != "x" {
				t.Errorf("echo %q", r.Data)
			}
		})
	}
}
