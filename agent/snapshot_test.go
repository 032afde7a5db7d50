package agent

import (
	"cmp"
	"slices"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/exporter"
)

func TestSnapshotUsesDeclaredNamesOnly(t *testing.T) {
	core := newStandIn()
	r := start(t, core, nil)
	img := compile(t, source)
	if _, err := r.client.Apply(t.Context(), img, 0); err != nil {
		t.Fatal(err)
	}
	id := ids(t, img)
	number := r.link.view().Names.Image.Crossings[0].Number
	core.mu.Lock()
	core.rings = [abi.Rings]abi.RingState{abi.RingDenied: {Seq: 12, Lost: 2}}
	core.bindings = map[uint64]uint32{1: id["web"], 2: id["web"], 3: 1, 4: 0}
	core.counts = map[abi.CountKey]uint64{
		{Subject: id["web"], Peer: id["api"], Crossing: number, Direction: abi.Egress, Verdict: abi.Allow, Reason: abi.ByCrossing}:  5,
		{Subject: id["api"], Peer: id["web"], Crossing: number, Direction: abi.Ingress, Verdict: abi.Allow, Reason: abi.ByCrossing}: 6,
		{Subject: 1, Direction: abi.Egress, Verdict: abi.Deny, Reason: abi.NoCrossingFor}:                                           1,
		// Two identities and a crossing that no known image has become one series.
		{Subject: 0x777, Crossing: 1, Verdict: abi.Deny, Reason: abi.Revoked}: 2,
		{Subject: 0x778, Crossing: 2, Verdict: abi.Deny, Reason: abi.Revoked}: 3,
	}
	core.mu.Unlock()
	got := (&metrics{link: r.link}).Snapshot()
	slices.SortFunc(got.Verdicts, func(a, b exporter.Verdict) int {
		return cmp.Or(cmp.Compare(a.Count, b.Count), cmp.Compare(b.Crossing, a.Crossing))
	})
	web, api := exporter.Party{Zone: "edge", Workload: "web"}, exporter.Party{Zone: "app", Workload: "api"}
	want := exporter.Snapshot{
		Connected: true, Enforcing: true, Policy: got.Policy,
		Verdicts: []exporter.Verdict{
			{Verdict: abi.Deny, Reason: abi.NoCrossingFor, Source: exporter.Party{Workload: "unmanaged"}, Count: 1},
			{Verdict: abi.Allow, Reason: abi.ByCrossing, Crossing: "web-api", Source: web, Destination: api, Count: 5},
			{Verdict: abi.Deny, Reason: abi.Revoked, Crossing: "unknown", Source: exporter.Party{Zone: "unknown", Workload: "unknown"}, Count: 5},
			{Direction: abi.Ingress, Verdict: abi.Allow, Reason: abi.ByCrossing, Crossing: "web-api", Source: web, Destination: api, Count: 6},
		},
		Bindings: []exporter.Bindings{{Party: exporter.Party{Workload: "unmanaged"}, Count: 1}, {Party: web, Count: 2}},
		Rings:    []exporter.Ring{{Name: "denied", Made: 12, Lost: 2}, {Name: "allowed"}},
		Faults:   &[abi.Faults]uint64{abi.FaultStorage: 3},
	}
	if d := gocmp.Diff(want, got); d != "" {
		t.Errorf("snapshot (-want +got):\n%s", d)
	}
	if got.Policy == nil || got.Policy.Name != "shop" || got.Policy.Generation != 1 {
		t.Errorf("policy %+v", got.Policy)
	}
	core.stop()
	eventually(t, "core left", func() bool { return !r.link.view().Connected })
	got = (&metrics{link: r.link}).Snapshot()
	if d := gocmp.Diff(exporter.Snapshot{}, got); d != "" {
		t.Errorf("core away (-want +got):\n%s", d)
	}
}
