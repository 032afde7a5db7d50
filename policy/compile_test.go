package policy_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/image/encode"
	"github.com/demarc/demarc/policy/policytest"
)

// TestDifferential asks the slow evaluator and the compiled tables the same
// questions about random policies.
func TestDifferential(t *testing.T) {
	const policies, probes = 2000, 100
	seen := map[abi.Reason]int{}
	for seed := range uint64(policies) {
		r := rand.New(rand.NewPCG(seed, 1))
		p := policytest.Random(r, policytest.Small)
		img, err := policy.Compile(p)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if err := image.Verify(img); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		index, evaluator := img.Index(), p.Evaluator()
		for range probes {
			q := policytest.RandomQuery(r, p)
			want, got := evaluator.Evaluate(q), index.Decide(q)
			if want != got {
				t.Fatalf("seed %d: %+v\nevaluator %+v\ntables    %+v", seed, q, want, got)
			}
			seen[want.Reason]++
		}
	}
	// Questions that reach only some of the answers would prove little.
	for _, reason := range []abi.Reason{
		abi.ByCrossing, abi.ByUnmanaged, abi.Unproven, abi.NoCrossingFor, abi.NotInWindow, abi.TagMissing,
		abi.PendingSubject, abi.Unbound, abi.TagBadMAC,
	} {
		if seen[reason] < policies*probes/1000 {
			t.Errorf("only %d of %d answers are %s", seen[reason], policies*probes, reason)
		}
	}
}

func TestCompileIsDeterministic(t *testing.T) {
	var first []byte
	for range 3 {
		img, err := policy.Compile(policytest.Random(rand.New(rand.NewPCG(7, 7)), policytest.Small))
		if err != nil {
			t.Fatal(err)
		}
		b, err := encode.Image(img)
		if err != nil {
			t.Fatal(err)
		}
		if first != nil && string(first) != string(b) {
			t.Fatal("the same policy gave two images")
		}
		first = b
	}
}

func TestCompileRules(t *testing.T) {
	p := policytest.Shop()
	p.Crossings = p.Crossings[1:3] // web-api, api-db
	img, err := policy.Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	ids := p.IDs()
	class := map[image.Port]uint16{}
	for _, r := range img.Ports {
		class[image.Port{Proto: r.Proto, Number: r.Low}] = r.Class
	}
	web, api, db := ids["web"], ids["api"], ids["postgres"]
	port8080, port5432 := class[image.Port{Proto: image.TCP, Number: 8080}], class[image.Port{Proto: image.TCP, Number: 5432}]
	identity := func(id image.ID) image.Peer { return image.MakePeer(image.PeerIdentity, uint32(id)) }
	proven := image.MakePeer(image.PeerProven, 0)
	want := map[image.RuleKey][]uint32{
		{Subject: web, Peer: identity(api), Class: port8080, Direction: image.Egress}:  {0},
		{Subject: web, Peer: proven, Class: port8080, Direction: image.Egress}:         {0},
		{Subject: api, Peer: identity(web), Class: port8080, Direction: image.Ingress}: {0},
		{Subject: api, Peer: proven, Class: port8080, Direction: image.Ingress}:        {0},
		{Subject: api, Peer: identity(db), Class: port5432, Direction: image.Egress}:   {1},
		{Subject: api, Peer: proven, Class: port5432, Direction: image.Egress}:         {1},
		{Subject: db, Peer: identity(api), Class: port5432, Direction: image.Ingress}:  {1},
		{Subject: db, Peer: proven, Class: port5432, Direction: image.Ingress}:         {1},
	}
	got := map[image.RuleKey][]uint32{}
	for _, r := range img.Rules {
		got[r.RuleKey] = r.Crossings
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rules (-want +got):\n%s", diff)
	}
}

