package core

import "testing"

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
