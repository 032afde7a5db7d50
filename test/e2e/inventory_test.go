package e2e_test

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/demarc/demarc/test/netlab"
)

const inventoryPolicy = `workloads:
  a: {zone: app, match: [{kubernetes: {namespace: shop, podLabels: {app: a}}}]}
  b: {zone: app, match: [{kubernetes: {namespace: shop, podLabels: {app: b}}}]}
  db: {zone: app, match: [{cgroup: /lab/db}]}
crossings:
  - {name: a-db, from: [workload/a], to: [workload/db], ports: [tcp/7000, udp/7000]}
  - {name: b-db, from: [workload/b], to: [workload/db], ports: [tcp/7001, udp/7001]}
`

func inventory(pods ...string) string {
	text := "namespaces: {shop: {labels: {team: x}}}\nworkloads:\n"
	for i, label := range pods {
		if label != "" {
			text += fmt.Sprintf("  - {namespace: shop, name: pod-%d, labels: {app: %s}, cgroup: /lab/pod-%d}\n", i, label, i)
		}
	}
	if len(pods) == 0 {
		text = "workloads: []\n"
	}
	return text
}

// A pod is what the inventory says, as soon as it says so: with its label come its
// flows, and go.
func TestInventory(t *testing.T) {
	lab := netlab.New(t)
	pods, db := lab.Namespace("pods"), lab.Namespace("db")
	node := lab.Node(document(1, inventoryPolicy), netlab.NodeOptions{Inventory: inventory("a", "b")})
	server := startActor(t, db, node.Cgroup("/lab/db"))
	e := &ends{db: db}
	for port := uint16(7000); port < 7002; port++ {
		server.serve(port)
	}
	pod := startActor(t, pods, node.Cgroup("/lab/pod-0/container"))
	other := startActor(t, pods, node.Cgroup("/lab/pod-1"))
	bound := func(want int) {
		t.Helper()
		eventually(t, timeToAnswer, fmt.Sprintf("%d pods are bound", want), func() bool {
			s := statusOf(t, node)
			return s.Inventory != nil && s.Inventory.Bound == want
		})
	}
	bound(2)
	wantBothWays(t, "pod labelled a", pod, e.at4(7000), true)
	wantBothWays(t, "pod labelled a", pod, e.at4(7001), false)
	wantBothWays(t, "pod labelled b", other, e.at6(7001), true)
	wantBothWays(t, "pod labelled b", other, e.at6(7000), false)

	// The label changes while the pod's flows run: the old ones are cut, the new
	// ones come about.
	own, kept := []string{e.at4(7000).String(), e.at6(7000).String()}, []string{e.at4(7001).String()}
	call[bool](pod, "StartTraffic", TrafficArgs{Streams: own, Datagrams: own})
	call[bool](other, "StartTraffic", TrafficArgs{Streams: kept, Datagrams: kept})
	wire := pods.Wire()
	write := func(text string) {
		t.Helper()
		aside := node.InventoryFile() + ".new"
		if err := os.WriteFile(aside, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(aside, node.InventoryFile()); err != nil {
			t.Fatal(err)
		}
	}
	write(inventory("b", "b"))
	took := eventually(t, timeToAnswer, "the pod is known as b", func() bool { return pod.reaches(e.at4(7001)) })
	t.Logf("known by its new label after %s", took)
	wire.Forget()
	time.Sleep(200 * time.Millisecond)
	// What its servers send again is no news to it: it is dropped at its door.
	for _, p := range wire.Packets(netlab.And(on(7000), func(p netlab.Packet) bool { return p.Sent })) {
		t.Errorf("after the relabelling: %s", p)
	}
	wantBothWays(t, "pod relabelled b", pod, e.at6(7001), true)
	wantBothWays(t, "pod relabelled b", pod, e.at4(7000), false)
	r := call[TrafficReply](other, "StopTraffic", true)
	for _, problem := range r.Problems {
		t.Errorf("the pod that nothing changed for: %s", problem)
	}
	for name, n := range r.Lost {
		if n != 0 {
			t.Errorf("the pod that nothing changed for: %s lost %d", name, n)
		}
	}
	call[TrafficReply](pod, "StopTraffic", true)

	// A broken inventory changes nothing, and is told.
	write("workloads: [{name: [}\n")
	eventually(t, timeToAnswer, "the problem is told", func() bool { return len(statusOf(t, node).Inventory.Problems) > 0 })
	wantBothWays(t, "with a broken inventory", pod, e.at4(7001), true)

	// A pod that is gone from the inventory is nobody.
	write(inventory("", "b"))
	bound(1)
	wantBothWays(t, "pod that is gone", pod, e.at4(7001), false)
	wantBothWays(t, "pod that stays", other, e.at4(7001), true)
	if problems := statusOf(t, node).Inventory.Problems; len(problems) > 0 {
		t.Errorf("problems that were mended: %v", problems)
	}

	// A pod that is named before its cgroup exists has its identity at its birth.
	write(inventory("", "b", "a"))
	bound(2)
	late := startActor(t, pods, node.Cgroup("/lab/pod-2"))
	wantBothWays(t, "pod named before its birth", late, e.at4(7000), true)

	// What the agent claimed outlives it, and the next one takes it over.
	node.KillAgent()
	wantBothWays(t, "without agent", late, e.at4(7000), true)
	node.StartAgent()
	bound(2)
	wantBothWays(t, "with the next agent", late, e.at4(7000), true)
	node.KillCore()
	wantBothWays(t, "without core", late, e.at4(7000), true)
	node.StartCore()
	wantBothWays(t, "with the next core", late, e.at4(7000), true)
	bound(2)
}
