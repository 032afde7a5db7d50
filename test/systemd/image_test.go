//go:build packages

package systemd_test

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"

	apps "k8s.io/api/apps/v1"
	kube "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/demarc/demarc/test/netlab"
)

// TestImage has containerd and runc run the container image: as it is, and as the
// DaemonSet would, with the host's cgroups and BPF file system.
func TestImage(t *testing.T) {
	const file = "new/demarc-0.2.0.oci.tar"
	first, err := os.ReadFile(packageFile(t, file))
	if err != nil {
		t.Fatal(err)
	}
	second, err := os.ReadFile(packageFile(t, strings.Replace(file, "new/", "again/", 1)))
	if err != nil || !bytes.Equal(first, second) {
		t.Errorf("two builds differ: %v", err)
	}
	lab := netlab.New(t)
	h := newHost(t, lab)
	h.Write("/root/demarc.tar", string(first), 0o644)
	h.Boot()
	h.Run("systemctl", "start", "containerd")
	// Both architectures; the snapshotter, because the machine's root is an overlay itself.
	out := h.Run("ctr", "images", "import", "--all-platforms", "--snapshotter", "native", "/root/demarc.tar")
	if !strings.Contains(out, "demarc.dev/demarc:0.2.0") {
		t.Fatalf("import: %s", out)
	}
	if out := h.Run("ctr", "images", "ls"); !strings.Contains(out, "linux/amd64") || !strings.Contains(out, "linux/arm64") {
		t.Errorf("images: %s", out)
	}
	// What is in the programs is in the image, too.
	h.Run("ctr", "images", "mount", "--snapshotter", "native", "demarc.dev/demarc:0.2.0", "/mnt")
	for _, program := range []string{"demarc", "demarc-agent", "demarc-core"} {
		listed(t, h.Path("/mnt/usr/bin/"+program), h.Path("/mnt/usr/share/demarc/sbom/"+program+".cdx.json"))
	}
	h.Run("ctr", "images", "unmount", "--rm", "--snapshotter", "native", "/mnt")
	run := func(options []string, id string, args ...string) (string, int) {
		t.Helper()
		all := append([]string{"run", "--rm", "--snapshotter", "native", "--cpu-shares", "0", "--runc-systemd-cgroup", "--cgroup", "system.slice:demarc:" + id}, options...)
		all = append(append(all, "demarc.dev/demarc:0.2.0", id), args...)
		return h.Try("ctr", all...)
	}
	if out, status := run(nil, "version", "/usr/bin/demarc", "version"); status != 0 || !strings.Contains(out, "0.2.0") {
		t.Errorf("version: %d, %s", status, out)
	}
	privileged := []string{"--privileged", "--net-host", "--read-only",
		"--mount", "type=bind,src=/sys/fs/bpf,dst=/sys/fs/bpf,options=rbind:rw", "--mount", "type=bind,src=/sys/fs/cgroup,dst=/sys/fs/cgroup,options=rbind:rw",
		"--mount", "type=bind,src=/etc/demarc,dst=/etc/demarc,options=rbind:ro", "--mount", "type=tmpfs,src=tmpfs,dst=/var/lib/demarc,options=mode=0700"}
	if out, status := run(privileged, "preflight", "/usr/bin/demarc-core", "preflight"); status != 0 || !strings.Contains(out, `"name": "self-test"`) {
		t.Errorf("preflight: %d\n%s", status, out)
	}
	// And with what the DaemonSet's container has: its capabilities and no others, the
	// runtime's list of calls, and a cgroup namespace of its own, that it has to get out of.
	text, err := os.ReadFile("../../deploy/kubernetes/base/daemonset.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var set apps.DaemonSet
	if err := yaml.UnmarshalStrict(text, &set); err != nil {
		t.Fatal(err)
	}
	core := set.Spec.Template.Spec.Containers[0]
	h.Run("systemd-run", "--unit", "elsewhere", "--property", "Type=exec", "unshare", "--cgroup", "sh", "-c", "touch /run/elsewhere; exec sleep infinity")
	h.Run("sh", "-c", "until [ -e /run/elsewhere ]; do sleep 0.1; done")
	pid := strings.TrimSpace(h.Run("systemctl", "show", "--property", "MainPID", "--value", "elsewhere"))
	contained := slices.Concat(privileged[1:], []string{"--seccomp", "--with-ns", "pid:/proc/1/ns/pid", "--with-ns", "cgroup:/proc/" + pid + "/ns/cgroup"})
	for _, c := range strings.Fields("CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE") {
		if !slices.Contains(core.SecurityContext.Capabilities.Add, kube.Capability(c)) {
			contained = append(contained, "--cap-drop", "CAP_"+c) // of the runtime's default
		}
	}
	for _, c := range core.SecurityContext.Capabilities.Add {
		contained = append(contained, "--cap-add", "CAP_"+string(c))
	}
	if out, status := run(contained, "shut-in", "/usr/bin/demarc-core", "preflight"); status != 1 || !strings.Contains(out, "run in the host's cgroup namespace") {
		t.Errorf("preflight in a cgroup namespace: %d\n%s", status, out)
	}
	if out, status := run(contained, "entering", append(slices.Clone(core.Command[:3]), "preflight")...); status != 0 || !strings.Contains(out, `"name": "self-test"`) {
		t.Errorf("preflight as in the DaemonSet: %d\n%s", status, out)
	}
	h.Run("systemctl", "stop", "elsewhere")
	// Without them it refuses, and names what it lacks.
	if out, status := run(nil, "unprivileged", "/usr/bin/demarc-core", "preflight"); status != 1 || !strings.Contains(out, "enforcement would be refused") {
		t.Errorf("preflight without privileges: %d\n%s", status, out)
	}
}
