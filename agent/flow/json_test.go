package flow

import (
	"encoding/json"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

func anyEndpoint(t *rapid.T) Endpoint {
	e := Endpoint{
		Port: rapid.Uint16().Draw(t, "port"), Identity: rapid.Uint32Max(3).Draw(t, "identity"), Claimed: rapid.Bool().Draw(t, "claimed"),
		Workload: anyText(t), Zone: anyText(t), Reserved: anyText(t), Cgroup: anyText(t), Networks: rapid.SliceOfN(rapid.StringMatching(`[a-z]*`), 0, 3).Draw(t, "networks"),
	}
	e.Pod, e.Container, e.Image = anyText(t), anyText(t), anyText(t)
	e.PodLabels = rapid.MapOfN(rapid.StringMatching(`[a-z./<"]{1,4}`), rapid.StringMatching(`[ -~]{0,6}`), 0, 3).Draw(t, "labels")
	switch rapid.IntRange(0, 2).Draw(t, "family") {
	case 1:
		e.Address = netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "address")))
	case 2:
		e.Address = netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "address")))
	}
	return e
}

// anyText is what a flow's strings may hold: printable ASCII.
func anyText(t *rapid.T) string { return rapid.StringMatching(`[ -~]{0,12}`).Draw(t, "text") }

func anyFlow(t *rapid.T) *Flow {
	return &Flow{
		Time: time.Unix(0, rapid.Int64Range(0, 1<<60).Draw(t, "time")).UTC(), Node: anyText(t),
		Verdict: abi.Verdict(rapid.IntRange(0, 3).Draw(t, "verdict")), Reason: abi.Reason(rapid.IntRange(0, abi.Reasons-1).Draw(t, "reason")),
		Direction: abi.Direction(rapid.IntRange(0, 1).Draw(t, "direction")), Hook: record.Hook(rapid.IntRange(1, 9).Draw(t, "hook")), Proof: abi.Proof(rapid.IntRange(0, 3).Draw(t, "proof")),
		Protocol: anyText(t), Source: anyEndpoint(t), Destination: anyEndpoint(t), Crossing: anyText(t), Line: rapid.Uint32Max(2).Draw(t, "line"),
		PID: rapid.Uint32().Draw(t, "pid"), Comm: anyText(t), CPU: rapid.Uint32Max(9).Draw(t, "cpu"), Seq: rapid.Uint64().Draw(t, "seq"), Epoch: rapid.Uint32().Draw(t, "epoch"),
	}
}

func TestAppendJSONIsThatOfTheLibrary(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := anyFlow(t)
		want, err := json.Marshal(f)
		if err != nil {
			t.Fatal(err)
		}
		got := f.AppendJSON([]byte("x"))
		if d := cmp.Diff("x"+string(want), string(got)); d != "" {
			t.Fatalf("(-want +got):\n%s", d)
		}
		var back Flow
		if err := json.Unmarshal(got[1:], &back); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(f, &back, cmpopts.EquateComparable(netip.Addr{}), cmpopts.EquateEmpty()); d != "" {
			t.Fatalf("read back (-want +got):\n%s", d)
		}
	})
}

// One flow's time says nothing of the next one's.
func TestJSONTimes(t *testing.T) {
	var j JSON
	start := time.Date(2026, 11, 28, 23, 59, 59, 0, time.UTC)
	for _, at := range []time.Time{
		{}, start, start.Add(1), start.Add(120_000_000), start.Add(999_999_999), start.Add(time.Second), start, start.Add(24 * time.Hour),
		time.Unix(0, 0).UTC(), time.Unix(-1, 5).UTC(), start.In(time.FixedZone("", 3600)), start, time.Date(2026, 11, 28, 23, 59, 59, 5, time.UTC),
	} {
		f := &Flow{Time: at, Hook: record.HookConnect}
		want, err := json.Marshal(f)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), string(j.Append(nil, f))); d != "" {
			t.Errorf("%s (-want +got):\n%s", at, d)
		}
	}
}

// What no flow should hold is escaped all the same.
func TestAppendJSONMovesNoCursor(t *testing.T) {
	f := &Flow{Comm: "\x1b]0;\x07\u009b\xff\n\"\\<&", Hook: record.HookConnect}
	b := f.AppendJSON(nil)
	for _, c := range b {
		if c < 0x20 || c > 0x7e {
			t.Fatalf("%q", b)
		}
	}
	if !json.Valid(b) {
		t.Errorf("no JSON: %s", b)
	}
}

func BenchmarkAppendJSON(b *testing.B) {
	r := resolver()
	e := record.Event{Kind: record.EventVerdict, Hook: record.HookIngress, Verdict: abi.Allow, Reason: abi.ByCrossing, Direction: abi.Ingress, Subject: web, Peer: postgres, Proof: abi.ProofIdentity, Crossing: 77, Epoch: 1,
		Tuple: abi.Tuple{Source: mapped("10.0.0.1"), Destination: mapped("10.0.0.2"), SourcePort: 4000, DestinationPort: 5432, Proto: 6}}
	var f Flow
	var buffer []byte
	b.ReportAllocs()
	for b.Loop() {
		r.Resolve(&e, &f)
		buffer = f.AppendJSON(buffer[:0])
	}
}
