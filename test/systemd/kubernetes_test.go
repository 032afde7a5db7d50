//go:build kubernetes

package systemd_test

import (
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	apps "k8s.io/api/apps/v1"
	kube "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/yaml"

	"github.com/demarc/demarc/test/cluster"
	"github.com/demarc/demarc/test/netlab"
)

// What pods may do, by their labels, their service account, or the name of their container. What
// nobody selects may reach 7009, and the API server: the agent is among them.
const podsPolicy = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: pods, version: %d}
trustDomain: pods.example
zones: {outside: {trust: 0}, app: {trust: 10}}
networks: {peer: {zone: outside, cidrs: [%s/32]}, cluster: {zone: outside, cidrs: [%s/32]}}
workloads:
  api:  {zone: app, match: [{kubernetes: {namespace: shop, podLabels: {app: api}}}]}
  tool: {zone: app, match: [{container: {name: tool}}]}
  jobs: {zone: app, match: [{kubernetes: {namespace: other, serviceAccount: jobs}}]}
crossings:
  - {name: api,     from: [workload/api],  to: [network/peer], ports: [tcp/7001]}
  - {name: tool,    from: [workload/tool], to: [network/peer], ports: [tcp/7002]}
  - {name: jobs,    from: [workload/jobs], to: [network/peer], ports: [tcp/7003]}
  - {name: others,  from: [unmanaged],     to: [network/peer], ports: [tcp/7009]}
