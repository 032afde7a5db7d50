//go:build kubernetes

package systemd_test

import (
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	authorization "k8s.io/api/authorization/v1"
	kube "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/demarc/demarc/test/cluster"
)

// TestKubernetesAPI: pods that really run, in containerd, get their identity from a real
// API server, and keep it for as long as they have it there. Until then nothing of them
// is on the wire, then exactly what their crossings declare.
func TestKubernetesAPI(t *testing.T) {
	n := newNode(t)
	// The agent's watch is older than enforcement, which cuts such connections without
	// a word where unmanaged processes may not do as they please.
	n.says(n.cluster.URL(), true)
	n.pods(1, askAPI)
	n.wire.Forget()
	labels := map[string]string{"app": "api"}
	for _, tt := range []struct {
		namespace, name, container, account string
		labels                              map[string]string
		port                                uint16
	}{
		{"shop", "labelled", "main", "default", labels, 7001},
		{"other", "accounted", "main", "jobs", labels, 7003},
		{"other", "contained", "tool", "default", nil, 7002},
		{"shop", "nobodys", "main", "jobs", nil, 7009},
	} {
		p := n.run(tt.namespace, tt.name, tt.container, tt.account, tt.labels)
		n.nothing(tt.name+", before the API server knows its container", 2)
		n.report(p, tt.container)
		n.reaches(tt.namespace+"/"+tt.name, tt.port)
		n.end(p)
	}

	api := n.pod("shop", "api", "main", "default", labels)
	n.reaches("shop/api", 7001)

	t.Run("policy that keeps the agent away", func(t *testing.T) {
		n.Write("/root/away.yaml", fmt.Sprintf(podsPolicy, 2, n.peer.IP4, n.at(), ""), 0o644)
		if out := n.Run("demarc", "apply", "/root/away.yaml", "--dry-run"); !strings.Contains(out, "demarc-agent[") || !strings.Contains(out, "-> "+strings.TrimPrefix(n.cluster.URL(), "https://")) {
			t.Errorf("what would be cut does not name the agent's connection:\n%s", out)
		}
		n.pods(2, "")
		n.says("declare a crossing for them", true)
		n.wire.Forget()
		n.reaches("who was named", 7001)
		n.pods(3, askAPI)
		n.says("declare a crossing for them", false)
	})

	t.Run("relabelled", func(t *testing.T) {
		relabel := func(app string, port uint16) {
			n.admin.Must(http.MethodPatch, api.path(), cluster.Merge, map[string]any{"metadata": map[string]any{"labels": map[string]string{"app": app}}}, nil)
			n.Await("has another label", func() error {
				n.wire.Forget()
				time.Sleep(500 * time.Millisecond)
				if got := n.reached(); !slices.Equal(got, []uint16{port}) {
					return fmt.Errorf("%v is on the wire", got)
				}
				return nil
			})
			n.reaches("as "+app, port)
		}
		relabel("web", 7009)
		relabel("api", 7001)
	})

	t.Run("renewed token", func(t *testing.T) {
		bound := func(name string) (token, path string) {
			secret := &kube.Secret{ObjectMeta: meta.ObjectMeta{Name: name}}
			n.admin.Create("/api/v1/namespaces/demarc/secrets", secret)
			return n.admin.Token("demarc", "demarc", name, string(secret.UID)), "/api/v1/namespaces/demarc/secrets/" + name
		}
		first, gone := bound("first")
		n.token(first)
		n.Run("systemctl", "restart", "demarc-agent")
		n.awaitState("enforcing")
		n.wire.Forget()
		n.reaches("after a restart of the agent", 7001)
		// The first token ends; the agent has another one, and the next question is with it.
		n.admin.Must(http.MethodDelete, gone, "", nil, nil)
		n.Await("ends the token", func() error {
			if status, _ := n.cluster.Bearer(first).Ask(http.MethodGet, "/api/v1/pods", "", nil); status != http.StatusUnauthorized {
				return fmt.Errorf("%d", status)
			}
			return nil
		})
		n.cluster.Stop()
		n.cluster.Start()
		n.says("it does not know the token (401)", true)
		second, _ := bound("second")
		n.token(second)
		n.says("it does not know the token (401)", false)
	})

	t.Run("API server that is away", func(t *testing.T) {
		n.cluster.Stop()
		n.says("connection refused", true)
		n.wire.Forget()
		n.reaches("while the API server is away", 7001)
		n.Run("systemctl", "restart", "demarc-agent")
		n.Run("systemctl", "restart", "demarc-core")
		n.awaitState("enforcing")
		n.wire.Forget()
		n.reaches("after both daemons were started anew without it", 7001)
		n.cluster.Start()
		n.says("connection refused", false)
		tool := n.pod("other", "tool", "tool", "default", nil)
		n.Await("names a pod after that", func() error {
			if got := n.reached(); !slices.Equal(got, []uint16{7001, 7002}) {
				return fmt.Errorf("%v is on the wire", got)
			}
			return nil
		})
		n.end(tool)
	})

	t.Run("deleted by force", func(t *testing.T) {
		n.admin.Must(http.MethodDelete, api.path()+"?gracePeriodSeconds=0", "", nil, nil)
		n.Await("is silent", func() error {
			n.wire.Forget()
			time.Sleep(time.Second)
			if got := n.reached(); len(got) > 0 {
				return fmt.Errorf("%v is on the wire", got)
			}
			return nil
		})
		n.nothing("a pod that is not there any more", 3)
		n.kubelet.stop(api.sandbox)
	})

	t.Run("questions", func(t *testing.T) {
		lists, watches := 0, 0
		for _, a := range n.cluster.Asked(account) {
			if a.Agent != "demarc-agent" {
				continue // this test, as the agent
			}
			u, err := url.Parse(a.URI)
			if err != nil || u.Path != "/api/v1/pods" || u.Query().Get("fieldSelector") != "spec.nodeName=host" {
				t.Errorf("%s %s: not of this node's pods", a.Verb, a.URI)
			}
			switch a.Verb {
			case "list":
				lists++
			case "watch":
				watches++
			default:
				t.Errorf("%s %s", a.Verb, a.URI)
			}
		}
		if lists == 0 || watches == 0 {
			t.Errorf("%d lists, %d watches", lists, watches)
		}
		t.Logf("%d lists and %d watches in all", lists, watches)
	})
}

