//go:build kernels

package vm_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
	"github.com/demarc/demarc/test/vm/talk"
)

// limits are what kernels of a series are known to lack. A kernel that lacks
// something else, or has more than is said here, fails.
var limits = map[string][]string{
	"6.1": {"no device boundary: this kernel has no tcx; UDP proofs do not cross hosts"},
}

// agentLimits are what they lack to confine the agent.
var agentLimits = map[string][]string{
	"6.1": {"the agent is confined to its files by Landlock 2, which lacks limits for networks or signals (6 has them)"},
}

// refusals are the kernels that demarc does not run on, and what it says they lack.
var refusals = map[string]string{
	"5.10": "this kernel lacks a feature: ",
}

// single is the policy of one machine. `other` has a crossing on that port, so that
// only the receiver can refuse what it sends to db.
const single = `
workloads:
  web: {zone: app, match: [{cgroup: /lab/web}]}
  db: {zone: app, match: [{cgroup: /lab/db}]}
  other: {zone: app, match: [{cgroup: /lab/other}]}
networks:
  outside: {zone: app, cidrs: [%[1]s/32, "%[2]s/128"]}
crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000]}
  - {name: other-web, from: [workload/other], to: [workload/web], ports: [tcp/7000, udp/7000]}
  - {name: leave, from: [workload/web], to: [network/outside], ports: [tcp/443, udp/443], identity: none}
  - {name: visit, from: [network/outside], to: [workload/web], ports: [tcp/443, udp/443], identity: none}
`

// On each kernel demarc loads, enforces, is taken over by a core that starts anew,
// and says what it cannot do there.
func TestKernels(t *testing.T) {
	programs := build(t)
	var table strings.Builder
	fmt.Fprintf(&table, "%-8s %-28s %6s %6s  %-6s %s\n", "kernel", "release", "boot s", "test s", "result", "limits")
	defer func() { t.Logf("\n%s", &table) }()
	for _, s := range series(t) {
		begin, hello := time.Now(), "not booted"
		boot := 0.0
		result := "pass"
		passed := t.Run(s, func(t *testing.T) {
			var m *machine
			if want, ok := refusals[s]; ok {
				m, result = testRefusal(t, programs, s, want), "refuse"
			} else {
				m = testKernel(t, programs, s)
			}
			hello, boot = m.hello.Release, m.hello.Uptime
		})
		if !passed {
			result = "FAIL"
		}
		fmt.Fprintf(&table, "%-8s %-28s %6.1f %6.1f  %-6s %s\n", s, hello, boot, time.Since(begin).Seconds(), result, strings.Join(limits[s], "; "))
	}
}

func testKernel(t *testing.T, programs, series string) *machine {
	lab := netlab.New(t)
	outside := lab.Namespace("outside")
	outside.Echo(443)
	outside.Echo(444)
	m := boot(t, programs, lab, series)[0]

	var checks []struct {
		Name, Limit string
		OK          bool
	}
	check(t, json.Unmarshal([]byte(m.run("demarc", "preflight", "-o", "json")), &checks), "read preflight")
	var limited []string
	for _, c := range checks {
		if c.Limit != "" && c.Name != "guard" {
			limited = append(limited, c.Limit)
		}
	}
	if diff := cmp.Diff(limits[series], limited); diff != "" {
		t.Errorf("limits of preflight (-want +got):\n%s", diff)
	}

	m.enforce(document(fmt.Sprintf(single, outside.IP4, outside.IP6)))
	serve(t, m, "db", 7000, 7001)
	serve(t, m, "web", 443)
	m.healthy()
	m.control(outside)
	m.leaves("db")
	stranger := caller(outside.Probe(lab.Cgroup("outside")).Do)
	// Who is refused by the listener's side is told so, and others at their own call.
	denied := map[string]bool{}
	for _, c := range []struct {
		from     caller
		name     string
		to       *netlab.Namespace
		port     uint16
		tcp, udp string // what the application is told
	}{
		{m.workload("web"), "web", m.ns, 7001, "connect: EPERM", "connect: EPERM"},
		{m.workload("other"), "other", m.ns, 7000, "connect: ECONNREFUSED", "recv: ECONNREFUSED"},
		{m.workload("web"), "web", outside, 444, "connect: EPERM", "connect: EPERM"},
		{m.workload("other"), "other", outside, 443, "connect: EPERM", "connect: EPERM"},
	} {
		for network, want := range map[string]string{"tcp": c.tcp, "udp": c.udp} {
			for _, family := range families {
				to := netip.AddrPortFrom(addressOf(c.to, family), c.port)
				if got := c.from.reaches(network, to, long); got != want {
					t.Errorf("%s to %s %s: %q, want %q", c.name, network, to, got, want)
				}
				denied[network+" "+to.String()] = true
			}
		}
	}
	for _, network := range []string{"tcp", "udp"} {
		for _, family := range families {
			to := netip.AddrPortFrom(addressOf(m.ns, family), 7000)
			if stranger.reaches(network, to, short) == "" {
				t.Errorf("outside reaches %s %s", network, to)
			}
		}
	}
	m.awaitDenied(denied)
	m.settle()
	for _, family := range families {
		for port, silent := range map[uint16]bool{443: false, 444: true} {
			for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
				seen := len(m.wire.Packets(netlab.To(proto, addressOf(outside, family), port)))
				if silent != (seen == 0) {
					t.Errorf("%d packets of protocol %d to port %d over %s on the wire", seen, proto, port, family)
				}
			}
		}
		visited := func(p netlab.Packet) bool {
			return p.Sent && p.Src == netip.AddrPortFrom(addressOf(m.ns, family), 7000) && p.Flags&2 != 0
		}
		if n := m.wire.Count(visited); n > 0 {
			t.Errorf("%d SYN-ACKs of a port that is not declared", n)
		}
	}

	// Another core takes over what is in force.
	call[bool](m, "Kill", corePath)
	m.control(outside)
	m.startAgain()
	m.healthy()
	m.control(outside)
	m.guarded(true)
	m.control(outside)
	m.rooted()
	m.clockSteps(outside)
	m.stop()
	return m
}

