package netpol_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"encoding/json"

	"github.com/demarc/demarc/policy/kubernetes/facts"
	"github.com/demarc/demarc/test/netlab"
)

// cluster is a cluster of facts on one machine: each pod a process in a namespace and
// a cgroup of its own, all on one switch.
//
//	pod-1  pod-2  ...  node  outside      namespaces, by the addresses of the facts
//	  |      |          |       |
//	  +------+--switch--+-------+
//
// Pods are below /pods of the node's cgroups. Who is in a node's network is below
// /host, which no policy selects. Hosts outside are outside of demarc, too.
type cluster struct {
	t     testing.TB
	lab   *netlab.Lab
	node  *netlab.Node
	facts *facts.Cluster
	dir   string
	pods  map[string]*process
}

func newCluster(t testing.TB, start *facts.Cluster) *cluster {
	t.Helper()
	c := &cluster{t: t, lab: netlab.New(t), facts: start, dir: t.TempDir(), pods: map[string]*process{}}
	c.node = c.lab.Node("", netlab.NodeOptions{})
	return c
}

func cgroupOf(p *facts.Pod) string { return "/pods/" + strings.ReplaceAll(p.Key(), "/", "-") }

func (c *cluster) file(name string) string { return filepath.Join(c.dir, name) }

func (c *cluster) write(name string, text []byte) string {
	c.t.Helper()
	if err := os.WriteFile(c.file(name), text, 0o644); err != nil {
		c.t.Fatal(err)
	}
	return c.file(name)
}

func (c *cluster) demarc(args ...string) string {
	c.t.Helper()
	out, problems, status := c.node.Demarc(args...)
	if status != 0 {
		c.t.Fatalf("demarc %s: %d\n%s%s", strings.Join(args, " "), status, out, problems)
	}
	return out
}

// enforce imports what there is now, and has it in force when it returns. Then it
// starts the pods that are new and ends those that are gone.
func (c *cluster) enforce() {
	c.t.Helper()
	inventory, err := c.facts.Inventory(cgroupOf)
	if err != nil {
		c.t.Fatal(err)
	}
	c.demarc("policy", "import", "kubernetes", "--inventory", c.write("inventory.yaml", inventory), c.write("objects.yaml", c.facts.Objects()), "-o", c.file("policy.yaml"))
	c.demarc("apply", c.file("policy.yaml"))
	c.demarc("status", "--wait", "enforcing", "--timeout", "30s")
	here := map[string]bool{}
	for _, p := range c.facts.Pods {
		here[p.Key()] = true
		if c.pods[p.Key()] == nil {
			c.start(p)
		}
	}
	for key, p := range c.pods {
		if !here[key] {
			p.stop()
			delete(c.pods, key)
		}
	}
}

func (c *cluster) start(p *facts.Pod) {
	c.t.Helper()
	ns := c.lab.Namespace(strings.ReplaceAll(p.Key(), "/", "-"))
	address := netip.MustParseAddr(p.IP)
	ns.Address(netip.PrefixFrom(address, 32))
	ns.Neighbours(address)
	var cgroup *netlab.Cgroup
	switch {
	case p.External:
		cgroup = c.lab.Cgroup(p.Name)
	case p.HostNetwork:
		cgroup = c.node.Cgroup("/host/" + p.Name)
	default:
		cgroup = c.node.Cgroup(cgroupOf(p))
	}
	pod := startProcess(c.t, p.Key(), ns, cgroup)
	for _, port := range p.Ports {
		if port.Protocol != "SCTP" {
			call[bool](pod, "Serve", Target{Protocol: port.Protocol, To: netip.AddrPortFrom(address, port.Port)})
		}
	}
	c.pods[p.Key()] = pod
}

// How long a connection that must come about may take, and how long one that must not
// is watched.
const (
	patience = 20 * time.Second
	watch    = 600 * time.Millisecond
)

