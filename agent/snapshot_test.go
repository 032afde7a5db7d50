package agent

import (
	"cmp"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
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
	core.rings = [record.AllRings]record.RingState{record.RingDenied: {Seq: 12, Lost: 2}}
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
		Connected: true, Enforcing: true, State: "enforcing", Policy: got.Policy, Core: &exporter.Core{Programs: 1, Attached: 1},
		Maps: []exporter.Map{{Name: "counts", Entries: 5, Max: 100}, {Name: "bindings", Entries: 4, Max: 200}},
		Verdicts: []exporter.Verdict{
			{Verdict: abi.Deny, Reason: abi.NoCrossingFor, Source: exporter.Party{Workload: "unmanaged"}, Count: 1},
			{Verdict: abi.Allow, Reason: abi.ByCrossing, Crossing: "web-api", Source: web, Destination: api, Count: 5},
			{Verdict: abi.Deny, Reason: abi.Revoked, Crossing: "unknown", Source: exporter.Party{Zone: "unknown", Workload: "unknown"}, Count: 5},
			{Direction: abi.Ingress, Verdict: abi.Allow, Reason: abi.ByCrossing, Crossing: "web-api", Source: web, Destination: api, Count: 6},
		},
		Bindings: []exporter.Bindings{{Party: exporter.Party{Workload: "unmanaged"}, Count: 1}, {Party: web, Count: 2}},
		Rings:    []exporter.Ring{{Name: "denied", Made: 12, Lost: 2}, {Name: "allowed"}, {Name: "signals"}},
		Faults:   &[record.Faults]uint64{record.FaultStorage: 3},
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
	if d := gocmp.Diff(exporter.Snapshot{State: "unknown"}, got); d != "" {
		t.Errorf("core away (-want +got):\n%s", d)
	}
}

// H12: whoever can make identities and crossings come and go makes no more series
// than the images that the agent knows have names. 100,000 of them are one.
func TestSeriesAreBounded(t *testing.T) {
	core := newStandIn()
	r := start(t, core, nil)
	img := compile(t, source)
	if _, err := r.client.Apply(t.Context(), img, 0); err != nil {
		t.Fatal(err)
	}
	gather := func() int {
		t.Helper()
		registry := prometheus.NewPedanticRegistry()
		registry.MustRegister(exporter.Collector{Source: &metrics{link: r.link}})
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, f := range families {
			n += len(f.GetMetric())
		}
		return n
	}
	grow := func(names uint32) int {
		core.mu.Lock()
		counts, bindings := map[abi.CountKey]uint64{}, map[uint64]uint32{}
		for i := range names {
			counts[abi.CountKey{Subject: 0x1000 + i, Peer: 0x900000 - i, Crossing: 1 + i, Verdict: abi.Deny, Reason: abi.Revoked}] = 1
			bindings[uint64(i)+10] = 0x1000 + i
		}
		core.counts, core.bindings = counts, bindings
		core.mu.Unlock()
		return gather()
	}
	if one, many := grow(1), grow(100_000); one != many {
		t.Errorf("%d series with one name that no image knows, %d with 100,000", one, many)
	}
}

func TestSnapshotTellsWhatEnds(t *testing.T) {
	core := newStandIn()
	r := start(t, core, nil)
	text := strings.Replace(source, "metadata: {", "metadata: {notAfter: 2036-01-01T00:00:00Z, ", 1)
	text = strings.Replace(text, "{name: web-api,", "{name: web-api, until: 2035-01-01T00:00:00Z,", 1)
	if _, err := r.client.Apply(t.Context(), compile(t, text), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.Apply(t.Context(), []byte("nothing"), 0); err == nil {
		t.Error("nothing was applied")
	}
	p := r.metrics.Snapshot()
	want := []exporter.Grant{{Crossing: "web-api", Until: time.Date(2035, 1, 1, 0, 0, 0, 0, time.UTC).Local()}}
	if d := gocmp.Diff(want, p.Policy.Grants); d != "" || p.Policy.Expires.Unix() != time.Date(2036, 1, 1, 0, 0, 0, 0, time.UTC).Unix() {
		t.Errorf("expires %v, grants (-want +got):\n%s", p.Policy.Expires, d)
	}
	if a := p.Applies; a.Applied != 1 || a.Refused != 1 || a.Check <= 0 || a.Core <= 0 {
		t.Errorf("applies %+v", a)
	}
}
