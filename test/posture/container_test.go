package posture_test

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	apps "k8s.io/api/apps/v1"
	"sigs.k8s.io/yaml"

	"github.com/demarc/demarc/test/netlab"
)

// The DaemonSet's core starts in a cgroup namespace of its own, and gets out of it with
// the capabilities that its container has, and not without one of them.
func TestContainerCgroups(t *testing.T) {
	text, err := os.ReadFile("../../deploy/kubernetes/base/daemonset.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var set apps.DaemonSet
	if err := yaml.UnmarshalStrict(text, &set); err != nil {
		t.Fatal(err)
	}
	core := set.Spec.Template.Spec.Containers[0]
	if want := []string{"/usr/bin/demarc", "enter-host-cgroups", "/usr/bin/demarc-core", "run"}; !slices.Equal(core.Command[:4], want) {
		t.Fatalf("the core is started by %v, want %v", core.Command, want)
	}
	demarc := netlab.New(t).Program("demarc")
	initial, err := os.Readlink("/proc/self/ns/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for _, without := range []string{"", "SYS_PTRACE", "SYS_ADMIN"} {
		bounding := "-all"
		for _, c := range core.SecurityContext.Capabilities.Add {
			if string(c) != without {
				bounding += ",+" + strings.ToLower(string(c))
			}
		}
		// Process 1 is a shell that has all capabilities.
		const script = `unshare --cgroup setpriv --inh-caps -all --bounding-set "$1" "$2" enter-host-cgroups /usr/bin/readlink /proc/self/ns/cgroup; exit $?`
		out, err := exec.Command("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, "sh", bounding, demarc).CombinedOutput()
		got := strings.TrimSpace(string(out))
		if without == "" && (err != nil || got != initial) {
			t.Errorf("it is in %s (%v), want %s", got, err, initial)
		}
		if without != "" && (err == nil || !strings.Contains(got, "grant CAP_"+without)) {
			t.Errorf("without %s: %v, %s", without, err, got)
		}
	}
}
