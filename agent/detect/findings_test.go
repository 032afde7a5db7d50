package detect

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func sighting(workload, key string, s Severity, at time.Duration) Finding {
	return Finding{
		Key: key, Detector: "port-scan", Technique: serviceDiscovery, Title: key, Severity: s, Confidence: 50,
		Subject: Party{Identity: 7, Workload: workload, Zone: "edge"}, FirstSeen: start.Add(at), LastSeen: start.Add(at), Count: 1,
		Evidence: []Event{{Signal: &Signal{Kind: Raw, Time: start.Add(at)}}},
	}
}

func TestFindingsTellWhatIsWorthIt(t *testing.T) {
	s := NewFindings()
	explained := sighting("web", "a", Medium, 9*time.Second)
	explained.SuppressedBy = "scanner"
	for i, c := range []struct {
		seen   Finding
		change Change
		count  uint64
	}{
		{sighting("web", "a", Low, 0), New, 1},
		{sighting("web", "a", Low, time.Second), Grown, 2},
		{sighting("web", "a", Low, 2*time.Second), Nothing, 3},
		{sighting("web", "a", Low, 3*time.Second), Grown, 4},
		{sighting("web", "a", Medium, 4*time.Second), Worse, 5},
		{sighting("web", "a", Low, 5*time.Second), Nothing, 6},
		{sighting("web", "a", Low, 25*time.Hour), New, 1},
		{explained, Nothing, 2}, // it comes late, and is milder than nothing new
	} {
		if i == 7 {
			c.change = Worse // its severity is
		}
		f, change := s.Add(c.seen)
		if change != c.change || f.Count != c.count {
			t.Errorf("sighting %d: change %d, count %d; want %d, %d", i, change, f.Count, c.change, c.count)
		}
		if len(f.Evidence) > evidenceKept {
			t.Errorf("%d events of evidence", len(f.Evidence))
		}
	}
	want := map[Series]uint64{
		{"T1046", "low", "edge", "web", ""}: 2, {"T1046", "medium", "edge", "web", ""}: 2,
	}
	if d := cmp.Diff(want, s.Counts()); d != "" {
		t.Errorf("counts (-want +got):\n%s", d)
	}
}

// Whoever makes findings without end pushes out its own, the mildest first, and
// nobody else's: rows H01, H02 and H04.
func TestFindingsAreBounded(t *testing.T) {
	s := NewFindings()
	s.Add(sighting("victim", "needle", Low, 0))
	s.Add(sighting("noisy", "worst", Critical, 0))
	for i := range 10 * findingsKept {
		s.Add(sighting("noisy", fmt.Sprint("noise ", i), Medium, time.Duration(i)*time.Second))
	}
	for i := range 2 * findingsKept {
		f := sighting("", fmt.Sprint("address ", i), High, time.Duration(i)*time.Second)
		f.Subject = Party{Address: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})}
		s.Add(f)
	}
	all, _ := s.After(0)
	if len(all) > findingsKept {
		t.Errorf("%d findings are kept", len(all))
	}
	kept := map[string]bool{}
	noise := 0
	for _, f := range all {
		kept[f.Key] = true
		if f.Subject.Workload == "noisy" {
			noise++
		}
	}
	if !kept["needle"] || noise > findingsEach {
		t.Errorf("needle kept: %v; %d of the noisy one", kept["needle"], noise)
	}
	if len(s.Counts()) > seriesKept {
		t.Errorf("%d series", len(s.Counts()))
	}
}

