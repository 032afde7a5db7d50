package agent

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/identity"
)

func TestContainersOf(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	scope := "/kubepods.slice/kubepods-pod01234567_89ab_cdef_0123_456789abcdef.slice/cri-containerd-" + id + ".scope"
	pod := identity.Workload{Namespace: "shop", Name: "api-1", Labels: map[string]string{"app": "api", "pod-template-hash": "5f", "k8s-app": ""}, Cgroup: scope}
	whole := flow.Container{Pod: "shop/api-1", Name: "api", Image: "registry/api:1", Labels: map[string]string{"app": "api"}}
	c := &containers{}
	if got := c.Of(scope); !cmp.Equal(got, flow.Container{}) {
		t.Errorf("before any inventory: %+v", got)
	}
	c.follow(&identity.Inventory{Workloads: []identity.Workload{
		{Name: "api", Image: "registry/api:1", Cgroup: scope}, pod,
		{Name: "redis", Image: "redis:7", Cgroup: "/lab/redis"},
		{Name: "e\x1b]0;vil\n", Image: strings.Repeat("x", 2*maxNameText+2), Cgroup: "/lab/evil"},
		{Name: "elsewhere"},
	}})
	for _, q := range []struct {
		name, path string
		want       flow.Container
	}{
		{"OK container in a pod", scope, whole},
		{"OK below it", scope + "/init/x", whole},
		{"OK container", "/lab/redis", flow.Container{Name: "redis", Image: "redis:7"}},
		{"OK escaped", "/lab/evil", flow.Container{Name: `e\x1b]0;vil\x0a`}},
		{"bad longer name", "/lab/redis-2", flow.Container{}},
		{"bad above", "/lab", flow.Container{}},
		{"bad root", "/", flow.Container{}},
		{"bad none", "", flow.Container{}},
		{"bad relative", "lab/redis", flow.Container{}},
	} {
		if d := cmp.Diff(q.want, c.Of(q.path)); d != "" {
			t.Errorf("%s (-want +got):\n%s", q.name, d)
		}
	}
	// A path that holds a container's id names nobody else, ever; another one may.
	c.follow(&identity.Inventory{})
	if d := cmp.Diff(whole, c.Of(scope)); d != "" {
		t.Errorf("ended container (-want +got):\n%s", d)
	}
	if got := c.Of("/lab/redis"); !cmp.Equal(got, flow.Container{}) {
		t.Errorf("a path that others may get: %+v", got)
	}
}

// However many containers come and go, so many are kept.
func TestContainersAreBounded(t *testing.T) {
	c := &containers{}
	for round := range 5 {
		inv := &identity.Inventory{}
		for i := range 3000 {
			inv.Workloads = append(inv.Workloads, identity.Workload{Name: "x", Cgroup: fmt.Sprintf("/docker/%064x", round*3000+i)})
		}
		c.follow(inv)
		if n := len(*c.current.Load()); n > 3000+maxEnded {
			t.Fatalf("round %d: %d names", round, n)
		}
		// Those that ended just now come first.
		if just := fmt.Sprintf("/docker/%064x", max(round-1, 0)*3000+7); c.Of(just).Name != "x" {
			t.Errorf("round %d: %s has no name", round, just)
		}
	}
	inv := &identity.Inventory{}
	for i := range maxContainers + 10 {
		inv.Workloads = append(inv.Workloads, identity.Workload{Name: "x", Cgroup: fmt.Sprintf("/lab/%d", i)})
	}
	c.follow(inv)
	if n := len(*c.current.Load()); n > maxContainers+maxEnded {
		t.Errorf("%d names", n)
	}
}

// Flows say which pod was judged, as the inventory has it when they are asked for, also
// to Hubble's clients.
func TestFlowsNamePods(t *testing.T) {
	core := newStandIn()
	core.root = t.TempDir()
	if err := os.MkdirAll(filepath.Join(core.root, "lab/api-1/child"), 0o755); err != nil {
		t.Fatal(err)
	}
	inventory := filepath.Join(t.TempDir(), "inventory.yaml")
	put := func(pod string) {
		t.Helper()
		text := "workloads: [{namespace: shop, name: " + pod + ", labels: {app: api, tier: x}, cgroup: /lab/api-1}, {name: redis, image: \"redis:7\", cgroup: /lab/redis}]"
		if err := os.WriteFile(inventory+".new", []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(inventory+".new", inventory); err != nil {
			t.Fatal(err)
		}
	}
	put("api-1")
	r := start(t, core, func(c *Config) { c.Inventory = inventory })
	if _, err := r.client.Apply(t.Context(), compile(t, source), 0); err != nil {
		t.Fatal(err)
	}
	core.emit(t, record.RingDenied, record.Event{Kind: record.EventVerdict, Hook: record.HookEgress, Time: 1, Seq: 1, Epoch: 1, Subject: 1, Verdict: abi.Audit, Reason: abi.NoCrossingFor,
		Cgroup: inode(t, filepath.Join(core.root, "lab/api-1/child"))})
	eventually(t, "a flow", func() bool { return r.link.store.Counts()[record.RingDenied].Received == 1 })
	ask := func(query url.Values) (found []flow.Endpoint) {
		t.Helper()
		for line, err := range r.client.Flows(t.Context(), query) {
			if err != nil {
				t.Fatal(err)
			}
			if line.Flow != nil {
				found = append(found, line.Source)
			}
		}
		return found
	}
	got := ask(nil)
	if len(got) != 1 || got[0].Cgroup != "/lab/api-1/child" || got[0].Pod != "shop/api-1" || !cmp.Equal(got[0].PodLabels, map[string]string{"app": "api"}) {
		t.Errorf("flows of %+v", got)
	}
	for selector, want := range map[string]int{"demarc:pod=api-1,demarc:pod-namespace=shop": 1, "demarc:pod=api-2": 0, "demarc:container=redis": 0} {
		if got := ask(url.Values{"label": {selector}}); len(got) != want {
			t.Errorf("%s: %d flows, want %d", selector, len(got), want)
		}
	}
	put("api-2")
	eventually(t, "the new name", func() bool { got := ask(nil); return len(got) == 1 && got[0].Pod == "shop/api-2" })
}

func BenchmarkContainersOf(b *testing.B) {
	inv := &identity.Inventory{}
	for i := range 1000 {
		inv.Workloads = append(inv.Workloads, identity.Workload{Name: "x", Cgroup: fmt.Sprintf("/docker/%064x", i)})
	}
	c := &containers{}
	c.follow(inv)
	b.ReportAllocs()
	for b.Loop() {
		c.Of("/kubepods.slice/kubepods-burstable.slice/nobody.scope/init")
	}
}
