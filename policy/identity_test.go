package policy_test

import (
	"fmt"
	"testing"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

// TestIDsCollide numbers enough workloads that some hashes begin alike, and
// compares with the verifier, which counts on its own.
func TestIDsCollide(t *testing.T) {
	p := &policy.Policy{
		Name: "many", Version: 1, TrustDomain: "many.example", Zones: []policy.Zone{{Name: "z"}},
		Unmanaged: policy.Unmanaged{Zone: "z"},
	}
	for i := range 20_000 {
		p.Workloads = append(p.Workloads, policy.Workload{Name: fmt.Sprintf("w%05d", i), Zone: "z"})
	}
	ids := p.IDs()
	owner := map[image.ID]string{}
	moved := 0
	for i := range p.Workloads {
		name := p.Workloads[i].Name
		id := ids[name]
		if id < image.FirstID || id > image.MaxID {
			t.Fatalf("%s has number %d", name, id)
		}
		if other, taken := owner[id]; taken {
			t.Fatalf("%s and %s share number %d", name, other, id)
		}
		owner[id] = name
		alone := &policy.Policy{TrustDomain: p.TrustDomain, Workloads: p.Workloads[i : i+1]}
		if alone.IDs()[name] != id {
			moved++
		}
	}
	if moved == 0 {
		t.Error("no two hashes begin alike: the test says nothing about collisions")
	}
	img, err := policy.Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	if err := image.Verify(img); err != nil {
		t.Error(err)
	}
}
