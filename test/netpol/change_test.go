package netpol_test

import (
	"encoding/json"
	"net/netip"
	"testing"
	"time"

	"github.com/demarc/demarc/policy/kubernetes/facts"
)

const apiPolicy = `{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "api", "namespace": "shop"},
 "spec": {"podSelector": {"matchLabels": {"app": "api"}}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": "http"}]}]}}`

const dbPolicy = `{"apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy", "metadata": {"name": "db"},
 "spec": {"tier": "Admin", "priority": 1, "subject": {"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "db"}}}},
  "ingress": [{"action": "Deny", "from": [{"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "api"}}}}]}]}}`

// A connection stays as it is while pods, labels, namespaces and policies change that do
// not concern it, and ends when its own do.
func TestChangeLeavesTheRestAlone(t *testing.T) {
	pod := func(name, ip string, port uint16) *facts.Pod {
		return &facts.Pod{Namespace: "shop", Name: name, Labels: map[string]string{"app": name}, IP: ip,
			Ports: []facts.Port{{Name: "http", Protocol: "TCP", Port: port}}}
	}
	start := facts.Case{
		Namespaces: map[string]map[string]string{"shop": {"team": "a"}},
		Pods:       []*facts.Pod{pod("web", "10.78.1.1", 80), pod("api", "10.78.1.2", 8080), pod("db", "10.78.1.3", 5432)},
	}
	c := newCluster(t, start.Start())
	change := func(changes ...facts.Change) {
		t.Helper()
		if err := c.facts.Apply(&facts.Step{Changes: changes}); err != nil {
			t.Fatal(err)
		}
		c.enforce()
	}
	change(facts.Change{Op: "create", Object: json.RawMessage(apiPolicy)})

	to := func(ip string, port uint16) Target {
		return Target{Protocol: "TCP", Source: "10.78.1.1", To: netip.AddrPortFrom(netip.MustParseAddr(ip), port), Patience: patience}
	}
	byProof, byAddress := to("10.78.1.2", 8080), to("10.78.1.3", 5432)
	web := c.pods["shop/web"]
	for _, target := range []Target{byProof, byAddress} {
		call[string](web, "Open", target)
	}
	for _, step := range []struct {
		name    string
		changes []facts.Change
	}{
		{"OK nothing", nil},
		{"OK a server's own other label", []facts.Change{{Op: "set-pod-labels", PodObject: json.RawMessage(`"shop/api"`), Labels: map[string]string{"app": "api", "pod-template-hash": "1"}}}},
		{"OK the client's other label", []facts.Change{{Op: "set-pod-labels", PodObject: json.RawMessage(`"shop/web"`), Labels: map[string]string{"app": "web", "version": "2"}}}},
		{"OK a namespace's label", []facts.Change{{Op: "set-namespace-labels", Namespace: "shop", Labels: map[string]string{"team": "b"}}}},
		{"OK a policy about others", []facts.Change{{Op: "create", Object: json.RawMessage(dbPolicy)}}},
		{"OK a new pod and a new namespace", []facts.Change{
			{Op: "create-namespace", Namespace: "other", Labels: map[string]string{}},
			{Op: "create-pod", PodObject: json.RawMessage(`{"ns": "other", "name": "late", "labels": {"app": "web"}, "ip": "10.78.1.4"}`)},
		}},
		{"OK a pod that goes", []facts.Change{{Op: "delete-pod", PodObject: json.RawMessage(`"other/late"`)}}},
	} {
		change(step.changes...)
		for _, target := range []Target{byProof, byAddress} {
			call[bool](web, "Echo", target)
		}
	}

	// Now the client is no web any more: what was declared by its label ends, and what
	// nothing forbids stays.
	change(facts.Change{Op: "set-pod-labels", PodObject: json.RawMessage(`"shop/web"`), Labels: map[string]string{"app": "scanner"}})
	call[bool](web, "Echo", byAddress)
	byProof.Patience = 2 * time.Second
	var ok bool
	if err := web.calls.Call("Pod.Echo", byProof, &ok); err == nil {
		t.Error("the connection that lost its crossing goes on")
	}
	if got := call[[]bool](web, "Try", []Target{byProof}); got[0] {
		t.Error("a new connection is made without a crossing")
	}
}
