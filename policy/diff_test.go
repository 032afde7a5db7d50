package policy_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/policytest"
)

func TestDiff(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*policy.Policy)
		want   string
	}{
		{"OK same", func(*policy.Policy) {}, ""},
		{"OK same meaning in other words", func(p *policy.Policy) {
			p.Crossings[0].Ports = []image.Span{policytest.TCP(443), policytest.TCP(80), policytest.TCP(443)}
			p.Crossings[0].Pos.Line = 99
		}, ""},
		{"OK version", func(p *policy.Policy) { p.Version = 8 }, "~ policy: version: 7 -> 8\n"},
		{"OK crossing removed", func(p *policy.Policy) { p.Crossings = append(p.Crossings[:2:2], p.Crossings[3:]...) },
			"- crossing api-db\n! newly denied: workload/api -> workload/postgres tcp/5432 (api-db)\n"},
		{"OK crossing added", func(p *policy.Policy) {
			c := p.Crossings[1]
			c.Name, c.From, c.Ports = "more", []policy.Term{policytest.Zone("edge")}, []image.Span{{Proto: image.UDP, Low: 53, High: 54}}
			p.Crossings = append(p.Crossings, c)
		}, "+ crossing more\n! newly allowed: workload/bastion -> workload/api udp/53-54 (more)\n" +
			"! newly allowed: workload/web -> workload/api udp/53-54 (more)\n"},
		{"OK crossing changed", func(p *policy.Policy) {
			p.Crossings[1].Ports = []image.Span{policytest.TCP(8081)}
			p.Crossings[1].Rate, p.Crossings[1].Burst = 0, 0
			p.Crossings[1].Until = time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC)
		}, "~ crossing web-api: ports: tcp/8080 -> tcp/8081\n" +
			"~ crossing web-api: limit: 360000/h, burst 100 -> none\n" +
			"~ crossing web-api: until: none -> 2099-01-01T00:00:00Z\n" +
			"! newly denied: workload/web -> workload/api tcp/8080 (web-api)\n" +
			"! newly allowed: workload/web -> workload/api tcp/8081 (web-api)\n"},
		{"OK order", func(p *policy.Policy) { p.Crossings[0], p.Crossings[1] = p.Crossings[1], p.Crossings[0] },
			"~ crossings: order: public-web, web-api, api-db, break-glass, 1 more -> web-api, public-web, api-db, break-glass, 1 more\n"},
		{"OK workload moved to another zone", func(p *policy.Policy) { p.Workloads[0].Zone = "data" },
			"~ workload api: zone: app -> data\n~ workload api: identity: 11625356 -> 13387535\n" +
				"! newly allowed: workload/bastion -> workload/api tcp/22 (break-glass)\n"},
		{"OK network", func(p *policy.Policy) { p.Networks[1].CIDRs[0] = netip.MustParsePrefix("192.0.2.0/25") },
			"~ network office: cidrs: 192.0.2.0/24 -> 192.0.2.0/25\n" +
				"! newly denied: 192.0.2.128 -> workload/bastion tcp/22 (office-ssh)\n"},
		{"OK unmanaged", func(p *policy.Policy) {
			p.Unmanaged.Inbound = false
			p.Networks = p.Networks[:1]
			p.Crossings = p.Crossings[:4]
		},
			"~ policy: unmanaged inbound: allow -> deny\n- network office\n- crossing office-ssh\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := policytest.Shop()
			p.Crossings[3].Until = time.Date(2098, 1, 1, 0, 0, 0, 0, time.UTC)
			changed := policytest.Shop()
			changed.Crossings[3].Until = p.Crossings[3].Until
			tt.change(changed)
			got := policy.Diff(p, changed)
			if tt.name == "OK unmanaged" { // the list of flows is long; its beginning says enough
				got.Verdicts = nil
			}
			if diff := cmp.Diff(tt.want, got.String()); diff != "" {
				t.Errorf("difference (-want +got):\n%s", diff)
			}
			if got.Empty() != (tt.want == "") {
				t.Errorf("empty: %v", got.Empty())
			}
		})
	}
}

// TestDiffLarge: a small change to a large policy is found without judging every
// flow, and the difference says that it did not.
func TestDiffLarge(t *testing.T) {
	old, changed := policytest.Large(2000, 5000), policytest.Large(2000, 5000)
	changed.Crossings = changed.Crossings[:4999]
	removed := old.Crossings[4999]
	got := policy.Diff(old, changed)
	if !got.Truncated || len(got.Changes) != 1 || len(got.Verdicts) != 1 {
		t.Fatalf("difference: %+v", got)
	}
	v := got.Verdicts[0]
	if v.From != removed.From[0].String() || v.To != removed.To[0].String() || v.By != removed.Name {
		t.Errorf("verdict change: %+v", v)
	}
}