// check holds every cell of a step's tables: by explain, and on the wire.
func (c *cluster) check(step *facts.Step) (live int) {
	c.t.Helper()
	probes, err := c.facts.Probes(step)
	if err != nil {
		c.t.Fatal(err)
	}
	c.explain(probes)

	type tried struct {
		targets []Target
		probes  []facts.Probe
	}
	by := map[string]*tried{}
	for _, p := range probes {
		if p.Protocol == "SCTP" || !serves(p) {
			continue
		}
		if by[p.From.Key()] == nil {
			by[p.From.Key()] = &tried{}
		}
		t := Target{Protocol: p.Protocol, Source: p.From.IP, To: netip.AddrPortFrom(netip.MustParseAddr(p.To.IP), p.Port), Patience: watch}
		if p.Want == '.' {
			t.Patience = patience
		}
		by[p.From.Key()].targets = append(by[p.From.Key()].targets, t)
		by[p.From.Key()].probes = append(by[p.From.Key()].probes, p)
		live++
	}
	for _, p := range c.pods {
		call[[]Arrival](p, "Arrivals", true)
	}
	var all sync.WaitGroup
	var mu sync.Mutex
	for key, t := range by {
		all.Go(func() {
			var passed []bool
			err := c.pods[key].calls.Call("Pod.Try", t.targets, &passed)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				c.t.Errorf("pod %s: %v", key, err)
				return
			}
			for i, p := range t.probes {
				if passed[i] != (p.Want == '.') {
					c.t.Errorf("%s: passed %v, want %c", p, passed[i], p.Want)
				}
			}
		})
	}
	all.Wait()

	// What the server's end refuses never arrives, and of TCP nothing does that any end
	// refuses. A datagram may arrive before its caller knows who answers.
	arrived := map[string]map[Arrival]bool{}
	for key, p := range c.pods {
		arrived[key] = map[Arrival]bool{}
		for _, a := range call[[]Arrival](p, "Arrivals", true) {
			arrived[key][a] = true
		}
	}
	for _, t := range by {
		for _, p := range t.probes {
			a := Arrival{p.From.IP, p.Protocol, p.Port}
			if p.Want != '.' && (p.Want != 'E' || p.Protocol == "TCP") && arrived[p.To.Key()][a] {
				c.t.Errorf("%s: data arrived, want %c", p, p.Want)
			}
		}
	}
	return live
}

// serves says whether there is somebody to answer the probe.
func serves(p facts.Probe) bool {
	for _, port := range p.To.Ports {
		if port.Protocol == p.Protocol && port.Port == p.Port {
			return true
		}
	}
	return false
}

// explain asks the command line about every probe.
func (c *cluster) explain(probes []facts.Probe) {
	c.t.Helper()
	end := func(p *facts.Pod) string {
		if p.External {
			return p.IP
		}
		return "pod/" + p.Key()
	}
	var in strings.Builder
	for _, p := range probes {
		fmt.Fprintf(&in, "{\"from\":%q,\"to\":%q,\"port\":\"%s/%d\"}\n", end(p.From), end(p.To), strings.ToLower(p.Protocol), p.Port)
	}
	out := c.demarc("policy", "explain", c.file("policy.yaml"), "--inventory", c.file("inventory.yaml"), "--batch", c.write("probes.jsonl", []byte(in.String())))
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != len(probes) {
		c.t.Fatalf("%d answers to %d probes", len(lines), len(probes))
	}
	for i, p := range probes {
		var a struct {
			Allowed bool
			Refuses string
		}
		if err := json.Unmarshal([]byte(lines[i]), &a); err != nil {
			c.t.Fatal(err)
		}
		want := map[byte]string{'.': "", 'E': "egress", 'I': "ingress", 'B': "both"}[p.Want]
		if a.Refuses != want || a.Allowed != (want == "") {
			c.t.Errorf("explain %s: %s, want %c", p, lines[i], p.Want)
		}
	}
}
