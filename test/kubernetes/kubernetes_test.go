package kubernetes_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	apps "k8s.io/api/apps/v1"
	kube "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	yamlreader "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"github.com/demarc/demarc/test/kubernetes"
)

const deploy = "../../deploy/kubernetes/"

// objects decodes a stream into the API's types, which must know every field. The
// names are KIND/NAME. Any other kind fails.
func objects(t *testing.T, text []byte) map[string]any {
	t.Helper()
	all := map[string]any{}
	r := yamlreader.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
	for {
		doc, err := r.Read()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		var head struct {
			Kind, APIVersion string
			Metadata         struct{ Name, Namespace string }
		}
		if err := yaml.Unmarshal(doc, &head); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		if head.Kind == "" {
			continue // a template with nothing to say
		}
		var object any
		switch head.APIVersion + " " + head.Kind {
		case "v1 Namespace":
			object = new(kube.Namespace)
		case "v1 ServiceAccount":
			object = new(kube.ServiceAccount)
		case "v1 ConfigMap":
			object = new(kube.ConfigMap)
		case "apps/v1 DaemonSet":
			object = new(apps.DaemonSet)
		case "rbac.authorization.k8s.io/v1 ClusterRole":
			object = new(rbac.ClusterRole)
		case "rbac.authorization.k8s.io/v1 ClusterRoleBinding":
			object = new(rbac.ClusterRoleBinding)
		case "monitoring.coreos.com/v1 PodMonitor":
			object = new(monitoring.PodMonitor)
		case "monitoring.coreos.com/v1 PrometheusRule":
			object = new(monitoring.PrometheusRule)
		default:
			t.Fatalf("%s %s has no place here", head.APIVersion, head.Kind)
		}
		if err := yaml.UnmarshalStrict(doc, object); err != nil {
			t.Fatalf("%s/%s: %v in\n%s", head.Kind, head.Metadata.Name, err, doc)
		}
		namespace := "demarc"
		if head.Kind == "Namespace" || strings.HasPrefix(head.Kind, "Cluster") {
			namespace = ""
		}
		if head.Metadata.Namespace != namespace {
			t.Errorf("%s/%s is in namespace %q", head.Kind, head.Metadata.Name, head.Metadata.Namespace)
		}
		name := head.Kind + "/" + head.Metadata.Name
		if all[name] != nil {
			t.Errorf("%s is there twice", name)
		}
		all[name] = object
	}
}

func kustomized(t *testing.T) map[string]any {
	t.Helper()
	return kustomizedAt(t, "base")
}

func kustomizedAt(t *testing.T, dir string) map[string]any {
	t.Helper()
	text, err := kubernetes.Kustomize(deploy + dir)
	if err != nil {
		t.Fatal(err)
	}
	return objects(t, text)
}

func rendered(t *testing.T, values string) map[string]any {
	t.Helper()
	text, err := kubernetes.Chart(deploy+"chart", values)
	if err != nil {
		t.Fatal(err)
	}
	return objects(t, text)
}

// With its defaults the chart is the kustomize base, but for the namespace, which
// `helm install` has an option for.
func TestSame(t *testing.T) {
	want, got := kustomized(t), rendered(t, "")
	if len(want) != 4 || want["Namespace/demarc"] == nil {
		t.Fatalf("the base has %v", slices.Sorted(maps.Keys(want)))
	}
	delete(want, "Namespace/demarc")
	if a, b := slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)); !slices.Equal(a, b) {
		t.Fatalf("the chart has %v, the base %v", a, b)
	}
	for name := range want {
		if a, b := text(t, got[name]), text(t, want[name]); a != b {
			t.Errorf("%s differs: the chart has\n%s\nthe base\n%s", name, a, b)
		}
	}
}

