package systemd_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/demarc/demarc/test/netlab"
)

// A pod of the namespace shop may reach one port, a container called tool another one,
// and whoever nobody selects a third.
const containersPolicy = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: containers, version: 1}
trustDomain: containers.example
zones: {outside: {trust: 0}, app: {trust: 10}}
networks: {peer: {zone: outside, cidrs: [%s/32]}}
workloads:
  api:  {zone: app, match: [{kubernetes: {namespace: shop, podLabels: {app: api}}}]}
  tool: {zone: app, match: [{container: {name: tool}}]}
crossings:
  - {name: api,    from: [workload/api],  to: [network/peer], ports: [tcp/7001]}
  - {name: tool,   from: [workload/tool], to: [network/peer], ports: [tcp/7002]}
  - {name: others, from: [unmanaged],     to: [network/peer], ports: [tcp/7009]}
unmanaged: {zone: app, outbound: deny, inbound: allow}
`

// containerdConfig has the distribution's containerd keep everything in memory. Its runc
// is told to leave shares of the CPU alone: where cgroup2 has no cpu controller, as on
// machines with both versions, they cannot be set.
const containerdConfig = `version = 2
root = "/run/test-containerd"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "demarc.dev/busybox:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = true
        BinaryName = "/usr/local/bin/runc-without-cpu"
`

const runcWithoutCPU = `#!/bin/sh
bundle=
take=
for a in "$@"; do
	[ -z "$take" ] || { bundle=$a; take=; }
	[ "$a" != --bundle ] || take=1
