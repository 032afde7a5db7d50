package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/test/netlab"
)

// Where the monitoring of a node listens, in its own namespace.
const (
	prometheusAt   = "127.0.0.1:9090"
	alertmanagerAt = "127.0.0.1:9093"
	receiverAt     = "127.0.0.1:9094"
)

// evaluation is the interval at which Prometheus looks at its rules, and scraped that
// at which it asks the agent.
const (
	evaluation = 3 * time.Second
	scraped    = time.Second
)

// monitored is a node that a real Prometheus scrapes, with the rules that demarc ships,
// and a real Alertmanager that delivers to a receiver of the test.
type monitored struct {
	*ends
	t        *testing.T
	http     *http.Client
	received chan notice
}

// notice is one alert that the receiver got.
type notice struct {
	Status      string            `json:"status"`
	Labels      map[string]string `json:"labels"`
	Annotations map[string]string `json:"annotations"`
	StartsAt    time.Time         `json:"startsAt"`
	got         time.Time
}

func newMonitored(t *testing.T, body string, o netlab.NodeOptions) *monitored {
	t.Helper()
	o.Metrics = metricsAt
	m := &monitored{ends: newEnds(t, body, o), t: t, received: make(chan notice, 100)}
	home := m.node.Home()
	transport := &http.Transport{DialContext: func(_ context.Context, network, address string) (c net.Conn, err error) {
		err = home.Do(func() error {
			c, err = net.DialTimeout(network, address, 5*time.Second)
			return err
		})
		return c, err
	}}
	m.http = &http.Client{Transport: transport, Timeout: 30 * time.Second}
	t.Cleanup(transport.CloseIdleConnections)
	m.receive()
	dir := filepath.Join(m.lab.Dir(), "monitoring")
	rules, err := filepath.Abs("../../deploy/prometheus")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(rules + "/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var shipped []string
	for _, f := range files {
		if !strings.HasSuffix(f, "_test.yaml") {
			shipped = append(shipped, strconv.Quote(f))
		}
	}
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return file
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	prometheus := write("prometheus.yaml", fmt.Sprintf(`global: {scrape_interval: %s, evaluation_interval: %s}
rule_files: [%s]
alerting: {alertmanagers: [{static_configs: [{targets: [%q]}]}]}
scrape_configs:
  - {job_name: demarc, static_configs: [{targets: [%q]}]}
`, scraped, evaluation, strings.Join(shipped, ", "), alertmanagerAt, metricsAt))
	alertmanager := write("alertmanager.yaml", fmt.Sprintf(`route: {receiver: test, group_by: ["..."], group_wait: 0s, group_interval: 1s}
receivers:
  - {name: test, webhook_configs: [{url: "http://%s/", send_resolved: true}]}
`, receiverAt))
	daemons := m.lab.Cgroup("monitoring")
	am := home.Start(daemons, netlab.Command{Path: "/usr/bin/prometheus-alertmanager", Dir: dir, Args: []string{
		"--config.file=" + alertmanager, "--storage.path=" + dir + "/alertmanager", "--web.listen-address=" + alertmanagerAt, "--cluster.listen-address=",
	}})
	m.up(am, alertmanagerAt)
	pm := home.Start(daemons, netlab.Command{Path: "/usr/bin/prometheus", Dir: dir, Args: []string{
		"--config.file=" + prometheus, "--storage.tsdb.path=" + dir + "/prometheus", "--web.listen-address=" + prometheusAt,
	}})
	m.up(pm, prometheusAt)
	m.await(`up{job="demarc"} == 1`)
	m.await("demarc_enforcing == 1")
	return m
}

// receive takes what Alertmanager delivers.
func (m *monitored) receive() {
	m.t.Helper()
	var l net.Listener
	if err := m.node.Home().Do(func() (err error) {
		l, err = net.Listen("tcp", receiverAt)
		return err
	}); err != nil {
		m.t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var body struct{ Alerts []notice }
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			m.t.Errorf("Alertmanager sent: %v", err)
		}
		for _, n := range body.Alerts {
			n.got = time.Now()
			m.received <- n
		}
	})}
	go func() { _ = server.Serve(l) }()
	m.t.Cleanup(func() { server.Close() })
}

