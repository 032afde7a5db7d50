package fault

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/coreclient"
	"github.com/demarc/demarc/test/netlab"
)

// points is how many places a fault is put at, in each phase: a sample, unless
// the environment asks for more (`make test-faults`).
func points(t testing.TB, sample int) int {
	t.Helper()
	asked := os.Getenv("DEMARC_FAULTS")
	if asked == "" {
		return sample
	}
	n, err := strconv.Atoi(asked)
	if err != nil || n < 1 {
		t.Fatalf("DEMARC_FAULTS is %q, not a number of faults", asked)
	}
	return n
}

// spread picks n of 1..total at even distances, from the first to the last.
func spread(total, n int) (all []int) {
	n = min(n, total)
	for i := range n {
		all = append(all, 1+i*(total-1)/max(n-1, 1))
	}
	return all
}

// point is one call of a program: which of its kind. Threads take turns as they
// like, so that the number of a call among all of them says less.
type point struct {
	call string
	nth  int
}

func (p point) String() string { return fmt.Sprintf("call %d of the kind %s", p.nth, p.call) }

// pointsOf are the calls of a program that was let run.
func pointsOf(calls []string) (all []point) {
	seen := map[string]int{}
	for _, c := range calls {
		seen[c]++
		all = append(all, point{c, seen[c]})
	}
	return all
}

// pick is a spread over calls, and one of those that move a file or a pin to where
// it counts: what lies aside then has to go.
func pick(calls []string, n int) (picked []point) {
	all := pointsOf(calls)
	for _, i := range spread(len(all), n) {
		picked = append(picked, all[i-1])
	}
	for _, p := range all {
		if strings.HasPrefix(p.call, "rename ") && !slices.Contains(picked, p) {
			return append(picked, p)
		}
	}
	return picked
}

// at answers one call, and lets all others happen.
func (s *scene) at(p point, a Answer) func(*Call) Answer {
	seen := 0
	return func(c *Call) Answer {
		if c.String() != p.call {
			return Answer{}
		}
		if seen++; seen != p.nth {
			return Answer{}
		}
		s.met.Add(1)
		return a
	}
}

// policy is a policy of some version: web may reach db on 7000, never on 7001.
func policy(version int) string {
	return fmt.Sprintf(`apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: lab, version: %d}
trustDomain: lab.example
zones:
  app: {trust: 10}
workloads:
  web: {zone: app, match: [{cgroup: /lab/web}]}
  db: {zone: app, match: [{cgroup: /lab/db}]}
crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000], log: none}
  - {name: only-in-%d, from: [workload/db], to: [workload/web], ports: [tcp/%d], log: none}
`, version, version, 1+version%60000)
}

// scene is a node and traffic that goes on whatever happens to its core:
//
//	web (/lab/web)  ->  db (/lab/db)  7000 declared: streams kept open, connections all the time
//	web             ->  db            7001 not: tried a thousand times a second
//	peer (no demarc) -> db            7000 without a proof: tried all the time
//	host: where the core runs, with a device that is a boundary
type scene struct {
	t          *testing.T
	lab        *netlab.Lab
	node       *netlab.Node
	host       *netlab.Namespace
	web, db    *netlab.Namespace
	peer       *netlab.Namespace
	wire, door *netlab.Wire // of web, of db
	server     *running
	client     *running // nil while nothing is promised
	stranger   *running
	pins       []string        // of a start that nothing disturbed
	beside     []string        // cgroups and files of a core that runs
	limits     []string        // of this machine
	version    int             // of the newest policy
	recoveries []time.Duration // from a start to enforcing, after each fault
	faults     int             // that were put somewhere
	met        *atomic.Int64   // that something ran into
	total      counted
}

func newScene(t *testing.T) *scene {
	t.Helper()
	s := &scene{t: t, lab: netlab.New(t), version: 1, met: new(atomic.Int64)}
	s.web, s.db, s.peer, s.host = s.lab.Namespace("web"), s.lab.Namespace("db"), s.lab.Namespace("peer"), s.lab.Namespace("host")
	s.node = s.lab.Node(policy(1), netlab.NodeOptions{CoreOnly: true, Home: s.host})
	s.server = startProber(t, s.db, s.node.Cgroup("/lab/db"), probes{Serve: []string{"[::]:7000", "[::]:7001"}})
	s.wire, s.door = s.web.Wire(), s.db.Wire()
	s.pins, s.beside, s.limits = listing(t, s.node), beside(t, s.node), s.node.Status().Limits
	return s
}

// traffic starts what must be let through and what must not.
func (s *scene) traffic() {
	s.t.Helper()
	four, six := s.db.At4(7000).String(), s.db.At6(7000).String()
	s.client = startProber(s.t, s.web, s.node.Cgroup("/lab/web"), probes{
		Streams: []string{four, six}, Connect: []string{four, six},
		Denied: []string{s.db.At4(7001).String(), s.db.At6(7001).String()}, Every: 4 * time.Millisecond,
	})
	s.stranger = startProber(s.t, s.peer, s.lab.Cgroup("peer"), probes{Strange: []string{four, six}})
}