done
[ -z "$bundle" ] || sed -i -e 's/"cpu":{[^}]*},//' -e 's/,"cpu":{[^}]*}//' -e 's/"cpu":{[^}]*}//' "$bundle/config.json"
exec /usr/sbin/runc "$@"
`

// dialing tries the peer's ports over and over, from the container's first moment.
const dialing = `while true; do for p in 7001 7002 7003 7009; do echo hello | nc -w 2 %s $p >/dev/null 2>&1; done; sleep 0.05; done`

// busyboxImage is an image with one program, in the form of docker save.
func busyboxImage(t *testing.T) []byte {
	t.Helper()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	pack := func(files map[string][]byte, order ...string) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, name := range order {
			h := &tar.Header{Name: name, Mode: 0o755, Size: int64(len(files[name])), Typeflag: tar.TypeReg}
			if strings.HasSuffix(name, "/") {
				h = &tar.Header{Name: name, Mode: 0o755, Typeflag: tar.TypeDir}
			}
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(files[name]); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	layer := pack(map[string][]byte{"bin/sh": busybox, "bin/nc": busybox, "bin/sleep": busybox, "pause": []byte("#!/bin/sh\nexec sleep 100000\n")},
		"bin/", "bin/sh", "bin/nc", "bin/sleep", "pause", "tmp/")
	sum := sha256.Sum256(layer)
	config := fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","config":{"Entrypoint":["/pause"],"Env":["PATH=/bin"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}`, hex.EncodeToString(sum[:]))
	manifest, err := json.Marshal([]map[string]any{{"Config": "config.json", "RepoTags": []string{"demarc.dev/busybox:1"}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		t.Fatal(err)
	}
	return pack(map[string][]byte{"config.json": config, "layer.tar": layer, "manifest.json": manifest}, "config.json", "layer.tar", "manifest.json")
}

// installContainerd configures the distribution's containerd, and gives it an image.
func (h *host) installContainerd() {
	h.t.Helper()
	h.Write("/etc/containerd/config.toml", containerdConfig, 0o644)
	h.Write("/usr/local/bin/runc-without-cpu", runcWithoutCPU, 0o755)
	h.Write("/root/busybox.tar", string(busyboxImage(h.t)), 0o644)
}

func (h *host) startContainerd() {
	h.t.Helper()
	h.Run("systemctl", "start", "containerd")
	h.Run("ctr", "-n", "k8s.io", "images", "import", "/root/busybox.tar")
}

// kubelet does what a kubelet would: it makes pods, by CRI.
type kubelet struct {
	t *testing.T
	runtime.RuntimeServiceClient
	peer string
}

func newKubelet(h *host) *kubelet {
	h.t.Helper()
	conn, err := grpc.NewClient("unix://"+h.Path("/run/containerd/containerd.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	return &kubelet{h.t, runtime.NewRuntimeServiceClient(conn), h.peer.IP4.String()}
}

// pod starts a pod with one container, in the node's own network.
func (k *kubelet) pod(namespace, name, container string, labels map[string]string) (sandbox string, started time.Time) {
	k.t.Helper()
	sandbox, _, started = k.start(&runtime.PodSandboxConfig{
		Metadata: &runtime.PodSandboxMetadata{Namespace: namespace, Name: name, Uid: "0f3b2c1d-1111-2222-3333-" + fmt.Sprintf("%012x", len(name))},
		Labels:   labels, Linux: &runtime.LinuxPodSandboxConfig{CgroupParent: "kubepods-besteffort.slice"},
	}, container, fmt.Sprintf(dialing, k.peer))
	return sandbox, started
}

// start starts a pod with one container that runs a script, in the node's own network.
func (k *kubelet) start(config *runtime.PodSandboxConfig, name, script string) (sandbox, container string, started time.Time) {
	k.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	node := &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_CONTAINER}
	config.LogDirectory = "/tmp"
	config.Linux.SecurityContext = &runtime.LinuxSandboxSecurityContext{NamespaceOptions: node}
	s, err := k.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config})
	if err != nil {
		k.t.Fatalf("run pod %s: %v", config.Metadata.Name, err)
	}
	c, err := k.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: s.PodSandboxId, SandboxConfig: config, Config: &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: name}, Image: &runtime.ImageSpec{Image: "demarc.dev/busybox:1"},
		Command: []string{"/bin/sh", "-c", script}, LogPath: name + ".log",
		Linux: &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{NamespaceOptions: node}},
	}})
	if err != nil {
		k.t.Fatalf("make container %s: %v", name, err)
	}
	started = time.Now()
	if _, err := k.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		k.t.Fatalf("start container %s: %v", name, err)
	}
	return s.PodSandboxId, c.ContainerId, started
}

// stop ends a pod.
func (k *kubelet) stop(sandbox string) {
	k.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if _, err := k.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: sandbox}); err != nil {
		k.t.Errorf("stop pod: %v", err)
	}
}

// bound is when the agent last gave a cgroup its identity.
func (h *host) bound() time.Time {
	h.t.Helper()
	lines := regexp.MustCompile(`(?m)^(\S+)\tinfo\tbind\t`).FindAllStringSubmatch(h.Journal("demarc-agent"), -1)
	if lines == nil {
		h.t.Fatalf("the agent bound nothing:\n%s", h.Journal("demarc-agent"))
	}
	at, err := time.Parse(time.RFC3339Nano, lines[len(lines)-1][1])
	if err != nil {
		h.t.Fatal(err)
	}
	return at
}

