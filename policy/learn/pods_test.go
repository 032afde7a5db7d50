package learn

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
)

func TestOwnerOf(t *testing.T) {
	for pod, want := range map[string]string{
		"api-7d9f8b6c5d-x2x4z": "api", "web-front-5f4b5c7d9-bcdfg": "web-front", "node-exporter-x2x4z": "node-exporter",
		"db-0": "db", "db-12": "db", "backup-28391040-x2x4z": "backup", "my-nginx": "my-nginx", "api": "api", "v2": "v2", "etcd-host1": "etcd-host1",
		"web-7d9f8b6c5d": "web-7d9f8b6c5d", "-x2x4z": "-x2x4z",
	} {
		if got := ownerOf(pod); got != want {
			t.Errorf("%s: %q, want %q", pod, got, want)
		}
	}
}

// names are what an inventory calls an endpoint.
type names struct {
	pod, container, image string
	labels                string // "app=api,k8s-app=x"
}

func (n names) give(e *flow.Endpoint) {
	e.Pod, e.Container, e.Image = n.pod, n.container, n.image
	if n.labels != "" {
		e.PodLabels = map[string]string{}
		for l := range strings.SplitSeq(n.labels, ",") {
			key, value, _ := strings.Cut(l, "=")
			e.PodLabels[key] = value
		}
	}
}

func podPath(n int) string {
	return fmt.Sprintf("/kubepods.slice/kubepods-pod%08x_89ab_cdef_0123_456789abcdef.slice/cri-containerd-%064x.scope", n, n)
}

// accepts makes something with these names accept a connection from outside.
func accepts(l *Learner, cgroup string, n names) {
	for _, f := range (seen{to: cgroup, source: fmt.Sprintf("192.0.2.9:%d", 40000+len(l.talks)), target: "10.0.0.1:80"}).flows() {
		n.give(&f.Destination)
		l.Add(f)
	}
}

// workloadLines are the section of a policy, comments included.
func workloadLines(text string) (out []string) {
	in := false
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, " ") {
			in = line == "workloads:\n"
		} else if in {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return out
}

