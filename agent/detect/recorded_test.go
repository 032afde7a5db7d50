package detect

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write what is found in testdata into its .want files")

// What was recorded of real tools in the lab (DEMARC_RECORD, test/lateral) is found
// again, whole: nothing more, nothing less, each with its process where there is one.
func TestRecordings(t *testing.T) {
	files, err := filepath.Glob("testdata/*.jsonl")
	if err != nil || len(files) < 4 {
		t.Fatalf("recordings: %q, %v", files, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			r, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			g, s := NewEngine(nil), NewFindings()
			for e, err := range Replay(r) {
				if err != nil {
					t.Fatal(err)
				}
				for _, f := range g.See(e) {
					s.Add(f)
				}
			}
			all, _ := s.After(0)
			var got strings.Builder
			for _, f := range all {
				by := "-"
				if f.Process != nil {
					by = f.Process.Comm
				}
				fmt.Fprintf(&got, "%s %s %s %s x%d by %s: %s\n", f.Technique.ID, f.Detector, f.Severity, f.Subject.Label(), f.Count, by, f.Title)
			}
			want := strings.TrimSuffix(file, ".jsonl") + ".want"
			if *update {
				if err := os.WriteFile(want, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			text, err := os.ReadFile(want)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(text), got.String()); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}
