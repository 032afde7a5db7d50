//go:build soak

package e2e_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/test/netlab"
)

// What `make soak` asks. Growth is that of the last quarter over the second one, when
// caches have filled.
const (
	soakLasts  = 30 * time.Minute // DEMARC_SOAK says otherwise
	soakRound  = 5 * time.Second
	soakMemory = 1.20 // of a daemon's resident memory
	soakSlack  = 4096 // kB more than that
	soakFiles  = 8    // descriptors
	soakSeries = 8    // of what Prometheus gets
)

// soak is two hosts, as in the rotation of keys, with agents: web on the first, db on
// the second. The daemons of the first live through the whole run and are measured; those of the
// second are killed.
type soak struct {
	*rotated
	version    int
	births     *actor
	changes    int
	shadows    int
	kills      int
	born       int
	wrong      []string
	samples    []footprint
	began      time.Time
	undeclared [2]*netlab.Wire
}

// footprint is what the first host's daemons take.
type footprint struct{ Core, Agent, CoreFiles, AgentFiles, Series int }

// Two hosts under load, whose policy, keys and cgroups change all the time, and one of
// which loses its core or its agent again and again: what is declared passes, what is not does
// not reach the wire, and nothing grows. (X22)
func TestSoak(t *testing.T) {
	lasts := soakLasts
	if text := os.Getenv("DEMARC_SOAK"); text != "" {
		var err error
		if lasts, err = time.ParseDuration(text); err != nil || lasts < time.Minute {
			t.Fatalf("DEMARC_SOAK: %q is no time of at least 1m", text)
		}
	}
	s := newSoak(t)
	s.load()
	t.Logf("%6s %8s %8s %7s %6s %6s | %9s %9s %5s %5s %7s | %5s", "time", "changes", "shadows", "keys", "kills", "births", "core kB", "agent kB", "files", "files", "series", "wrong")
	for i := 0; time.Since(s.began) < lasts; i++ {
		next := time.Now().Add(soakRound)
		s.apply(i)
		switch i % 4 {
		case 0:
			s.rotate()
			s.until(time.Now().Add(time.Second))
			s.copyRing()
		case 1, 3:
			s.kill(i)
		}
		s.churn()
		s.sample()
		s.until(next)
	}
	s.end()
}

func newSoak(t *testing.T) *soak {
	t.Helper()
	r := newRotated(t, netlab.NodeOptions{})
	s := &soak{rotated: r, version: 1}
	for i, host := range r.hosts {
		s.undeclared[i] = host.Wire()
	}
	// Cgroups can be listed by anybody, as on a real host: the agent is nobody.
	for _, n := range r.nodes {
		if err := os.Chmod(filepath.Dir(n.Root().Dir()), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s.births = startActor(t, r.hosts[0], r.nodes[0].Cgroup("/forker"))
	return s
}

// load is what goes on all the time, both ways: connections that last, new ones,
// datagrams, and what is denied.
func (s *soak) load() {
	s.t.Helper()
	s.began = time.Now()
	for i, a := range s.actors {
		there, port := s.hosts[1-i], uint16(7000+i)
		at := func(port uint16) string { return fmt.Sprintf("%s:%d", there.IP4, port) }
		call[bool](a, "StartTraffic", TrafficArgs{
			Streams: []string{at(port), fmt.Sprintf("[%s]:%d", there.IP6, port)}, Datagrams: []string{at(port)}, Connect: []string{at(port)},
			Denied: []string{at(7009)}, Every: 50 * time.Millisecond,
		})
	}
}

func (s *soak) blame(format string, args ...any) {
	s.wrong = append(s.wrong, fmt.Sprintf("%s after %s: ", time.Now().Format("15:04:05"), time.Since(s.began).Round(time.Second))+fmt.Sprintf(format, args...))
}

// apply makes a change that changes nothing for the load, and in every third round puts
// one in shadow before.
func (s *soak) apply(round int) {
	s.t.Helper()
	s.version++
	extra := fmt.Sprintf("  - {name: extra, from: [workload/web], to: [workload/db], ports: [tcp/%d]}\n", 8000+s.version%100)
	for i, n := range s.nodes {
		file := filepath.Join(n.Dir(), "policy.yaml")
		if err := os.WriteFile(file, []byte(document(s.version, rotationPolicy+extra)), 0o644); err != nil {
			s.t.Fatal(err)
		}
		if round%3 == 0 {
			s.demarc(i, "apply", file, "--shadow", "--for", "1m")
			s.shadows++
		}
		s.demarc(i, "apply", file)
		s.changes++
	}
}

func (s *soak) demarc(node int, args ...string) string {
	out, problems, code := s.nodes[node].Demarc(args...)
	if code != 0 {
		s.blame("host %d: demarc %v: %d %s%s", node, args, code, out, problems)
	}
	return out
}

// kill ends a daemon of the second host with SIGKILL, and starts it again.
func (s *soak) kill(round int) {
	n := s.nodes[1]
	if round%4 == 1 {
		n.KillCore()
		n.StartCore()
	} else {
		n.KillAgent()
		n.StartAgent()
	}
	s.kills++
	s.demarc(1, "status", "--wait", "enforcing", "--timeout", "60s")
}

// churn makes cgroups in each of which a process dials at once.
func (s *soak) churn() {
	r := call[BirthReply](s.births, "Births", BirthArgs{Dir: s.nodes[0].Cgroup("/lab/web").Dir(), To: s.hosts[1].IP4.String(), Want: 50, Limit: 20 * time.Second})
	s.born += r.Made
	if r.Echoed != r.Made || r.Connected != r.Made {
		s.blame("of %d cgroups, %d had their datagram answered and %d connected: %s", r.Made, r.Echoed, r.Connected, r.Failure)
	}
	if r.Refused["operation not permitted"] != 2*r.Made {
		s.blame("undeclared calls of %d cgroups ended with %v", r.Made, r.Refused)
	}
}

func (s *soak) sample() {
	s.t.Helper()
	n := s.nodes[0]
	files := func(pid int) int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			s.t.Fatal(err)
		}
		return len(entries)
	}
	series := 0
	client, err := api.NewClient(strings.TrimPrefix(n.DemarcEnv()[0], "DEMARC_SERVER="))
	if err != nil {
		s.t.Fatal(err)
	}
	defer client.Close()
	text, err := client.Metrics(context.Background())
	if err != nil {
		s.blame("metrics: %v", err)
	}
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "#") {
			series++
		}
	}
	p := footprint{resident(s.t, n.Core.PID()), resident(s.t, n.Agent.PID()), files(n.Core.PID()), files(n.Agent.PID()), series}
	s.samples = append(s.samples, p)
	wrong := len(s.wrong)
	for _, a := range s.actors {
		wrong += len(call[TrafficReply](a, "Traffic", true).Problems)
	}
	s.t.Logf("%6s %8d %8d %7d %6d %6d | %9d %9d %5d %5d %7d | %5d", time.Since(s.began).Round(time.Second), s.changes, s.shadows, len(s.ever), s.kills, s.born,
		p.Core, p.Agent, p.CoreFiles, p.AgentFiles, p.Series, wrong)
}

