package fault

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
)

// The core is restarted again and again, by SIGTERM and by SIGKILL, under load.
// (X2, I02)
func TestX2Restart(t *testing.T) {
	s := newScene(t)
	s.traffic()
	for i := range times(t, 20, 5) {
		end := s.node.KillCore
		if i%2 == 0 {
			end = s.node.StopCore
		}
		end()
		s.recover(fmt.Sprintf("restart %d", i), s.version)
		s.check(fmt.Sprintf("restart %d", i))
	}
	s.quiet()
	s.report()
}

// Two builds take turns, whose every program differs, under load: what runs is
// replaced in place, up and down. (X2, I04)
func TestX2Upgrade(t *testing.T) {
	s := newScene(t)
	builds := []string{build(t, otherPrograms), s.node.CoreProgram}
	s.traffic()
	tags := s.tags()
	for i := range times(t, 6, 0.5) {
		when := fmt.Sprintf("change of build %d", i)
		s.node.StopCore()
		s.node.CoreProgram = builds[i%2]
		s.recover(when, s.version)
		s.check(when)
		now := s.tags()
		for name, tag := range now {
			if tag == tags[name] {
				t.Errorf("%s: %s still runs %s", when, name, tag)
			}
		}
		if len(now) != len(tags) {
			t.Errorf("%s: %d programs are attached, %d were", when, len(now), len(tags))
		}
		tags = now
	}
	s.quiet()
	s.report()
}

// times is how often something is done: sample, or share times what is asked for.
func times(t testing.TB, sample int, share float64) int {
	t.Helper()
	n := points(t, 0)
	if n == 0 {
		return sample
	}
	return max(sample, int(share*float64(n)))
}

// tags are those of the attached programs.
func (s *scene) tags() map[string]string {
	s.t.Helper()
	all := map[string]string{}
	for _, l := range s.node.Status().Links {
		all[l.Name] = l.Program
	}
	return all
}

// A build whose tables mean something else, or are of another size, does not
// touch what is in force: it says so, and the build before goes on. (X2, I04)
func TestI04OtherLayout(t *testing.T) {
	for _, tt := range []struct {
		name    string
		variant variant
	}{
		{"bad version of the layout", otherABI},
		{"bad size of a map", otherLayout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			other := build(t, tt.variant)
			s := newScene(t)
			s.traffic()
			usual := s.node.CoreProgram
			s.node.StopCore()
			s.node.CoreProgram = other
			core := s.supervise(Machine{}, record)
			if client := s.ready(core); client != nil {
				client.Close()
				t.Fatalf("it started; it said:\n%s", core.Output())
			}
			status := core.Gone(t, time.Minute)
			if problem := clearRefusal(status, core.Output()); problem != "" || !strings.Contains(core.Output(), "was made by another version") {
				t.Errorf("%s; it said:\n%s", problem, core.Output())
			}
			if diff := cmp.Diff(s.pins, listing(t, s.node)); diff != "" {
				t.Errorf("pins (-before +after):\n%s", diff)
			}
			s.check("beside another build")
			s.node.CoreProgram = usual
			s.recover("with the usual build", s.version)
			s.quiet()
		})
	}
}

// A core that is told to hang up has nothing to do, and goes on.
func TestHangUp(t *testing.T) {
	s := newScene(t)
	before := s.node.Core.PID()
	s.node.Core.Signal(unix.SIGHUP)
	// The answer comes after the signal was taken.
	if status := s.node.Status(); status.State != proto.StateEnforcing {
		t.Errorf("status %+v", status)
	}
	select {
	case <-s.node.Core.Ended():
		t.Fatalf("core %d ended; it said:\n%s", before, s.node.Core.Output())
	default:
	}
}