// Who asks the API server may list and watch pods, and nothing else; the token is the
// agent's alone. Nobody else has a role (J18): the objects of all other values are
// compared with the base's, which has none.
func TestRole(t *testing.T) {
	want, got := kustomizedAt(t, "api"), rendered(t, "identity: {provider: kubernetes}")
	delete(want, "Namespace/demarc")
	if a, b := slices.Sorted(maps.Keys(got)), []string{"ClusterRole/demarc", "ClusterRoleBinding/demarc", "ConfigMap/demarc-config", "DaemonSet/demarc", "ServiceAccount/demarc"}; !slices.Equal(a, b) {
		t.Fatalf("the chart has %v, want %v", a, b)
	}
	for name := range got {
		if a, b := text(t, got[name]), text(t, want[name]); a != b {
			t.Errorf("%s differs: the chart has\n%s\nkustomize\n%s", name, a, b)
		}
	}
	if len(got) != len(want) {
		t.Errorf("kustomize has %v", slices.Sorted(maps.Keys(want)))
	}
	role := got["ClusterRole/demarc"].(*rbac.ClusterRole)
	if rules := []rbac.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list", "watch"}}}; !reflect.DeepEqual(role.Rules, rules) || role.AggregationRule != nil {
		t.Errorf("it may do %s", text(t, role))
	}
	binding := got["ClusterRoleBinding/demarc"].(*rbac.ClusterRoleBinding)
	if whom := []rbac.Subject{{Kind: "ServiceAccount", Name: "demarc", Namespace: "demarc"}}; !reflect.DeepEqual(binding.Subjects, whom) ||
		binding.RoleRef != (rbac.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: "demarc"}) {
		t.Errorf("bound is %s", text(t, binding))
	}
	pod := got["DaemonSet/demarc"].(*apps.DaemonSet).Spec.Template.Spec
	if pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken {
		t.Error("every container has the token")
	}
	for _, c := range pod.Containers {
		has := slices.ContainsFunc(c.VolumeMounts, func(m kube.VolumeMount) bool { return m.Name == "account" })
		if has != (c.Name == "agent") {
			t.Errorf("%s has the token: %v", c.Name, has)
		}
	}
}

// Findings and the journal outlive the agent's container: they are in a volume. The
// charts' objects are compared with these.
func TestState(t *testing.T) {
	for _, dir := range []string{"base", "api"} {
		objects := kustomizedAt(t, dir)
		config := objects["ConfigMap/demarc-config"].(*kube.ConfigMap).Data["agent.yaml"]
		agent := objects["DaemonSet/demarc"].(*apps.DaemonSet).Spec.Template.Spec.Containers[1]
		if !slices.ContainsFunc(agent.VolumeMounts, func(m kube.VolumeMount) bool {
			return !m.ReadOnly && strings.Contains(config, "\nstate: "+m.MountPath+"\n")
		}) {
			t.Errorf("%s: the state is in no volume:\n%s", dir, config)
		}
	}
}

