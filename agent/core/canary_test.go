package core

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

// "enforcing" is said only if a datagram that must not get out does not, at the moment
// that somebody asks. (V7)
func TestV7Canary(t *testing.T) {
	for _, mode := range []image.Mode{image.Enforce, image.Observe} {
		m := newMachine(t)
		want := proto.StateEnforcing
		if mode == image.Observe {
			want = proto.StateObserving
		}
		c := still(m.start())
		if err := c.prove(); err != nil {
			t.Errorf("without a policy there is nothing to prove: %v", err)
		}
		s, err := c.Apply(shop(t, func(p *policy.Policy) { p.Mode = mode }), 0)
		if err != nil || s.State != want {
			t.Fatalf("apply: %+v, %v", s, err)
		}
		before := canaryCount(t, c, mode)
		if s := c.Status(); s.State != want || canaryCount(t, c, mode) != before+1 {
			t.Errorf("status: %v, %v, counted %d and then %d", s.State, s.Problems, before, canaryCount(t, c, mode))
		}
		// Every link is where it should be; what judges does not.
		spec := c.objects.spec.Programs["egress"]
		blind := foreignProgram(t, spec)
		egress := hook{program: "egress"}
		must(t, c.links.open[egress].Update(blind))
		must(t, c.links.note(egress, c.links.open[egress].Link))
		s = c.Status()
		if told := strings.Join(s.Problems, "; "); s.State != proto.StateDegraded || !strings.HasPrefix(told, "canary: a datagram that nobody declared ") {
			t.Errorf("judged by a program that lets everything pass: %v, %s", s.State, told)
		}
		must(t, c.links.put(egress))
		if s := c.Status(); s.State != want {
			t.Errorf("put back: %v, %v", s.State, s.Problems)
		}
		var problems []string
		for _, r := range journalOf(t, c) {
			if r.What == auditProblem || r.What == auditHealthy {
				problems = append(problems, r.What)
			}
		}
		if strings.Join(problems, " ") != "problem healthy" {
			t.Errorf("the audit log tells of %v", problems)
		}
		c.Close()
	}
}

func canaryCount(t *testing.T, c *Core, mode image.Mode) uint64 {
	t.Helper()
	key := abi.CountKey{Subject: uint32(image.Canary), Verdict: abi.Deny, Reason: abi.PendingSubject}
	if mode == image.Observe {
		key.Verdict = abi.Audit
	}
	n, err := c.counted(key)
	must(t, err)
	return n
}

// The canary's socket is in a network of its own, and its cgroup goes with the core; a
// core that was killed leaves it to the next, or to detach.
func TestCanaryLeavesNothing(t *testing.T) {
	m := newMachine(t)
	dir := m.config.CgroupRoot + canaryPath
	must(t, os.Mkdir(dir, 0o755)) // of a core that was killed
	c := enforcing(t, m, shop(t, nil))
	own, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	must(t, err)
	defer unix.Close(own)
	here, err := unix.GetsockoptUint64(own, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	must(t, err)
	there, err := unix.GetsockoptUint64(c.canary.socket, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	must(t, err)
	if here == there {
		t.Error("the canary is in the network of the core")
	}
	if members, err := os.ReadFile(filepath.Join(dir, "cgroup.procs")); err != nil || len(members) > 0 {
		t.Errorf("the canary's cgroup holds %q, %v", members, err)
	}
	c.Close()
	absent(t, dir)
	must(t, os.Mkdir(dir, 0o755))
	must(t, Detach(m.config))
	absent(t, dir)
}

// Without a canary nothing is called enforced.
func TestV7NoCanary(t *testing.T) {
	m := newMachine(t)
	c := enforcing(t, m, shop(t, nil))
	c.canary.close()
	c.canary = nil
	s := c.Status()
	if told := strings.Join(s.Problems, "; "); s.State != proto.StateDegraded || told != "canary: there is no canary: nothing proves that the kernel enforces" {
		t.Errorf("%v, %s", s.State, told)
	}
}
