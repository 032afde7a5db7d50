package lateral_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// What is found in contacts alone, allowed and refused ones.
func TestContacts(t *testing.T) {
	var k *keys
	scenarios := quick([]scenario{
		{"ssh logins with a wrong key", func(r *run) {
			for range 12 {
				r.tool("ssh", k.ssh("stranger", netip.AddrPortFrom(r.targets[0].IP4, 22), "true")...)
			}
		}, "T1110", "brute-force", detect.Medium, "ssh", 20 * time.Second, false},
		{"ssh to twelve hosts", func(r *run) {
			for i := range 12 {
				r.tool("ssh", k.ssh("user", netip.AddrPortFrom(r.address(i), 22), "true")...)
			}
		}, "T1021.004", "fan-out", detect.Medium, "ssh", 20 * time.Second, false},
		{"curl to the metadata service", func(r *run) {
			r.tool("curl", "-s", "-m", "2", "http://169.254.169.254/latest/meta-data/")
		}, "T1552.005", "metadata", detect.High, "curl", 10 * time.Second, false},
		{"nc to a decoy", func(r *run) {
			r.tool("nc", "-w", "2", r.host.IP4.String(), "3306")
		}, "T1046", "decoy", detect.High, "nc", 10 * time.Second, false},
		{"nc to a more trusted zone, three ports", func(r *run) {
			for _, port := range []string{"5432", "5433", "5434"} {
				r.tool("nc", "-w", "2", r.targets[1].IP4.String(), port)
			}
		}, "T1021", "upward-probe", detect.Medium, "nc", 10 * time.Second, false},
	})
	var workloads []string
	for i := range scenarios {
		workloads = append(workloads, workloadOf(i))
	}
	l := &lab{t: t, lab: netlab.New(t)}
	l.host = l.lab.Namespace("host")
	for i := range 2 {
		l.targets = append(l.targets, l.lab.Namespace(fmt.Sprintf("target%d", i+1)))
	}
	var cidrs []string
	for i := range 12 {
		l.targets[0].Address(netip.PrefixFrom(l.address(i), 16))
		cidrs = append(cidrs, l.address(i).String()+"/32")
	}
	more := fmt.Sprintf(`  - {name: ssh, from: [zone/edge], to: [network/machines], ports: [tcp/22], identity: none, log: all}
  - {name: ssh-too, from: [zone/edge], to: [network/target], ports: [tcp/22], identity: none, log: all}
  - {name: trap, from: [zone/edge], to: [workload/trap], ports: [tcp/3306], decoy: true, log: all, limit: {connections: 10/s}}
`)
	text := l.policy(workloads, more)
	text = strings.Replace(text, "workloads:\n", fmt.Sprintf("  machines: {zone: outside, cidrs: [%s]}\n  store: {zone: data, cidrs: [%s/32]}\nworkloads:\n  trap: {zone: edge, match: [{cgroup: /lab/trap}]}\n",
		strings.Join(cidrs, ", "), l.targets[1].IP4), 1)
	l.node = l.lab.Node(text, netlab.NodeOptions{Home: l.host})
	l.dial()
	k = newKeys(t, l.lab.Dir())
	k.sshd(t, l.targets[0], l.lab.Cgroup("target"), netip.MustParseAddrPort("0.0.0.0:22"))
	trap := l.host.Probe(l.node.Cgroup("/lab/trap"))
	trap.Must(probe.Call{Op: "serve", Address: ":3306"})
	runAll(t, scenarios, func(i int, _ *scenario) *run { return &run{lab: l, workload: workloads[i]} })
	l.record()
}

// address is one of many that the first target has.
func (l *lab) address(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 66, 7, byte(i + 1)}) }

