//go:build kernels

// Package vm_test runs demarc on other kernels than the machine's own: each in a
// virtual machine without hardware support, so that it works wherever tests do.
// `make test-kernels` fetches the kernels and runs it.
package vm_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/demarc/demarc/test/netlab"
)

// Who runs the tests says where the kernels are (test/vm/fetch) and which to try.
const (
	directoryVariable = "DEMARC_KERNELS"
	seriesVariable    = "DEMARC_KERNEL_SERIES"
)

func TestMain(m *testing.M) { netlab.Main(m) }

// series are the kernels to try.
func series(t *testing.T) []string {
	t.Helper()
	all := strings.Fields(os.Getenv(seriesVariable))
	if len(all) == 0 {
		t.Fatalf("%s names no kernel: run make test-kernels", seriesVariable)
	}
	return all
}

// kernel is a directory that test/vm/fetch made.
func kernel(t *testing.T, series string) string {
	t.Helper()
	dir := filepath.Join(os.Getenv(directoryVariable), series)
	if _, err := os.Stat(filepath.Join(dir, "made")); err != nil {
		t.Fatalf("kernel %s was not fetched: %v", series, err)
	}
	return dir
}

// rootTests are the trusted core's own tests, which want root, as one program.
const rootTests = "core.test"

// build makes what a machine runs, in a directory that ends with the test. It runs
// without a C library, which the machine does not have.
func build(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	args := []string{"build", "-trimpath", "-ldflags", "-s -w", "-o", dir + "/"}
	for _, p := range []string{"cmd/demarc", "cmd/demarc-core", "cmd/demarc-agent", "test/vm/init", "test/vm/node"} {
		args = append(args, "github.com/demarc/demarc/"+p)
	}
	for _, args := range [][]string{args, {"test", "-c", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(dir, rootTests), "github.com/demarc/demarc/agent/core"}} {
		c := exec.Command("go", args...)
		c.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("build programs: %v\n%s", err, out)
		}
	}
	return dir
}
