package identity

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/demarc/demarc/policy/image"
)

const shop = `
namespaces: {shop: {labels: {team: a}}}
workloads:
  - {namespace: shop, name: api-1, labels: {app: api}, serviceAccount: api, cgroup: /lab/api-1, ips: [10.0.0.2], ports: [{name: http, protocol: TCP, port: 8080}]}
  - {name: Cache_1, image: redis, labels: {app: cache}, cgroup: /lab/cache}
`

func TestParseInventory(t *testing.T) {
	got, err := ParseInventory("i.yaml", []byte(shop))
	if err != nil {
		t.Fatal(err)
	}
	want := &Inventory{
		Namespaces: map[string]Namespace{"shop": {Labels: map[string]string{"team": "a"}}},
		Workloads: []Workload{
			{Namespace: "shop", Name: "api-1", Labels: map[string]string{"app": "api"}, ServiceAccount: "api", Cgroup: "/lab/api-1",
				IPs: []netip.Addr{netip.MustParseAddr("10.0.0.2")}, Ports: []Port{{Name: "http", Protocol: "TCP", Port: 8080}}},
			{Name: "Cache_1", Labels: map[string]string{"app": "cache"}, Image: "redis", Cgroup: "/lab/cache"},
		},
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); d != "" {
		t.Errorf("inventory (-want +got):\n%s", d)
	}
}

func TestParseInventoryRefuses(t *testing.T) {
	for _, c := range []struct{ name, src, want string }{
		{"bad empty", " \n", "i.yaml: the inventory is empty\nhint: write `workloads: []` if no workload is meant"},
		{"bad key", "workloads: []\npods: []\n", "i.yaml:2:1: unknown field \"pods\"\nhint: check the spelling; unknown keys are never ignored"},
		{"bad name", "workloads:\n- {name: a b}\n", "i.yaml:2:10: workload name \"a b\" is no name\nhint: give every workload a name of letters, digits, '-', '_' and '.'"},
		{"bad no name", "workloads:\n- {cgroup: /a}\n", "i.yaml:2:3: workload name \"\" is no name\nhint: give every workload a name of letters, digits, '-', '_' and '.'"},
		{"bad namespace", "workloads:\n- {name: a, namespace: ../x}\n", "i.yaml:2:24: namespace \"../x\" is no name\nhint: use letters, digits, '-', '_' and '.'"},
		{"bad namespaces", "namespaces: {\"\": {}}\n", "i.yaml:1:13: namespace \"\" is no name\nhint: use letters, digits, '-', '_' and '.'"},
		{"bad twice", "workloads:\n- {name: a}\n- {name: a}\n", "i.yaml:3:3: workload a is already number 1 of this list\nhint: remove one of them"},
		{"bad relative cgroup", "workloads:\n- {name: a, cgroup: lab}\n", "i.yaml:2:21: cgroup \"lab\" is no path below the managed root\nhint: start with '/' and name a group below the root, like /lab/api-1"},
		{"bad root cgroup", "workloads:\n- {name: a, cgroup: /}\n", "i.yaml:2:21: cgroup \"/\" is no path below the managed root\nhint: start with '/' and name a group below the root, like /lab/api-1"},
		{"bad unclean cgroup", "workloads:\n- {name: a, cgroup: /a/../b}\n", "i.yaml:2:21: cgroup \"/a/../b\" is no path below the managed root\nhint: write it as /b"},
		{"bad control byte", "workloads:\n- {name: a, cgroup: \"/a\\e\"}\n", "i.yaml:2:21: cgroup \"/a\\x1b\" is no path below the managed root\nhint: use printable ASCII"},
		{"bad shared cgroup", "workloads:\n- {name: a, cgroup: /a}\n- {name: b, cgroup: /a}\n", "i.yaml:3:21: cgroup /a already belongs to a\nhint: give each workload a cgroup of its own"},
		{"bad nested cgroup", "workloads:\n- {name: a, cgroup: /a/b/c}\n- {name: b, cgroup: /a}\n", "i.yaml:2:21: cgroup /a/b/c lies inside /a of b\nhint: give each workload a cgroup of its own, beside the others"},
		{"bad protocol", "workloads:\n- name: a\n  ports: [{port: 1}, {protocol: tcp, port: 2}]\n", "i.yaml:3:33: unknown protocol \"tcp\"\nhint: use TCP, UDP or SCTP"},
		{"bad node", "workloads:\n- {name: a, node: n}\n", "i.yaml:2:19: a runs on node \"n\", which the inventory does not know\nhint: list it under nodes, with its addresses"},
		{"bad host network", "workloads:\n- {name: a, hostNetwork: true}\n", "i.yaml:2:3: a has hostNetwork, and only pods have that\nhint: give the pod its namespace"},
		{"bad port", "workloads:\n- name: a\n  ports: [{port: 0}]\n", "i.yaml:3:11: port of a is missing or 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := ""
			if _, err := ParseInventory("i.yaml", []byte(c.src)); err != nil {
				got = err.Error()
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Errorf("error (-want +got):\n%s", d)
			}
		})
	}
}