// Workloads are found by what outlives their pods and containers, where that tells
// them from others.
func TestSelectors(t *testing.T) {
	const lost = "# review: no name or label tells these from others; their paths end with them, a selector of yours outlives them"
	const old = "# review: this path ends with the container; a container or kubernetes selector outlives it"
	const byName = "# review: no label tells these pods from others; but for those of a StatefulSet, a pod's name ends with it"
	type one struct {
		cgroup string
		names
	}
	for _, c := range []struct {
		name string
		seen []one
		want []string
	}{
		{"OK pods of one owner", []one{
			{podPath(1), names{pod: "shop/api-7d9f8b6c5d-x2x4z", container: "api", labels: "app=api"}},
			{podPath(1), names{pod: "shop/api-7d9f8b6c5d-x2x4z", container: "sidecar", labels: "app=api"}},
			{podPath(2), names{pod: "shop/api-7d9f8b6c5d-bcdfg", labels: "app=api"}}},
			[]string{`api: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podLabels: {"app": "api"}}}]}`}},
		{"OK the label that is believed most", []one{{podPath(1), names{pod: "shop/api-0", labels: "k8s-app=a,app=b,app.kubernetes.io/name=c"}}},
			[]string{`api: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podLabels: {"app.kubernetes.io/name": "c"}}}]}`}},
		{"OK one that tells them apart", []one{
			{podPath(1), names{pod: "shop/api-0", labels: "app=api,app.kubernetes.io/name=shop"}}, {podPath(2), names{pod: "shop/db-0", labels: "app=db,app.kubernetes.io/name=shop"}}},
			[]string{`api: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podLabels: {"app": "api"}}}]}`,
				`db: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podLabels: {"app": "db"}}}]}`}},
		{"OK two that do", []one{
			{podPath(1), names{pod: "shop/a-0", labels: "app=x,k8s-app=x"}}, {podPath(2), names{pod: "shop/b-0", labels: "app=x,k8s-app=y"}}, {podPath(3), names{pod: "shop/c-0", labels: "app=y,k8s-app=x"}}},
			[]string{`a: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podLabels: {"app": "x", "k8s-app": "x"}}}]}`,
				`b: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podLabels: {"app": "x", "k8s-app": "y"}}}]}`,
				`c: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podLabels: {"app": "y", "k8s-app": "x"}}}]}`}},
		{"OK a label that changed", []one{{podPath(1), names{pod: "shop/api-0", labels: "app=api"}}, {podPath(2), names{pod: "shop/api-1", labels: "app=api2"}}},
			[]string{`api: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podLabels: {"app": "api"}}}, {kubernetes: {namespace: "shop", podLabels: {"app": "api2"}}}]}`}},
		{"OK the same name elsewhere", []one{{podPath(1), names{pod: "shop/api-0", labels: "app=api"}}, {podPath(2), names{pod: "test/api-0", labels: "app=api"}}},
			[]string{`api: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podLabels: {"app": "api"}}}]}`,
				`api-2: {zone: tier-1, match: [{kubernetes: {namespace: "test", podLabels: {"app": "api"}}}]}`}},
		{"OK container", []one{{"/docker/" + strings.Repeat("0", 64), names{container: "Cache_1", image: "redis:7"}}, {"/lab/x", names{container: "x"}}},
			[]string{`cache-1: {zone: tier-1, match: [{container: {name: "Cache_1"}}]}`, `x: {zone: tier-1, match: [{container: {name: "x"}}]}`}},
		{"OK image", []one{{"/lab/x", names{image: "registry.example:5000/redis:7"}}},
			[]string{"# review: this is every container of the image", `redis: {zone: tier-1, match: [{container: {image: "registry.example:5000/redis:7"}}]}`}},
		{"OK seen before it had a name", []one{{podPath(1), names{}}, {podPath(1), names{pod: "shop/api-0", labels: "app=api"}}},
			[]string{`api: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podLabels: {"app": "api"}}}]}`}},
		{"OK seen before it had a label", []one{{podPath(1), names{pod: "shop/api-0"}}, {podPath(1), names{pod: "shop/api-0", labels: "app=api"}}},
			[]string{`api: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podLabels: {"app": "api"}}}]}`}},
		{"OK a unit stays one", []one{{web, names{container: "x"}}}, []string{`nginx: {zone: tier-1, match: [{systemdUnit: "nginx.service"}]}`}},
		{"bad no labels", []one{{podPath(1), names{pod: "shop/db-0"}}, {podPath(2), names{pod: "shop/db-1"}}},
			[]string{byName, `db: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podName: "db-0"}}, {kubernetes: {namespace: "shop", podName: "db-1"}}]}`}},
		{"bad the same labels", []one{{podPath(1), names{pod: "shop/a", labels: "app=x"}}, {podPath(2), names{pod: "shop/b", labels: "app=x"}}},
			[]string{byName, `a: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podName: "a"}}]}`, byName, `b: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podName: "b"}}]}`}},
		{"bad no labels beside labels", []one{{podPath(1), names{pod: "shop/a", labels: "app=x"}}, {podPath(2), names{pod: "shop/b"}}},
			[]string{`a: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podLabels: {"app": "x"}}}]}`, lost, `b: {zone: tier-1, match: [{cgroup: "` + podPath(2) + `"}]}`}},
		{"bad image beside a name", []one{{"/lab/x", names{container: "x"}}, {"/lab/y", names{image: "redis"}}},
			[]string{"# review: no name or label tells these from others; their paths end with them, a selector of yours outlives them",
				`redis: {zone: tier-1, match: [{cgroup: "/lab/y"}]}`, `x: {zone: tier-1, match: [{container: {name: "x"}}]}`}},
		{"bad names", []one{{podPath(1), names{pod: `sh"op/api`, labels: "app=x"}}, {podPath(2), names{pod: "shop/api\n", container: "x"}}, {podPath(3), names{container: "nginx"}}, {"/lab/w", names{container: "we*b"}}},
			[]string{old, `pod-00000001-89a: {zone: tier-1, match: [{cgroup: "` + podPath(1) + `"}]}`, old, `pod-00000002-89a: {zone: tier-1, match: [{cgroup: "` + podPath(2) + `"}]}`,
				old, `pod-00000003-89a: {zone: tier-1, match: [{cgroup: "` + podPath(3) + `"}]}`, `w: {zone: tier-1, match: [{cgroup: "/lab/w"}]}`}},
		{"bad label value", []one{{podPath(1), names{pod: "shop/api", labels: "app=a b"}}},
			[]string{byName, `api: {zone: tier-1, match: [{kubernetes: {namespace: "shop", podName: "api"}}]}`}},
		{"bad below another workload", []one{{"/lab", names{}}, {"/lab/x", names{container: "x"}}}, []string{`lab: {zone: tier-1, match: [{cgroup: "/lab"}]}`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, reversed := range []bool{false, true} {
				l := New(Options{})
				all := slices.Clone(c.seen)
				if reversed {
					slices.Reverse(all)
				}
				for _, s := range all {
					accepts(l, s.cgroup, s.names)
				}
				p, err := l.Propose()
				if err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(c.want, workloadLines(string(p.Text))); d != "" {
					t.Errorf("reversed %v (-want +got):\n%s", reversed, d)
				}
			}
		})
	}
}

