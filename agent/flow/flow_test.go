package flow

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/policy/image"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	web      = 0x101
	postgres = 0x202
)

// shop is an image with what naming needs.
func shop() *image.Image {
	return &image.Image{
		Name: "shop", TrustDomain: "shop.example", UnmanagedZone: 1,
		Zones:     []image.Zone{{Name: "data", Trust: 30}, {Name: "edge", Trust: 10}, {Name: "internet"}},
		Workloads: []image.Workload{{Name: "postgres", ID: postgres, Zone: 0}, {Name: "web", ID: web, Zone: 1}},
		Networks: []image.Network{
			{Name: "anywhere", Zone: 2, CIDRs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}},
			{Name: "office", Zone: 1, CIDRs: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")}},
			{Name: "printers", Zone: 1, CIDRs: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}},
		},
		Crossings: []image.Crossing{{Name: "public-web", Number: 77, Line: 14}},
	}
}

func mapped(s string) [16]byte { return netip.MustParseAddr(s).As16() }

func resolver() *Resolver {
	book := &Book{}
	book.Add(1, "d1", NewNames(shop()))
	return &Resolver{
		Node: "n1", Book: book,
		Cgroup: func(id uint64) string { return map[uint64]string{9: "/lab/we\x1bb"}[id] },
		Wall:   func(boot uint64) time.Time { return time.Unix(1000, int64(boot)).UTC() },
	}
}

func TestDecodeEventReadsTheLayoutOfGo(t *testing.T) {
	// record.Event is checked against the C struct elsewhere; here every byte of it
	// must be decoded, so each gets a value of its own.
	if size := unsafe.Sizeof(record.Event{}); size != EventSize {
		t.Fatalf("record.Event has %d bytes, EventSize is %d", size, EventSize)
	}
	b := make([]byte, EventSize)
	for i := range b {
		b[i] = byte(i + 1)
	}
	var want, got record.Event
	if _, err := binary.Decode(b, binary.NativeEndian, &want); err != nil {
		t.Fatal(err)
	}
	if err := DecodeEvent(b, &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, cmpopts.IgnoreUnexported(record.Event{}, abi.Tuple{})); d != "" {
		t.Errorf("event (-want +got):\n%s", d)
	}
	if err := DecodeEvent(b[:EventSize-1], &got); err == nil {
		t.Error("a short record was decoded")
	}
}

func BenchmarkDecodeAndStore(b *testing.B) {
	raw := make([]byte, EventSize)
	s := NewStore(StoreSize)
	var e record.Event
	var gaps Gaps
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		binary.NativeEndian.PutUint64(raw[8:], uint64(i+1))
		if err := DecodeEvent(raw, &e); err != nil {
			b.Fatal(err)
		}
		gaps.See(e.CPU, e.Seq)
		s.Add(record.RingAllowed, &e)
	}
}

func TestGaps(t *testing.T) {
	var g Gaps
	var got []int64
	for _, e := range []struct {
		cpu uint32
		seq uint64
	}{{0, 5}, {0, 6}, {0, 9}, {1, 1}, {0, 8}, {0, 9}, {0, 10}, {1, 4}, {0, 2}} {
		got = append(got, g.See(e.cpu, e.seq))
	}
	if d := cmp.Diff([]int64{0, 0, 2, 0, -1, 0, 0, 2, 0}, got); d != "" {
		t.Errorf("losses (-want +got):\n%s", d)
	}
}