// A finding that is certain enough quarantines its workload by itself, but not more
// of them than the limit, and none that manages the host.
func TestAutomaticContainment(t *testing.T) {
	workloads := []string{"s00", "s01", "s02", "boss management"}
	l := newLab(t, 1, workloads, "", netlab.NodeOptions{AgentLines: `detect:
  modes: {T1040: automatic}
  quarantine: {for: 10m, limit: 2, within: 1h}
`})
	l.targets[0].Echo(9)
	at := l.targets[0].At4(9).String()
	live := l.host.Probe(l.node.Cgroup("/lab/s00"))
	live.Socket("beat", "tcp4")
	live.Connect("beat", at)
	live.Echoed("beat", "before")
	for _, step := range []struct{ workload, action string }{
		{"boss", "advised: a workload with the role management is never quarantined by itself"},
		{"s00", quarantinedUntil}, {"s01", quarantinedUntil},
		{"s02", "advised: 2 workloads were quarantined within 1h0m0s, which is the limit"},
	} {
		l.start(step.workload, "nmap", "-n", "-Pn", "-sS", "--send-ip", "-p", "80", l.targets[0].IP4.String())
		var found []detect.Finding
		await(t, step.workload+" is judged", func() bool {
			found = l.findings(detect.Filter{Workload: step.workload, Suppressed: true})
			return len(found) > 0 && (found[0].Action != "" || found[0].SuppressedBy != "")
		})
		if step.workload == "boss" {
			if found[0].SuppressedBy != "management" {
				t.Errorf("boss: %s", describe(found))
			}
			continue
		}
		if !strings.HasPrefix(found[0].Action, step.action) {
			t.Errorf("%s: action %q, want %q", step.workload, found[0].Action, step.action)
		}
	}
	if r := live.Do(probe.Call{Op: "send", Socket: "beat", Data: []byte("after")}); r.Error == "" {
		if r = live.Do(probe.Call{Op: "recv", Socket: "beat", Timeout: 1000}); r.Error == "" {
			t.Errorf("a live connection of a quarantined workload goes on: %+v", r)
		}
	}
	quarantined := 0
	for _, q := range l.node.Status().Quarantines {
		if !q.Automatic {
			t.Errorf("quarantine %+v is not automatic", q)
		}
		quarantined++
	}
	if quarantined != 2 {
		t.Errorf("%d workloads are quarantined, want 2", quarantined)
	}
	log, _, status := l.node.Demarc("audit", "show")
	if status != 0 || !strings.Contains(log, "T1040 by raw-socket") {
		t.Errorf("audit show: %d, says nothing of the finding:\n%s", status, log)
	}
}

// What is not certain quarantines a workload only if two signals speak against it that
// do not rest on each other: two kinds of scan are one signal, a scan and a row of
// logins are two. A workload that manages the host stays.
func TestIndependentSignals(t *testing.T) {
	l := newLab(t, 1, []string{"s00", "boss management"}, dials, netlab.NodeOptions{AgentLines: `detect:
  mode: automatic
  quarantine: {for: 10m, limit: 2, within: 1h, signals: 2}
`})
	l.targets[0].Echo(9)
	k := newKeys(t, l.lab.Dir())
	k.sshd(t, l.targets[0], l.lab.Cgroup("target"), netip.AddrPortFrom(l.targets[0].IP4, 22))
	live := l.host.Probe(l.node.Cgroup("/lab/s00"))
	live.Socket("beat", "tcp4")
	live.Connect("beat", l.targets[0].At4(9).String())
	live.Echoed("beat", "before")
	target := l.targets[0].IP4.String()
	scan := func(workload string) { l.start(workload, "nmap", "-n", "-Pn", "-sT", "-p", "100-200", target) }
	for _, step := range []struct {
		do                         func()
		workload, detector, action string
		quarantined                int
	}{
		{func() { scan("boss") }, "boss", "port-scan", "advised: 1 of 2 independent signals", 0},
		{func() { l.start("boss", "curl", "-s", "-m", "2", "http://169.254.169.254/") }, "boss", "metadata",
			"advised: a workload with the role management is never quarantined by itself", 0},
		{func() { scan("s00") }, "s00", "port-scan", "advised: 1 of 2 independent signals", 0},
		{func() { l.start("s00", "nmap", "-n", "-Pn", "-sT", "-p", "8081", "10.66.0.0/25") }, "s00", "host-sweep", "advised: 1 of 2 independent signals", 0},
		{func() {
			for range 12 {
				l.start("s00", "ssh", k.ssh("stranger", netip.AddrPortFrom(l.targets[0].IP4, 22), "true")...)
			}
		}, "s00", "brute-force", quarantinedUntil, 1},
	} {
		step.do()
		var found []detect.Finding
		await(t, fmt.Sprintf("%s of %s is judged", step.detector, step.workload), func() bool {
			found = slices.DeleteFunc(l.findings(detect.Filter{Workload: step.workload}), func(f detect.Finding) bool { return f.Detector != step.detector })
			return len(found) > 0 && found[0].Action != ""
		})
		if !strings.HasPrefix(found[0].Action, step.action) {
			t.Errorf("%s of %s: action %q, want %q", step.detector, step.workload, found[0].Action, step.action)
		}
		if q := l.node.Status().Quarantines; len(q) != step.quarantined || len(q) > 0 && (q[0].Workload != "s00" || !q[0].Automatic) {
			t.Errorf("after %s of %s: quarantined are %+v, want %d", step.detector, step.workload, q, step.quarantined)
		}
	}
	if r := live.Do(probe.Call{Op: "send", Socket: "beat", Data: []byte("after")}); r.Error == "" {
		if r = live.Do(probe.Call{Op: "recv", Socket: "beat", Timeout: 1000}); r.Error == "" {
			t.Errorf("a live connection of a quarantined workload goes on: %+v", r)
		}
	}
	if log, _, status := l.node.Demarc("audit", "show"); status != 0 || !strings.Contains(log, "T1110 by brute-force") {
		t.Errorf("audit show: %d, says nothing of the finding:\n%s", status, log)
	}
}

const quarantinedUntil = "quarantined until "
