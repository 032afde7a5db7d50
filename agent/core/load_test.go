package core

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// maxVerified bounds the instructions that the verifier walks through for one
// program. Linux stops at a million; long before, every start takes seconds, in
// which a new host enforces nothing. A room that each caller verifies again wants
// to be a global function. (X23)
const maxVerified = 100_000

func TestX23VerifierComplexity(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	for _, name := range sortedKeys(c.objects.Programs) {
		info, err := c.objects.Programs[name].Info()
		must(t, err)
		n, known := info.VerifiedInstructions()
		if !known || n == 0 {
			t.Fatalf("%s: the kernel does not say", name)
		}
		t.Logf("%-16s %6d", name, n)
		if n > maxVerified {
			t.Errorf("%s: the verifier went through %d instructions, at most %d", name, n, maxVerified)
		}
	}
}

// Up to Linux 6.7 the stack of each function on the way counts in steps of 32 bytes, and
// more than 512 over all of them is refused. This kernel counts by bytes, and says how
// many each function takes: so the sum can be made in the old way.
func TestX23StackOfOldKernels(t *testing.T) {
	const most, step = 512, 32
	spec, err := loadDemarc()
	must(t, err)
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats}})
	must(t, err)
	defer c.Close()
	said := regexp.MustCompile(`stack depth ([\d+]+)`)
	for _, name := range sortedKeys(c.Programs) {
		m := said.FindStringSubmatch(c.Programs[name].VerifierLog)
		if m == nil {
			t.Fatalf("%s: the kernel does not say how deep the stack is", name)
		}
		// One number for each function, in the order in which they stand.
		depths := strings.Split(m[1], "+")
		calls, depth := map[string][]string{}, map[string]int{}
		first, current := "", ""
		for _, ins := range spec.Programs[name].Instructions {
			if btf.FuncMetadata(&ins) != nil {
				current = ins.Symbol()
				if first == "" {
					first = current
				}
				if len(depths) == 0 {
					t.Fatalf("%s: more functions than the kernel knows", name)
				}
				bytes, err := strconv.Atoi(depths[0])
				must(t, err)
				depth[current], depths = (max(bytes, 1)+step-1)/step*step, depths[1:]
			}
			if ins.IsFunctionReference() {
				calls[current] = append(calls[current], ins.Reference())
			}
		}
		if len(depths) > 0 {
			t.Fatalf("%s: fewer functions than the kernel knows", name)
		}
		var deepest func(function string) (int, string)
		deepest = func(function string) (total int, path string) {
			for _, callee := range calls[function] {
				if d, p := deepest(callee); d > total {
					total, path = d, " > "+p
				}
			}
			return total + depth[function], fmt.Sprintf("%s %d%s", function, depth[function], path)
		}
		total, path := deepest(first)
		t.Logf("%-16s %3d: %s", name, total, path)
		if total > most {
			t.Errorf("%s: %d bytes of stack, at most %d: %s", name, total, most, path)
		}
	}
}