// On a kernel that lacks what enforcement needs, preflight and a start say what that
// is, and nothing is attached or left.
func testRefusal(t *testing.T, programs, series, want string) *machine {
	lab := netlab.New(t)
	m := boot(t, programs, lab, series)[0]
	for _, args := range [][]string{{"preflight", "--config", coreFile}, {"run", "--config", coreFile}} {
		out := call[talk.Outcome](m, "Run", talk.Command{Path: corePath, Args: args})
		t.Logf("%s: %d\n%s%s", args[0], out.Status, out.Stdout, out.Stderr)
		if out.Status != 1 || !strings.Contains(out.Stdout+out.Stderr, want) {
			t.Errorf("%s ended with %d, want 1, and %q", args[0], out.Status, want)
		}
	}
	if left := call[[]string](m, "List", "/sys/fs/bpf"); len(left) > 0 {
		t.Errorf("left pins %v", left)
	}
	m.stop()
	return m
}

// guarded has root tamper with what enforces. Where BPF LSM guards it, nothing of that
// is done; else it is done, and mended.
func (m *machine) guarded(guard bool) {
	m.t.Helper()
	done := map[string]string{}
	for _, tried := range call[[]talk.Tampering](m, "Tamper", guard) {
		done[tried.What] = tried.Errno
		if guard != (tried.Errno == "EPERM") {
			m.t.Errorf("%s, with guard %v: %q", tried.What, guard, tried.Errno)
		}
	}
	if len(done) == 0 {
		m.t.Error("nothing was tried")
	}
	m.t.Logf("tampering: %v", done)
	time.Sleep(time.Second) // the agent's answer may be older than this, by a tenth of a second
	m.run("demarc", "status", "--wait", "enforcing", "--timeout", patience.String())
	m.healthy()
}

// The same machine with and without BPF LSM on its command line: there what enforces
// is kept from root's hands, here what they did is seen and undone. (I06, I07, I08)
func TestGuard(t *testing.T) {
	programs, all := build(t), series(t)
	newest := all[len(all)-1]
	for _, tt := range []struct {
		lsm   string
		guard bool
	}{
		{"landlock,lockdown,yama,bpf", true},
		{"landlock,lockdown,yama", false},
	} {
		l := lane{series: newest, lsm: tt.lsm}
		t.Run(l.String(), func(t *testing.T) {
			lab := netlab.New(t)
			outside := lab.Namespace("outside")
			outside.Echo(443)
			m := bootLanes(t, programs, lab, l)[0]
			m.enforce(document(fmt.Sprintf(single, outside.IP4, outside.IP6)))
			serve(t, m, "db", 7000)
			var s api.Status
			check(t, json.Unmarshal([]byte(m.run("demarc", "status", "-o", "json")), &s), "read status")
			told := slices.ContainsFunc(s.Limits, func(l string) bool { return strings.HasPrefix(l, "root is not kept from what enforces") })
			if told == tt.guard {
				t.Errorf("limits %q, with guard %v", s.Limits, tt.guard)
			}
			m.guarded(tt.guard)
			m.control(outside)
			// Another core takes over, guard and all.
			call[bool](m, "Kill", corePath)
			m.startAgain()
			m.guarded(tt.guard)
			m.control(outside)
			m.stop()
		})
	}
}

