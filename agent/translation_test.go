package agent

import (
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
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
			said, log := observer.New(zap.InfoLevel)
			s := &service{log: zap.New(said)}
			err = s.translated(img, []byte(tt.name))
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("%v, want %s", err, tt.want)
			}
			again := s.translated(img, []byte(tt.name))
			if (again == nil) != (err == nil) {
				t.Errorf("the second time: %v", again)
			}
			if n := log.FilterMessage("the image decides as it declares").Len(); err == nil && n != 1 {
				t.Errorf("compared %d times", n)
			}
		})
	}
}

// What costs too much is compared in part, and that is said.
func TestTranslationIsBounded(t *testing.T) {
	img, err := policy.Compile(policytest.Large(200, 1000))
	if err != nil {
		t.Fatal(err)
	}
	c, err := new(policy.Memory).Check(img, 1000)
	if err != nil || c.Exhaustive || c.Subjects == 0 || c.Subjects >= c.Identities || !strings.Contains(c.String(), " of 201 identities") {
		t.Errorf("%+v, %v", c, err)
	}
	if c, err := new(policy.Memory).Check(img, mostQuestions); err != nil || !c.Exhaustive {
		t.Errorf("%+v, %v", c, err)
	}
}
