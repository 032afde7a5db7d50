package kubernetes_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/demarc/demarc/identity"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/kubernetes"
	"github.com/demarc/demarc/policy/kubernetes/facts"
)

// TestFacts imports every step of every case and asks about each cell of its tables.
// DEMARC_FACTS names a directory with other cases of the same form.
func TestFacts(t *testing.T) {
	cases, err := facts.Load(os.Getenv("DEMARC_FACTS"))
	if err != nil {
		t.Fatal(err)
	}
	cells := 0
	for i := range cases {
		c := &cases[i]
		t.Run(c.ID, func(t *testing.T) {
			for _, group := range []kubernetes.Grouping{kubernetes.ByPod, kubernetes.ByReplica} {
				cluster := c.Start()
				for n := range c.Steps {
					step := &c.Steps[n]
					if err := cluster.Apply(step); err != nil {
						t.Fatal(err)
					}
					for _, cgroups := range []bool{true, false} {
						cells += checkStep(t, fmt.Sprintf("%s step %d by %s", c.ID, n+1, group), cluster, step, group, cgroups)
					}
				}
			}
		})
	}
	t.Logf("%d cases, %d cells", len(cases), cells)
}

func checkStep(t *testing.T, label string, cluster *facts.Cluster, step *facts.Step, group kubernetes.Grouping, cgroups bool) int {
	t.Helper()
	text, err := cluster.Inventory(func(p *facts.Pod) string {
		if !cgroups {
			return ""
		}
		return "/pods/" + p.Key()
	})
	if err != nil {
		t.Fatal(err)
	}
	inv, err := identity.ParseInventory("inventory.yaml", text)
	if err != nil {
		t.Fatal(err)
	}
	objects := &kubernetes.Objects{}
	if err := objects.Read("objects.yaml", cluster.Objects()); err != nil {
		t.Fatal(err)
	}
	got, err := kubernetes.Import(inv, objects, kubernetes.Options{Name: "facts", Version: 1, TrustDomain: "facts.example", NAT: "none", Group: group})
	if err != nil {
		t.Fatalf("%s: %v\n%s", label, err, cluster.Objects())
	}
	if len(got.Reported) > 0 {
		t.Errorf("%s: reported %v", label, got.Reported)
	}
	probes, err := cluster.Probes(step)
	if err != nil {
		t.Fatal(err)
	}
	letters := answers(t, got.Policy, inv, probes)
	for i, p := range probes {
		if letters[i] != p.Want {
			t.Errorf("%s: %s: %c, want %c", label, p, letters[i], p.Want)
		}
	}
	if t.Failed() {
		t.Fatalf("%s\n%s", cluster.Objects(), got.Source)
	}
	return len(probes)
}

// answers asks a batch, as the command line does, and returns a letter for each.
func answers(t testing.TB, p *policy.Policy, inv *identity.Inventory, probes []facts.Probe) []byte {
	t.Helper()
	end := func(p *facts.Pod) string {
		if p.External {
			return p.IP
		}
		return "pod/" + p.Key()
	}
	var in, out bytes.Buffer
	for _, x := range probes {
		fmt.Fprintf(&in, "{%q:%q,%q:%q,%q:%q}\n", "from", end(x.From), "to", end(x.To), "port", fmt.Sprintf("%s/%d", strings.ToLower(x.Protocol), x.Port))
	}
	if err := policy.ExplainBatch(p, inv, &in, &out); err != nil {
		t.Fatalf("%v\n%s", err, out.Bytes())
	}
	var letters []byte
	d := json.NewDecoder(&out)
	for range probes {
		var a struct {
			Allowed bool
			Refuses string
		}
		if err := d.Decode(&a); err != nil {
			t.Fatal(err)
		}
		letter, known := map[string]byte{"": '.', "egress": 'E', "ingress": 'I', "both": 'B'}[a.Refuses]
		if !known || a.Allowed != (letter == '.') {
			t.Fatalf("answer %+v", a)
		}
		letters = append(letters, letter)
	}
	return letters
}