func TestCompileRefuses(t *testing.T) {
	from, to := []policy.Term{policytest.Workload("web")}, []policy.Term{policytest.Workload("api")}
	window := func(i int) policy.Crossing {
		return policy.Crossing{
			Pos: policy.Pos{Line: 40 + i, Column: 3}, Name: fmt.Sprintf("try-%d", i), From: from, To: to,
			Ports: []image.Span{policytest.TCP(9000)}, Until: policytest.Epoch.Add(time.Duration(i) * time.Hour),
		}
	}
	for _, tt := range []struct {
		name   string
		change func(*policy.Policy)
		want   string // "" = compiles
	}{
		{"OK", func(*policy.Policy) {}, ""},
		{"OK four alternatives", func(p *policy.Policy) {
			for i := range 4 {
				p.Crossings = append(p.Crossings, window(i))
			}
		}, ""},
		{"OK the fifth can never decide", func(p *policy.Policy) {
			for i := range 5 {
				p.Crossings = append(p.Crossings, window(i))
			}
			p.Crossings[len(p.Crossings)-2].Until = time.Time{}
		}, ""},
		{"bad five alternatives", func(p *policy.Policy) {
			for i := range 5 {
				p.Crossings = append(p.Crossings, window(i))
			}
		}, "crossings try-0 (shop.yaml:40:3), try-1 (shop.yaml:41:3), try-2 (shop.yaml:42:3), try-3 (shop.yaml:43:3), " +
			"try-4 (shop.yaml:44:3) are limited in time and declare the same flow; at most 4 can"},
		{"bad window not in whole seconds", func(p *policy.Policy) {
			p.Crossings[3].Until = policytest.Epoch.Add(time.Millisecond)
		}, "shop.yaml:25:5: crossing break-glass: until: 2027-01-15T08:00:00.001Z is not a whole second"},
		{"bad window before 1970", func(p *policy.Policy) {
			p.Crossings[3].Since = time.Unix(0, 0).UTC()
		}, "shop.yaml:25:5: crossing break-glass: since: 1970-01-01T00:00:00Z is before 1970"},
		{"bad unit names with one beginning", func(p *policy.Policy) {
			for i, name := range []string{"api@*-a.service", "api@*-b.service", "ap*.socket", "apx*.service", "api@*.timer"} {
				p.Workloads[0].Match = append(p.Workloads[0].Match, policy.Selector{
					Pos: policy.Pos{Line: 10 + i}, Kind: image.SelectUnit, Path: name,
				})
			}
		}, `a unit whose name begins with "api@" is looked up among ap*.socket (shop.yaml:12), api@*.service (shop.yaml:0), ` +
			"api@*-a.service (shop.yaml:10), api@*-b.service (shop.yaml:11), api@*.timer (shop.yaml:14); at most 4 fit"},
		{"bad too many combinations", func(p *policy.Policy) {
			all := policy.Crossing{Name: "all", From: []policy.Term{policytest.Workload("web")}, Ports: []image.Span{{Proto: image.TCP, High: 65535}}}
			for i := range 5000 {
				name := fmt.Sprintf("x%05d", i)
				block := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)
				p.Networks = append(p.Networks, policy.Network{Name: name, Zone: "internet", CIDRs: []netip.Prefix{block}})
				all.To = append(all.To, policytest.Network(name))
				c := window(0)
				c.Name, c.Ports = name, []image.Span{policytest.TCP(uint16(10000 + i))}
				p.Crossings = append(p.Crossings, c)
			}
			p.Crossings = append(p.Crossings, all)
		}, "more than 16777216 combinations of subject, peer, ports and crossing; name zones instead of many workloads, " +
			"or declare fewer different ports"},
		{"bad too many zones", func(p *policy.Policy) {
			for i := range image.MaxZones {
				p.Zones = append(p.Zones, policy.Zone{Name: fmt.Sprintf("z%05d", i)})
			}
		}, "1028 zones, at most 1024 fit"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := policytest.Shop()
			tt.change(p)
			_, err := policy.Compile(p)
			got := ""
			if err != nil {
				got = strings.TrimPrefix(err.Error(), "compile policy shop: ")
			}
			if got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

func BenchmarkCompile10kx100k(b *testing.B) {
	p := policytest.Large(10_000, 100_000)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := policy.Compile(p); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify10kx100k(b *testing.B) {
	img, err := policy.Compile(policytest.Large(10_000, 100_000))
	if err != nil {
		b.Fatal(err)
	}
	encoded, err := encode.Image(img)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(encoded)))
	b.ReportAllocs()
	for b.Loop() {
		decoded, err := image.Decode(encoded)
		if err != nil {
			b.Fatal(err)
		}
		if err := image.Verify(decoded); err != nil {
			b.Fatal(err)
		}
	}
}
