package docs_test

import (
	"fmt"
	"path"
	"strings"
	"testing"
)

// docs/tcb.md counts what agent/core/TCB.golden counts.
func TestTrustedLines(t *testing.T) {
	lines := map[[2]string]int{}
	for line := range strings.Lines(read(t, "../../agent/core/TCB.golden")) {
		var name, kind string
		var n int
		if _, err := fmt.Sscanf(line, "%s %d %s", &name, &n, &kind); err == nil && name != "total" {
			lines[[2]string{path.Dir(name), kind}] += n
			lines[[2]string{"total", kind}] += n
		}
	}
	doc := read(t, "../../docs/tcb.md")
	for key, n := range lines {
		want := fmt.Sprintf("| `%s` | %d %s | ", key[0], n, key[1])
		if key[0] == "total" {
			want = fmt.Sprintf("| total | %d Go, %d C | |", lines[[2]string{"total", "Go"}], lines[[2]string{"total", "C"}])
		}
		if !strings.Contains(doc, want) {
			t.Errorf("docs/tcb.md lacks %q", want)
		}
	}
	if len(lines) < 10 {
		t.Errorf("only %d rows are counted", len(lines))
	}
}
