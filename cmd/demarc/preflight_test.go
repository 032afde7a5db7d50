package main

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// docs/operate.md says of each check what preflight says.
func TestPreflightMeanings(t *testing.T) {
	text, err := os.ReadFile("../../docs/operate.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "| check | tried | without it |\n|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	documented := map[string]string{}
	for line := range strings.Lines(table) {
		cells := strings.Split(line, " | ")
		if len(cells) != 3 {
			t.Fatalf("not a row of three: %q", line)
		}
		name := strings.Trim(cells[0], "| `")
		documented[name] = strings.TrimPrefix(strings.Trim(cells[2], "| \n"), "limit: ")
	}
	if diff := cmp.Diff(documented, meanings); diff != "" {
		t.Errorf("(-docs/operate.md +preflight):\n%s", diff)
	}
}
