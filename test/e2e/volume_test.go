package e2e_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/policy"
)

// Policies in a volume of a kubelet's are links, which are followed where nobody can
// turn them, and no further than the volume.
func TestPolicyFromVolume(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=777"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	if err := os.Mkdir(filepath.Join(dir, "..2026"), 0o755); err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(t.TempDir(), "policy.img")
	for file, mode := range map[string]os.FileMode{filepath.Join(dir, "..2026/policy.img"): 0o644, filepath.Join(dir, "..2026/open.img"): 0o666, outside: 0o644} {
		if err := os.WriteFile(file, []byte("policy"), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"..data": "..2026", "policy.img": "..data/policy.img", "open.img": "..data/open.img", "away.img": outside, "magic.img": "/proc/self/exe"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	check := func(name, file, want string) {
		t.Helper()
		b, err := policy.ReadFile(filepath.Join(dir, file))
		if want == "" && (err != nil || string(b) != "policy") || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %q, %v, want %q", name, b, err, want)
		}
	}
	const link = "a symbolic link is in the path"
	check("bad link that can be turned", "policy.img", link)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	check("OK volume", "policy.img", "")
	check("bad file that everyone may write", "open.img", "writable by everyone")
	check("bad way out", "away.img", link)
	check("bad magic link", "magic.img", link)
	check("bad link to the volume's directory on the way", "..data/policy.img", link)
}
