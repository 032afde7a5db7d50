package e2e_test

import (
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/demarc/demarc/test/netlab"
)

// Containers prove themselves to each other as workloads of hosts do: on one host
// and across, routed and bridged, and nothing else passes.
//
//	web (routed)  --.                        .-- db (routed)
//	                 left ---- switch ---- right
//	api (bridged) --'                        `-- log (bridged)
func TestContainers(t *testing.T) {
	lab := netlab.New(t)
	left, right := lab.Host("left"), lab.Host("right")
	left.Known(right.Namespace)
	right.Known(left.Namespace)
	text := document(1, `workloads:
  web: {zone: app, match: [{cgroup: /lab/web}]}
  api: {zone: app, match: [{cgroup: /lab/api}]}
  db: {zone: app, match: [{cgroup: /lab/db}]}
  log: {zone: app, match: [{cgroup: /lab/log}]}
crossings:
  - {name: web-api, from: [workload/web], to: [workload/api], ports: [tcp/8080, udp/8080]}
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/8080, udp/8080]}
  - {name: api-log, from: [workload/api], to: [workload/log], ports: [tcp/8080, udp/8080]}
  - {name: log-web, from: [workload/log], to: [workload/web], ports: [tcp/8080, udp/8080]}
`)
	nodes := map[*netlab.Host]*netlab.Node{}
	for _, h := range []*netlab.Host{left, right} {
		nodes[h] = lab.Node(text, netlab.NodeOptions{CoreOnly: true, Home: h.Namespace})
	}
	containers := map[string]*netlab.Container{
		"web": left.Routed("web"), "api": left.Bridged("api"), "db": right.Routed("db"), "log": right.Bridged("log"),
	}
	actors := map[string]*actor{}
	for name, c := range containers {
		guarded(t, nodes[c.Host], c.Door)
		actors[name] = startActor(t, c.Namespace, nodes[c.Host].Cgroup("/lab/"+name))
		actors[name].serve(8080)
	}
	declared := map[string]bool{"web api": true, "web db": true, "api log": true, "log web": true}
	var all sync.WaitGroup
	for from, a := range actors {
		all.Go(func() {
			for to, c := range containers {
				if from == to {
					continue
				}
				for _, address := range []netip.Addr{c.IP4, c.IP6} {
					a.checkReach(t, netip.AddrPortFrom(address, 8080), declared[from+" "+to], true)
				}
			}
		})
	}
	all.Wait()
	if t.Failed() {
		for h, n := range nodes {
			for _, flow := range n.Flows() {
				t.Log(h.Name, netlab.Describe(flow))
			}
		}
	}
}

// guarded waits until a device of a node's host is a boundary: it is noticed when
// it comes, and what is tried before that is another row.
func guarded(t testing.TB, n *netlab.Node, device string) {
	t.Helper()
	eventually(t, waitGuarded, device+" is guarded both ways", func() bool {
		ways := 0
		for _, l := range n.Status().Links {
			if strings.HasSuffix(l.Name, " "+device) && l.Attached {
				ways++
			}
		}
		return ways == 2
	})
}

// waitGuarded is generous: it is no measure.
const waitGuarded = time.Minute
