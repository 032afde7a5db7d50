//go:build packages

package systemd_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	apps "k8s.io/api/apps/v1"
	kube "k8s.io/api/core/v1"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/yaml"

	"github.com/demarc/demarc/test/netlab"
)

// The unit may reach 7001, the pod 7003, and nobody anything else.
const rollingPolicy = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: rolling, version: 1}
trustDomain: rolling.example
zones: {outside: {trust: 0}, app: {trust: 10}}
networks: {peer: {zone: outside, cidrs: [%s/32]}}
workloads:
  worker: {zone: app, match: [{systemdUnit: worker.service}]}
  api:    {zone: app, match: [{kubernetes: {namespace: shop, podLabels: {app: api}}}]}
crossings:
  - {name: worker, from: [workload/worker], to: [network/peer], ports: [tcp/7001]}
  - {name: api,    from: [workload/api],    to: [network/peer], ports: [tcp/7003]}
unmanaged: {zone: app, outbound: allow, inbound: allow}
`

// daemons is one pod of the DaemonSet, as a kubelet has it run.
type daemons struct {
	*kubelet
	h          *host
	sandbox    string
	containers map[string]string // ids by name
}

// volumes are what a kubelet has for the DaemonSet's pods that is no directory of the
// host's: files of ConfigMaps and Secrets by volume.
type volumes map[string]map[string]string

// daemons starts a pod of the DaemonSet from one version of the image.
func (k *kubelet) daemons(h *host, set *apps.DaemonSet, image string, files volumes, number int) *daemons {
	k.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	d := &daemons{kubelet: k, h: h, containers: map[string]string{}}
	spec := set.Spec.Template.Spec
	uid := fmt.Sprintf("9d3b2c1d-1111-2222-3333-%012x", number)
	// The pod's namespaces are the node's: hostNetwork and hostPID. IPC is not.
	namespaces := &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_NODE, Ipc: runtime.NamespaceMode_POD}
	config := &runtime.PodSandboxConfig{
		Metadata: &runtime.PodSandboxMetadata{Namespace: "demarc", Name: fmt.Sprintf("demarc-%d", number), Uid: uid}, Labels: set.Spec.Template.Labels, LogDirectory: "/tmp",
		Linux: &runtime.LinuxPodSandboxConfig{CgroupParent: "kubepods-burstable-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice",
			SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: namespaces}},
	}
	s, err := k.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config})
	if err != nil {
		k.t.Fatalf("run pod: %v", err)
	}
	d.sandbox = s.PodSandboxId
	for _, c := range spec.Containers {
		request := &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: c.Name}, Image: &runtime.ImageSpec{Image: image}, Command: c.Command, LogPath: fmt.Sprintf("%s-%d.log", c.Name, number),
			Linux: &runtime.LinuxContainerConfig{SecurityContext: securityContext(spec, c, namespaces)},
		}
		for _, e := range c.Env {
			request.Envs = append(request.Envs, &runtime.KeyValue{Key: e.Name, Value: []byte(e.Value)})
		}
		for _, m := range c.VolumeMounts {
			request.Mounts = append(request.Mounts, h.mounted(spec, m, uid, files))
		}
		made, err := k.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: d.sandbox, SandboxConfig: config, Config: request})
		if err != nil {
			k.t.Fatalf("make container %s: %v", c.Name, err)
		}
		d.containers[c.Name] = made.ContainerId
		if _, err := k.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: made.ContainerId}); err != nil {
			k.t.Fatalf("start container %s: %v", c.Name, err)
		}
	}
	return d
}

// securityContext is what a kubelet makes of a container's.
func securityContext(spec kube.PodSpec, c kube.Container, namespaces *runtime.NamespaceOption) *runtime.LinuxContainerSecurityContext {
	s := c.SecurityContext
	out := &runtime.LinuxContainerSecurityContext{
		Privileged: *s.Privileged, ReadonlyRootfs: *s.ReadOnlyRootFilesystem, NoNewPrivs: !*s.AllowPrivilegeEscalation, NamespaceOptions: namespaces,
		RunAsUser: &runtime.Int64Value{Value: *s.RunAsUser}, RunAsGroup: &runtime.Int64Value{Value: *s.RunAsGroup},
		Capabilities: &runtime.Capability{}, SupplementalGroups: spec.SecurityContext.SupplementalGroups,
		Seccomp:  &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined},
		Apparmor: &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}, // there is none on this kernel
		MaskedPaths: []string{"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
			"/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"},
		ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
	}
	for _, a := range s.Capabilities.Add {
		out.Capabilities.AddCapabilities = append(out.Capabilities.AddCapabilities, string(a))
	}
	for _, d := range s.Capabilities.Drop {
		out.Capabilities.DropCapabilities = append(out.Capabilities.DropCapabilities, string(d))
	}
	if s.SeccompProfile.Type == kube.SeccompProfileTypeRuntimeDefault {
		out.Seccomp.ProfileType = runtime.SecurityProfile_RuntimeDefault
	}
	return out
}

// mounted makes a volume where there is none yet, and says how it is mounted.
func (h *host) mounted(spec kube.PodSpec, m kube.VolumeMount, uid string, files volumes) *runtime.Mount {
	h.t.Helper()
	v := spec.Volumes[slices.IndexFunc(spec.Volumes, func(v kube.Volume) bool { return v.Name == m.Name })]
	out := &runtime.Mount{ContainerPath: m.MountPath, Readonly: m.ReadOnly}
	if m.MountPropagation != nil && *m.MountPropagation == kube.MountPropagationHostToContainer {
		out.Propagation = runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
	}
	at := "/var/lib/kubelet/pods/" + uid + "/" + v.Name
	switch {
	case v.HostPath != nil:
		out.HostPath = v.HostPath.Path
		if *v.HostPath.Type == kube.HostPathDirectoryOrCreate {
			h.Run("mkdir", "-p", "-m", "755", out.HostPath)
		}
	case v.EmptyDir != nil:
		out.HostPath = at
		h.Run("sh", "-c", "mkdir -p "+at+" && chmod 777 "+at)
	default:
		// As a kubelet writes them: links to a directory that is replaced as a whole.
		for name, text := range files[v.Name] {
			mode := os.FileMode(0o644)
			if v.Secret != nil && v.Secret.DefaultMode != nil {
				mode = os.FileMode(*v.Secret.DefaultMode)
			}
			h.Write(at+"/..2026_01_01/"+name, text, mode)
		}
		h.Run("sh", "-c", "mkdir -p "+at+"/..2026_01_01 && cd "+at+" && ln -sfn ..2026_01_01 ..data && for f in ..data/*; do [ ! -e $f ] || ln -sf $f .; done")
		out.HostPath = at
		if m.SubPath != "" {
			out.HostPath = filepath.Join(at, "..2026_01_01", m.SubPath)
		}
	}
	return out
}

// exec is kubectl exec.
func (d *daemons) exec(container string, command ...string) (string, error) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	r, err := d.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: d.containers[container], Cmd: command, Timeout: 90})
	if err != nil {
		return "", err
	}
	if r.ExitCode != 0 {
		return "", fmt.Errorf("%v: %d: %s%s", command, r.ExitCode, r.Stdout, r.Stderr)
	}
	return string(r.Stdout), nil
}

// ready waits until the readiness probes would be answered with yes: it is enforced.
func (d *daemons) ready() {
	d.t.Helper()
	d.h.Await("is enforcing", func() error {
		_, err := d.exec("agent", "demarc", "status", "--wait", "enforcing", "--timeout", "5s")
		if err != nil {
			return fmt.Errorf("%w\n%s", err, d.logs())
		}
		// As a kubelet asks: a unit of the host's.
		if out, status := d.h.Try("systemd-run", "--wait", "--pipe", "--quiet", "curl", "-sS", "--fail", "--max-time", "5", "http://127.0.0.1:9477/readyz"); status != 0 {
			return fmt.Errorf("readiness probe: %d %s\n%s", status, out, d.logs())
		}
		return nil
	})
}

func (d *daemons) logs() string {
	status, err := d.exec("agent", "demarc", "status")
	out, _ := d.h.Try("sh", "-c", "tail -n 30 /tmp/*.log")
	return fmt.Sprintf("status: %s %v\n%s", status, err, out)
}

// stop ends the pod as a kubelet does: all containers are asked at once, and have the
// grace period; then everything of it is removed.
func (d *daemons) stop(grace int64) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	ended := make(chan error)
	for _, id := range d.containers {
		go func() {
			_, err := d.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: id, Timeout: grace})
			ended <- err
		}()
	}
	for range d.containers {
		if err := <-ended; err != nil {
			d.t.Errorf("stop container: %v", err)
		}
	}
	for name, id := range d.containers {
		s, err := d.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: id})
		if err != nil || grace > 0 && s.Status.ExitCode != 0 {
			d.t.Errorf("%s ended with %d, %v\n%s", name, s.GetStatus().GetExitCode(), err, d.logs())
		}
	}
	d.kubelet.stop(d.sandbox)
	if _, err := d.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: d.sandbox}); err != nil {
		d.t.Errorf("remove pod: %v", err)
	}
}

// TestImageRolling: the DaemonSet's pods, from its manifests and the image, started and
// stopped by CRI with what a kubelet would ask for, under traffic. A rolling restart and
// an upgrade cut no connection, and let nothing out: also not of a pod that starts while
// no pod of the DaemonSet runs. (I17, G06)
func TestImageRolling(t *testing.T) {
	lab := netlab.New(t)
	h := newHost(t, lab)
	h.installContainerd()
	images := map[string]string{}
	for dir, version := range map[string]string{"old": "0.1.0", "new": "0.2.0"} {
		b, err := os.ReadFile(packageFile(t, dir+"/demarc-"+version+".oci.tar"))
		if err != nil {
			t.Fatal(err)
		}
		h.Write("/root/"+dir+".tar", string(b), 0o644)
		images[dir] = "demarc.dev/demarc:" + version
	}
	// What runs is the image's, and no unit.
	for _, wants := range []string{"sysinit.target.wants/demarc-core.service", "multi-user.target.wants/demarc-agent.service"} {
		if err := os.Remove(h.Path("/etc/systemd/system/" + wants)); err != nil {
			t.Fatal(err)
		}
	}
	h.Boot()
	h.startContainerd()
	for dir := range images {
		h.Run("ctr", "-n", "k8s.io", "images", "import", "--snapshotter", "native", "/root/"+dir+".tar")
	}
	var set apps.DaemonSet
	var config kube.ConfigMap
	for file, into := range map[string]any{"daemonset.yaml": &set, "configmap.yaml": &config} {
		text, err := os.ReadFile("../../deploy/kubernetes/base/" + file)
		if err == nil {
			err = yaml.UnmarshalStrict(text, into)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	h.Write("/root/policy.yaml", fmt.Sprintf(rollingPolicy, h.peer.IP4), 0o644)
	h.Run("demarc", "keys", "generate", "tag", "--out", "/root/keyring")
	h.Run("demarc", "keys", "generate", "signing", "-o", "/root/ops.key")
	h.Run("demarc", "policy", "build", "/root/policy.yaml", "--sign", "/root/ops.key", "-o", "/root/policy.img")
	// What differs from a node: its tree is a part of this machine's.
	core := strings.Replace(config.Data["core.json"], "{", fmt.Sprintf("{\n  \"cgroup_root\": %q,", h.tree()), 1)
	files := volumes{
		"core-config": {"core.json": core}, "agent-config": {"agent.yaml": config.Data["agent.yaml"]},
		"trust": {"ops.key.pub": h.written("/root/ops.key.pub")}, "keyring": {"keyring": h.written("/root/keyring")}, "policy": {"policy.img": h.written("/root/policy.img")},
	}
	k := newKubelet(h)
	pod := k.daemons(h, &set, images["old"], files, 1)
	h.Await("takes a policy", func() error {
		_, err := pod.exec("agent", "demarc", "apply", "/etc/demarc/policy/policy.img", "--now")
		if err != nil {
			return fmt.Errorf("%w\n%s", err, pod.logs())
		}
		return nil
	})
	pod.ready()
	wire := h.Wire()
	goesOn := h.talker()
	k.pod("shop", "api-1", "main", map[string]string{"app": "api"})
	goesOn("at first")
	expect := func(when string, want ...uint16) {
		t.Helper()
		h.Await(fmt.Sprintf("has reached %v %s", want, when), func() error {
			if got := reached(wire, h.peer); !slices.Equal(got, want) {
				return fmt.Errorf("%v is on the wire\n%s", got, pod.logs())
			}
			return nil
		})
		wire.Forget()
	}
	expect("at first", 7001, 7003)
	for i, step := range []struct {
		how, image string
		grace      int64
	}{
		{"a rolling restart", "old", 30}, {"an upgrade", "new", 30}, {"pods that were killed", "new", 0}, {"a downgrade", "old", 30},
	} {
		began := time.Now()
		pod.stop(step.grace)
		goesOn("while no pod of the DaemonSet runs, before " + step.how)
		expect("while no pod of the DaemonSet runs, before "+step.how, 7001, 7003)
		// Somebody new, whom nobody can name now.
		sandbox, _ := k.pod("shop", fmt.Sprintf("api-2%d", i), "main", map[string]string{"app": "api"})
		goesOn("while a new pod waits")
		pod = k.daemons(h, &set, images[step.image], files, i+2)
		pod.ready()
		t.Logf("%s: %v from the stop until it is enforcing again", step.how, time.Since(began).Round(100*time.Millisecond))
		goesOn("after " + step.how)
		expect("after "+step.how, 7001, 7003)
		k.stop(sandbox)
	}
	if out, err := pod.exec("agent", "demarc", "version"); err != nil || !strings.Contains(out, "0.1.0") {
		t.Errorf("version: %s, %v", out, err)
	}
	pod.stop(30)
	h.Run("demarc-core", "detach", "--yes")
}
