package agent

import (
	"os"
	"path/filepath"
	"testing"
)

// A process with a cgroup namespace of its own is told the way to other cgroups, not
// where they are.
func TestCgroupsRelative(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"kubepods.slice/pod1.slice/cri-1.scope", "kubepods.slice/pod2.slice/cri-2.scope", "kubepods.slice/pod2.slice/cri-3.scope/init", "other.slice/init"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	type result struct {
		path  string
		found bool
	}
	for _, tt := range []struct {
		name, below, cgroup string
		want                result
	}{
		{"OK another pod", "", "/../../pod2.slice/cri-2.scope", result{"/kubepods.slice/pod2.slice/cri-2.scope", true}},
		{"OK the same pod", "", "/../cri-1.scope", result{"/kubepods.slice/pod1.slice/cri-1.scope", true}},
		{"OK from the top", "", "/../../../kubepods.slice/pod2.slice/cri-2.scope", result{"/kubepods.slice/pod2.slice/cri-2.scope", true}},
		{"OK the managed root is deeper", "/lab", "/../../lab/kubepods.slice/pod1.slice/cri-1.scope", result{"/kubepods.slice/pod1.slice/cri-1.scope", true}},
		{"bad two that end so", "", "/../init", result{"", false}},
		{"bad half a name", "", "/../2.scope", result{"", false}},
		{"bad not there", "", "/../cri-4.scope", result{"", false}},
		{"bad only up", "", "/../..", result{"", false}},
		{"bad above the managed root", "/lab", "/../../elsewhere/kubepods.slice/pod1.slice/cri-1.scope", result{"", false}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var c cgroups
			path, found := c.Relative(root, tt.below, tt.cgroup)
			if got := (result{path, found}); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}