func TestFindingsAreFollowed(t *testing.T) {
	s := NewFindings()
	s.Add(sighting("web", "a", Low, 0))
	all, at := s.After(0)
	if len(all) != 1 {
		t.Fatalf("%d findings", len(all))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	go s.Add(sighting("web", "b", Low, time.Second))
	if !s.Wait(ctx, at) {
		t.Fatal("nothing came")
	}
	next, at := s.After(at)
	if len(next) != 1 || next[0].Key != "b" {
		t.Errorf("followed: %+v", next)
	}
	s.Act("a", "advised")
	if next, _ = s.After(at); len(next) != 1 || next[0].Action != "advised" {
		t.Errorf("an action is not told: %+v", next)
	}
	cancel()
	_, at = s.After(0)
	if s.Wait(ctx, at) {
		t.Error("waits on after its end")
	}
}

func TestContainment(t *testing.T) {
	var done []string
	quarantine := func(workload string, d time.Duration, reason string) error {
		if workload == "stubborn" {
			return fmt.Errorf("the core is away")
		}
		done = append(done, fmt.Sprintf("%s for %s: %s", workload, d, reason))
		return nil
	}
	config := DefaultConfig()
	config.Modes = map[string]Mode{"T1046": Automatic, "T1110": Automatic, "T1040": Automatic, "T1018": Automatic, "T1059": Off}
	if p := config.Check(); p != nil && p.Path != "modes" {
		t.Fatal(p)
	}
	make := func(workload, detector string, technique Technique, s Severity, certain bool, at time.Duration) Finding {
		f := sighting(workload, detector, s, at)
		f.Detector, f.Technique, f.Certain, f.ID = detector, technique, certain, "id"
		return f
	}
	suppressed := make("web", "port-scan", serviceDiscovery, High, true, 0)
	suppressed.SuppressedBy = "scanner"
	stranger := make("", "port-scan", serviceDiscovery, High, true, 0)
	stranger.Subject = Party{Address: netip.MustParseAddr("10.0.0.1")}
	again := make("web", "brute-force", bruteForce, Medium, false, 90*time.Second)
	again.Action = "quarantined until 2026-05-04T09:01:00Z"
	c := &Containment{Config: config, Quarantine: quarantine, Policy: testPolicy(t)}
	for i, step := range []struct {
		f    Finding
		want string
	}{
		{make("web", "port-scan", serviceDiscovery, Low, false, 0), ""},
		{suppressed, ""},
		{make("web", "shell", unixShell, Critical, true, 0), ""},
		{make("web", "metadata", metadataAPI, High, true, 0), "advised"},
		{stranger, "advised: it is not a workload of this policy that could be quarantined"},
		{make("web", "port-scan", serviceDiscovery, Medium, false, 0), "advised: 1 of 2 independent signals"},
		{make("web", "host-sweep", systemDiscovery, Medium, false, time.Second), "advised: 1 of 2 independent signals"}, // the same denials
		{make("api", "brute-force", bruteForce, Medium, false, 0), "advised: 1 of 2 independent signals"},
		{make("api", "port-scan", serviceDiscovery, Medium, false, 2*time.Hour), "advised: 1 of 2 independent signals"}, // too far apart
		{make("web", "brute-force", bruteForce, Medium, false, time.Minute), "quarantined until 2026-05-04T09:01:00Z"},
		{again, "quarantined until 2026-05-04T09:01:00Z"},
		{make("web", "raw-socket", sniffing, Medium, true, 2*time.Minute), "the workload is in quarantine until 2026-05-04T09:01:00Z"},
		{make("stubborn", "raw-socket", sniffing, Medium, true, 2*time.Minute), "could not quarantine: the core is away"},
		{make("mail", "raw-socket", sniffing, Medium, true, 3*time.Minute), "quarantined until 2026-05-04T09:03:00Z"},
		{make("batch", "raw-socket", sniffing, Medium, true, 4*time.Minute), "advised: 2 workloads were quarantined within 1h0m0s, which is the limit"},
		{make("batch", "raw-socket", sniffing, Medium, true, 2*time.Hour), "quarantined until 2026-05-04T11:00:00Z"},
	} {
		if got := c.Consider(&step.f); got != step.want {
			t.Errorf("step %d, %s of %s: %q, want %q", i, step.f.Detector, step.f.Subject.Label(), got, step.want)
		}
	}
	want := []string{
		"web for 1h0m0s: finding id, T1110 by brute-force", "mail for 1h0m0s: finding id, T1040 by raw-socket", "batch for 1h0m0s: finding id, T1040 by raw-socket",
	}
	if d := cmp.Diff(want, done); d != "" {
		t.Errorf("quarantined (-want +got):\n%s", d)
	}
}
