package lateral_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/test/netlab"
)

// One probe in ten minutes: what the kernel tells of real ones, each moved ten minutes
// on, is found at the fourth, half an hour after the first.
func TestOneProbeInTenMinutes(t *testing.T) {
	const probes, apart = 6, 10 * time.Minute
	l := newLab(t, 1, []string{"s00"}, "", netlab.NodeOptions{})
	for i := range probes {
		l.start("s00", "nc.openbsd", "-n", "-w", "1", fmt.Sprintf("10.66.0.%d", 100+i), fmt.Sprint(2000+i)).Wait(30 * time.Second)
	}
	var flows []flow.Flow
	await(t, "the probes are told", func() bool {
		flows = l.node.Flows("--from", "workload/s00", "--verdict", "denied")
		return len(flows) >= probes
	})
	if len(flows) != probes {
		t.Fatalf("%d flows of %d probes", len(flows), probes)
	}
	policy := filepath.Join(l.lab.Dir(), "slow.yaml")
	if err := os.WriteFile(policy, []byte(l.policy([]string{"s00"}, "")), 0o600); err != nil {
		t.Fatal(err)
	}
	first := flows[0].Time
	for n := 1; n <= probes; n++ {
		file := filepath.Join(l.lab.Dir(), fmt.Sprintf("slow-%d.jsonl", n))
		w, err := os.Create(file)
		if err != nil {
			t.Fatal(err)
		}
		for i, f := range flows[:n] {
			f.Time = first.Add(time.Duration(i) * apart)
			if err := json.NewEncoder(w).Encode(detect.Event{Flow: &f}); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		text, problems, status := l.node.Demarc("findings", "--from", file, "--policy", policy, "-o", "json")
		var found []detect.Finding
		if err := json.Unmarshal([]byte(text), &found); err != nil || status != 0 {
			t.Fatalf("demarc findings: %d, %v\n%s", status, err, problems)
		}
		if n < 4 {
			if len(found) > 0 {
				t.Errorf("after %d probes:\n%s", n, describe(found))
			}
			continue
		}
		if len(found) != 1 || found[0].Detector != "slow-scan" || found[0].Technique.ID != "T1046" || found[0].Process == nil || found[0].Process.Comm != "nc.openbsd" ||
			found[0].LastSeen.Sub(first) != time.Duration(n-1)*apart {
			t.Errorf("after %d probes:\n%s", n, describe(found))
		}
	}
}
