package fault

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/coreclient"
	"github.com/demarc/demarc/test/netlab"
)

// The core is killed before each of its calls in turn, or before a sample of
// them, in every phase of its life, and nobody whose traffic is declared notices,
// and nothing else passes. (X1, I01)

// A start that adopts.
func TestX1KillRestart(t *testing.T) {
	s := newScene(t)
	s.traffic()
	s.killStarts(s.node.CoreProgram, 3)
	s.quiet()
	s.report()
}

// A start of another build, which puts its programs in the place of those that
// run, up and down. The one that was killed or the one before may start after it.
func TestX1KillUpgrade(t *testing.T) {
	s := newScene(t)
	s.traffic()
	s.killStarts(build(t, otherPrograms), 3)
	s.quiet()
	s.report()
}

// killStarts kills starts of a build over what the node's own attached, and the
// other way round.
func (s *scene) killStarts(other string, sample int) {
	s.t.Helper()
	s.node.KillCore()
	calls := s.rehearse(other)
	running, other := other, s.node.CoreProgram
	for i, p := range pick(calls, points(s.t, sample)) {
		when := "killed before " + p.String()
		s.node.CoreProgram = other
		s.killStart(p)
		if i%2 == 0 {
			running, other = other, running
		}
		s.node.CoreProgram = running
		s.recover(when, s.version)
		s.node.KillCore()
		s.check(when)
	}
	s.node.StartCore()
}

// rehearse lists the calls of a start that nothing disturbs.
func (s *scene) rehearse(program string) []string {
	s.t.Helper()
	usual := s.node.CoreProgram
	defer func() { s.node.CoreProgram = usual }()
	s.node.CoreProgram = program
	core := s.supervise(Machine{}, record)
	client := s.ready(core)
	if client == nil {
		s.t.Fatalf("the core does not start under a supervisor; it said:\n%s", core.Output())
	}
	defer client.Close()
	calls := core.Calls()
	core.Kill()
	return calls
}

// killStart kills a start before a call, or at its end if that does not come.
func (s *scene) killStart(p point) {
	s.t.Helper()
	s.faults++
	core := s.supervise(Machine{}, s.at(p, Answer{Kill: true}))
	if client := s.ready(core); client != nil {
		client.Close()
		core.Kill()
	}
	core.Gone(s.t, time.Minute)
}

// The first start on a machine: either nothing is in force or everything, and a
// start that was killed is never taken for one that was finished.
func TestX1KillFirstStart(t *testing.T) {
	s := newScene(t)
	s.node.Detach()
	calls := s.rehearse(s.node.CoreProgram)
	s.detach()
	for _, p := range pick(calls, points(t, 3)) {
		when := "killed before " + p.String()
		s.killStart(p)
		if _, err := os.Lstat(filepath.Join(s.node.Dir(), "bpf", "demarc", "abi")); err == nil {
			missing := map[string]bool{}
			for _, pin := range s.pins {
				missing[pin] = true
			}
			for _, pin := range listing(t, s.node) {
				delete(missing, pin)
			}
			if len(missing) > 0 {
				t.Errorf("%s: called finished without %v", when, missing)
			}
		}
		s.recover(when, s.version)
		s.wire.Forget()
		s.door.Forget()
		s.traffic()
		s.await(10)
		s.quiet()
		s.node.Detach()
	}
	s.report()
}

// detach ends enforcement while no core runs.
func (s *scene) detach() {
	s.t.Helper()
	if out, status := s.node.Run("demarc-core", "detach", "--config", s.node.CoreConfig(), "--yes"); status != 0 {
		s.t.Fatalf("detach: %d: %s", status, out)
	}
}

// await waits until the wire has seen that many packets of declared traffic.
func (s *scene) await(packets int) {
	s.t.Helper()
	for range packets {
		s.wire.Forget()
		s.wire.Await(func(p netlab.Packet) bool { return p.Sent && p.Dst.Port() == 7000 && p.Proto == unix.IPPROTO_TCP })
	}
}

// change is what a client asks of a core that is then killed.
type change struct {
	prepare func(*coreclient.Client) (*proto.Status, error) // before, undisturbed; nil = nothing
	ask     func(*coreclient.Client) (*proto.Status, error)
	trial   bool // nobody confirms it: a start takes it back
}

