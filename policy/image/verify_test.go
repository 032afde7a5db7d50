package image_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/demarc/demarc/policy/image"
)

// TestVerify breaks each invariant of a good image. Zones: app data edge internet;
// workloads: api bastion postgres web; networks: anywhere office; crossings:
// public-web web-api api-db break-glass office-ssh.
func TestVerify(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(*image.Image)
		want  string
	}{
		{"OK", func(*image.Image) {}, ""},

		{"bad name", func(img *image.Image) { img.Name = "Shop" }, `policy name "Shop" is not valid`},
		{"bad version", func(img *image.Image) { img.Version = 0 }, "version is 0"},
		{"bad trust domain", func(img *image.Image) { img.TrustDomain = "a/b" }, `trust domain "a/b" is not valid`},
		{"bad not-after", func(img *image.Image) { img.NotAfter = -1 }, "not-after -1 is before 1970"},
		{"bad mode", func(img *image.Image) { img.Mode = 2 }, "mode 2 is unknown"},
		{"bad unmanaged zone", func(img *image.Image) { img.UnmanagedZone = 4 }, "unmanaged: zone 4 of 4"},
		{"bad too many zones", func(img *image.Image) { img.Zones = make([]image.Zone, image.MaxZones+1) }, "1025 zones, at most 1024 fit"},
		{"bad zone name", func(img *image.Image) { img.Zones[0].Name = "-app" }, `zone 0: name "-app" is not valid`},
		{"bad zone twice", func(img *image.Image) { img.Zones[1].Name = "app" }, `zone "app" is out of order`},

		{"bad workload order", func(img *image.Image) { img.Workloads[3].Name = "a" }, `workload "a" is out of order`},
		{"bad workload zone", func(img *image.Image) { img.Workloads[0].Zone = 4 }, `workload "api": zone 4 of 4`},
		{"bad identity", func(img *image.Image) { img.Workloads[0].ID = 16 }, `workload "api": identity 16, its name gives 11625356`},
		{"bad identity of another zone", func(img *image.Image) { img.Workloads[0].Zone = 1 },
			`workload "api": identity 11625356, its name gives 13387535`},
		{"bad role", func(img *image.Image) { img.Workloads[1].Roles[0].Name = "king" },
			`workload "bastion": role "king" until 0 is not valid`},
		{"bad role twice", func(img *image.Image) {
			img.Workloads[1].Roles = append(img.Workloads[1].Roles, img.Workloads[1].Roles[0])
		}, `workload "bastion": role "bastion" is out of order`},

		{"bad network zone", func(img *image.Image) { img.Networks[0].Zone = 9 }, `network "anywhere": zone 9 of 4`},
		{"bad host bits", func(img *image.Image) { img.Networks[1].CIDRs[0] = netip.MustParsePrefix("192.0.2.1/24") },
			`network "office": address block 192.0.2.1/24 is not valid`},
		{"bad v4-mapped block", func(img *image.Image) { img.Networks[1].CIDRs[0] = netip.MustParsePrefix("::ffff:192.0.2.0/120") },
			`network "office": address block ::ffff:192.0.2.0/120 is not valid`},
		{"bad block order", func(img *image.Image) { slices.Reverse(img.Networks[0].CIDRs) },
			`network "anywhere": address block ::/0 is out of order`},

		{"bad crossing name", func(img *image.Image) { img.Crossings[1].Name = "public-web" },
			`crossing 1: name "public-web" is not valid or not unique`},
		{"bad crossing number", func(img *image.Image) { img.Crossings[0].Number++ },
			`crossing "public-web": number 2756317056, its name gives 2756317055`},
		{"bad no from", func(img *image.Image) { img.Crossings[0].From = nil }, `crossing "public-web": from is empty`},
		{"bad term kind", func(img *image.Image) { img.Crossings[0].To[0].Kind = 6 }, `crossing "public-web": to: term of kind 6 names 3 of 0`},
		{"bad term index", func(img *image.Image) { img.Crossings[0].To[0].Index = 4 }, `crossing "public-web": to: term of kind 1 names 4 of 4`},
		{"bad any with index", func(img *image.Image) { img.Crossings[0].To[0] = image.Term{Kind: image.TermAny, Index: 1} },
			`crossing "public-web": to: term of kind 5 names 1 of 1`},
		{"bad term twice", func(img *image.Image) { img.Crossings[0].To = append(img.Crossings[0].To, img.Crossings[0].To[0]) },
			`crossing "public-web": to: term 1 is out of order`},
		{"bad no ports", func(img *image.Image) { img.Crossings[0].Ports = nil }, `crossing "public-web": no ports`},
		{"bad protocol", func(img *image.Image) { img.Crossings[0].Ports[0].Proto = 47 }, `crossing "public-web": ports 80-80 of protocol 47 are not valid`},
		{"bad ICMP type", func(img *image.Image) {
			img.Crossings[0].Ports = []image.Span{{Proto: image.ICMP, Low: 0, High: 256}}
		}, `crossing "public-web": ports 0-256 of protocol 1 are not valid`},
		{"bad ports touch", func(img *image.Image) { img.Crossings[0].Ports[1].Low = 81 },
			`crossing "public-web": ports 81-443 of protocol 6 are out of order`},
		{"bad need", func(img *image.Image) { img.Crossings[0].Need = 3 },
			`crossing "public-web": identity 3, nat 0, log 0, refuse 0, side 0: unknown value`},
		{"bad side", func(img *image.Image) { img.Crossings[0].Side = 3 },
			`crossing "public-web": identity 2, nat 0, log 0, refuse 0, side 3: unknown value`},
		{"bad rule at an end where its crossing does not hold", func(img *image.Image) { img.Crossings[1].Side = image.EgressSide },
			`rule for subject 11625356, peer 1/4408713, port class 4, direction 1: no crossing declares it`},
		{"bad no proof between workloads", func(img *image.Image) { img.Crossings[1].Need = image.NoProof },
			`crossing "web-api": asks no proof between workloads`},
		{"bad rate", func(img *image.Image) { img.Crossings[0].Rate = image.MaxRate + 1 },
			`crossing "public-web": limit of 3600000000001 an hour with burst 100 is not valid`},
		{"bad rate without burst", func(img *image.Image) { img.Crossings[0].Burst = 0 },
			`crossing "public-web": limit of 360000 an hour with burst 0 is not valid`},
		{"bad burst", func(img *image.Image) { img.Crossings[0].Burst = 1 << 60 },
			`crossing "public-web": burst 1152921504606846976 takes longer than the kernel's clock can count`},
		{"bad window", func(img *image.Image) { img.Crossings[3].Since = img.Crossings[3].Until },
			`crossing "break-glass": window from 1800003600 until 1800003600 is not valid`},
		{"bad purpose", func(img *image.Image) { img.Crossings[0].Purpose = "\x1b[2J" }, `crossing "public-web": purpose is not plain text`},

		{"bad selector workload", func(img *image.Image) { img.Selectors[0].Workload = 4 }, "selector 0: workload 4 of 4"},
		{"bad selector order", func(img *image.Image) { img.Selectors[0].Workload = 1 }, "selector 1 is out of order"},
		{"bad empty selector", func(img *image.Image) { img.Selectors[2] = image.Selector{Kind: image.SelectContainer} },
			`selector 2 of workload "api" is not valid`},
		{"bad selector with two kinds of field", func(img *image.Image) { img.Selectors[0].Namespace = "shop" },
			`selector 0 of workload "api" is not valid`},
		{"bad label order", func(img *image.Image) { slices.Reverse(img.Selectors[1].Labels) }, `selector 1 of workload "api" is not valid`},
		{"bad unit that is everything", func(img *image.Image) { img.Selectors[0].Path = "*.service" }, `selector 0 of workload "api" is not valid`},
		{"bad unit with two stars", func(img *image.Image) { img.Selectors[0].Path = "a*b*.service" }, `selector 0 of workload "api" is not valid`},
		{"bad unit suffix", func(img *image.Image) { img.Selectors[0].Path = "a*" + strings.Repeat("b", 20) + ".service" },
			`selector 0 of workload "api" is not valid`},
		{"bad unit twice", func(img *image.Image) {
			img.Selectors[5].Kind, img.Selectors[5].Path = image.SelectUnit, "api@*.service"
		},
			`workloads "api" and "postgres" both select unit api@*.service`},
		{"bad unit alternatives", func(img *image.Image) {
			for _, suffix := range []string{"a", "b", "c"} {
				img.Selectors = slices.Insert(img.Selectors, 0, image.Selector{Kind: image.SelectUnit, Path: "api@*-" + suffix + ".service"})
			}
			img.Selectors = slices.Insert(img.Selectors, 0, image.Selector{Kind: image.SelectUnit, Path: "ap*.socket"})
		}, `unit names beginning with "api@": 5, at most 4 fit`},
		{"bad path", func(img *image.Image) { img.Selectors[5].Path = "/lab/../x" }, `selector 5 of workload "postgres" is not valid`},
		{"bad nested path", func(img *image.Image) { img.Selectors[5].Path = "/lab/bastion/x" },
			`workloads "bastion" and "postgres" both select cgroup /lab/bastion/x`},

		{"bad port gap", func(img *image.Image) { img.Ports[2].High-- }, "ports: range 3 does not continue protocol 6 at 21"},
		{"bad port range missing", func(img *image.Image) { img.Ports = img.Ports[:len(img.Ports)-1] }, "ports: 0 of protocol 132 has no class"},
		{"bad port range twice", func(img *image.Image) { img.Ports = append(img.Ports, img.Ports[0]) }, "ports: 1 ranges too many"},
		{"bad port class skipped", func(img *image.Image) { img.Ports[0].Class = 1 }, "ports: range 0 has class 1, the next is 0"},
		{"bad port class in part", func(img *image.Image) { img.Crossings[1].Ports[0].High++ }, `crossing "web-api" covers a part of a port range`},
		{"bad port class shared", func(img *image.Image) {
			i := slices.IndexFunc(img.Ports, func(r image.PortRange) bool { return r.Low == 8080 })
			j := slices.IndexFunc(img.Ports, func(r image.PortRange) bool { return r.Low == 5432 })
			img.Ports[i].Class = img.Ports[j].Class
		}, `crossing "web-api" covers a part of port class 3`},

		{"bad address missing", func(img *image.Image) { img.Addresses = img.Addresses[:2] }, "addresses: 192.0.2.0/24 is not entry 2"},
		{"bad address too many", func(img *image.Image) {
			img.Addresses = append(img.Addresses, image.Prefix{Prefix: netip.MustParsePrefix("ff00::/8"), Class: 1})
		}, "addresses: ff00::/8 is in no network"},
		{"bad address class 0", func(img *image.Image) { img.Addresses[0].Class = 0 }, "addresses: ::/0 has class 0, the next is 1"},
		{"bad address class", func(img *image.Image) { img.Addresses[2].Class = 1 }, "addresses: 192.0.2.0/24 is not in the networks of class 1"},

		{"bad rule missing", func(img *image.Image) { img.Rules = img.Rules[1:] },
			"rule for subject 3897576, peer 2/1, port class 1, direction 0 is missing"},
		{"bad last rule missing", func(img *image.Image) { img.Rules = img.Rules[:len(img.Rules)-1] }, "is missing"},
		{"bad rule twice", func(img *image.Image) { img.Rules = slices.Insert(img.Rules, 1, img.Rules[0]) }, "no crossing declares it"},
		{"bad rule at the end", func(img *image.Image) {
			r := img.Rules[len(img.Rules)-1]
			r.Direction ^= 1
			img.Rules = append(img.Rules, r)
		}, "no crossing declares it"},
		{"bad rule of nobody", func(img *image.Image) { img.Rules[0].Subject = image.Kernel }, "no crossing declares it"},
		{"bad rule list", func(img *image.Image) { img.Rules[0].Crossings = []uint32{1} }, "lists crossings [1], declared are ["},
		{"bad rule without crossings", func(img *image.Image) { img.Rules[0].Crossings = nil }, "lists crossings [], declared are ["},
		{"bad rule with more", func(img *image.Image) { img.Rules[0].Crossings = []uint32{0, 1} }, "lists crossings [0 1], declared are ["},
	} {
		t.Run(tt.name, func(t *testing.T) {
			img := shop(t)
			tt.spoil(img)
			err := image.Verify(img)
			got := ""
			if err != nil {
				got = strings.TrimPrefix(err.Error(), "verify image: ")
			}
			if tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}
