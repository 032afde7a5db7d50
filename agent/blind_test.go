package agent

import (
	"os"
	"regexp"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Somebody says what each program is for.
func TestObserved(t *testing.T) {
	source, err := os.ReadFile("../bpf/signal.bpf.c")
	if err != nil {
		t.Fatal(err)
	}
	programs := regexp.MustCompile(`(?m)^SEC\("[^"]+/[^"]+"\)\nint (?:BPF_PROG\()?(\w+)`).FindAllSubmatch(source, -1)
	for _, p := range programs {
		if observed[string(p[1])] == "" {
			t.Errorf("nobody says what %s is for", p[1])
		}
	}
	if len(programs) != len(observed) {
		t.Errorf("%d programs, and words for %d", len(programs), len(observed))
	}
}

func TestBlindness(t *testing.T) {
	got := blindness([]string{"moved: load: not supported: by this kernel", "switched: load: not permitted (MEMLOCK may be too low, consider this)", "what tasks did for at most 5s until then", "else: why"})
	want := append(slices.Clone(neverSeen), "moves between cgroups: load: not supported: by this kernel", observed["switched"]+": load: not permitted", "what tasks did for at most 5s until then", "else: why")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
