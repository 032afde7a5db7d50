package policy

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestErrorsAreOneAndMany(t *testing.T) {
	r := &reporter{file: "x.yaml", src: []byte("one\ntwo\n")}
	r.add(Pos{2, 2}, "", "second")
	r.add(Pos{1, 3}, "do it", "first")
	r.add(Pos{}, "", "whole")
	err := fmt.Errorf("apply: %w", r.err())
	const want = "apply: x.yaml: whole\n" +
		"x.yaml:1:3: first\n    one\n      ^\n    hint: do it\n" +
		"x.yaml:2:2: second\n    two\n     ^"
	if err.Error() != want {
		t.Errorf("got %s\nwant %s", err, want)
	}
	var all Errors
	var one *Error
	if !errors.As(err, &all) || len(all) != 3 || !errors.As(err, &one) || one.Msg != "whole" {
		t.Errorf("errors.As finds %v and %v", all, one)
	}
}

func TestErrorsAreBounded(t *testing.T) {
	r := &reporter{file: "x.yaml"}
	for range maxErrors + 7 {
		r.add(Pos{}, "", "bad")
	}
	text := r.err().Error()
	if got := strings.Count(text, "\n") + 1; got != maxErrors+1 {
		t.Errorf("%d lines", got)
	}
	if !strings.HasSuffix(text, "x.yaml: 7 more problems are not listed") {
		t.Errorf("ends in %q", text[len(text)-60:])
	}
}

func TestNearest(t *testing.T) {
	for _, tt := range []struct {
		word       string
		candidates []string
		want       string
	}{
		{"crossing", []string{"crossings", "zones"}, "did you mean crossings?"},
		{"form", []string{"from", "to", "ports"}, "did you mean from?"},
		{"x", []string{"y"}, ""},
		{"something", []string{"anything-else"}, ""},
		{"api", []string{"api-1", "apis"}, "did you mean apis?"},
		{"", []string{"a"}, ""},
	} {
		t.Run(tt.word, func(t *testing.T) {
			r := &reporter{}
			if got := r.nearest(tt.word, tt.candidates); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