func TestResolverSaysEventsInWords(t *testing.T) {
	event := func(change func(*record.Event)) record.Event {
		e := record.Event{
			Time: 5e9, Seq: 3, Cgroup: 9, CPU: 1, PID: 812, Subject: web, Peer: postgres, Epoch: 1, Kind: record.EventVerdict,
			Hook: record.HookConnect, Verdict: abi.Deny, Reason: abi.NoCrossingFor, Direction: abi.Egress, Proof: abi.ProofUnknown,
			Tuple: abi.Tuple{Source: mapped("10.0.1.2"), Destination: mapped("192.0.2.9"), SourcePort: 44312, DestinationPort: 5432, Proto: 6},
			Comm:  [16]byte{'n', 'g', 0x1b, '[', 'm', '\\', 0, 'x'},
		}
		change(&e)
		return e
	}
	base := Flow{
		Time: time.Unix(1005, 0).UTC(), Node: "n1", Verdict: abi.Deny, Reason: abi.NoCrossingFor, Direction: abi.Egress, Hook: record.HookConnect,
		Protocol: "tcp", Proof: abi.ProofUnknown, PID: 812, Comm: `ng\x1b[m\x5c`, CPU: 1, Seq: 3, Epoch: 1,
		Source:      Endpoint{Address: netip.MustParseAddr("10.0.1.2"), Port: 44312, Identity: web, Workload: "web", Zone: "edge", Cgroup: `/lab/we\x1bb`},
		Destination: Endpoint{Address: netip.MustParseAddr("192.0.2.9"), Port: 5432, Networks: []string{"anywhere", "office", "printers"}},
	}
	for _, c := range []struct {
		name   string
		event  record.Event
		want   func(*Flow)
		labels [2]string
	}{
		{"OK egress to a network", event(func(*record.Event) {}), func(*Flow) {}, [2]string{"edge/web", "network/anywhere,office,printers"}},
		{"OK ingress from a proven workload",
			event(func(e *record.Event) {
				e.Direction, e.Proof, e.Subject, e.Peer, e.Crossing = abi.Ingress, abi.ProofIdentity, postgres, web, 77
			}),
			func(f *Flow) {
				f.Direction, f.Proof, f.Crossing, f.Line = abi.Ingress, abi.ProofIdentity, "public-web", 14
				f.Source.Cgroup = ""
				f.Destination = Endpoint{Address: f.Destination.Address, Port: 5432, Identity: postgres, Workload: "postgres", Zone: "data", Cgroup: `/lab/we\x1bb`}
			}, [2]string{"edge/web", "data/postgres"}},
		{"OK bad proof is only a claim",
			event(func(e *record.Event) { e.Proof, e.Reason = abi.ProofBad, abi.TagBadMAC }),
			func(f *Flow) {
				f.Proof, f.Reason = abi.ProofBad, abi.TagBadMAC
				f.Destination.Identity, f.Destination.Workload, f.Destination.Zone, f.Destination.Claimed = postgres, "postgres", "data", true
			}, [2]string{"edge/web", "claims data/postgres"}},
		{"OK reserved and unknown identities",
			event(func(e *record.Event) { e.Proof, e.Subject, e.Peer = abi.ProofIdentity, uint32(image.Unmanaged), 0x999 }),
			func(f *Flow) {
				f.Proof = abi.ProofIdentity
				f.Source.Identity, f.Source.Reserved, f.Source.Workload = uint32(image.Unmanaged), "unmanaged", ""
				f.Destination.Identity, f.Destination.Networks = 0x999, nil
			}, [2]string{"unmanaged", "identity-2457"}},
		{"OK no packet yet",
			event(func(e *record.Event) {
				e.Hook, e.Tuple, e.Cgroup, e.Comm, e.Crossing = record.HookSockCreate, abi.Tuple{Proto: 255}, 0, [16]byte{}, 5
			}),
			func(f *Flow) {
				f.Hook, f.Protocol, f.Comm, f.Crossing = record.HookSockCreate, "proto-255", "", "crossing-5"
				f.Source.Address, f.Source.Port, f.Source.Cgroup = netip.Addr{}, 0, ""
				f.Destination = Endpoint{}
			}, [2]string{"edge/web", "unknown"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			want := base
			c.want(&want)
			got := resolver().Flow(&c.event)
			if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); d != "" {
				t.Errorf("flow (-want +got):\n%s", d)
			}
			if labels := [2]string{got.Source.Label(), got.Destination.Label()}; labels != c.labels {
				t.Errorf("labels %q, want %q", labels, c.labels)
			}
		})
	}
}

