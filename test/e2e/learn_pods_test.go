package e2e_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/test/netlab"
)

// A pod and a container that only the inventory knows are learned by what it calls them,
// and the learned policy finds them by that.
func TestLearnPods(t *testing.T) {
	lab := netlab.New(t)
	webNS, cacheNS := lab.Namespace("web"), lab.Namespace("cache")
	node := lab.Node("", netlab.NodeOptions{Inventory: `workloads:
- {namespace: shop, name: web-7d9f8b6c5d-x2x4z, labels: {app: web, pod-template-hash: 7d9f8b6c5d}, cgroup: /lab/web}
- {name: cache, image: "redis:7", cgroup: /lab/cache}
`})
	if err := os.Chmod(filepath.Dir(node.Root().Dir()), 0o755); err != nil {
		t.Fatal(err)
	}
	demarc := func(args ...string) string {
		t.Helper()
		out, problems, status := node.Demarc(args...)
		if status != 0 {
			t.Fatalf("demarc %v: %d\n%s%s", args, status, out, problems)
		}
		return out + problems
	}
	var web, cache *actor
	restart := func() {
		for _, a := range []*actor{web, cache} {
			if a != nil {
				a.stop()
			}
		}
		web, cache = startActor(t, webNS, node.Cgroup("/lab/web/init")), startActor(t, cacheNS, node.Cgroup("/lab/cache"))
		cache.serve(6379)
		web.serve(8080)
	}
	observe := filepath.Join(lab.Dir(), "observe.yaml")
	demarc("policy", "learn", "--start", "--trust-domain", "shop.example", "-o", observe)
	demarc("apply", observe)
	restart()
	to := netip.AddrPortFrom(cacheNS.IP4, 6379)
	if !web.reaches(to) {
		t.Fatal("while nothing is refused, the cache is out of reach")
	}
	flows := filepath.Join(lab.Dir(), "flows.json")
	eventually(t, 10*time.Second, "both ends are told", func() bool {
		out := demarc("flows", "--all", "-o", "json")
		if err := os.WriteFile(flows, []byte(out), 0o644); err != nil {
			t.Fatal(err)
		}
		return strings.Contains(out, `"pod":"shop/web-7d9f8b6c5d-x2x4z","podLabels":{"app":"web"}`) && strings.Contains(out, `"container":"cache","image":"redis:7"`)
	})
	learned := filepath.Join(lab.Dir(), "learned.yaml")
	demarc("policy", "learn", "--name", "shop", "--trust-domain", "shop.example", "-o", learned)
	text, err := os.ReadFile(learned)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`match: [{kubernetes: {namespace: "shop", podLabels: {"app": "web"}}}]}`, `match: [{container: {name: "cache"}}]}`,
		"{name: web-cache, from: [workload/web], to: [workload/cache], ports: [tcp/6379],",
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("not learned: %s\n%s", want, text)
		}
	}
	node.Apply(string(text))
	eventually(t, 10*time.Second, "both are bound", func() bool {
		out := demarc("identities", "-o", "wide")
		return strings.Contains(out, "/lab/web") && strings.Contains(out, "/lab/cache")
	})
	restart()
	if !web.reaches(to) {
		t.Error("under the learned policy the cache is out of reach")
	}
	if cache.reachesWithin(netip.AddrPortFrom(webNS.IP4, 8080), timeOfSilence) {
		t.Error("the cache reaches the pod, which it never did")
	}
	if said := demarc("policy", "learn", "--from", flows, "--base", learned); !strings.Contains(said, "allows all that can be proposed") {
		t.Errorf("learn with its own policy as the base: %s", said)
	}
}