// clockSteps sets the wall clock a day forward, and two back. A crossing's window
// ends when it would have, and opens again for no step; tags hold all the while. (X9, I12)
func (m *machine) clockSteps(outside *netlab.Namespace) {
	m.t.Helper()
	const brief, day = 20 * time.Second, 1257 << abi.TagSlotShift // whole slots: see boot
	until := time.Now().Add(m.ahead + brief).Truncate(time.Second)
	text := strings.Replace(document(fmt.Sprintf(single, outside.IP4, outside.IP6)), "version: 1", "version: 2", 1)
	m.set(policyFile, strings.Replace(text, "identity: none}\n  - {name: visit", "identity: none, until: "+until.UTC().Format(time.RFC3339)+"}\n  - {name: visit", 1))
	m.run("demarc", "apply", policyFile)
	end := until.Add(-m.ahead)
	inside, away := netip.AddrPortFrom(m.ns.IP4, 7000), netip.AddrPortFrom(outside.IP4, 443)
	web := m.workload("web")
	m.step(day)
	if got := web.reaches("tcp", away, long); got != "" && time.Now().Before(end) {
		m.t.Errorf("a day ahead, a crossing that goes on: %s", got)
	}
	time.Sleep(time.Until(end.Add(time.Second)))
	for _, by := range []time.Duration{0, -2 * day} {
		m.step(by)
		if got := web.reaches("tcp", inside, long); got != "" {
			m.t.Errorf("stepped by %s, proven: %s", by, got)
		}
		if got := web.reaches("tcp", away, long); got != "connect: EPERM" {
			m.t.Errorf("stepped by %s, a crossing that has ended: %q", by, got)
		}
	}
}

// leaves shows that a process which goes into another network namespace, and does nothing
// there, is seen at that moment: the sensor at the kernel's own function is there. (T1611)
func (m *machine) leaves(workload string) {
	m.t.Helper()
	r := m.workload(workload)(probe.Call{Op: "leave"})
	if r.Error != "" {
		m.t.Fatalf("%s: unshare: %s", workload, r.Error)
	}
	var found []detect.Finding
	for end := time.Now().Add(patience); len(found) == 0 && time.Now().Before(end); {
		check(m.t, json.Unmarshal([]byte(m.run("demarc", "findings", "--technique", "T1611", "-o", "json")), &found), "read findings")
	}
	if len(found) != 1 || found[0].Detector != "namespace" || found[0].Subject.Workload != workload {
		m.t.Fatalf("findings of a change of network namespace: %+v", found)
	}
	late := found[0].FirstSeen.Sub(time.Unix(0, int64(r.N)))
	m.t.Logf("a change of network namespace was seen %s after it", late)
	if late > 10*time.Millisecond { // a round over all files is made every 5 s
		m.t.Errorf("a change of network namespace was seen %s after it was made", late)
	}
}

// control shows that what is declared works.
func (m *machine) control(outside *netlab.Namespace) {
	m.t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		for _, family := range families {
			for _, to := range []netip.AddrPort{
				netip.AddrPortFrom(addressOf(m.ns, family), 7000), netip.AddrPortFrom(addressOf(outside, family), 443),
			} {
				if got := m.workload("web").reaches(network, to, long); got != "" {
					m.t.Errorf("web to %s %s: %s", network, to, got)
					m.tell()
				}
			}
		}
	}
}

// healthy shows that enforcement is as it should be, and what is not enforced is
// said.
func (m *machine) healthy() {
	m.t.Helper()
	var s api.Status
	check(m.t, json.Unmarshal([]byte(m.run("demarc", "status", "-o", "json")), &s), "read status")
	got := api.Status{State: s.State, Problems: s.Problems}
	for _, l := range s.Limits {
		if !strings.HasPrefix(l, "root is not kept from") { // as on every machine
			got.Limits = append(got.Limits, l)
		}
	}
	if diff := cmp.Diff(api.Status{State: proto.StateEnforcing, Limits: slices.Concat(agentLimits[m.series], limits[m.series])}, got); diff != "" {
		m.t.Errorf("status of %s (-want +got):\n%s", m.ns.Name, diff)
	}
}

// flows is what demarc tells of a machine.
func (m *machine) flows() (all []netlab.Flow) {
	m.t.Helper()
	for d := json.NewDecoder(strings.NewReader(m.run("demarc", "flows", "--all", "-o", "json"))); d.More(); {
		var f netlab.Flow
		check(m.t, d.Decode(&f), "read flows")
		all = append(all, f)
	}
	return all
}

// tell logs what demarc tells.
func (m *machine) tell() {
	m.t.Helper()
	for _, f := range m.flows() {
		m.t.Log(m.ns.Name, f.Time.Format(time.TimeOnly), netlab.Describe(f))
	}
}

// awaitDenied waits until denials are told of all that is named, "tcp 10.66.0.2:7001",
// for want of a crossing.
func (m *machine) awaitDenied(what map[string]bool) {
	m.t.Helper()
	var missing map[string]bool
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		missing = maps.Clone(what)
		for _, f := range m.flows() {
			if f.Verdict == abi.Deny && f.Reason == abi.NoCrossingFor {
				delete(missing, f.Protocol+" "+f.Destination.Place())
			}
		}
		if len(missing) == 0 {
			return
		}
	}
	m.t.Errorf("no denial was told of %v", slices.Sorted(maps.Keys(missing)))
}

func serve(t *testing.T, m *machine, workload string, ports ...uint16) {
	t.Helper()
	for _, port := range ports {
		if problem := m.workload(workload).serve(port); problem != "" {
			t.Fatalf("%s: serve port %d: %s", workload, port, problem)
		}
	}
}
