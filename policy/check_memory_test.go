package policy_test

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/policytest"
)

// Who remembers comes to the same end as who does not: of other policies that are
// right, and of images that are broken in every way that tables can be wrong.
func TestMemoryFindsWhatCheckFinds(t *testing.T) {
	size := policytest.Size{Zones: 3, Workloads: 5, Networks: 2, Crossings: 6}
	refused, remembered := 0, 0
	for seed := range uint64(400) {
		r := rand.New(rand.NewPCG(seed, 6))
		p := policytest.Random(r, size)
		var memory policy.Memory
		agree := func(what string, img *image.Image) {
			t.Helper()
			_, want := new(policy.Memory).Check(img)
			c, got := memory.Check(img)
			if (got == nil) != (want == nil) {
				t.Fatalf("seed %d, %s: with a memory %v, without %v\n%+v", seed, what, got, want, p)
			}
			if remembered += c.Remembered; want != nil {
				refused++
			}
		}
		agree("first", compiled(t, p))
		if len(p.Crossings) == 0 {
			continue
		}
		i := r.IntN(len(p.Crossings))
		switch seed % 3 {
		case 0:
			p.Crossings = slices.Delete(slices.Clone(p.Crossings), i, i+1)
		case 1:
			p.Crossings[i].Ports = []image.Span{policytest.TCP(uint16(r.IntN(100)))}
		case 2:
			slices.Reverse(p.Crossings)
		}
		img := compiled(t, p)
		agree("changed", img)
		if m := mutations[int(seed)%len(mutations)]; m.spoil(r, img) {
			agree(m.name, img)
		}
	}
	if refused < 100 || remembered < 500 {
		t.Errorf("%d refused, %d subjects remembered: too few to tell", refused, remembered)
	}
}

// One crossing more in a large policy costs the questions about its two ends.
func TestMemoryAsksWhatChanged(t *testing.T) {
	p := policytest.Large(200, 1000)
	var memory policy.Memory
	first, err := memory.Check(compiled(t, p))
	if err != nil || first.Remembered != 0 {
		t.Fatalf("%+v, %v", first, err)
	}
	p.Crossings = append(p.Crossings, policy.Crossing{
		Name: "more", From: []policy.Term{policytest.Workload("w000000")}, To: []policy.Term{policytest.Workload("w000001")}, Ports: []image.Span{policytest.TCP(7300)},
	})
	c, err := memory.Check(compiled(t, p))
	if err != nil || c.Asked != 2 || c.Remembered != c.Identities-2 || c.Questions > first.Questions/20 {
		t.Errorf("%+v, %v", c, err)
	}
	p.Networks[0].CIDRs = p.Networks[1].CIDRs // everybody's answers may depend on that
	if c, err = memory.Check(compiled(t, p)); err != nil || c.Remembered != 0 {
		t.Errorf("%+v, %v", c, err)
	}
}
