//go:build packages

package systemd_test

import (
	"bytes"
	"os"
	"strings"
	"testing"

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
	if out, status := run(privileged, "preflight", "/usr/bin/demarc-core", "preflight"); status != 0 || !strings.Contains(out, "ok    self-test") {
		t.Errorf("preflight: %d\n%s", status, out)
	}
	// Without them it refuses, and names what it lacks.
	if out, status := run(nil, "unprivileged", "/usr/bin/demarc-core", "preflight"); status != 1 || !strings.Contains(out, "enforcement would be refused") {
		t.Errorf("preflight without privileges: %d\n%s", status, out)
	}
}
