package core

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write TCB.golden instead of comparing with it")

// trusted are the directories of the trusted core.
var trusted = []string{
	"cmd/demarc-core", "agent/core", "agent/core/audit", "agent/core/calls", "agent/core/keyring", "agent/core/proto", "agent/core/trust", "internal/strict", "policy/envelope",
	"policy/image", "policy/image/layout", "bpf", "bpf/abi", "bpf/include",
}

// reasons says why the trusted core imports what is neither its own nor the
// standard library. An import without one fails the test.
var reasons = map[string]string{
	"github.com/cilium/ebpf":    "loads, pins and attaches programs; reads and writes maps",
	"golang.org/x/sys/unix":     "system calls that the standard library has not",
	"golang.org/x/sys/internal": "part of x/sys",
}

// TestTCB counts what has to be trusted, and compares it with what was agreed.
// Lines are of code: blank ones and comments do not count. Tests and generated
// files are left out.
func TestTCB(t *testing.T) {
	var report bytes.Buffer
	total := map[string]int{}
	for _, dir := range trusted {
		files, err := os.ReadDir(filepath.Join("../..", dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			kind := language(f.Name())
			if f.IsDir() || kind == "" {
				continue
			}
			n := codeLines(t, filepath.Join("../..", dir, f.Name()))
			total[kind] += n
			fmt.Fprintf(&report, "%-36s %5d %s\n", filepath.Join(dir, f.Name()), n, kind)
		}
	}
	fmt.Fprintf(&report, "%-36s %5d Go\n%-36s %5d C\n", "total", total["Go"], "total", total["C"])
	for _, line := range imports(t) {
		fmt.Fprintln(&report, line)
	}
	t.Logf("lines of code and imports of the trusted core:\n%s", report.String())
	if *update {
		if err := os.WriteFile("TCB.golden", report.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile("TCB.golden")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(golden), report.String()); diff != "" {
		t.Errorf("the trusted core changed; if that is meant, go test ./agent/core -run TestTCB -update, and say why in the commit:\n%s", diff)
	}
}

func language(file string) string {
	switch {
	case strings.HasSuffix(file, "_test.go"), strings.HasSuffix(file, "_bpfel.go"):
		return ""
	case strings.HasSuffix(file, ".go"):
		return "Go"
	case strings.HasSuffix(file, ".c"), strings.HasSuffix(file, ".h"):
		return "C"
	}
	return ""
}

func codeLines(t *testing.T, file string) (n int) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	comment := false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := strings.TrimSpace(lines.Text())
		switch {
		case comment:
			comment = !strings.Contains(line, "*/")
		case line == "", strings.HasPrefix(line, "//"):
		case strings.HasPrefix(line, "/*"):
			comment = !strings.Contains(line, "*/")
		default:
			n++
		}
	}
	return n
}

// imports lists the packages that the core is made of, outside the standard
// library, each with its reason.
func imports(t *testing.T) (lines []string) {
	t.Helper()
	c := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", "github.com/demarc/demarc/cmd/demarc-core")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := c.Output()
	if err != nil {
		t.Fatalf("list imports: %v", err)
	}
	for path := range strings.Lines(string(out)) {
		path = strings.TrimSpace(path)
		own, isOwn := strings.CutPrefix(path, "github.com/demarc/demarc/")
		if path == "" {
			continue
		}
		if isOwn {
			if !slices.Contains(trusted, own) {
				t.Errorf("the trusted core imports %s, which is not part of it", path)
			}
			continue
		}
		why := ""
		for prefix, reason := range reasons {
			if path == prefix || strings.HasPrefix(path, prefix+"/") {
				why = reason
			}
		}
		if why == "" {
			t.Errorf("the trusted core imports %s for no stated reason", path)
		}
		lines = append(lines, fmt.Sprintf("import %s: %s", path, why))
	}
	slices.Sort(lines)
	return lines
}