// Containers that really run get their identity from the runtime: until then nothing
// of them is on the wire, then exactly what their crossings declare. (C13, C17)
func TestContainers(t *testing.T) {
	lab := netlab.New(t)
	h := newHost(t, lab)
	h.installContainerd()
	h.Write("/etc/demarc/agent.yaml", "metrics: {listen: \"127.0.0.1:9477\"}\nidentity: {providers: [cri]}\n", 0o644)
	// The runtime's socket is root's: the agent gets it by its group.
	h.Write("/etc/systemd/system/demarc-agent.service.d/runtime.conf", "[Service]\nSupplementaryGroups=root\n", 0o644)
	h.Boot()
	h.startContainerd()
	h.apply(fmt.Sprintf(containersPolicy, h.peer.IP4))
	wire := h.Wire()
	k := newKubelet(h)

	for _, tt := range []struct {
		namespace, name, container string
		labels                     map[string]string
		port                       uint16
	}{
		{"shop", "api-1", "main", map[string]string{"app": "api"}, 7001},
		{"other", "api-2x", "main", map[string]string{"app": "api"}, 7009},
		{"other", "tools-3xx", "tool", nil, 7002},
	} {
		wire.Forget()
		sandbox, started := k.pod(tt.namespace, tt.name, tt.container, tt.labels)
		var named time.Duration
		h.Await(fmt.Sprintf("%s/%s reaches %d", tt.namespace, tt.name, tt.port), func() error {
			if got := reached(wire, h.peer); len(got) == 0 {
				flows, _ := h.Try("demarc", "flows", "--last", "5")
				return fmt.Errorf("nothing is on the wire; flows:\n%s\nagent:\n%s", flows, h.Journal("demarc-agent"))
			}
			named = time.Since(started)
			return nil
		})
		time.Sleep(time.Second) // more of what it may and may not
		if got := fmt.Sprint(reached(wire, h.peer)); got != fmt.Sprintf("[%d]", tt.port) {
			t.Errorf("%s/%s, container %s, reached %s, want only %d", tt.namespace, tt.name, tt.container, got, tt.port)
		}
		t.Logf("%s/%s: its container had its identity %v after it was started, and its first packet left %v after that start",
			tt.namespace, tt.name, h.bound().Sub(started).Round(time.Millisecond), named.Round(time.Millisecond))
		k.stop(sandbox)
	}

	// The runtime stands still. Who runs keeps its name and loses nothing, and that the
	// runtime does not answer is told. As it goes on, so do names. (X12)
	sandbox, _ := k.pod("shop", "api-4xxx", "main", map[string]string{"app": "api"})
	goesOn := func(when string) {
		t.Helper()
		wire.Forget()
		h.Await("reaches something "+when, func() error {
			if len(reached(wire, h.peer)) == 0 {
				return errors.New("nothing is on the wire")
			}
			return nil
		})
		time.Sleep(time.Second) // more of what it may and may not
		if got := fmt.Sprint(reached(wire, h.peer)); got != "[7001]" {
			t.Errorf("%s: reached %s, want only 7001", when, got)
		}
	}
	problems := func(want string) {
		t.Helper()
		h.Await("tells of "+want, func() error {
			metrics := h.Run("bash", "-c", `exec 3<>/dev/tcp/127.0.0.1/9477; printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3; cat <&3`)
			if !strings.Contains(metrics, "\ndemarc_inventory_problems "+want+"\n") {
				status, _ := h.Try("demarc", "status")
				return fmt.Errorf("status:\n%s", status)
			}
			return nil
		})
	}
	goesOn("before")
	problems("0")
	h.Run("systemctl", "kill", "-s", "STOP", "--kill-whom=main", "containerd")
	problems("1")
	if out, _ := h.Try("demarc", "status"); !strings.Contains(out, "list pods: ") {
		t.Errorf("while the runtime stands still:\n%s", out)
	}
	goesOn("while the runtime stands still")
	h.Run("systemctl", "kill", "-s", "CONT", "--kill-whom=main", "containerd")
	start := time.Now()
	problems("0")
	t.Logf("%s after the runtime went on, it was followed again", time.Since(start).Round(time.Millisecond))
	goesOn("afterwards")
	k.stop(sandbox)
	wire.Forget()
	sandbox, _ = k.pod("other", "tools-5xxxx", "tool", nil)
	h.Await("names the next one", func() error {
		if got := fmt.Sprint(reached(wire, h.peer)); got != "[7002]" {
			return fmt.Errorf("ports on the wire: %s", got)
		}
		return nil
	})
	k.stop(sandbox)
}
