package fault

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/coreclient"
)

// errnos are what a call may fail with that worked before.
var errnos = []unix.Errno{unix.EINTR, unix.ENOMEM, unix.EPERM, unix.EBUSY, unix.EAGAIN, unix.ENOSPC, unix.EIO}

// eachFailure calls try for a sample of all pairs of a call and an error, and for
// every call that makes a file last.
func (s *scene) eachFailure(calls []string, sample int, try func(when string, decide func(*Call) Answer)) {
	s.t.Helper()
	fail := func(p point, e unix.Errno) {
		s.faults++
		try(fmt.Sprintf("%v at %s", e, p), s.at(p, Answer{Errno: e}))
	}
	all := pointsOf(calls)
	for _, i := range spread(len(all)*len(errnos), times(s.t, sample, 5)) {
		fail(all[(i-1)/len(errnos)], errnos[(i-1)%len(errnos)])
	}
	for _, p := range all {
		if strings.HasPrefix(p.call, "rename ") || strings.HasPrefix(p.call, "fsync ") || strings.HasPrefix(p.call, "link ") {
			fail(p, unix.EIO)
		}
	}
}

// Whichever call of a start fails, beside an enforcing kernel: the core starts
// and says the truth, or it refuses with one line; the kernel enforces all the
// time, and nothing is left of the try. (X11)
func TestX11FailRestart(t *testing.T) {
	s := newScene(t)
	s.traffic()
	s.node.KillCore()
	s.eachFailure(s.rehearse(s.node.CoreProgram), 10, func(when string, decide func(*Call) Answer) {
		s.failStart(when, decide)
		if diff := cmp.Diff(s.pins, listing(t, s.node)); diff != "" {
			t.Errorf("%s: pins (-undisturbed +now):\n%s", when, diff)
		}
		s.check(when)
	})
	s.quiet()
	s.report()
}

// The same where nothing was in force: then nothing is, or everything.
func TestX11FailFirstStart(t *testing.T) {
	s := newScene(t)
	s.node.Detach()
	calls := s.rehearse(s.node.CoreProgram)
	s.detach()
	s.eachFailure(calls, 8, func(when string, decide func(*Call) Answer) {
		// What fails behind the last step ends the core, and not what is in force.
		if started := s.failStart(when, decide); !started && len(listing(t, s.node)) == 0 {
			return
		}
		if diff := cmp.Diff(s.pins, listing(t, s.node)); diff != "" {
			t.Errorf("%s: pins (-undisturbed +now):\n%s", when, diff)
		}
		s.wire.Forget()
		s.door.Forget()
		s.traffic()
		s.await(10)
		s.quiet()
		s.detach()
	})
	s.report()
}

// Whichever call of a change fails: the change is refused, and what was in force
// stays, or it is in force. The core goes on, takes the next change, and holds no
// more descriptors than before. (X11, V7)
func TestX11FailApply(t *testing.T) {
	s := newScene(t)
	s.traffic()
	s.node.KillCore()
	core := s.supervise(Machine{}, record)
	client := s.ready(core)
	if client == nil {
		t.Fatalf("the core does not start; it said:\n%s", core.Output())
	}
	defer client.Close()
	s.applied(client)
	s.applied(client) // from here on there is one that retired
	core.Decide(record)
	s.applied(client)
	calls := core.Calls()
	before := descriptors(t, core.PID())
	s.eachFailure(calls, 20, func(when string, decide func(*Call) Answer) {
		core.Decide(decide)
		_, err := client.Apply(s.image(s.version+1), 0)
		core.Decide(record)
		if err == nil {
			s.version++
		} else if gone(err) || strings.Contains(err.Error(), "\n") {
			t.Fatalf("%s: %v; the core said:\n%s", when, err, core.Output())
		}
		status, statusErr := client.Status()
		if statusErr != nil {
			t.Fatalf("%s: %v", when, statusErr)
		}
		s.truthful(when, status)
		t.Logf("%s: %v; %s %v", when, err, status.State, status.Problems)
		s.applied(client)
		s.check(when)
	})
	if after := descriptors(t, core.PID()); after > before {
		t.Errorf("%d descriptors are open, %d were", after, before)
	}
	core.Signal(unix.SIGTERM)
	core.Gone(t, time.Minute)
	if diff := cmp.Diff(s.pins, listing(t, s.node)); diff != "" {
		t.Errorf("pins (-undisturbed +after the faults):\n%s", diff)
	}
	s.quiet()
	s.report()
}

// applied puts the next version in force, which has to work.
func (s *scene) applied(client *coreclient.Client) {
	s.t.Helper()
	s.version++
	status, err := client.Apply(s.image(s.version), 0)
	if err != nil || status.Active == nil || int(status.Active.Version) != s.version {
		s.t.Fatalf("apply version %d: %+v, %v", s.version, status, err)
	}
}

// descriptors counts those that a process has open.
func descriptors(t testing.TB, pid int) int {
	t.Helper()
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// failStart starts a core that meets a fault and ends it again. It says whether
// the core started.
func (s *scene) failStart(when string, decide func(*Call) Answer) bool {
	s.t.Helper()
	core := s.supervise(Machine{}, decide)
	client := s.ready(core)
	if client == nil {
		status := core.Gone(s.t, time.Minute)
		if problem := clearRefusal(status, core.Output()); problem != "" {
			s.t.Errorf("%s: %s; it said:\n%s", when, problem, core.Output())
		}
		s.t.Logf("%s: %s", when, complaint(core.Output()))
		return false
	}
	defer client.Close()
	status, err := client.Status()
	if err != nil {
		s.t.Fatalf("%s: %v", when, err)
	}
	s.truthful(when, status)
	s.t.Logf("%s: %s %v %v", when, status.State, status.Problems, status.Limits)
	core.Signal(unix.SIGTERM)
	if code := core.Gone(s.t, time.Minute); code != 0 {
		s.t.Errorf("%s: the core started and ended with %d; it said:\n%s", when, code, core.Output())
	}
	return true
}

// truthful wants a status to be of everything enforced, or to say what is not
// (V7).
func (s *scene) truthful(when string, status *proto.Status) {
	s.t.Helper()
	if status.State != proto.StateEnforcing && len(status.Problems) == 0 {
		s.t.Errorf("%s: %s without a problem", when, status.State)
	}
	if status.State == proto.StateEnforcing && (status.Active == nil || int(status.Active.Version) != s.version) {
		s.t.Errorf("%s: enforcing %+v, not version %d", when, status.Active, s.version)
	}
}

// complaint is the line that a core ends with.
func complaint(output string) string {
	for line := range strings.Lines(output) {
		if rest, found := strings.CutPrefix(line, "demarc-core: "); found {
			return strings.TrimSpace(rest)
		}
	}
	return ""
}

// clearRefusal says what is wrong with how a core refused: one line and a hint
// are wanted, beside its log.
func clearRefusal(status int, output string) string {
	lines, others := 0, 0
	for line := range strings.Lines(output) {
		switch {
		case strings.HasPrefix(line, "demarc-core: "):
			lines++
		case !strings.HasPrefix(line, "hint: ") && !strings.HasPrefix(line, "time="):
			others++
		}
	}
	switch {
	case status <= 0:
		return fmt.Sprintf("ended with %d, not by refusing", status)
	case lines != 1 || others > 0:
		return fmt.Sprintf("%d lines say why, and %d more", lines, others)
	}
	return ""
}
