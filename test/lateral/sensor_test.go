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
)

// sensing is where each sensor's scenarios run, in workloads of one host:
//
//	target (7001 echoes, 22 and 8443 speak ssh, 53 answers every name) -- switch -- host
type sensing struct {
	*lab
	target *netlab.Namespace
	keys   *keys
	more   []string // crossings that scenarios need
}

// sensors make their scenarios. Each is in a file of its own.
var sensors = []func(*sensing) []scenario{relays, transfers, banners, tunDevices, cgroupMoves, namespaceMoves, pings, names}

// What the kernel's sensors see of real tools becomes a finding that names the process.
func TestSensors(t *testing.T) {
	s := &sensing{lab: &lab{t: t, lab: netlab.New(t)}}
	s.host, s.target = s.lab.lab.Namespace("host"), s.lab.lab.Namespace("target")
	s.targets = []*netlab.Namespace{s.target}
	s.host.Sysctl("ipv4/ping_group_range", "0 2147483647") // ping needs no raw socket then
	s.keys = newKeys(t, s.lab.lab.Dir())
	var scenarios []scenario
	for _, of := range sensors {
		scenarios = append(scenarios, of(s)...)
	}
	scenarios = quick(scenarios)
	var workloads []string
	detectors := map[string]string{}
	for i := range scenarios {
		workloads = append(workloads, workloadOf(i))
		detectors[workloads[i]] = scenarios[i].detector
	}
	recording, lines := recorded(t, s.lab.lab)
	s.node = s.lab.lab.Node(s.policy(workloads, fmt.Sprintf(`  - {name: out, from: [zone/edge], to: [network/target], ports: [tcp/22, tcp/7001, tcp/7010-7019, tcp/8443, tcp/53, udp/53, icmp/echo], identity: none, log: all}
  - {name: in, from: [network/target], to: [zone/edge], ports: [tcp/8000-8099], identity: none, log: all, limit: {connections: 100/s}}
  - {name: on, from: [zone/edge], to: [zone/edge], ports: [tcp/8000-8099], log: all}
%s`, strings.Join(s.more, "\n"))), netlab.NodeOptions{Home: s.host, AgentLines: lines})
	s.dial()
	s.target.Echo(7001)
	for _, port := range []uint16{22, 8443} {
		s.keys.sshd(t, s.target, s.lab.lab.Cgroup("target"), netip.AddrPortFrom(s.target.IP4, port))
	}
	runAll(t, scenarios, func(i int, _ *scenario) *run { return &run{lab: s.lab, workload: workloads[i]} })
	record(t, recording, detectors)

	// Sensors are the core's: what happens while no agent runs waits for the next one.
	s.node.KillAgent()
	for _, device := range []string{"tun8", "tun9"} {
		p := s.start("vault", "ip", "tuntap", "add", "dev", device, "mode", "tun")
		if status := p.Wait(time.Minute); status != 0 {
			t.Fatalf("ip: %s", p.Output())
		}
	}
	s.node.StartAgent()
	s.node.AwaitAgent()
	s.dial()
	await(t, "what happened without an agent is found", func() bool {
		return slices.ContainsFunc(s.findings(detect.Filter{Workload: "vault"}), func(f detect.Finding) bool { return f.Detector == "tun" && f.Process.Comm == "ip" })
	})
}

// outside starts a shell command on the other machine.
func (s *sensing) outside(format string, args ...any) *netlab.Process {
	s.t.Helper()
	return s.target.Start(s.lab.lab.Cgroup("outside"), shell(s.t, format, args...))
}

// shell starts a shell command in the scenario's workload.
func (r *run) shell(format string, args ...any) *netlab.Process {
	r.t.Helper()
	return r.host.Start(r.node.Cgroup("/lab/"+r.workload), shell(r.t, format, args...))
}

func shell(t *testing.T, format string, args ...any) netlab.Command {
	t.Helper()
	return netlab.Command{Path: lookPath(t, "sh"), Args: []string{"-c", fmt.Sprintf(format, args...)}}
}

// command is a program and its arguments for a shell; none of them has a space.
func command(args ...string) string { return strings.Join(slices.Clone(args), " ") }