func TestParseInventoryNamesBadAddresses(t *testing.T) {
	for src, want := range map[string]string{
		"workloads:\n- {name: a, ips: [10.0.0.2, 10.0.0.300]}\n": `i.yaml:2:29: "10.0.0.300" is no plain address`,
		"nodes: {n: {ips: [\"fe80::1%eth0\"]}}\n":                `i.yaml:1:19: "fe80::1%eth0" is no plain address`,
		"workloads:\n- {name: a, ips: [[10.0.0.2]]}\n":           `i.yaml:2:19: "[" is no plain address`,
		"workloads:\n- name: a\n  ips: 10.0.0.2\n":               "i.yaml:3:8: want a list of addresses, as [10.0.0.2]",
	} {
		if _, err := ParseInventory("i.yaml", []byte(src)); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", src, err, want)
		}
	}
}

func TestMatches(t *testing.T) {
	pod := Workload{Namespace: "shop", Name: "api-1", Labels: map[string]string{"app": "api", "tier": "2"}, ServiceAccount: "api"}
	container := Workload{Name: "cache", Image: "redis", Labels: map[string]string{"app": "cache"}}
	labels := func(kv ...string) (l []image.Label) {
		for i := 0; i < len(kv); i += 2 {
			l = append(l, image.Label{Key: kv[i], Value: kv[i+1]})
		}
		return l
	}
	for _, c := range []struct {
		name string
		w    Workload
		s    image.Selector
		want bool
	}{
		{"OK namespace", pod, image.Selector{Kind: image.SelectKubernetes, Namespace: "shop"}, true},
		{"OK all", pod, image.Selector{Kind: image.SelectKubernetes, Namespace: "shop", ServiceAccount: "api", Labels: labels("app", "api", "tier", "2")}, true},
		{"bad namespace", pod, image.Selector{Kind: image.SelectKubernetes, Namespace: "other"}, false},
		{"bad account", pod, image.Selector{Kind: image.SelectKubernetes, ServiceAccount: "other"}, false},
		{"bad label value", pod, image.Selector{Kind: image.SelectKubernetes, Labels: labels("app", "web")}, false},
		{"bad label missing", pod, image.Selector{Kind: image.SelectKubernetes, Labels: labels("app", "api", "zone", "")}, false},
		{"bad empty kubernetes", pod, image.Selector{Kind: image.SelectKubernetes}, false},
		{"bad empty container", container, image.Selector{Kind: image.SelectContainer}, false},
		{"bad container for a pod", pod, image.Selector{Kind: image.SelectContainer, Name: "api-1"}, false},
		{"bad pod for a container", container, image.Selector{Kind: image.SelectKubernetes, Labels: labels("app", "cache")}, false},
		{"bad kind", container, image.Selector{Kind: image.SelectCgroup, Path: "/"}, false},
		{"OK container", container, image.Selector{Kind: image.SelectContainer, Name: "cache", Image: "redis", Labels: labels("app", "cache")}, true},
		{"bad container image", container, image.Selector{Kind: image.SelectContainer, Name: "cache", Image: "nginx"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := c.w.Matches(c.s); got != c.want {
				t.Errorf("Matches = %v, want %v", got, c.want)
			}
		})
	}
}

func TestClaims(t *testing.T) {
	inv := &Inventory{Workloads: []Workload{
		{Namespace: "shop", Name: "api-1", Labels: map[string]string{"app": "api"}, Cgroup: "/lab/api-1"},
		{Namespace: "shop", Name: "api-2", Labels: map[string]string{"app": "api"}},
		{Namespace: "shop", Name: "both", Labels: map[string]string{"app": "api", "job": "x"}, Cgroup: "/lab/both"},
		{Namespace: "shop", Name: "none", Cgroup: "/lab/none"},
	}}
	img := &image.Image{
		Workloads: []image.Workload{{Name: "api", ID: 100}, {Name: "job", ID: 200}},
		Selectors: []image.Selector{
			{Workload: 0, Kind: image.SelectKubernetes, Labels: []image.Label{{Key: "app", Value: "api"}}},
			{Workload: 0, Kind: image.SelectKubernetes, Namespace: "shop", Labels: []image.Label{{Key: "app", Value: "api"}}},
			{Workload: 1, Kind: image.SelectKubernetes, Labels: []image.Label{{Key: "job", Value: "x"}}},
		},
	}
	claims, problems := Claims(inv, img)
	if d := cmp.Diff(map[string]image.ID{"/lab/api-1": 100}, claims); d != "" {
		t.Errorf("claims (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]string{`shop/both is selected by workloads ["api" "job"]: not bound`}, problems); d != "" {
		t.Errorf("problems (-want +got):\n%s", d)
	}
}

func FuzzParseInventory(f *testing.F) {
	f.Add([]byte(shop))
	f.Add([]byte("workloads: [{name: a, cgroup: /a}]"))
	f.Add([]byte("{{{{"))
	f.Fuzz(func(t *testing.T, src []byte) {
		if inv, err := ParseInventory("i.yaml", src); err == nil && inv == nil {
			t.Error("neither inventory nor error")
		}
	})
}

// BenchmarkParseInventory reads 5,000 pods, as `kubectl` and people write them.
func BenchmarkParseInventory(b *testing.B) {
	var src strings.Builder
	src.WriteString("workloads:\n")
	for i := range 5000 {
		fmt.Fprintf(&src, "  - {namespace: shop, name: api-%d, labels: {app: api, tier: \"%d\"}, ips: [10.0.%d.%d], ports: [{name: http, port: 8080}]}\n", i, i%7, i/250, i%250)
	}
	for b.Loop() {
		if inv, err := ParseInventory("i.yaml", []byte(src.String())); err != nil || len(inv.Workloads) != 5000 {
			b.Fatal(err)
		}
	}
}