// Whatever the values are, the containers may do the same.
func TestValues(t *testing.T) {
	base := kustomized(t)["DaemonSet/demarc"].(*apps.DaemonSet).Spec.Template.Spec
	for _, tt := range []struct {
		name, values string
		kinds        []string // beside those of the base
		groups       []int64
		mounts       []string // of the agent, that the base has not
		missing      []string // of the agent, that only the base has
		config       string
	}{
		{"OK nothing names workloads", "identity: {provider: ''}", nil, nil, nil, []string{"runtime"}, ""},
		{"OK inventory", "identity: {provider: file}", nil, nil, []string{"inventory"}, []string{"runtime"}, "identity: {providers: [file], inventory: /etc/demarc/inventory/inventory.yaml}"},
		{"OK API server", "identity: {provider: kubernetes}", []string{"ClusterRole/demarc", "ClusterRoleBinding/demarc"}, nil, []string{"account"}, []string{"runtime"}, "identity: {providers: [kubernetes]}"},
		{"OK another runtime", "identity: {runtimeDirectory: /run/crio, runtimeSocket: crio.sock}", nil, []int64{0}, nil, nil, "cri: unix:///run/crio/crio.sock}"},
		{"OK policy from a Secret", "policy: {kind: Secret, name: shop}", nil, []int64{0}, nil, nil, ""},
		{"OK two keys", "trust: {keys: [a.pub, b.pub]}", nil, []int64{0}, nil, nil, ""},
		{"OK monitored", "metrics: {host: 0.0.0.0}\npodMonitor: {enabled: true, labels: {release: p}}\nprometheusRule: {enabled: true}",
			[]string{"PodMonitor/demarc", "PrometheusRule/demarc-alerts", "PrometheusRule/demarc-findings"}, []int64{0}, nil, nil, `listen: "0.0.0.0:9477"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			all := rendered(t, tt.values)
			pod := all["DaemonSet/demarc"].(*apps.DaemonSet).Spec.Template.Spec
			kinds := append([]string{"ConfigMap/demarc-config", "DaemonSet/demarc", "ServiceAccount/demarc"}, tt.kinds...)
			slices.Sort(kinds)
			if got := slices.Sorted(maps.Keys(all)); !slices.Equal(got, kinds) {
				t.Errorf("objects: %v, want %v", got, kinds)
			}
			if len(pod.Containers) != 2 || len(pod.InitContainers) != 0 {
				t.Fatalf("containers: %+v", pod.Containers)
			}
			for i, c := range pod.Containers {
				if !reflect.DeepEqual(c.SecurityContext, base.Containers[i].SecurityContext) {
					t.Errorf("%s may do something else: %s", c.Name, text(t, c.SecurityContext))
				}
			}
			var groups []int64
			if pod.SecurityContext != nil {
				groups = pod.SecurityContext.SupplementalGroups
			}
			if !slices.Equal(groups, tt.groups) {
				t.Errorf("groups: %v, want %v", groups, tt.groups)
			}
			names := func(p kube.PodSpec) (names []string) {
				for _, m := range p.Containers[1].VolumeMounts {
					names = append(names, m.Name)
					if !slices.ContainsFunc(p.Volumes, func(v kube.Volume) bool { return v.Name == m.Name }) {
						t.Errorf("no volume %s", m.Name)
					}
				}
				return names
			}
			want := slices.DeleteFunc(append(names(base), tt.mounts...), func(n string) bool { return slices.Contains(tt.missing, n) })
			if got := names(pod); !slices.Equal(got, want) {
				t.Errorf("mounts of the agent: %v, want %v", got, want)
			}
			if config := all["ConfigMap/demarc-config"].(*kube.ConfigMap).Data["agent.yaml"]; !strings.Contains(config, tt.config) {
				t.Errorf("agent.yaml has no %q:\n%s", tt.config, config)
			}
		})
	}
}

// The rules are those of deploy/prometheus, which have tests of their own.
func TestRules(t *testing.T) {
	all := rendered(t, "prometheusRule: {enabled: true}")
	for _, name := range []string{"alerts", "findings"} {
		var want monitoring.PrometheusRuleSpec
		file, err := os.ReadFile("../../deploy/prometheus/" + name + ".yaml")
		if err == nil {
			err = yaml.UnmarshalStrict(file, &want)
		}
		if err != nil {
			t.Fatal(err)
		}
		got := all["PrometheusRule/demarc-"+name].(*monitoring.PrometheusRule).Spec
		if len(want.Groups) == 0 || text(t, got) != text(t, want) {
			t.Errorf("%s: got\n%s\nwant\n%s", name, text(t, got), text(t, want))
		}
	}
}

func TestRefusedValues(t *testing.T) {
	for _, tt := range []struct{ name, values, want string }{
		{"bad provider", "identity: {provider: docker}", `use cri, kubernetes, file or`},
		{"bad kind of policy", "policy: {kind: Pod}", "use ConfigMap or Secret"},
		{"bad scrape of loopback", "podMonitor: {enabled: true}", "set metrics.host"},
		{"bad no key", "trust: {keys: []}", "name at least one file"},
	} {
		if _, err := kubernetes.Chart(deploy+"chart", tt.values); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

func text(t *testing.T, object any) string {
	t.Helper()
	b, err := json.MarshalIndent(object, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
