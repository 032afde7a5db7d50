package policy

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/internal/yamlfile"
)

// suite is a test suite as it is written:
//
//	policy: shop.yaml          # beside the suite
//	cases:
//	  - {name: web reaches api, from: workload/web, to: workload/api, port: tcp/8080, expect: allow, crossing: web-api}
type suite struct {
	Policy string      `yaml:"policy"`
	Cases  []suiteCase `yaml:"cases"`
}

type suiteCase struct {
	Name     string    `yaml:"name"`
	From     string    `yaml:"from"`
	To       string    `yaml:"to"`
	Port     string    `yaml:"port"`
	At       time.Time `yaml:"at"`       // RFC 3339; absent = now
	Expect   string    `yaml:"expect"`   // allow or deny
	Reason   string    `yaml:"reason"`   // text that the reason must contain
	Crossing string    `yaml:"crossing"` // that must allow it
}

// SuiteResult is what became of a suite.
type SuiteResult struct {
	File   string       `json:"file"`
	Policy string       `json:"policy"`
	Cases  []CaseResult `json:"cases"`
}

// CaseResult is what became of one case.
type CaseResult struct {
	Name    string `json:"name"`
	Pass    bool   `json:"pass"`
	Message string `json:"message,omitempty"` // why it failed
	Answer  Answer `json:"answer"`
}

// Failed is the number of cases that did not pass.
func (s *SuiteResult) Failed() int {
	n := 0
	for _, c := range s.Cases {
		if !c.Pass {
			n++
		}
	}
	return n
}

// RunSuite runs a test suite. load reads the policy that the suite names; a
// relative path is taken from the directory of the suite. The error is about the
// suite or the policy; cases that fail are in the result.
func RunSuite(file string, src []byte, load func(path string) (*Policy, error)) (*SuiteResult, error) {
	var s suite
	doc, err := yamlfile.Decode(file, src, &s)
	if err != nil {
		return nil, err
	}
	if s.Policy == "" {
		return nil, doc.Errorf("$.policy", "name the policy to test: `policy: shop.yaml`", "policy is missing")
	}
	if len(s.Cases) == 0 {
		return nil, doc.Errorf("$.cases", "add at least one case", "no cases")
	}
	path := s.Policy
	if !filepath.IsAbs(path) {
		path = filepath.Join(filepath.Dir(file), path)
	}
	p, err := load(path)
	if err != nil {
		return nil, err
	}
	x := explainer{Evaluator: p.Evaluator(), ids: p.IDs()}
	result := &SuiteResult{File: file, Policy: path}
	for i, c := range s.Cases {
		at := fmt.Sprintf("$.cases[%d]", i)
		if c.Name == "" {
			return nil, doc.Errorf(at, "give each case a name", "case %d has no name", i+1)
		}
		var want abi.Verdict
		if err := want.UnmarshalText([]byte(c.Expect)); err != nil || want > abi.Allow {
			return nil, doc.Errorf(at+".expect", "write allow or deny", "case %s: expect is %q", c.Name, c.Expect)
		}
		if want == abi.Deny && c.Crossing != "" {
			return nil, doc.Errorf(at+".crossing", "remove crossing, or expect allow", "case %s: no crossing decides a denial", c.Name)
		}
		answer, err := x.explain(Probe{From: c.From, To: c.To, Port: c.Port, At: c.At})
		if err != nil {
			return nil, doc.Errorf(at, "", "case %s: %v", c.Name, err)
		}
		r := CaseResult{Name: c.Name, Answer: answer}
		switch {
		case answer.Verdict != want:
			r.Message = fmt.Sprintf("want %s, got %s: %s", want, answer.Verdict, answer.Reason)
		case c.Crossing != "" && answer.Crossing != c.Crossing:
			r.Message = fmt.Sprintf("want crossing %s, got %s", c.Crossing, orNone(answer.Crossing))
		case !strings.Contains(answer.Reason, c.Reason):
			r.Message = fmt.Sprintf("want a reason with %q, got %q", c.Reason, answer.Reason)
		default:
			r.Pass = true
		}
		result.Cases = append(result.Cases, r)
	}
	return result, nil
}

// SuiteFormats are the forms that Write knows.
var SuiteFormats = []string{"text", "tap", "junit", "json"}

// Write writes the result in one of SuiteFormats.
func (s *SuiteResult) Write(w io.Writer, format string) error {
	switch format {
	case "text":
		return s.writeText(w)
	case "tap":
		return s.writeTAP(w)
	case "junit":
		return s.writeJUnit(w)
	case "json":
		e := json.NewEncoder(w)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		return e.Encode(s)
	}
	return fmt.Errorf("unknown format %q: use one of %s", format, strings.Join(SuiteFormats, ", "))
}

func (s *SuiteResult) writeText(w io.Writer) error {
	var b strings.Builder
	for _, c := range s.Cases {
		if c.Pass {
			fmt.Fprintf(&b, "ok    %s\n", c.Name)
		} else {
			fmt.Fprintf(&b, "FAIL  %s: %s\n", c.Name, c.Message)
		}
	}
	fmt.Fprintf(&b, "%s: %d cases, %d failed\n", s.File, len(s.Cases), s.Failed())
	_, err := io.WriteString(w, b.String())
	return err
}

// writeTAP writes the Test Anything Protocol, version 13.
func (s *SuiteResult) writeTAP(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "TAP version 13\n1..%d\n", len(s.Cases))
	escape := strings.NewReplacer("\\", "\\\\", "#", "\\#", "\n", " ")
	for i, c := range s.Cases {
		if c.Pass {
			fmt.Fprintf(&b, "ok %d - %s\n", i+1, escape.Replace(c.Name))
		} else {
			fmt.Fprintf(&b, "not ok %d - %s\n# %s\n", i+1, escape.Replace(c.Name), strings.ReplaceAll(c.Message, "\n", " "))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// writeJUnit writes the XML that CI systems read as JUnit's.
func (s *SuiteResult) writeJUnit(w io.Writer) error {
	type failure struct {
		Message string `xml:"message,attr"`
	}
	type testcase struct {
		Name    string   `xml:"name,attr"`
		Class   string   `xml:"classname,attr"`
		Failure *failure `xml:"failure"`
	}
	type testsuite struct {
		XMLName  xml.Name   `xml:"testsuite"`
		Name     string     `xml:"name,attr"`
		Tests    int        `xml:"tests,attr"`
		Failures int        `xml:"failures,attr"`
		Cases    []testcase `xml:"testcase"`
	}
	out := testsuite{Name: s.File, Tests: len(s.Cases), Failures: s.Failed()}
	for _, c := range s.Cases {
		t := testcase{Name: c.Name, Class: s.Policy}
		if !c.Pass {
			t.Failure = &failure{c.Message}
		}
		out.Cases = append(out.Cases, t)
	}
	b, err := xml.MarshalIndent(out, "", "  ")
	if err != nil {
		return err
	}
	_, err = io.WriteString(w, xml.Header+string(b)+"\n")
	return err
}