// median of a quarter of the samples, the first one being 0.
func (s *soak) median(quarter int, of func(footprint) int) int {
	n := len(s.samples)
	var values []int
	for _, p := range s.samples[n*quarter/4 : n*(quarter+1)/4] {
		values = append(values, of(p))
	}
	slices.Sort(values)
	return values[len(values)/2]
}

func (s *soak) end() {
	s.t.Helper()
	t := s.t
	for i, a := range s.actors {
		r := call[TrafficReply](a, "StopTraffic", true)
		for _, p := range r.Problems {
			t.Errorf("host %d: %s", i, p)
		}
		t.Logf("host %d: %d round trips, %d connections, %d denied calls; lost %v", i, r.Exchanged, r.Connected, r.Tried, r.Lost)
		if r.Connected == 0 || r.Exchanged == 0 || r.Tried == 0 {
			t.Errorf("host %d: no load", i)
		}
		for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			for _, port := range []uint16{7009, uint16(7001 - i)} { // births try 7001
				if n := s.undeclared[i].Count(netlab.To(proto, s.hosts[1-i].IP4, port)); n != 0 && (port == 7009 || i == 0) {
					t.Errorf("host %d: %d undeclared packets of protocol %d to port %d on the wire", i, n, proto, port)
				}
			}
		}
		s.demarc(i, "audit", "verify")
		if st := statusOf(t, s.nodes[i]); st.State != "enforcing" || len(st.Problems) > 0 || int(st.Policy.Version) != s.version {
			t.Errorf("host %d: %s, version %d, %v", i, st.State, st.Policy.Version, st.Problems)
		}
	}
	for _, w := range s.wrong {
		t.Error(w)
	}
	for name, g := range map[string]struct {
		of    func(footprint) int
		most  float64
		slack int
	}{
		"resident memory of the core, kB":  {func(p footprint) int { return p.Core }, soakMemory, soakSlack},
		"resident memory of the agent, kB": {func(p footprint) int { return p.Agent }, soakMemory, soakSlack},
		"descriptors of the core":          {func(p footprint) int { return p.CoreFiles }, 1, soakFiles},
		"descriptors of the agent":         {func(p footprint) int { return p.AgentFiles }, 1, soakFiles},
		"series":                           {func(p footprint) int { return p.Series }, 1, soakSeries},
	} {
		before, after := s.median(1, g.of), s.median(3, g.of)
		t.Logf("%-33s second quarter %8d, last quarter %8d", name, before, after)
		if float64(after) > g.most*float64(before)+float64(g.slack) {
			t.Errorf("%s grew from %d to %d", name, before, after)
		}
	}
}