// TestKubernetesRights: with the role of deploy/kubernetes the agent's token lists and
// watches pods, and does nothing else.
func TestKubernetesRights(t *testing.T) {
	n := newControl(t)
	agent := n.cluster.Bearer(n.admin.Token("demarc", "demarc", "", ""))
	if status, answer := agent.Ask(http.MethodGet, "/api/v1/pods?fieldSelector=spec.nodeName%3Dhost", "", nil); status != http.StatusOK {
		t.Errorf("list of pods: %d\n%s", status, answer)
	}
	n.declare("host", "shop", "victim", "main", "default", nil)
	for _, tt := range []struct {
		method, path string
		body         any
	}{
		{http.MethodGet, "/api/v1/namespaces/shop/pods/victim", nil},
		{http.MethodGet, "/api/v1/namespaces/shop/pods/victim/log", nil},
		{http.MethodPost, "/api/v1/namespaces/shop/pods/victim/exec?command=id", nil},
		{http.MethodDelete, "/api/v1/namespaces/shop/pods/victim", nil},
		{http.MethodPost, "/api/v1/namespaces/shop/pods", &kube.Pod{ObjectMeta: meta.ObjectMeta{Name: "mine"}}},
		{http.MethodGet, "/api/v1/secrets", nil},
		{http.MethodGet, "/api/v1/namespaces/demarc/secrets/demarc-keyring", nil},
		{http.MethodGet, "/api/v1/namespaces/demarc/configmaps", nil},
		{http.MethodGet, "/api/v1/nodes", nil},
		{http.MethodGet, "/api/v1/namespaces", nil},
		{http.MethodGet, "/apis/apps/v1/daemonsets", nil},
		{http.MethodGet, "/apis/rbac.authorization.k8s.io/v1/clusterroles", nil},
		{http.MethodPost, "/api/v1/namespaces/demarc/serviceaccounts/demarc/token", map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest"}},
	} {
		if status, answer := agent.Ask(tt.method, tt.path, cluster.JSON, tt.body); status != http.StatusForbidden {
			t.Errorf("%s %s: %d, want 403\n%s", tt.method, tt.path, status, answer)
		}
	}
	// What the API server itself says of it, all but what every service account may.
	n.admin.Create("/api/v1/namespaces/demarc/serviceaccounts", &kube.ServiceAccount{ObjectMeta: meta.ObjectMeta{Name: "another"}})
	common := rules(n.cluster.Bearer(n.admin.Token("demarc", "another", "", "")))
	got := slices.DeleteFunc(rules(agent), func(r string) bool { return slices.Contains(common, r) })
	if want := []string{"[list watch] [] [pods] []"}; !slices.Equal(got, want) {
		t.Errorf("it may %q, want %q", got, want)
	}
}

// rules are what somebody may do in the namespace demarc.
func rules(c *cluster.Client) (all []string) {
	r := &authorization.SelfSubjectRulesReview{Spec: authorization.SelfSubjectRulesReviewSpec{Namespace: "demarc"}}
	c.Create("/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", r)
	for _, rule := range r.Status.ResourceRules {
		all = append(all, fmt.Sprint(rule.Verbs, rule.APIGroups, rule.Resources, rule.ResourceNames))
	}
	return all
}

// TestKubernetesManifests has the API server judge what kustomize and Helm make: by its
// own schemas, strictly, with all that is admitted or not. Nothing is kept of it.
func TestKubernetesManifests(t *testing.T) {
	n := newControl(t)
	const strict = "?dryRun=All&fieldManager=test&fieldValidation=Strict"
	files, err := os.ReadDir(os.Getenv(cluster.Programs) + "/manifests")
	if err != nil || len(files) < 6 {
		t.Fatalf("manifests: %v, %v", files, err)
	}
	n.admin.Create("/api/v1/namespaces", &kube.Namespace{ObjectMeta: meta.ObjectMeta{Name: "baseline", Labels: map[string]string{"pod-security.kubernetes.io/enforce": "baseline"}}})
	n.admin.Create("/api/v1/namespaces/baseline/serviceaccounts", &kube.ServiceAccount{ObjectMeta: meta.ObjectMeta{Name: "demarc"}})
	for _, file := range files {
		text, err := os.ReadFile(os.Getenv(cluster.Programs) + "/manifests/" + file.Name())
		if err != nil {
			t.Fatal(err)
		}
		kinds := map[string]int{}
		for _, doc := range documents(string(text)) {
			path, kind := place(t, doc), head(t, doc).Kind
			kinds[kind]++
			status, answer := n.admin.Ask(http.MethodPatch, path+strict, cluster.Apply, doc)
			if status != http.StatusOK && status != http.StatusCreated || len(n.admin.Warnings) > 0 {
				t.Errorf("%s: %s: %d %s %q", file.Name(), path, status, cluster.Reason(answer), n.admin.Warnings)
			}
			if kind != "DaemonSet" {
				continue
			}
			// Strict it is: a field that there is not is refused.
			wrong := strings.Replace(doc, "hostPID: true", "hostPID: true\n      hostPIDs: true", 1)
			if status, answer := n.admin.Ask(http.MethodPatch, path+strict, cluster.Apply, wrong); status != http.StatusBadRequest && status != http.StatusInternalServerError && status != http.StatusUnprocessableEntity {
				t.Errorf("%s: an unknown field: %d %s", file.Name(), status, cluster.Reason(answer))
			}
			n.podSecurity(t, file.Name(), doc)
		}
		if kinds["DaemonSet"] != 1 || kinds["ConfigMap"] != 1 || kinds["ServiceAccount"] != 1 {
			t.Errorf("%s has %v", file.Name(), kinds)
		}
		t.Logf("%s: %v", file.Name(), kinds)
	}
}

// podSecurity makes a pod of the DaemonSet's: its namespace's label admits it, and one
// less would not.
func (n *node) podSecurity(t *testing.T, file, doc string) {
	t.Helper()
	set := daemonSet(t, doc)
	pod := &kube.Pod{ObjectMeta: meta.ObjectMeta{Name: "demarc-1", Labels: set.Spec.Template.Labels}, Spec: set.Spec.Template.Spec}
	for namespace, want := range map[string]int{"demarc": http.StatusCreated, "baseline": http.StatusForbidden} {
		status, answer := n.admin.Ask(http.MethodPost, "/api/v1/namespaces/"+namespace+"/pods?dryRun=All&fieldValidation=Strict", cluster.JSON, pod)
		if status != want || want == http.StatusForbidden && !strings.Contains(cluster.Reason(answer), "violates PodSecurity") {
			t.Errorf("%s: a pod in namespace %s: %d %s, want %d", file, namespace, status, cluster.Reason(answer), want)
		}
	}
}