// up waits until a server says that it is ready.
func (m *monitored) up(p *netlab.Process, at string) {
	m.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		res, err := m.http.Get("http://" + at + "/-/ready")
		if err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return
			}
		}
		select {
		case <-p.Ended():
			m.t.Fatalf("%s ended; it said:\n%s", p.Name, p.Output())
		default:
		}
		if time.Now().After(end) {
			m.t.Fatalf("%s is not ready: %v; it said:\n%s", p.Name, err, p.Output())
		}
	}
}

// sample is one result of a query.
type sample struct {
	Metric map[string]string
	Value  [2]any
	Values [][2]any
}

// query asks Prometheus.
func (m *monitored) query(expr string) (samples []sample) {
	m.t.Helper()
	res, err := m.http.Get("http://" + prometheusAt + "/api/v1/query?" + url.Values{"query": {expr}}.Encode())
	if err != nil {
		m.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		m.t.Fatal(err)
	}
	var answer struct {
		Error string
		Data  struct {
			ResultType string
			Result     json.RawMessage
		}
	}
	if err := json.Unmarshal(b, &answer); err != nil || answer.Error != "" {
		m.t.Fatalf("query %s: %v %s", expr, err, answer.Error)
	}
	if answer.Data.ResultType == "scalar" {
		m.t.Fatalf("query %s: a scalar has no series", expr)
	}
	if err := json.Unmarshal(answer.Data.Result, &samples); err != nil {
		m.t.Fatalf("query %s: %v in %s", expr, err, b)
	}
	return samples
}

// await waits until a query has a result.
func (m *monitored) await(expr string) []sample {
	m.t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if s := m.query(expr); len(s) > 0 {
			return s
		}
	}
	m.t.Fatalf("query %s: no result within a minute", expr)
	return nil
}

// first is when Prometheus first saw a series.
func (m *monitored) first(series string) time.Time {
	m.t.Helper()
	s := m.await(series + "[1h]")
	at, ok := s[0].Values[0][0].(float64)
	if !ok {
		m.t.Fatalf("%s: %v is no time", series, s[0].Values[0][0])
	}
	return time.UnixMilli(int64(at * 1000))
}

// The first refused flow of a host makes Prometheus fire within one interval of its
// evaluation, and Alertmanager deliver; a flow that is let through does not.
func TestAlertIsDelivered(t *testing.T) {
	m := newMonitored(t, cliBody, netlab.NodeOptions{})
	m.server.serve(7000)
	if !m.client.reaches(m.at4(7000)) {
		t.Fatal("the declared connection does not come about")
	}
	m.await(`demarc_verdicts_total{verdict="allow"}`)
	time.Sleep(evaluation + 2*scraped) // nothing can be waited for: an alert would be there by now
	select {
	case n := <-m.received:
		t.Fatalf("delivered without a refusal: %+v", n)
	default:
	}

	refused := time.Now()
	if m.client.reaches(m.at4(7001)) {
		t.Fatal("the undeclared connection came about")
	}
	var n notice
	select {
	case n = <-m.received:
	case <-time.After(time.Minute):
		t.Fatal("nothing was delivered within a minute")
	}
	want := map[string]string{
		"alertname": "DemarcDeniedCrossing", "severity": "warning", "instance": metricsAt, "reason": "no-crossing",
		"src_zone": "app", "src_workload": "web",
	}
	for name, value := range want {
		if n.Labels[name] != value {
			t.Errorf("label %s is %q, want %q", name, n.Labels[name], value)
		}
	}
	if n.Status != "firing" || !strings.HasSuffix(n.Annotations["runbook_url"], "/DemarcDeniedCrossing.md") || !strings.Contains(n.Annotations["summary"], "app/web") {
		t.Errorf("delivered %+v", n)
	}
	seen := m.first(`demarc_verdicts_total{verdict="deny"}`)
	t.Logf("refused; scraped after %v, firing after %v, delivered after %v", seen.Sub(refused), n.StartsAt.Sub(refused), n.got.Sub(refused))
	// Prometheus starts evaluations on time also on a busy machine, and notes when. What
	// it sees then are scrapes that have ended; seen is when one began.
	scrape, err := time.ParseDuration(fmt.Sprint(m.await(`max_over_time(scrape_duration_seconds{job="demarc"}[1m])`)[0].Value[1]) + "s")
	if err != nil {
		t.Fatal(err)
	}
	if late := n.StartsAt.Sub(seen); late > evaluation+scrape+100*time.Millisecond {
		t.Errorf("fired %v after the refusal was scraped, which takes %v, want %v", late, scrape, evaluation)
	}
	if late := n.got.Sub(n.StartsAt); late > evaluation {
		t.Errorf("delivered %v after it fired", late)
	}
}

