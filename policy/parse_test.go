package policy

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/demarc/demarc/policy/image"
)

func TestParseWholePolicy(t *testing.T) {
	src := goodSources(t)["everything.yaml"]
	got, err := parse("everything.yaml", src, corpusTime)
	if err != nil {
		t.Fatal(err)
	}
	date := func(year int) time.Time { return time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC) }
	workload := func(name string) Term { return Term{Kind: image.TermWorkload, Name: name} }
	zone := func(name string) Term { return Term{Kind: image.TermZone, Name: name} }
	network := func(name string) Term { return Term{Kind: image.TermNetwork, Name: name} }
	anybody, unmanaged := Term{Kind: image.TermAny}, Term{Kind: image.TermUnmanaged}
	want := &Policy{
		Name: "everything", Version: 18446744073709551615, TrustDomain: "a_b.c-d", Mode: image.Observe, NotAfter: date(2036),
		Zones: []Zone{{Name: "high", Trust: 65535}, {Name: "low"}},
		Workloads: []Workload{
			{Name: "0", Zone: "low", Match: []Selector{{Kind: image.SelectCgroup, Path: "/machine.slice/x"}}},
			{Name: "a", Zone: "low", Match: []Selector{
				{Kind: image.SelectUnit, Path: "a@*.service"},
				{Kind: image.SelectUnit, Path: "a-*.scope"},
				{Kind: image.SelectCgroup, Path: "/lab/a b/c"},
				{Kind: image.SelectKubernetes, Namespace: "ns", ServiceAccount: "sa.x", Labels: map[string]string{"app.kubernetes.io/name": "a"}},
				{Kind: image.SelectContainer, Name: "a", Image: "registry.example/a:1", Labels: map[string]string{"com.example.role": "any text"}},
			}, Roles: []Role{{Name: "scanner"}, {Name: "management", Until: date(2036)}}},
			{Name: "b", Zone: "high", Match: []Selector{{Kind: image.SelectUnit, Path: "b.service"}}},
		},
		Networks: []Network{
			{Name: "v4", Zone: "low", CIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.1.0.0/16")}},
			{Name: "v6", Zone: "low", CIDRs: []netip.Prefix{netip.MustParsePrefix("2001:db8::/32")}},
		},
		Unmanaged: Unmanaged{Zone: "low"},
		Crossings: []Crossing{
			{Name: "up", From: []Term{workload("a")}, To: []Term{workload("b")}, NAT: image.NATDestination, Rate: 5400, Burst: 2,
				Ports: []image.Span{{Proto: image.TCP, Low: 1, High: 1}, {Proto: image.UDP, Low: 1, High: 2}, {Proto: image.SCTP, Low: 0, High: 65535}}},
			{Name: "one-way", From: []Term{workload("b")}, To: []Term{workload("a")}, Need: image.Sender, Side: image.EgressSide, Refuse: image.RefuseDrop,
				Ports: []image.Span{{Proto: image.UDP, Low: 514, High: 514}}},
			{Name: "ping", From: []Term{workload("b")}, To: []Term{zone("low")}, Need: image.Sender,
				Ports: []image.Span{{Proto: image.ICMP, Low: 8, High: 8}, {Proto: image.ICMP6, Low: 1, High: 4}, {Proto: image.ICMP6, Low: 128, High: 128}}},
			{Name: "ping-one-way", From: []Term{workload("b")}, To: []Term{zone("low")}, Need: image.Sender,
				Ports: []image.Span{{Proto: image.ICMP, Low: 8, High: 8}}},
			{Name: "out", From: []Term{zone("high")}, To: []Term{network("v4"), network("v6"), unmanaged}, Need: image.NoProof,
				Ports: everyPort, Since: date(2030), Until: date(2036)},
			{Name: "trap", From: []Term{anybody}, To: []Term{zone("low")}, Need: image.NoProof, Side: image.IngressSide, Decoy: true, Purpose: "für alle",
				Ports: []image.Span{{Proto: image.TCP, Low: 0, High: 65535}}},
		},
		Assertions: []Assertion{
			{Never: true, From: network("v4"), To: zone("high"), Hops: 2},
			{Never: true, From: anybody, To: workload("b"), Hops: 1, Port: &image.Port{Proto: image.ICMP, Number: 8}},
			{Never: true, From: anybody, To: workload("b"), Hops: 1, Port: &image.Port{Proto: image.ICMP6, Number: 128}},
			{From: workload("b"), To: workload("a"), Port: &image.Port{Proto: image.UDP, Number: 514}},
		},
	}
	if diff := cmp.Diff(want, got, ignorePlaces); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestParseKnowsThePlaces(t *testing.T) {
	got, err := parse("shop.yaml", goodSources(t)["shop.yaml"], corpusTime)
	if err != nil {
		t.Fatal(err)
	}
	c := got.Crossings[1]
	want := Crossing{Pos: Pos{33, 5}, Name: "web-api", Need: image.Required, Rate: 3_600_000, Burst: 1000,
		From:  []Term{{Pos: Pos{33, 28}, Kind: image.TermWorkload, Name: "web"}},
		To:    []Term{{Pos: Pos{33, 48}, Kind: image.TermWorkload, Name: "api"}},
		Ports: []image.Span{{Proto: image.TCP, Low: 8080, High: 8080}}}
	if diff := cmp.Diff(want, c, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestUnmanagedDefaults(t *testing.T) {
	const rest = "zones: {b: {trust: 5}, a: {trust: 5}, c: {trust: 6}}\n" +
		"workloads: {web: {zone: a, match: [{systemdUnit: web.service}]}}\n" +
		"crossings: [{name: x, from: [workload/web], to: [workload/web], ports: [tcp/1]}]\n"
	for _, tt := range []struct {
		name, section string
		want          Unmanaged
	}{
		{"OK absent", "", Unmanaged{Zone: "a", Outbound: true, Inbound: true}},
		{"OK zone", "unmanaged: {zone: c}\n", Unmanaged{Zone: "c", Outbound: true, Inbound: true}},
		{"OK outbound", "unmanaged: {outbound: deny}\n", Unmanaged{Zone: "a", Inbound: true}},
		{"OK inbound", "unmanaged: {inbound: deny, outbound: allow}\n", Unmanaged{Zone: "a", Outbound: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := parse("x.yaml", []byte(corpusHeader+rest+tt.section), corpusTime)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, p.Unmanaged, cmpopts.IgnoreTypes(Pos{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseRate(t *testing.T) {
	for _, tt := range []struct {
		in             string
		hourly, perSec uint64
		bad            string
	}{
		{"200/s", 720_000, 200, ""},
		{"1/h", 1, 1, ""},
		{"1/m", 60, 1, ""},
		{"61/m", 3660, 2, ""},
		{"1000000000/s", image.MaxRate, 1_000_000_000, ""},
		{"18446744073709551616/h", 0, 0, `connections "18446744073709551616/h" is more than 1000000000/s`},
		{"0/m", 0, 0, `connections "0/m" admits nothing`},
		{"5", 0, 0, `connections "5" is not a rate`},
		{"5/s ", 0, 0, `connections "5/s " is not a rate`},
		{"+5/s", 0, 0, `connections "+5/s" is not a rate`},
		{"/s", 0, 0, `connections "/s" is not a rate`},
	} {
		t.Run(tt.in, func(t *testing.T) {
			hourly, perSec, bad := parseRate(&node{kind: stringNode, text: tt.in})
			msg := ""
			if bad != nil {
				msg = bad.msg
			}
			if hourly != tt.hourly || perSec != tt.perSec || msg != tt.bad {
				t.Errorf("got %d an hour, %d a second, %q", hourly, perSec, msg)
			}
		})
	}
}

// largeSource is the text of a policy of the size that must still be handled.
func largeSource(workloads, crossings int) []byte {
	var b bytes.Buffer
	b.WriteString(corpusHeader + "zones: {app: {trust: 1}}\nworkloads:\n")
	for i := range workloads {
		fmt.Fprintf(&b, "  w%d: {zone: app, match: [{systemdUnit: w%d.service}, {kubernetes: {namespace: shop, podLabels: {app: w%d}}}]}\n", i, i, i)
	}
	b.WriteString("crossings:\n")
	for i := range crossings {
		fmt.Fprintf(&b, "  - {name: c-%d, from: [workload/w%d], to: [workload/w%d], ports: [tcp/%d], identity: required, "+
			"limit: {connections: 200/s, burst: 400}, log: all, purpose: public site}\n", i, i%workloads, i*7%workloads, 1000+i%50000)
	}
	return b.Bytes()
}

func BenchmarkParse10kx100k(b *testing.B) {
	src := largeSource(10_000, 100_000)
	b.SetBytes(int64(len(src)))
	b.ReportAllocs()
	for b.Loop() {
		p, err := Parse("large.yaml", src)
		if err != nil {
			b.Fatal(err)
		}
		if len(p.Workloads) != 10_000 || len(p.Crossings) != 100_000 {
			b.Fatalf("%d workloads, %d crossings", len(p.Workloads), len(p.Crossings))
		}
	}
}
