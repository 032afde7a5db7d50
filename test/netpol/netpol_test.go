package netpol_test

import (
	"os"
	"slices"
	"testing"
	"time"

	"github.com/demarc/demarc/policy/kubernetes/facts"
	"github.com/demarc/demarc/test/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m) }

// sample is cases that together hold each thing an import can do. DEMARC_NETPOL=all
// runs every case; `make test-netpol` does.
var sample = []string{
	"cnp-07", // Admin, both directions, three protocols
	"cnp-08", // networks over pods; namespaces relabelled
	"cnp-20", // Baseline; nodes, a pod in the node's network, a range of ports
	"cnp-24", // Admin over NetworkPolicy over Baseline
	"knp-04", // answers
	"knp-06", // a host outside
	"knp-18", // a named port
}

func TestCases(t *testing.T) {
	cases, err := facts.Load(os.Getenv("DEMARC_FACTS"))
	if err != nil {
		t.Fatal(err)
	}
	all := os.Getenv("DEMARC_NETPOL") == "all"
	ran := 0
	for i := range cases {
		c := &cases[i]
		if !all && !slices.Contains(sample, c.ID) {
			continue
		}
		ran++
		t.Run(c.ID, func(t *testing.T) {
			begin, live := time.Now(), 0
			cluster := newCluster(t, c.Start())
			for n := range c.Steps {
				if err := cluster.facts.Apply(&c.Steps[n]); err != nil {
					t.Fatal(err)
				}
				cluster.enforce()
				live += cluster.check(&c.Steps[n])
				if t.Failed() {
					t.Fatalf("step %d of %s: %s", n+1, c.ID, c.Title)
				}
			}
			t.Logf("%s: %d steps, %d connections, %s", c.Title, len(c.Steps), live, time.Since(begin).Round(time.Millisecond))
		})
	}
	if ran == 0 || !all && ran != len(sample) {
		t.Errorf("%d cases ran", ran)
	}
}
