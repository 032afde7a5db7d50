package docs_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/demarc/demarc/agent/core"
)

// docs/operate.md lists the checks of preflight, in their order, and what they try.
func TestPreflightChecklist(t *testing.T) {
	dir := t.TempDir()
	var rows []string
	for _, c := range core.Preflight(core.Config{
		BPFFS: filepath.Join(dir, "bpf"), StateDir: filepath.Join(dir, "state"), Keyring: filepath.Join(dir, "keyring"), CgroupRoot: filepath.Join(dir, "none"),
	}) {
		rows = append(rows, fmt.Sprintf("| `%s` | %s | ", c.Name, c.Tried))
	}
	_, table, _ := strings.Cut(read(t, "../../docs/operate.md"), "| check | tried | without it |\n|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	lines := strings.Split(table, "\n")
	if len(lines) != len(rows) {
		t.Errorf("%d checks are documented, there are %d", len(lines), len(rows))
	}
	for i, row := range rows[:min(len(rows), len(lines))] {
		if !strings.HasPrefix(lines[i], row) {
			t.Errorf("row %d is %q, want it to begin with %q", i+1, lines[i], row)
		}
	}
}
