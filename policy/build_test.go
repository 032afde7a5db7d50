package policy_test

import (
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/policytest"
)

func TestBuild(t *testing.T) {
	p := policytest.Shop()
	b, err := policy.Build(p)
	if err != nil {
		t.Fatal(err)
	}
	got, err := image.Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	want, err := policy.Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, comparePrefix); diff != "" {
		t.Errorf("built image (-compiled +decoded):\n%s", diff)
	}
}

func TestBuildRandom(t *testing.T) {
	for seed := range uint64(20) {
		if _, err := policy.Build(policytest.Random(rand.New(rand.NewPCG(seed, 2)), policytest.Small)); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

func TestCheckCoverage(t *testing.T) {
	for _, tt := range []struct {
		name   string
		policy *policy.Policy
		want   policy.Coverage
	}{
		{"OK small", policytest.Shop(), policy.Coverage{Identities: 5, Asked: 5, PortClasses: 5, Addresses: 3}},
		{"OK large", policytest.Large(1000, 5000), policy.Coverage{Identities: 1001, Asked: 1001, PortClasses: 1843, Addresses: 66}},
		{"OK each that is like others", policytest.Zoned(2000, 2, 8), policy.Coverage{Identities: 2001, Asked: 2001, PortClasses: 9, Addresses: 66}},
		{"OK one of each class", policytest.Zoned(2001, 2, 8), policy.Coverage{Identities: 2002, Asked: 3, Alike: 1999, PortClasses: 9, Addresses: 66}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			img, err := policy.Compile(tt.policy)
			if err != nil {
				t.Fatal(err)
			}
			got, err := policy.Check(tt.policy, img)
			if err != nil {
				t.Fatal(err)
			}
			if got.Questions < 100 {
				t.Errorf("only %d questions", got.Questions)
			}
			got.Questions = 0
			if got != tt.want {
				t.Errorf("coverage: %+v, want %+v", got, tt.want)
			}
		})
	}
}

// TestCheckFindsDifferences breaks an image in ways that a wrong compiler might,
// each of which changes an answer.
func TestCheckFindsDifferences(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(*image.Image)
		want  string
	}{
		{"bad rule missing", func(img *image.Image) { img.Rules = img.Rules[1:] }, "the policy says allow (crossing "},
		{"bad rule of another class", func(img *image.Image) { img.Rules[0].Class++ }, "image and policy differ"},
		{"bad crossing", func(img *image.Image) { img.Rules[0].Crossings = []uint32{1} }, "the image allow (crossing "},
		{"bad window", func(img *image.Image) { img.Crossings[3].Until++ }, "crossing break-glass: until: the policy says 2027-01-15T09:00:00Z, the image 2027-01-15T09:00:01Z"},
		{"bad unmanaged", func(img *image.Image) { img.UnmanagedInbound = false }, "unmanaged inbound: the policy says allow, the image deny"},
		{"bad address class", func(img *image.Image) {
			for i := range img.Addresses {
				img.Addresses[i].Class = 1
			}
		}, "the policy says allow (crossing office-ssh), the image deny"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := policytest.Shop()
			img, err := policy.Compile(p)
			if err != nil {
				t.Fatal(err)
			}
			tt.spoil(img)
			if _, err := policy.Check(p, img); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
}

var comparePrefix = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
