package lateral_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/test/netlab"
)

// Somebody from another machine moves on by ssh:
//
//	outside -> hop1 -> target            two connections in a row
//	outside -> hop1 -> hop2 -> target    three
func TestSSHChains(t *testing.T) {
	l := &lab{t: t, lab: netlab.New(t)}
	host := l.lab.Host("host")
	l.host = host.Namespace
	l.targets = []*netlab.Namespace{l.lab.Namespace("target")}
	host.Known(l.targets[0])
	box := host.Routed("box") // a port has one owner in a namespace
	l.node = l.lab.Node(l.policy([]string{"hop1", "hop2"}, `  - {name: in, from: [network/target], to: [workload/hop1], ports: [tcp/22], identity: none, log: all, limit: {connections: 100/s}}
  - {name: between, from: [workload/hop1], to: [workload/hop2], ports: [tcp/22], log: all}
  - {name: out, from: [workload/hop1, workload/hop2], to: [network/target], ports: [tcp/22], identity: none, log: all}
`), netlab.NodeOptions{Home: l.host})
	l.dial()
	k := newKeys(t, l.lab.Dir())
	hop1, hop2 := netip.AddrPortFrom(l.host.IP4, 22), netip.AddrPortFrom(box.IP4, 22)
	target := netip.AddrPortFrom(l.targets[0].IP4, 22)
	k.sshd(t, l.targets[0], l.lab.Cgroup("target"), target)
	k.sshdOf(t, l.host, l.node.Cgroup("/lab/hop1"), hop1)
	k.sshdOf(t, box.Namespace, l.node.Cgroup("/lab/hop2"), hop2)

	outside := func(command ...string) {
		t.Helper()
		p := l.targets[0].Start(l.lab.Cgroup("outside"), netlab.Command{Path: lookPath(t, "ssh"), Args: k.ssh("user", hop1, command...)})
		if status := p.Wait(time.Minute); status != 0 || !strings.Contains(p.Output(), "arrived") {
			t.Fatalf("ssh: %d: %s", status, p.Output())
		}
	}
	ssh := "ssh " + strings.Join(k.ssh("user", target, "echo", "arrived"), " ")
	var results []result
	for _, s := range []struct {
		workload string
		command  string
		scenario scenario
	}{
		{"hop1", ssh, scenario{name: "ssh outside -> hop1 -> target", technique: "T1021.004", detector: "chain", severity: detect.Low, process: "ssh", within: 20 * time.Second}},
		{"hop2", "ssh " + strings.Join(k.ssh("user", hop2), " ") + " '" + ssh + "'", scenario{name: "ssh outside -> hop1 -> hop2 -> target", technique: "T1021.004", detector: "chain", severity: detect.High, process: "ssh", within: 20 * time.Second}},
	} {
		r := &run{lab: l, workload: s.workload, from: time.Now()}
		outside(s.command)
		results = append(results, r.await(&s.scenario))
	}
	table(t, results)
	l.record()
	if f := l.findings(detect.Filter{Workload: "hop1", Severity: detect.Medium}); len(f) > 0 {
		t.Errorf("two connections in a row are more than low:\n%s", describe(f))
	}
}

// sshdOf is sshd in a workload, to which no connection is made before the first one
// that counts.
func (k *keys) sshdOf(t *testing.T, ns *netlab.Namespace, c *netlab.Cgroup, at netip.AddrPort) {
	t.Helper()
	p := k.start(t, ns, c, at)
	await(t, fmt.Sprintf("sshd says that it listens on %s", at), func() bool { return strings.Contains(p.Output(), "Server listening on") })
}