// quiet ends it, and wants there to have been enough of it.
func (s *scene) quiet() {
	s.t.Helper()
	got := s.client.stop()
	strange := s.stranger.stop().Strange
	s.check("at the end")
	if got.Exchanged < 2 || got.Connected < 2 || got.Denied < 2 || strange < 2 {
		s.t.Errorf("too little traffic to prove anything: %+v, %d strangers", got, strange)
	}
	s.total.Exchanged += got.Exchanged
	s.total.Connected += got.Connected
	s.total.Denied += 2 * got.Denied
	s.total.Strange += strange
	s.client, s.stranger = nil, nil
}

// check wants no problem since the last time, and nothing on the wire that no
// policy declares (V1, V2).
func (s *scene) check(when string) {
	s.t.Helper()
	for _, r := range []*running{s.server, s.client, s.stranger} {
		if r == nil {
			continue
		}
		for _, p := range r.problems() {
			s.t.Errorf("%s: %s", when, p)
		}
	}
	undeclared := func(p netlab.Packet) bool { return p.Sent && p.Dst.Port() == 7001 }
	if got := s.wire.Packets(undeclared); len(got) > 0 {
		s.t.Errorf("%s: %d undeclared packets, the first: %s", when, len(got), got[0])
	}
	answer := func(p netlab.Packet) bool {
		return p.Sent && (p.Dst.Addr() == s.peer.IP4 || p.Dst.Addr() == s.peer.IP6) && p.Proto == unix.IPPROTO_TCP
	}
	if got := s.door.Packets(answer); len(got) > 0 {
		s.t.Errorf("%s: %d answers to a stranger, the first: %s", when, len(got), got[0])
	}
	s.wire.Forget()
	s.door.Forget()
}

// supervise starts the node's core under a supervisor.
func (s *scene) supervise(m Machine, decide func(*Call) Answer) *Supervised {
	s.t.Helper()
	return Supervise(s.t, s.lab, s.host, s.lab.Cgroup("daemons"), s.node.CoreCommand(), m, decide)
}

// ready waits until a core answers, or has ended: then there is no client. The
// caller closes it.
func (s *scene) ready(core *Supervised) *coreclient.Client {
	s.t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if client, err := s.dial(); err == nil {
			return client
		}
		select {
		case <-core.Ended():
			return nil
		default:
		}
	}
	s.t.Fatalf("the core neither answers nor ends; it said:\n%s", core.Output())
	return nil
}

func (s *scene) dial() (*coreclient.Client, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	client, err := coreclient.Dial(ctx, s.node.CoreSocket())
	if err != nil {
		return nil, err
	}
	_, descriptors, err := client.Hello()
	if err != nil {
		client.Close()
		return nil, err
	}
	descriptors.Close()
	return client, nil
}

// recover starts the core as usual after a fault. It must enforce one of the
// versions, and nothing may be left of the fault. It goes on running.
func (s *scene) recover(when string, versions ...int) {
	s.t.Helper()
	start := time.Now()
	s.node.StartCore()
	status := s.node.Status()
	for end := start.Add(30 * time.Second); status.State != proto.StateEnforcing && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		status = s.node.Status()
	}
	took := time.Since(start)
	s.recoveries = append(s.recoveries, took)
	s.t.Logf("%s: healthy after %s", when, took.Round(time.Millisecond))
	if status.State != proto.StateEnforcing || status.Active == nil || !slices.Contains(versions, int(status.Active.Version)) {
		s.t.Fatalf("%s: status %+v, want version %v enforced", when, status, versions)
	}
	if diff := cmp.Diff(s.pins, listing(s.t, s.node)); diff != "" {
		s.t.Errorf("%s: pins (-undisturbed +after the fault):\n%s", when, diff)
	}
	if diff := cmp.Diff(s.beside, beside(s.t, s.node)); diff != "" {
		s.t.Errorf("%s: cgroups and files (-undisturbed +after the fault):\n%s", when, diff)
	}
}

// recovered is what half of the starts after a fault took at most, and the longest of
// them.
func (s *scene) recovered() (median, longest time.Duration) {
	all := slices.Sorted(slices.Values(s.recoveries))
	if len(all) == 0 {
		return 0, 0
	}
	return all[(len(all)-1)/2], all[len(all)-1]
}

// listing is everything that the node has pinned.
func listing(t testing.TB, node *netlab.Node) (all []string) {
	t.Helper()
	root := filepath.Join(node.Dir(), "bpf", "demarc")
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		all = append(all, strings.TrimPrefix(path, filepath.Dir(root)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// beside are cgroups and files that a core makes for itself for a while.
func beside(t testing.TB, node *netlab.Node) (all []string) {
	t.Helper()
	for _, pattern := range []string{filepath.Join(node.Root().Dir(), "demarc-*"), filepath.Join(node.Dir(), "state", "preflight*")} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	return all
}

// image is a policy as a file that a core reads.
func (s *scene) image(version int) *os.File {
	s.t.Helper()
	fd, err := unix.MemfdCreate("image", unix.MFD_CLOEXEC)
	if err != nil {
		s.t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "image")
	s.t.Cleanup(func() { f.Close() })
	if _, err := f.Write(s.node.Image(policy(version))); err != nil {
		s.t.Fatal(err)
	}
	return f
}

// record lets everything happen.
func record(*Call) Answer { return Answer{} }

// gone says whether an error is that the core was gone.
func gone(err error) bool {
	var refused *proto.Refused
	return err != nil && !errors.As(err, &refused)
}