// A change of policy: afterwards the old or the new one is in force, and the new
// one if the core said so.
func TestX1KillApply(t *testing.T) {
	s := newScene(t)
	s.traffic()
	s.killChanges(change{ask: func(client *coreclient.Client) (*proto.Status, error) {
		return client.Apply(s.image(s.version+1), 0)
	}})
}

// The same as the agent asks for it: what is applied is made ready before.
func TestX1KillReady(t *testing.T) {
	s := newScene(t)
	s.traffic()
	s.killChanges(change{ask: func(client *coreclient.Client) (*proto.Status, error) {
		image := s.image(s.version + 1)
		if err := client.Prepare(image); err != nil {
			return nil, err
		}
		return client.Apply(image, 0)
	}})
}

// A way back, to the policy before.
func TestX1KillRollback(t *testing.T) {
	s := newScene(t)
	s.version++
	s.node.Apply(policy(s.version))
	s.traffic()
	s.killChanges(change{ask: (*coreclient.Client).Rollback})
}

// A change for a time: whoever starts takes it back.
func TestX1KillTrial(t *testing.T) {
	s := newScene(t)
	s.traffic()
	s.killChanges(change{trial: true, ask: func(client *coreclient.Client) (*proto.Status, error) {
		return client.Apply(s.image(s.version+1), time.Hour)
	}})
}

// A change that is made to last.
func TestX1KillConfirm(t *testing.T) {
	s := newScene(t)
	s.traffic()
	s.killChanges(change{ask: (*coreclient.Client).Confirm, prepare: func(client *coreclient.Client) (*proto.Status, error) {
		return client.Apply(s.image(s.version+1), time.Hour)
	}})
}

// killChanges kills cores in the middle of a change.
func (s *scene) killChanges(c change) {
	s.t.Helper()
	s.node.KillCore()
	calls, version := s.killChange(c, point{})
	for _, p := range append([]point{{}}, pick(calls, points(s.t, 3))...) {
		when := "after a change that was not disturbed"
		if p.nth > 0 {
			when = "killed before " + p.String()
			s.faults++
			_, version = s.killChange(c, p)
		}
		switch {
		case c.trial:
			s.recover(when, s.version)
		case version != 0:
			s.recover(when, version)
		default:
			s.recover(when, s.version-1, s.version, s.version+1)
		}
		s.version = int(s.node.Status().Active.Version)
		s.node.KillCore()
		s.check(when)
	}
	s.node.StartCore()
	s.quiet()
	s.report()
}

// killChange kills a core before a call of a change, or afterwards. It
// returns the calls, and the version that the core said was in force; 0 = it said
// nothing.
func (s *scene) killChange(c change, p point) (calls []string, version int) {
	s.t.Helper()
	core := s.supervise(Machine{}, record)
	client := s.ready(core)
	if client == nil {
		s.t.Fatalf("the core does not start; it said:\n%s", core.Output())
	}
	defer client.Close()
	if c.prepare != nil {
		if _, err := c.prepare(client); err != nil {
			s.t.Fatal(err)
		}
	}
	core.Decide(s.at(p, Answer{Kill: true}))
	status, err := c.ask(client)
	calls = core.Calls()
	switch {
	case err == nil:
		version = int(status.Active.Version)
	case !gone(err):
		s.t.Fatalf("change refused: %v", err)
	}
	core.Kill()
	core.Gone(s.t, time.Minute)
	return calls, version
}

// healthyWithin is how long a start after a fault may take, in the median: a machine
// that does other things stands still for seconds at times.
const healthyWithin = 5 * time.Second

// report says how much was done, and wants the core to have been healthy again in time.
func (s *scene) report() {
	s.t.Helper()
	median, longest := s.recovered()
	s.t.Logf("%d of %d faults met; %d starts after one were healthy after %s in the median, %s at most; traffic: %+v", s.met.Load(), s.faults,
		len(s.recoveries), median.Round(time.Millisecond), longest.Round(time.Millisecond), s.total)
	if s.total.Denied == 0 || int(s.met.Load()) < s.faults/2 {
		s.t.Error("nothing was proved")
	}
	if median >= healthyWithin { // zero where the core went on
		s.t.Errorf("healthy after %s in the median, want less than %s", median, healthyWithin)
	}
}
