package agent

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/exporter"
)

// churnPolicy declares workloads with names that no other generation has.
func churnPolicy(generation, workloads int) string {
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: churn, version: %d}
trustDomain: churn.example
zones:
  app: {trust: 10}
workloads:
`, generation+1)
	for i := range workloads {
		fmt.Fprintf(&b, "  w-%d-%d: {zone: app, match: [{cgroup: /g%d/w%d}]}\n", generation, i, generation, i)
	}
	fmt.Fprintf(&b, "crossings:\n  - {name: among-%d, from: [zone/app], to: [zone/app], ports: [tcp/80]}\n", generation)
	return b.String()
}

// 10,000 workloads come and go, 250 at a time, and each leaves its numbers in the
// kernel. The names of the last images are kept, so that after those the number of
// series and the agent's memory do not grow any more.
func TestChurnIsFlat(t *testing.T) {
	const each, generations, settled = 250, 40, 12 // after which all that is kept is full
	core := newStandIn()
	r := start(t, core, nil)
	core.mu.Lock()
	core.counts = map[abi.CountKey]uint64{}
	core.mu.Unlock()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(exporter.Collector{Source: r.metrics})
	series := func() (n int) {
		t.Helper()
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			n += len(f.GetMetric())
		}
		return n
	}
	heap := func() float64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc) / (1 << 20)
	}
	var firstSeries int
	var firstHeap float64
	for g := range generations {
		img := compile(t, churnPolicy(g, each))
		if _, err := r.client.Apply(t.Context(), img, 0); err != nil {
			t.Fatal(err)
		}
		number := r.link.view().Names.Image.Crossings[0].Number
		core.mu.Lock()
		core.images = core.images[len(core.images)-1:] // it is the agent's memory that is of interest
		core.bindings = map[uint64]uint32{}
		for _, id := range ids(t, img) {
			core.bindings[uint64(id)] = id
			core.counts[abi.CountKey{Subject: id, Crossing: number, Verdict: abi.Allow, Reason: abi.ByCrossing}] = 1
			core.counts[abi.CountKey{Subject: id, Verdict: abi.Deny, Reason: abi.NoCrossingFor}] = 1
		}
		core.mu.Unlock()
		if g == settled {
			firstSeries, firstHeap = series(), heap()
		}
	}
	// What the stand-in for the kernel keeps grows by itself, and is no memory of the
	// agent's: some 100 bytes for each number.
	kept := float64((generations-settled)*each*2*100) / (1 << 20)
	lastSeries, lastHeap := series(), heap()
	t.Logf("after %d and %d workloads: %d and %d series, %.1f and %.1f MB", settled*each, generations*each, firstSeries, lastSeries, firstHeap, lastHeap)
	if lastSeries != firstSeries {
		t.Errorf("%d series, %d before", lastSeries, firstSeries)
	}
	if lastHeap > firstHeap*1.1+kept+1 {
		t.Errorf("%.1f MB, %.1f before", lastHeap, firstHeap)
	}
}
