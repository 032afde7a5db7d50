package docs_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	apps "k8s.io/api/apps/v1"
	kube "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/demarc/demarc/agent"
	"github.com/demarc/demarc/agent/core"
)

const kustomizeBase = "../../deploy/kubernetes/base/"

func manifest(t *testing.T, file string, into any) {
	t.Helper()
	if err := yaml.UnmarshalStrict([]byte(read(t, kustomizeBase+file)), into); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

// The API's own types take every field of the base, and there is nothing else in it:
// above all no role (J18).
func TestKubernetesBase(t *testing.T) {
	var (
		list      struct{ Resources []string }
		namespace kube.Namespace
		account   kube.ServiceAccount
	)
	if err := yaml.Unmarshal([]byte(read(t, kustomizeBase+"kustomization.yaml")), &list); err != nil {
		t.Fatal(err)
	}
	if want := []string{"namespace.yaml", "serviceaccount.yaml", "configmap.yaml", "daemonset.yaml"}; !slices.Equal(list.Resources, want) {
		t.Errorf("resources: %v, want %v", list.Resources, want)
	}
	manifest(t, "namespace.yaml", &namespace)
	manifest(t, "serviceaccount.yaml", &account)
	if account.AutomountServiceAccountToken == nil || *account.AutomountServiceAccountToken {
		t.Error("the service account's token is given to pods")
	}
	for _, dir := range []string{"base", "chart/templates"} {
		files, err := filepath.Glob("../../deploy/kubernetes/" + dir + "/*.yaml")
		if err != nil || len(files) < 3 {
			t.Fatalf("%s: %v, %v", dir, files, err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(text)) {
				// One file of the chart has a role, and only for the provider that needs it; test/kubernetes
				// looks at what it says.
				if filepath.Base(file) == "role.yaml" && strings.HasPrefix(string(text), "{{- if eq .Values.identity.provider \"kubernetes\" }}\n") && strings.HasSuffix(string(text), "\n{{- end }}\n") {
					continue
				}
				if kind, found := strings.CutPrefix(strings.TrimSpace(line), "kind: "); found && (strings.HasPrefix(kind, "Role") || strings.HasPrefix(kind, "ClusterRole")) {
					t.Errorf("%s: %s, and nothing asks the API server", file, kind)
				}
			}
		}
	}
}

// What the DaemonSet's containers may do is what docs/kubernetes.md says, and no more.
func TestKubernetesPrivileges(t *testing.T) {
	var set apps.DaemonSet
	manifest(t, "daemonset.yaml", &set)
	pod := set.Spec.Template.Spec
	type rights struct {
		Name                              string
		Privileged, Escalation, WriteRoot bool
		User                              int64
		Add                               string
		Drop                              string
		Seccomp                           kube.SeccompProfileType
		Mounts                            string
	}
	var got []rights
	for _, c := range append(pod.InitContainers, pod.Containers...) {
		s := c.SecurityContext
		if s == nil || s.Privileged == nil || s.AllowPrivilegeEscalation == nil || s.ReadOnlyRootFilesystem == nil || s.RunAsUser == nil || s.Capabilities == nil || s.SeccompProfile == nil {
			t.Fatalf("%s leaves open what it may do", c.Name)
		}
		if (*s.RunAsUser != 0) != (s.RunAsNonRoot != nil && *s.RunAsNonRoot) {
			t.Errorf("%s: runAsNonRoot does not go with user %d", c.Name, *s.RunAsUser)
		}
		r := rights{Name: c.Name, Privileged: *s.Privileged, Escalation: *s.AllowPrivilegeEscalation, WriteRoot: !*s.ReadOnlyRootFilesystem, User: *s.RunAsUser, Seccomp: s.SeccompProfile.Type}
		var add, drop, mounts []string
		for _, capability := range s.Capabilities.Add {
			add = append(add, string(capability))
		}
		for _, capability := range s.Capabilities.Drop {
			drop = append(drop, string(capability))
		}
		for _, m := range c.VolumeMounts {
			at := slices.IndexFunc(pod.Volumes, func(v kube.Volume) bool { return v.Name == m.Name })
			if at < 0 {
				t.Fatalf("%s: no volume %s", c.Name, m.Name)
			}
			if host := pod.Volumes[at].HostPath; host != nil {
				if host.Path != m.MountPath {
					t.Errorf("%s: the host's %s is at %s", c.Name, host.Path, m.MountPath)
				}
				mode := "rw "
				if m.ReadOnly {
					mode = "ro "
				}
				mounts = append(mounts, mode+host.Path)
			} else if m.ReadOnly == (pod.Volumes[at].EmptyDir != nil) {
				t.Errorf("%s: readOnly of %s is %v", c.Name, m.Name, m.ReadOnly)
			}
		}
		r.Add, r.Drop, r.Mounts = strings.Join(add, " "), strings.Join(drop, " "), strings.Join(mounts, ", ")
		got = append(got, r)
	}
	want := []rights{
		{Name: "core", Escalation: true, Add: "BPF PERFMON NET_ADMIN SYS_ADMIN SYS_PTRACE NET_RAW CHOWN SETPCAP", Drop: "ALL", Seccomp: kube.SeccompProfileTypeRuntimeDefault,
			Mounts: "rw /sys/fs/bpf, rw /sys/fs/cgroup, rw /run/demarc, rw /var/lib/demarc"},
		{Name: "agent", User: 65532, Drop: "ALL", Seccomp: kube.SeccompProfileTypeUnconfined, Mounts: "ro /sys/fs/cgroup, ro /run/demarc, ro /run/containerd"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
	if pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken || !pod.HostNetwork || !pod.HostPID || pod.HostIPC || pod.PriorityClassName != "system-node-critical" {
		t.Errorf("pod: %+v", pod)
	}
	// The core's container has what its unit has, and one capability to enter the host's cgroup namespace.
	_, unit, _ := strings.Cut(read(t, "../../deploy/systemd/demarc-core.service"), "CapabilityBoundingSet=")
	unit, _, _ = strings.Cut(unit, "\n")
	inUnit := strings.Fields(strings.ReplaceAll(unit, "CAP_", ""))
	inPod := slices.DeleteFunc(strings.Fields(want[0].Add), func(c string) bool { return c == "SYS_PTRACE" })
	slices.Sort(inUnit)
	slices.Sort(inPod)
	if !slices.Equal(inUnit, inPod) {
		t.Errorf("capabilities: the unit has %v, the container %v", inUnit, inPod)
	}
}

// The configuration is one that the core and the agent take, and agrees with the mounts.
func TestKubernetesConfiguration(t *testing.T) {
	var (
		set    apps.DaemonSet
		config kube.ConfigMap
	)
	manifest(t, "daemonset.yaml", &set)
	manifest(t, "configmap.yaml", &config)
	c, err := core.ParseConfig("core.json", []byte(config.Data["core.json"]))
	if err != nil {
		t.Fatal(err)
	}
	a, err := agent.ParseConfig("agent.yaml", []byte(config.Data["agent.yaml"]))
	if err != nil {
		t.Fatal(err)
	}
	containers := set.Spec.Template.Spec.Containers
	mounted := func(c kube.Container, path string) bool {
		return slices.ContainsFunc(c.VolumeMounts, func(m kube.VolumeMount) bool { return path == m.MountPath || strings.HasPrefix(path, m.MountPath+"/") })
	}
	for i, paths := range [][]string{{c.BPFFS, c.RunDir, c.StateDir, c.Keyring, c.TrustDir + "/ops.key.pub"}, {a.Core, a.Server, a.Journal, a.Runtime}} {
		for _, path := range paths {
			if path == "" || !mounted(containers[i], path) {
				t.Errorf("%s: nothing is mounted for %q", containers[i].Name, path)
			}
		}
	}
	if uid := *containers[1].SecurityContext.RunAsUser; uint32(uid) != c.AgentUID || a.Core != c.Socket() {
		t.Errorf("the agent is user %d and looks at %s, the core serves %d at %s", uid, a.Core, c.AgentUID, c.Socket())
	}
	if env := containers[1].Env[0]; env.Name != "DEMARC_SERVER" || env.Value != "unix://"+a.Server {
		t.Errorf("%s is %s, the agent serves %s", env.Name, env.Value, a.Server)
	}
	for _, probe := range []*kube.Probe{containers[0].ReadinessProbe, containers[1].StartupProbe, containers[1].LivenessProbe, containers[1].ReadinessProbe} {
		if at := probe.HTTPGet.Host + ":" + probe.HTTPGet.Port.String(); at != a.Metrics {
			t.Errorf("a probe asks %s, the agent serves %s", at, a.Metrics)
		}
	}
}
