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

// Somebody outside uses a workload to get to a machine behind it. Everything passes
// through ports that the policy declares:
//
//	outside (targets[0]) -> workload -> inner (targets[1])
//
// inner serves a page of 256 KiB; that it arrives outside is seen there.
func TestRelays(t *testing.T) {
	var k *keys
	// fetched asks for the page again and again, as somebody does who looks around.
	fetched := func(r *run, args ...string) {
		script := `while :; do curl -s -m 10 "$@" | grep -c page-line; sleep 1; done`
		p := r.targets[0].Start(r.lab.lab.Cgroup("target"), netlab.Command{Path: lookPath(t, "sh"), Args: append([]string{"-c", script, "sh"}, args...)})
		r.soon("the page arrives through the relay", func() bool { return strings.Contains(p.Output(), fmt.Sprint(pageLines)) })
	}
	ssh := func(to netip.Addr, more ...string) []string {
		args := k.ssh("user", netip.AddrPortFrom(to, 22), "-N", "-o", "ExitOnForwardFailure=yes")
		return append(more, args...)
	}
	const prompt = 60 * time.Second // several rounds over all files, which are made every few seconds
	scenarios := quick([]scenario{
		{"ssh -L", func(r *run) {
			r.tool("ssh", ssh(r.targets[1].IP4, "-L", "0.0.0.0:7002:127.0.0.1:80")...)
			fetched(r, fmt.Sprintf("http://%s:7002/", r.host.IP4))
		}, "T1572", "relay", detect.Medium, "ssh", prompt, true},
		{"ssh -D", func(r *run) {
			r.tool("ssh", ssh(r.targets[1].IP4, "-D", "0.0.0.0:7003")...)
			fetched(r, "--socks5-hostname", fmt.Sprintf("%s:7003", r.host.IP4), "http://127.0.0.1/")
		}, "T1572", "relay", detect.Medium, "ssh", prompt, true},
	})
	if len(scenarios) == 0 {
		return // TestSensors has relays that are quick
	}
	var workloads []string
	for i := range scenarios {
		workloads = append(workloads, workloadOf(i))
	}
	l := &lab{t: t, lab: netlab.New(t)}
	l.host = l.lab.Namespace("host")
	l.targets = []*netlab.Namespace{l.lab.Namespace("target"), l.lab.Namespace("inner")}
	serveTextAt(t, l.targets[1], netip.MustParseAddrPort("0.0.0.0:80"), strings.Repeat("page-line "+strings.Repeat("x", 117)+"\n", pageLines))
	text := l.policy(workloads, dials+calls+"  - {name: inward, from: [zone/edge], to: [network/inner], ports: [tcp/80, tcp/22], identity: none, log: all}\n")
	text = strings.Replace(text, "workloads:\n", fmt.Sprintf("  inner: {zone: outside, cidrs: [%s/32]}\nworkloads:\n", l.targets[1].IP4), 1)
	l.node = l.lab.Node(text, netlab.NodeOptions{Home: l.host})
	l.dial()
	k = newKeys(t, l.lab.Dir())
	for _, n := range l.targets {
		k.sshd(t, n, l.lab.Cgroup("target"), netip.AddrPortFrom(n.IP4, 22))
	}
	runAll(t, scenarios, func(i int, _ *scenario) *run { return &run{lab: l, workload: workloads[i]} })
}

const pageLines = 2048
