package policy

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// checkFormat formats a policy and expects the same meaning, and nothing left to
// format.
func checkFormat(t *testing.T, p *Policy, src []byte) {
	t.Helper()
	once, err := Format(p.File, src)
	if err != nil {
		t.Fatalf("format:\n%s\n%v", src, err)
	}
	twice, err := Format(p.File, once)
	if err != nil {
		t.Fatalf("format again:\n%s\n%v", once, err)
	}
	if diff := cmp.Diff(string(once), string(twice)); diff != "" {
		t.Errorf("formatting again changes (-once +twice):\n%s", diff)
	}
	again, err := parse(p.File, once, corpusTime)
	if err != nil {
		t.Fatalf("formatted policy is refused:\n%s\n%v", once, err)
	}
	if diff := cmp.Diff(p, again, ignorePlaces); diff != "" {
		t.Errorf("the meaning changed (-before +after):\n%s", diff)
	}
	for _, line := range strings.Split(string(once), "\n") {
		if line != strings.TrimRight(line, " ") {
			t.Errorf("blanks at the end of %q", line)
		}
	}
}

func TestFormatKeepsTheMeaning(t *testing.T) {
	for name, src := range goodSources(t) {
		t.Run(name, func(t *testing.T) {
			p, err := parse(name, src, corpusTime)
			if err != nil {
				t.Fatal(err)
			}
			checkFormat(t, p, src)
		})
	}
}

func TestShopIsFormatted(t *testing.T) {
	src := goodSources(t)["shop.yaml"]
	out, err := Format("shop.yaml", src)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(src), string(out)); diff != "" {
		t.Errorf("(-file +formatted):\n%s", diff)
	}
}

func TestFormat(t *testing.T) {
	long := strings.Repeat("x", 100)
	for _, tt := range []struct{ name, in, want string }{
		{"OK indent", "a:\n    b: c\nd:\n- e\n-   f: g\n    h: i\n", "a:\n  b: c\nd:\n  - e\n  - f: g\n    h: i\n"},
		{"OK quotes", "a: \"b\"\n\"c\": 'd e'\n'e': \"5\"\nf: \"true\"\ng: \"a: b\"\nh: 'it''s'\ni: \"::/0\"\nj: \"\"\nk: \"a@*.service\"\nl: \"*\"\n",
			"a: b\nc: d e\ne: \"5\"\nf: \"true\"\ng: \"a: b\"\nh: \"it's\"\ni: \"::/0\"\nj: \"\"\nk: a@*.service\nl: \"*\"\n"},
		{"OK flow", "a:   {b: c,d:  [e,f], }\n", "a: {b: c, d: [e, f]}\n"},
		{"OK flow over lines", "a: {b: c,\n   d: e}\n", "a: {b: c, d: e}\n"},
		{"OK flow with a comment", "a: {b: c, # why\n   d: [e, # first\n  f]}\n", "a:\n  b: c # why\n  d:\n    - e # first\n    - f\n"},
		{"OK flow too long", "a: {b: " + long + ", c: " + long + "}\n", "a:\n  b: " + long + "\n  c: " + long + "\n"},
		{"OK comments", "# head\n\n\n# of a\na: b #tail\n  # before c\nc:\n  - d\n  # after d\n\n# foot\n",
			"# head\n\n# of a\na: b #tail\n# before c\nc:\n  - d\n# after d\n\n# foot\n"},
		{"OK comment on a key", "a: # why\n  b: c\nd: # list\n  - e\n", "a: # why\n  b: c\nd: # list\n  - e\n"},
		{"OK blank lines", "\n\na: b\n\n\n\nc: d\n\n\n", "a: b\n\nc: d\n"},
		{"OK header", "---\n# x\na: b\n...\n", "# x\na: b\n"},
		{"OK anchors", "a: &x [b]\nc: *x\nd: &y\n  e: f\n", "a: &x [b]\nc: *x\nd: &y\n  e: f\n"},
		{"OK folded text", "a: >-\n  b\n  c\nd: |\n  e\n  f\n", "a: b c\nd: \"e\\nf\\n\"\n"},
		{"OK empty", "a:\nb: {}\nc: []\n", "a:\nb: {}\nc: []\n"},
		{"OK anchors of items", "a:\n- &x\n  b: c\n- &y\n  - d\n- *x\n", "a:\n  - &x\n    b: c\n  - &y\n    - d\n  - *x\n"},
		{"OK list of lists", "a:\n- - b\n  - c\n- [d]\n", "a:\n  - - b\n    - c\n  - [d]\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Format("x.yaml", []byte(tt.in))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, string(got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			again, err := Format("x.yaml", got)
			if err != nil || string(again) != string(got) {
				t.Errorf("again: %v\n%s", err, again)
			}
		})
	}
	for _, tt := range []struct{ name, in, want string }{
		{"bad YAML", "a: [\n", "x.yaml:1:4: not YAML"},
		{"bad keys", "a: b\na: c\n", `x.yaml:2:1: key "a" is given twice`},
		{"bad characters", "a: \tb\n", "x.yaml:1:4: tab"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := Format("x.yaml", []byte(tt.in)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}