%sunmanaged: {zone: app, outbound: deny, inbound: allow}
`

const askAPI = "  - {name: cluster, from: [unmanaged], to: [network/cluster], ports: [tcp/6443]}\n"

// node is a node of a cluster: a host, its containerd, and what a kubelet would do.
//
//	host: systemd, containerd, demarc ---- switch ---- control: etcd, kube-apiserver
//	                                         |
//	                                         peer: echo on 7001 ... 7009
type node struct {
	*host
	kubelet *kubelet
	cluster *cluster.Server
	admin   *cluster.Client
	self    *cluster.Client // the kubelet
	wire    *netlab.Wire
}

const account = "system:serviceaccount:demarc:demarc"

// newNode boots a node whose agent asks a real API server, as the service account and
// with the role of deploy/kubernetes.
func newNode(t *testing.T) *node {
	t.Helper()
	n := newControl(t)
	n.installContainerd()
	n.Write("/etc/demarc/account/ca.crt", n.cluster.CA(), 0o644)
	n.token(n.admin.Token("demarc", "demarc", "", ""))
	n.Write("/etc/demarc/agent.yaml", fmt.Sprintf("metrics: {listen: \"127.0.0.1:9477\"}\nidentity:\n  providers: [kubernetes]\n"+
		"  kubernetes: {server: %q, token_file: account/token, ca_file: account/ca.crt, node: host}\n", n.cluster.URL()), 0o644)
	n.Boot()
	n.startContainerd()
	n.kubelet = newKubelet(n.host)
	n.wire = n.Wire()
	return n
}

// newControl has a cluster, and no node that runs.
func newControl(t *testing.T) *node {
	t.Helper()
	lab := netlab.New(t)
	n := &node{host: newHost(t, lab)}
	n.cluster = cluster.New(t, lab, lab.Namespace("control"))
	n.admin, n.self = n.cluster.Admin(), n.cluster.Node("host")
	for _, file := range []string{"base/namespace.yaml", "base/serviceaccount.yaml", "api/role.yaml"} {
		n.manifest(file)
	}
	n.self.Create("/api/v1/nodes", &kube.Node{ObjectMeta: meta.ObjectMeta{Name: "host"}})
	n.admin.Create("/api/v1/nodes", &kube.Node{ObjectMeta: meta.ObjectMeta{Name: "elsewhere"}})
	for _, name := range []string{"shop", "other"} {
		n.admin.Create("/api/v1/namespaces", &kube.Namespace{ObjectMeta: meta.ObjectMeta{Name: name}})
		for _, account := range []string{"default", "jobs"} {
			n.admin.Create("/api/v1/namespaces/"+name+"/serviceaccounts", &kube.ServiceAccount{ObjectMeta: meta.ObjectMeta{Name: account}})
		}
	}
	return n
}

// manifest applies one of the files in deploy/kubernetes, as kubectl would.
func (n *node) manifest(file string) {
	n.t.Helper()
	text, err := os.ReadFile("../../deploy/kubernetes/" + file)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, doc := range documents(string(text)) {
		n.admin.Must(http.MethodPatch, place(n.t, doc)+"?fieldManager=test&fieldValidation=Strict", cluster.Apply, doc, nil)
	}
}

// documents are those of a stream that say something.
func documents(text string) (all []string) {
	for _, doc := range strings.Split("\n"+text, "\n---\n") {
		if strings.Contains(doc, "kind:") {
			all = append(all, doc)
		}
	}
	return all
}

type object struct {
	Kind, APIVersion string
	Metadata         struct{ Name, Namespace string }
}

func head(t *testing.T, doc string) (o object) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
		t.Fatal(err)
	}
	return o
}

func daemonSet(t *testing.T, doc string) *apps.DaemonSet {
	t.Helper()
	set := new(apps.DaemonSet)
	if err := yaml.UnmarshalStrict([]byte(doc), set); err != nil {
		t.Fatal(err)
	}
	return set
}

// place is the path of an object.
func place(t *testing.T, doc string) string {
	t.Helper()
	o := head(t, doc)
	group := "/apis/" + o.APIVersion
	if !strings.Contains(o.APIVersion, "/") {
		group = "/api/" + o.APIVersion
	}
	kind := strings.ToLower(o.Kind) + "s"
	if kind == "namespaces" || strings.HasPrefix(kind, "cluster") {
		return group + "/" + kind + "/" + o.Metadata.Name
	}
	return group + "/namespaces/demarc/" + kind + "/" + o.Metadata.Name
}

// token gives the agent a token, as a kubelet renews it: by another file.
func (n *node) token(text string) {
	n.t.Helper()
	n.Write("/etc/demarc/account/token.new", text, 0o644)
	if err := os.Rename(n.Path("/etc/demarc/account/token.new"), n.Path("/etc/demarc/account/token")); err != nil {
		n.t.Fatal(err)
	}
}

// pods puts a version of the policy in force.
func (n *node) pods(version int, more string) {
	n.t.Helper()
	n.apply(fmt.Sprintf(podsPolicy, version, n.peer.IP4, n.at(), more))
}

func (n *node) at() string {
	host, _, _ := strings.Cut(strings.TrimPrefix(n.cluster.URL(), "https://"), ":")
	return host
}

// pod is a pod that runs.
type pod struct {
	kube.Pod
	sandbox string
}

func (p *pod) path() string { return "/api/v1/namespaces/" + p.Namespace + "/pods/" + p.Name }

// pod makes a pod by the API, has containerd run it, and reports its container, all as
// a scheduler and a kubelet would.
func (n *node) pod(namespace, name, container, account string, labels map[string]string) *pod {
	n.t.Helper()
	p := n.run(namespace, name, container, account, labels)
	n.report(p, container)
	return p
}

// run does all but the report.
func (n *node) run(namespace, name, container, account string, labels map[string]string) *pod {
	n.t.Helper()
	p := n.declare("host", namespace, name, container, account, labels)
	uid := strings.ReplaceAll(string(p.UID), "-", "_")
	var id string
	p.sandbox, id, _ = n.kubelet.start(&runtime.PodSandboxConfig{
		Metadata: &runtime.PodSandboxMetadata{Namespace: namespace, Name: name, Uid: string(p.UID)},
		Labels:   labels, Linux: &runtime.LinuxPodSandboxConfig{CgroupParent: "kubepods-besteffort-pod" + uid + ".slice"},
	}, container, fmt.Sprintf(dialing, n.peer.IP4))
	p.Status = kube.PodStatus{Phase: kube.PodRunning, ContainerStatuses: []kube.ContainerStatus{{
		Name: container, Image: "demarc.dev/busybox:1", ContainerID: "containerd://" + id, Ready: true,
		State: kube.ContainerState{Running: &kube.ContainerStateRunning{StartedAt: meta.Now()}},
	}}}
	return p
}

// report tells the API server of the pod's container, with a kubelet's rights.
func (n *node) report(p *pod, container string) {
	n.t.Helper()
	n.self.Must(http.MethodPatch, p.path()+"/status", cluster.Strategic, map[string]any{"status": p.Status}, nil)
}

// declare makes a pod that nobody runs yet.
func (n *node) declare(on, namespace, name, container, account string, labels map[string]string) *pod {
	n.t.Helper()
	p := &pod{Pod: kube.Pod{ObjectMeta: meta.ObjectMeta{Namespace: namespace, Name: name, Labels: labels},
		Spec: kube.PodSpec{NodeName: on, ServiceAccountName: account, HostNetwork: true, Containers: []kube.Container{{Name: container, Image: "demarc.dev/busybox:1"}}}}}
	n.admin.Create("/api/v1/namespaces/"+namespace+"/pods", &p.Pod)
	return p
}

// reaches waits until somebody reaches one of the peer's ports, and says how long that
// took. Nothing else may have been reached.
func (n *node) reaches(who string, port uint16) {
	n.t.Helper()
	began := time.Now()
	n.Await(fmt.Sprintf("%s reaches %d", who, port), func() error {
		if got := n.reached(); !slices.Contains(got, port) {
			status, _ := n.Try("demarc", "status")
			return fmt.Errorf("%v is on the wire\n%s\nagent:\n%s", got, status, n.Journal("demarc-agent"))
		}
		return nil
	})
	n.t.Logf("%s: first packet %v later", who, time.Since(began).Round(time.Millisecond))
	time.Sleep(time.Second) // more of what it may and may not
	if got := n.reached(); !slices.Equal(got, []uint16{port}) {
		n.t.Errorf("%s reached %v, want only %d", who, got, port)
	}
}

// reached are the ports of the peer that were sent a SYN since the wire forgot.
func (n *node) reached() []uint16 { return reached(n.wire, n.peer) }

// nothing waits a while in which nobody may reach anything.
func (n *node) nothing(when string, seconds int) {
	n.t.Helper()
	n.wire.Forget()
	time.Sleep(time.Duration(seconds) * time.Second)
	if got := n.reached(); len(got) > 0 {
		n.t.Errorf("%s: %v is on the wire", when, got)
	}
}

// says waits until demarc's status says something, or says it no more.
func (n *node) says(what string, want bool) {
	n.t.Helper()
	n.Await(fmt.Sprintf("says %q: %v", what, want), func() error {
		if out, _ := n.Try("demarc", "status"); strings.Contains(out, what) != want {
			return fmt.Errorf("status:\n%s\nagent:\n%s", out, n.Journal("demarc-agent"))
		}
		return nil
	})
}

// end ends a pod as a kubelet does.
func (n *node) end(p *pod) {
	n.t.Helper()
	n.kubelet.stop(p.sandbox)
	n.self.Must(http.MethodDelete, p.path(), cluster.JSON, `{"kind":"DeleteOptions","apiVersion":"v1","gracePeriodSeconds":0}`, nil)
	n.wire.Forget()
}