func TestBookKeepsNamesOfEarlierImages(t *testing.T) {
	var b Book
	if names, _ := b.Current(); names != nil {
		t.Error("an empty book has names")
	}
	old, now := shop(), shop()
	old.Networks = old.Networks[:1]
	old.Workloads = append(old.Workloads, image.Workload{Name: "gone", ID: 0x300, Zone: 1})
	b.Add(1, "old", NewNames(old))
	b.Add(5, "now", NewNames(now))
	if _, digest := b.Current(); digest != "now" {
		t.Errorf("current is %q", digest)
	}
	if w, zone, ok := b.Workload(7, 0x300); w != "gone" || zone != "edge" || !ok {
		t.Errorf("late event: %q in %q, %v", w, zone, ok)
	}
	a := netip.MustParseAddr("192.0.2.1")
	if d := cmp.Diff([]string{"anywhere"}, b.Networks(4, a)); d != "" {
		t.Errorf("networks of the old image:\n%s", d)
	}
	if d := cmp.Diff([]string{"anywhere", "office", "printers"}, b.Networks(5, a)); d != "" {
		t.Errorf("networks of the new image:\n%s", d)
	}
	for i := range uint32(imagesKept) {
		b.Add(10+i, "more", NewNames(now))
	}
	if _, _, ok := b.Workload(7, 0x300); ok {
		t.Error("the book grows without bound")
	}
}

// TestJ07EscapesKernelStrings: no byte of a process name may move a cursor, start a
// line or hide text.
func TestJ07EscapesKernelStrings(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"nginx", "nginx"},
		{"a b", "a b"},
		{"\x1b]0;owned\x07", `\x1b]0;owned\x07`},
		{"line\nline\r\t", `line\x0aline\x0d\x09`},
		{"\u202etxt", `\xe2\x80\xaetxt`},
		{"\xff\x9b31m\x7f", `\xff\x9b31m\x7f`},
		{`\x41`, `\x5cx41`},
	} {
		if got := Escape(c.in); got != c.want {
			t.Errorf("Escape(%q) = %q, want %q", c.in, got, c.want)
		}
	}
	for b := range 256 {
		got := Escape(string([]byte{byte(b)}))
		if strings.ContainsFunc(got, func(r rune) bool { return r < 0x20 || r > 0x7e }) {
			t.Errorf("byte %#x comes out as %q", b, got)
		}
	}
}

// The judged side is called what the inventory calls its cgroup, the peer never is.
func TestResolverNamesContainers(t *testing.T) {
	r := resolver()
	labels := map[string]string{"app": "web"}
	r.Container = func(path string) Container {
		return map[string]Container{"/lab/we\x1bb": {Pod: "shop/web-1", Name: "web", Image: "web:1", Labels: labels}}[path]
	}
	for _, direction := range []abi.Direction{abi.Egress, abi.Ingress} {
		f := r.Flow(&record.Event{Cgroup: 9, Direction: direction})
		subject, peer := f.Source, f.Destination
		if direction == abi.Ingress {
			subject, peer = peer, subject
		}
		want := Endpoint{Cgroup: `/lab/we\x1bb`, Pod: "shop/web-1", Container: "web", Image: "web:1", PodLabels: labels}
		if d := cmp.Diff([]Endpoint{want, {}}, []Endpoint{subject, peer}, cmpopts.EquateComparable(netip.Addr{})); d != "" {
			t.Errorf("%s (-want +got):\n%s", direction, d)
		}
		if d := cmp.Diff([]string{"demarc:pod=web-1", "demarc:pod-namespace=shop", "demarc:container=web"}, subject.Labels()); d != "" {
			t.Errorf("labels (-want +got):\n%s", d)
		}
		for _, id := range []uint64{0, 7} {
			if f := r.Flow(&record.Event{Cgroup: id, Direction: direction}); f.Source.Pod+f.Destination.Pod != "" {
				t.Errorf("cgroup %d: %+v", id, f)
			}
		}
	}
}

func TestInertLeavesLabelsThatAreShared(t *testing.T) {
	shared := map[string]string{"app": "we\x1bb"}
	f := Flow{Source: Endpoint{Pod: "a\n/b", Container: "\x07", Image: "\u009b", PodLabels: shared}}
	f.Inert()
	want := Endpoint{Pod: `a\x0a/b`, Container: `\x07`, Image: `\xc2\x9b`, PodLabels: map[string]string{"app": `we\x1bb`}}
	if d := cmp.Diff(want, f.Source, cmpopts.EquateComparable(netip.Addr{})); d != "" || shared["app"] != "we\x1bb" {
		t.Errorf("shared %q (-want +got):\n%s", shared, d)
	}
}
