package policy_test

import (
	"strings"
	"testing"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/policytest"
)

func TestProve(t *testing.T) {
	var (
		workload, zone, network = policytest.Workload, policytest.Zone, policytest.Network
		tcp                     = func(n uint16) *image.Port { return &image.Port{Proto: image.TCP, Number: n} }
		never                   = func(from, to policy.Term, hops int, port *image.Port) policy.Assertion {
			return policy.Assertion{Pos: policy.Pos{Line: 40, Column: 5}, Never: true, From: from, To: to, Hops: hops, Port: port}
		}
		allow = func(from, to policy.Term, port *image.Port) policy.Assertion {
			return policy.Assertion{Pos: policy.Pos{Line: 40, Column: 5}, From: from, To: to, Port: port}
		}
		add = func(from, to policy.Term, ports ...image.Span) func(*policy.Policy) {
			return func(p *policy.Policy) {
				p.Crossings = append(p.Crossings, policy.Crossing{
					Pos: policy.Pos{Line: 30 + len(p.Crossings), Column: 5}, Name: "more", From: []policy.Term{from}, To: []policy.Term{to}, Ports: ports,
				})
			}
		}
	)
	for _, tt := range []struct {
		name      string
		assertion policy.Assertion
		change    func(*policy.Policy)
		want      string // "" = holds
	}{
		{"OK never in one hop", never(zone("internet"), zone("data"), 1, nil), nil, ""},
		{"OK never in one hop, two are needed", never(zone("internet"), zone("app"), 1, nil), nil, ""},
		{"bad never in three hops, two are enough", never(zone("internet"), zone("data"), 3, nil), nil,
			"never zone/internet to zone/data: network/anywhere reaches workload/bastion by crossing office-ssh (shop.yaml:26), " +
				"then workload/bastion reaches workload/postgres by crossing break-glass (shop.yaml:25)"},
		{"OK never on another port", never(zone("internet"), zone("data"), 3, tcp(9)), nil, ""},
		{"bad never, the port is of the last hop", never(zone("internet"), zone("data"), 3, tcp(5432)), nil,
			"never zone/internet to zone/data: network/anywhere reaches workload/web by crossing public-web (shop.yaml:22), " +
				"then workload/web reaches workload/api by crossing web-api (shop.yaml:23), " +
				"then workload/api reaches workload/postgres by crossing api-db (shop.yaml:24)"},
		{"bad never through a closed window", never(workload("bastion"), workload("postgres"), 1, nil), nil,
			"never workload/bastion to workload/postgres: workload/bastion reaches workload/postgres by crossing break-glass (shop.yaml:25)"},
		{"bad never by an overlapping network", never(network("office"), workload("web"), 1, nil), nil,
			"never network/office to workload/web: network/office reaches workload/web by crossing public-web (shop.yaml:22)"},
		{"OK never, no exit to a network", never(workload("api"), workload("web"), 1, nil), nil, ""},
		{"bad never by the addresses of both", never(workload("api"), workload("web"), 1, nil),
			add(workload("api"), network("office"), policytest.TCP(443)),
			"never workload/api to workload/web: workload/api reaches workload/web by crossing more (shop.yaml:35) and crossing public-web (shop.yaml:22)"},
		{"OK never by addresses, no port in common", never(workload("api"), workload("web"), 1, nil),
			add(workload("api"), network("office"), image.Span{Proto: image.TCP, Low: 81, High: 442}, image.Span{Proto: image.UDP, Low: 80, High: 80}), ""},
		{"OK never by addresses, not on the port", never(workload("api"), workload("web"), 1, tcp(80)),
			add(workload("api"), network("office"), policytest.TCP(443)), ""},
		{"bad never by unmanaged", never(zone("internet"), workload("api"), 2, nil), func(p *policy.Policy) {
			p.Crossings = p.Crossings[1:]
			add(policytest.Unmanaged(), workload("api"), policytest.TCP(1))(p)
		}, "never zone/internet to workload/api: network/anywhere reaches unmanaged by what unmanaged processes may do, " +
			"then unmanaged reaches workload/api by crossing more (shop.yaml:34)"},
		{"bad never by any", never(network("office"), workload("api"), 1, nil), add(policytest.Any(), workload("api"), policytest.TCP(1)),
			"never network/office to workload/api: network/office reaches workload/api by crossing more (shop.yaml:35)"},
		{"bad never to oneself", never(zone("app"), zone("app"), 1, nil), add(zone("app"), zone("app"), policytest.TCP(1)),
			"never zone/app to zone/app: workload/api reaches workload/api by crossing more (shop.yaml:35)"},
		{"bad never through an address", never(workload("postgres"), workload("web"), 2, nil),
			add(workload("postgres"), network("office"), policytest.TCP(7)),
			"never workload/postgres to workload/web: workload/postgres reaches network/anywhere by crossing more (shop.yaml:35), " +
				"then network/anywhere reaches workload/web by crossing public-web (shop.yaml:22)"},

		{"OK allow", allow(workload("web"), workload("api"), tcp(8080)), nil, ""},
		{"OK allow from a network", allow(network("anywhere"), workload("web"), tcp(80)), nil, ""},
		{"OK allow from a zone", allow(zone("app"), zone("data"), tcp(5432)), nil, ""},
		{"OK allow unmanaged", allow(policytest.Unmanaged(), network("office"), tcp(80)), nil, ""},
		{"bad allow", allow(workload("web"), workload("postgres"), tcp(5432)), nil,
			"allow workload/web to workload/postgres: no crossing lets workload/web reach workload/postgres on tcp/5432; " +
				"nearest: api-db (shop.yaml:24) from workload/api"},
		{"bad allow one of a zone", allow(zone("edge"), workload("api"), tcp(8080)), nil,
			"allow zone/edge to workload/api: no crossing lets workload/bastion reach workload/api on tcp/8080; " +
				"nearest: web-api (shop.yaml:23) from workload/web"},
		{"bad allow a part of a network", allow(network("anywhere"), workload("bastion"), tcp(22)), nil,
			"allow network/anywhere to workload/bastion: no crossing lets workload/bastion accept 0.0.0.0 on tcp/22; " +
				"nearest: office-ssh (shop.yaml:26) from network/office"},
		{"bad allow by a network that may hold it", allow(workload("api"), workload("web"), tcp(80)), nil,
			"allow workload/api to workload/web: no crossing lets workload/api reach workload/web on tcp/80"},
		{"bad allow any", allow(policytest.Any(), workload("web"), tcp(80)), nil, "allow any to workload/web: any is nobody in particular"},
		{"bad allow without port", allow(workload("web"), workload("api"), nil), nil, "allow workload/web to workload/api: names no port"},
		{"bad allow elsewhere", allow(network("office"), network("anywhere"), tcp(80)), nil,
			"allow network/office to network/anywhere: neither end is a workload or unmanaged, so nothing here judges it"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := policytest.Shop()
			p.Source = nil // no excerpt in the messages
			if tt.change != nil {
				tt.change(p)
			}
			p.Assertions = []policy.Assertion{tt.assertion}
			got := ""
			if err := p.Prove(); err != nil {
				got, _, _ = strings.Cut(err.Error(), "\n")
				got = strings.TrimPrefix(got, "shop.yaml:40:5: assertion does not hold: ")
			}
			if !strings.HasPrefix(got, tt.want) || tt.want == "" && got != "" {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}