// Every query of the dashboard has a result on a host where everything it shows has
// happened, and its variables are known.
func TestDashboard(t *testing.T) {
	keyring := filepath.Join(t.TempDir(), "keyring")
	const keys = `{"keys": [
  {"epoch": 1, "key": "000102030405060708090a0b0c0d0e0f", "until": "2035-01-01T00:00:00Z"},
  {"epoch": 2, "key": "f0e1d2c3b4a5968778695a4b3c2d1e0f", "accept": "2026-01-01T00:00:00Z", "send": "2026-01-01T00:00:01Z", "until": "2036-01-01T00:00:00Z"}
]}`
	if err := os.WriteFile(keyring, []byte(keys), 0o600); err != nil {
		t.Fatal(err)
	}
	const body = `crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000], log: all, until: 2036-01-01T00:00:00Z}
`
	m := newMonitored(t, body, netlab.NodeOptions{Keyring: keyring})
	m.server.serve(7000)
	change := strings.Replace(document(2, webAndDB+body), "{name: lab, ", "{name: lab, notAfter: 2037-01-01T00:00:00Z, ", 1)
	file := filepath.Join(m.lab.Dir(), "second.yaml")
	if err := os.WriteFile(file, []byte(change), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, problems, status := m.node.Demarc("apply", file, "--confirm-within", "1h"); status != 0 {
		t.Fatalf("apply: %d\n%s%s", status, out, problems)
	}
	if !m.client.reaches(m.at4(7000)) || m.client.reaches(m.at4(7001)) {
		t.Fatal("verdicts are not those of the policy")
	}
	for port := uint16(7100); port < 7150; port++ { // a scan
		m.client.reaches(m.at4(port))
	}
	m.await(`demarc_verdicts_total{verdict="deny"}`)
	m.await("demarc_findings_total")
	m.await("count_over_time(demarc_change_deadline_timestamp_seconds[1m]) > 2")

	text, err := os.ReadFile("../../deploy/grafana/demarc.json")
	if err != nil {
		t.Fatal(err)
	}
	type panel struct {
		Title   string
		Type    string
		Targets []struct{ Expr string }
	}
	var dashboard struct {
		Panels     []panel
		Templating struct {
			List []struct{ Name string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	known := map[string]string{"$__rate_interval": "1m", "$__range": "1h", "$datasource": "", "${datasource}": ""}
	for _, v := range dashboard.Templating.List {
		known["$"+v.Name] = ".*"
	}
	asked := 0
	for _, p := range dashboard.Panels {
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %q shows nothing", p.Title)
		}
		for _, target := range p.Targets {
			expr := target.Expr
			for name, value := range known {
				expr = strings.ReplaceAll(expr, name, value)
			}
			if strings.Contains(expr, "$") {
				t.Errorf("panel %q: unknown variable in %s", p.Title, target.Expr)
				continue
			}
			if asked++; len(m.query(expr)) == 0 {
				t.Errorf("panel %q: no data for %s", p.Title, target.Expr)
			}
		}
	}
	if asked < 20 {
		t.Errorf("only %d queries", asked)
	}
}
