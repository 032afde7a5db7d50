//go:build kernels

package vm_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var record = flag.Bool("record", false, "write down how far each verifier walks, instead of comparing")

// growth is how much further than what was written down a verifier may walk.
const growth = 1.05

// inMachine are tests of the trusted core that an emulated machine is fast enough for:
// they load every program there is.
var inMachine = []string{"TestX23VerifierComplexity", "TestObserversLoad"}

// rooted runs them. What the verifier walks through is compared with what was
// written down for this kernel. (X23)
func (m *machine) rooted() {
	m.t.Helper()
	for _, name := range inMachine {
		out, passed := m.test(name)
		if !passed {
			m.t.Errorf("%s did not pass:\n%s", name, out)
		}
		if name == "TestX23VerifierComplexity" {
			compareWalks(m.t, m.series, walks(out))
		}
	}
}

// walks reads the number of instructions that the verifier went through, by program.
func walks(out string) map[string]int {
	all := map[string]int{}
	for line := range strings.Lines(out) {
		_, rest, found := strings.Cut(line, "load_test.go:")
		if fields := strings.Fields(rest); found && len(fields) == 3 {
			if n, err := strconv.Atoi(fields[2]); err == nil {
				all[fields[1]] = n
			}
		}
	}
	return all
}

func compareWalks(t *testing.T, series string, got map[string]int) {
	t.Helper()
	file := filepath.Join("testdata", "verified-"+series)
	if len(got) == 0 {
		t.Fatal("the verifier's walks were not told")
	}
	if *record {
		var b strings.Builder
		for _, name := range sorted(got) {
			fmt.Fprintf(&b, "%-16s %6d\n", name, got[name])
		}
		check(t, os.WriteFile(file, []byte(b.String()), 0o644), "write down")
		return
	}
	text, err := os.ReadFile(file)
	check(t, err, "read what was written down (-record writes it)")
	known := map[string]int{}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) == 2 {
			known[fields[0]], err = strconv.Atoi(fields[1])
			check(t, err, file)
		}
	}
	for _, name := range sorted(got) {
		switch before, ok := known[name]; {
		case !ok:
			t.Errorf("%s: %d instructions, and nothing is written down: -record does", name, got[name])
		case float64(got[name]) > growth*float64(before):
			t.Errorf("%s: the verifier walks through %d instructions, and did through %d", name, got[name], before)
		}
	}
}

func sorted(m map[string]int) (names []string) {
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
