package agent

import (
	"slices"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/image/encode"
	"github.com/demarc/demarc/policy/policytest"
)

// An image that decides otherwise than it declares is refused with the first question
// on which it does. Verify would refuse these, too: so they are compared without it.
func TestTranslationIsComparedAgain(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(*image.Image)
		want  string // "" = accepted
	}{
		{"OK", func(*image.Image) {}, ""},
		{"bad rule missing", func(img *image.Image) { img.Rules = img.Rules[1:] }, "the policy says allow (crossing break-glass), the image deny (no-crossing)"},
		{"bad rule of nobody's", func(img *image.Image) { img.Rules[0].Crossings = []uint32{99} }, "lists crossing 99 of 5"},
		{"bad term", func(img *image.Image) { img.Crossings[0].To[0].Index = 99 }, "read the declared policy: the image has a term of kind 1 that names 99"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			img, err := policy.Compile(policytest.Shop())
			if err != nil {
				t.Fatal(err)
			}
			tt.spoil(img)
			s := &service{log: zap.NewNop()}
			if err := s.translated(img); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("%v, want %s", err, tt.want)
			}
		})
	}
}

// The bytes that were good the last time are not judged again, and only they.
func TestJudgedOnce(t *testing.T) {
	said, log := observer.New(zap.InfoLevel)
	s := &service{log: zap.New(said)}
	image := func(version uint64) []byte {
		p := policytest.Shop()
		p.Version = version
		img, err := policy.Compile(p)
		if err != nil {
			t.Fatal(err)
		}
		b, err := encode.Image(img)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	spoilt := image(7)
	spoilt[len(spoilt)/2] ^= 1
	for _, tt := range []struct {
		name     string
		offered  []byte
		want     title
		err      string // "" = accepted
		compared int    // so far
	}{
		{"OK first", image(7), title{"shop", 7}, "", 1},
		{"OK again", image(7), title{"shop", 7}, "", 1},
		{"OK another", image(8), title{"shop", 8}, "", 2},
		{"bad bit", spoilt, title{}, "decode image: checksum does not match", 2},
		{"OK the other again", image(8), title{"shop", 8}, "", 2},
		{"OK the first, which is forgotten", image(7), title{"shop", 7}, "", 3},
	} {
		got, err := s.judge(tt.offered, func() error { return notAsked(nil) })
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && err.Error() != tt.err {
			t.Errorf("%s: %v, %v", tt.name, got, err)
		}
		if n := log.FilterMessage("the image decides as it declares").Len(); n != tt.compared {
			t.Errorf("%s: compared %d times, want %d", tt.name, n, tt.compared)
		}
	}
}

// Of 2,000 workloads each is asked about, whatever it takes, and the log says so.
func TestTranslationIsExhaustive(t *testing.T) {
	said, log := observer.New(zap.InfoLevel)
	s := &service{log: zap.New(said)}
	img, err := policy.Compile(policytest.Zoned(2000, 1, 210))
	if err != nil {
		t.Fatal(err)
	}
	const want = "2001 identities, 211 classes of ports and 66 of addresses, exhaustive by 4220018 questions"
	if err := s.translated(img); err != nil || log.Len() != 1 || log.All()[0].ContextMap()["coverage"] != want {
		t.Errorf("%v, %v, want %s", err, log.All(), want)
	}
	// Whoever comes last in any order is compared as the first.
	for _, spoilt := range []int{0, len(img.Rules) - 1} {
		bad := *img
		bad.Rules = slices.Delete(slices.Clone(img.Rules), spoilt, spoilt+1)
		if err := s.translated(&bad); err == nil || !strings.HasPrefix(err.Error(), "image and policy differ: subject ") {
			t.Errorf("without rule %s: %v", img.Rules[spoilt].RuleKey, err)
		}
	}
}
