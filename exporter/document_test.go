package exporter

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v2"
)

const prometheusDir = "../deploy/prometheus"

// row is a metric as docs/metrics.md tells it.
type row struct{ Name, Type, Labels string }

// rule is one of an alert file.
type rule struct {
	Alert       string
	Expr        string
	Labels      map[string]string
	Annotations map[string]string
}

// shipped are the alerts of every rule file.
func shipped(t *testing.T) (rules []rule) {
	t.Helper()
	files, err := filepath.Glob(prometheusDir + "/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("rule files: %v, %v", files, err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.yaml") {
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var document struct{ Groups []struct{ Rules []rule } }
		if err := yaml.Unmarshal(text, &document); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		for _, g := range document.Groups {
			rules = append(rules, g.Rules...)
		}
	}
	return rules
}

// TestDocumentation holds docs/metrics.md to what is exported: every metric with its
// type and labels, and the alerts that use it.
func TestDocumentation(t *testing.T) {
	text, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(Collector{full})
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	types := map[string]string{}
	for _, f := range families {
		types[f.GetName()] = strings.ToLower(f.GetType().String())
	}
	var documented, exported []row
	alerts := map[string][]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(demarc_[a-z_]+)` \\| ([a-z]+) \\|([a-z_, ]*)\\| .* \\|([A-Za-z, ]*)\\|$").FindAllStringSubmatch(string(text), -1) {
		documented = append(documented, row{m[1], m[2], strings.TrimSpace(m[3])})
		if used := strings.TrimSpace(m[4]); used != "" {
			alerts[m[1]] = strings.Split(used, ", ")
		}
	}
	desc := regexp.MustCompile(`fqName: "([^"]+)".*variableLabels: \{([^}]*)\}`)
	for _, d := range all {
		m := desc.FindStringSubmatch(d.String())
		exported = append(exported, row{m[1], types[m[1]], strings.ReplaceAll(m[2], ",", ", ")})
	}
	byName := func(a, b row) int { return strings.Compare(a.Name, b.Name) }
	slices.SortFunc(documented, byName)
	slices.SortFunc(exported, byName)
	if diff := cmp.Diff(exported, documented); diff != "" {
		t.Errorf("docs/metrics.md (-exported +documented):\n%s", diff)
	}

	used := map[string][]string{}
	for _, r := range shipped(t) {
		for _, name := range regexp.MustCompile(`demarc_[a-z_]+`).FindAllString(r.Expr, -1) {
			if !slices.Contains(used[name], r.Alert) {
				used[name] = append(used[name], r.Alert)
			}
		}
	}
	for name, want := range used {
		if got := alerts[name]; !cmp.Equal(want, got) {
			t.Errorf("docs/metrics.md: %s is used by %s, not by %q", name, strings.Join(want, ", "), got)
		}
		delete(alerts, name)
	}
	for name, said := range alerts {
		t.Errorf("docs/metrics.md: %s is used by no alert, not by %q", name, said)
	}
}

// TestAlertsAreWhole says that every alert has what an operator who is woken needs,
// and a test of its own.
func TestAlertsAreWhole(t *testing.T) {
	var tests []byte
	files, err := filepath.Glob(prometheusDir + "/*_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		tests = append(tests, text...)
	}
	pages := map[string]bool{}
	for _, r := range shipped(t) {
		if !slices.Contains([]string{"info", "warning", "critical"}, r.Labels["severity"]) {
			t.Errorf("%s: severity %q", r.Alert, r.Labels["severity"])
		}
		if r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
			t.Errorf("%s: no summary or description", r.Alert)
		}
		page := r.Alert + ".md"
		pages[page] = true
		if want := "https://github.com/demarc/demarc/blob/main/docs/runbooks/" + page; r.Annotations["runbook_url"] != want {
			t.Errorf("%s: runbook_url %q, want %q", r.Alert, r.Annotations["runbook_url"], want)
		}
		text, err := os.ReadFile("../docs/runbooks/" + page)
		if err != nil {
			t.Error(err)
			continue
		}
		if !strings.HasPrefix(string(text), "# "+r.Alert+"\n") {
			t.Errorf("%s: its page has another title", r.Alert)
		}
		for _, section := range []string{"\n## What it means\n", "\n## Look\n", "\n## Mend\n"} {
			if !strings.Contains(string(text), section) {
				t.Errorf("%s: its page has no section %q", r.Alert, strings.TrimSpace(section))
			}
		}
		if n := bytes.Count(tests, []byte("alertname: "+r.Alert+"\n        exp_alerts:")); n == 0 {
			t.Errorf("%s: no test lets it fire", r.Alert)
		}
	}
	kept, err := os.ReadDir("../docs/runbooks")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range kept {
		if !pages[page.Name()] && page.Name() != "README.md" {
			t.Errorf("docs/runbooks/%s: there is no such alert", page.Name())
		}
	}
}

// promtool runs Prometheus' own tool, of the distribution's package prometheus.
func promtool(t *testing.T, stdin io.Reader, args ...string) {
	t.Helper()
	c := exec.Command("promtool", args...)
	c.Stdin = stdin
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func TestPromtool(t *testing.T) {
	files, err := filepath.Glob(prometheusDir + "/*.yaml")
	if err != nil || len(files) < 2 {
		t.Fatalf("rule files: %v, %v", files, err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.yaml") {
			promtool(t, nil, "test", "rules", file)
		} else {
			promtool(t, nil, "check", "rules", "--lint=all", "--lint-fatal", file)
		}
	}
	w := httptest.NewRecorder()
	Handler(full).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	ours := regexp.MustCompile(`(?m)^(# (HELP|TYPE) )?demarc_.*\n`).FindAllString(w.Body.String(), -1)
	if len(ours) == 0 {
		t.Fatal("no metrics")
	}
	promtool(t, strings.NewReader(strings.Join(ours, "")), "check", "metrics")
}

// TestOpenMetrics says that a scraper that asks for OpenMetrics gets it, and one that
// does not gets the text format.
func TestOpenMetrics(t *testing.T) {
	for _, c := range []struct{ accept, format, end string }{
		{"application/openmetrics-text; version=1.0.0", "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores", "# EOF\n"},
		{"", "text/plain; version=0.0.4; charset=utf-8; escaping=underscores", "\n"},
	} {
		r := httptest.NewRequest("GET", "/metrics", nil)
		r.Header.Set("Accept", c.accept)
		w := httptest.NewRecorder()
		Handler(full).ServeHTTP(w, r)
		body := w.Body.String()
		if w.Code != http.StatusOK || w.Header().Get("Content-Type") != c.format || !strings.HasSuffix(body, c.end) {
			t.Errorf("Accept %q: %d %q, ends %q", c.accept, w.Code, w.Header().Get("Content-Type"), body[max(0, len(body)-20):])
		}
		if counter := fmt.Sprintf("\ndemarc_drift_total %s\n", map[bool]string{true: "4.0", false: "4"}[c.accept != ""]); !strings.Contains(body, counter) {
			t.Errorf("Accept %q: no line %q", c.accept, strings.TrimSpace(counter))
		}
	}
}
