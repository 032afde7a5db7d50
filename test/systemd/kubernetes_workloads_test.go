//go:build kubernetes

package systemd_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	kube "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/test/cluster"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// TestKubernetesWorkloads: a node with 200 pods, each a workload of its own with five
// crossings, in a cluster that has as many elsewhere: all are bound, and nobody else is
// asked for, and the agent keeps within 40 MB when nothing happens (P15). The pods'
// containers are cgroups alone. What it takes when 50 of them scan, datagrams to ever
// other addresses that are refused, is told: no goal is for that. P19, of connections, is
// measured in test/bench.
func TestKubernetesWorkloads(t *testing.T) {
	const pods, senders, each, seconds = 200, 50, 400, 10
	n := newNode(t)
	cgroups := make([]*netlab.Cgroup, pods)
	for i := range pods {
		name := fmt.Sprintf("w%03d", i)
		n.declare("elsewhere", "other", name, "main", "default", nil)
		p := n.declare("host", "shop", name, "main", "default", map[string]string{"app": name})
		id := fmt.Sprintf("%064x", i+1)
		cgroups[i] = n.Root.Child("kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + strings.ReplaceAll(string(p.UID), "-", "_") + ".slice/cri-containerd-" + id + ".scope")
		p.Status = kube.PodStatus{Phase: kube.PodRunning, ContainerStatuses: []kube.ContainerStatus{{
			Name: "main", ContainerID: "containerd://" + id, State: kube.ContainerState{Running: &kube.ContainerStateRunning{StartedAt: meta.Now()}},
		}}}
		n.self.Must(http.MethodPatch, p.path()+"/status", cluster.Strategic, map[string]any{"status": p.Status}, nil)
	}
	var policy strings.Builder
	fmt.Fprintf(&policy, "apiVersion: demarc.dev/v1alpha1\nkind: BoundaryPolicy\nmetadata: {name: many, version: 1}\ntrustDomain: many.example\n"+
		"zones: {outside: {trust: 0}, app: {trust: 10}}\nnetworks: {peer: {zone: outside, cidrs: [%s/32]}}\nworkloads:\n", n.peer.IP4)
	for i := range pods {
		fmt.Fprintf(&policy, "  w%03d: {zone: app, match: [{kubernetes: {namespace: shop, podLabels: {app: w%03d}}}]}\n", i, i)
	}
	policy.WriteString("crossings:\n")
	for i := range pods {
		for port := 7001; port <= 7005; port++ {
			fmt.Fprintf(&policy, "  - {name: w%03d-%d, from: [workload/w%03d], to: [network/peer], ports: [tcp/%d]}\n", i, port, i, port)
		}
	}
	policy.WriteString("unmanaged: {zone: app, outbound: allow, inbound: allow}\n")
	began := time.Now()
	n.apply(policy.String())
	status := func() (s api.Status) {
		t.Helper()
		if err := json.Unmarshal([]byte(n.Run("demarc", "status", "-o", "json")), &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	n.Await("has bound them all", func() error {
		if s := status(); s.Inventory.Bound != pods || s.Core.Status.Claims != pods {
			return fmt.Errorf("%d bound", s.Inventory.Bound)
		}
		return nil
	})
	t.Logf("%d pods bound %v after the policy was applied", pods, time.Since(began).Round(time.Millisecond))

	// What the kernel says of the agent, once the garbage of the start is collected.
	resident := func() float64 {
		t.Helper()
		for line := range strings.Lines(n.Run("sh", "-c", "cat /proc/$(systemctl show -P MainPID demarc-agent)/status")) {
			if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
				kb, err := strconv.ParseFloat(strings.Fields(value)[0], 64)
				if err != nil {
					t.Fatal(err)
				}
				return kb / 1024
			}
		}
		t.Fatal("no VmRSS")
		return 0
	}
	time.Sleep(30 * time.Second)
	idle := resident()
	t.Logf("P15: the agent's resident memory, idle: %.1f MB, must 40", idle)
	if idle > 40 {
		t.Error("it has more than 40 MB")
	}

	processor := func() time.Duration {
		t.Helper()
		stat := n.Run("sh", "-c", "cat /proc/$(systemctl show -P MainPID demarc-agent)/stat")
		f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
		var ticks int
		for _, field := range f[11:13] { // utime and stime
			v, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			ticks += v
		}
		return time.Duration(ticks) * (time.Second / 100)
	}
	// One reader reads all of it.
	n.Run("systemd-run", "--quiet", "--unit", "reader", "sh", "-c", "exec demarc flows --follow -o json >/dev/null")
	probes := make([]*netlab.Probe, senders)
	for i := range probes {
		probes[i] = n.Probe(cgroups[i*pods/senders])
		probes[i].Socket("s", "udp4")
	}
	before, cpu, start := status(), processor(), time.Now()
	for second := range seconds {
		var all sync.WaitGroup
		for i, p := range probes {
			all.Go(func() {
				p.Do(probe.Call{Op: "flood", Socket: "s", Address: fmt.Sprintf("10.66.%d.0:%d", 100+i*2, 1000+second), Size: each, Data: []byte("x")})
			})
		}
		all.Wait()
		time.Sleep(time.Until(start.Add(time.Duration(second+1) * time.Second)))
	}
	spent := time.Since(start)
	used := 100 * float64(processor()-cpu) / float64(spent)
	n.Run("systemctl", "stop", "reader")
	after := status()
	var made, lost uint64
	for i, r := range after.Rings {
		made, lost = made+r.Made-before.Rings[i].Made, lost+r.Lost-before.Rings[i].Lost
	}
	rate := float64(made) / spent.Seconds()
	t.Logf("the agent's CPU at %.0f events/s (%d, %d lost), one reader: %.1f %% of a processor; then it has %.1f MB", rate, made, lost, used, resident())
	if rate < 0.9*senders*each {
		t.Errorf("only %.0f events/s were made, %d were meant: nothing can be told", rate, senders*each)
	}

	// It asked for this node's pods, and nobody else's.
	for _, a := range n.cluster.Asked(account) {
		if !strings.Contains(a.URI, "fieldSelector=spec.nodeName%3Dhost") {
			t.Errorf("%s %s: not of this node's pods", a.Verb, a.URI)
		}
	}
}