// A base that finds the pods keeps them; one that might gets nothing beside it that
// could find the same.
func TestSelectorsOfBase(t *testing.T) {
	for _, c := range []struct{ name, match, want string }{
		{"OK found", `{kubernetes: {namespace: shop, podLabels: {app: api}}}`, ""},
		{"OK found by name", `{kubernetes: {namespace: shop, podName: api-0}}`, ""},
		{"OK another", `{kubernetes: {namespace: test}}`, `match: [{kubernetes: {namespace: "shop", podLabels: {"app": "api"}}}]`},
		{"bad perhaps", `{kubernetes: {namespace: shop, serviceAccount: api}}`, `match: [{cgroup: "` + podPath(1) + `"}]`},
	} {
		b, err := policy.Parse("base.yaml", []byte(strings.Replace(base, "{systemdUnit: nginx.service}", c.match, 1)))
		if err != nil {
			t.Fatal(c.name, err)
		}
		l := New(Options{Base: b})
		accepts(l, podPath(1), names{pod: "shop/api-0", labels: "app=api"})
		p, err := l.Propose()
		if err != nil {
			t.Fatal(c.name, err)
		}
		added := slices.ContainsFunc(p.Added, func(s string) bool { return strings.HasPrefix(s, "workload ") })
		if added != (c.want != "") || !strings.Contains(string(p.Text), c.want) {
			t.Errorf("%s: added %q:\n%s", c.name, p.Added, p.Text)
		}
	}
}

// Datagrams from host to host are proposed with a word on those that get no answer.
func TestDatagramsBetweenHosts(t *testing.T) {
	const review = "# review: between hosts; datagrams that nobody answers need identity: sender here, or they stop after 16"
	for _, c := range []struct {
		name     string
		protocol string
		nodes    [2]string
		want     bool
	}{
		{"OK between hosts", "udp", [2]string{"a", "b"}, true},
		{"OK one host", "udp", [2]string{"a", "a"}, false},
		{"OK TCP", "tcp", [2]string{"a", "b"}, false},
		{"OK not told", "udp", [2]string{"", "b"}, false},
	} {
		l := New(Options{})
		for _, f := range (seen{from: web, to: db, target: "10.0.0.2:514", protocol: c.protocol}).flows() {
			f.Node = c.nodes[0]
			if f.Direction == abi.Ingress {
				f.Node = c.nodes[1]
			}
			l.Add(f)
		}
		p, err := l.Propose()
		if err != nil {
			t.Fatal(c.name, err)
		}
		lines := strings.Split(string(p.Text), "\n")
		at := slices.IndexFunc(lines, func(s string) bool { return strings.Contains(s, "- {name: nginx-postgresql") })
		if got := strings.TrimSpace(lines[at-1]) == review; got != c.want || strings.Count(string(p.Text), review) > 1 {
			t.Errorf("%s:\n%s", c.name, p.Text)
		}
	}
}

func TestMembersAreBounded(t *testing.T) {
	l := New(Options{})
	defer func() {
		accepts(l, podPath(1), names{pod: "shop/late-0"})
		p, err := l.Propose()
		want := []string{"# review: this path ends with the container; a container or kubernetes selector outlives it",
			`pod-00000001-89a: {zone: tier-1, match: [{cgroup: "` + strings.TrimSuffix(podPath(1), fmt.Sprintf("/cri-containerd-%064x.scope", 1)) + `"}]}`}
		if err != nil || !cmp.Equal(want, workloadLines(string(p.Text))) {
			t.Errorf("%v:\n%s", err, p.Text)
		}
	}()
	for i := range maxMembers + 100 {
		l.meet(flow.Endpoint{Pod: fmt.Sprintf("shop/api-%d", i)}, place{container, fmt.Sprintf("/pod%d", i)})
	}
	if m := l.met[place{pods, "shop/api"}]; l.members != maxMembers || len(m.cgroups) != maxMembers || len(m.pods) > maxMembers+1 {
		t.Errorf("%d members", l.members)
	}
}
