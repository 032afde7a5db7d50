package exporter

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/internal/version"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixed is a source that always says the same.
type fixed Snapshot

func (f fixed) Snapshot() Snapshot { return Snapshot(f) }

var full = fixed{
	Connected: true, Enforcing: true, State: "enforcing",
	Policy: &Policy{
		Name: "shop", Digest: "abc", Mode: "enforce", Version: 7, Generation: 12, Applied: time.Unix(1000, 500e6),
		Expires: time.Unix(2000, 0), Grants: []Grant{{"break-glass", time.Unix(1500, 0)}},
	},
	Core: &Core{
		Programs: 24, Attached: 23, Problems: 1, Limits: 2, Drifts: 4, Proved: time.Unix(1700, 250e6), Unconfirmed: time.Unix(1800, 0), Shadow: true,
		Keys: []Key{{Epoch: 1, Until: time.Unix(3000, 0), Sending: true}, {Epoch: 2, From: time.Unix(2900, 0)}},
	},
	Maps:    []Map{{"counts", 12, 65536}, {"bindings", 33, 16384}},
	Applies: Applies{Applied: 3, Refused: 2, Check: 250 * time.Millisecond, Core: 1500 * time.Millisecond},
	Verdicts: []Verdict{
		{Direction: abi.Egress, Verdict: abi.Deny, Reason: abi.NoCrossingFor, Source: Party{"edge", "web"}, Count: 4},
		{Direction: abi.Ingress, Verdict: abi.Allow, Reason: abi.ByCrossing, Crossing: "web-api", Source: Party{"edge", "web"}, Destination: Party{"app", "api"}, Count: 9},
	},
	Bindings:    []Bindings{{Party{"edge", "web"}, 2}, {Party{"", "unmanaged"}, 31}},
	Quarantined: []Party{{"app", "api"}},
	Rings:       []Ring{{"denied", 10, 1}, {"allowed", 20, 2}},
	Faults:      &[record.Faults]uint64{record.FaultStorage: 3},
	Inventory: &Inventory{
		Workloads: 3, Bound: 2, Problems: 1,
	},
	Received:   [record.Rings]uint64{9, 18},
	Missed:     [record.Rings]uint64{1, 2},
	ReadErrors: 5,
	Journal:    &Journal{Bytes: 1024, Max: 4096, Written: 70, Dropped: 6},
	Findings:   map[detect.Series]uint64{{Technique: "T1046", Severity: "medium", Zone: "edge", Workload: "web"}: 2, {Technique: "T1021.004", Severity: "low", Zone: "edge", Workload: "jump", SuppressedBy: "bastion"}: 1},
	Unseen:     6,
}

// build replaces what differs from one build to the next.
var build = regexp.MustCompile(`BUILD`)

func expected(series string) io.Reader {
	b := version.Get()
	return strings.NewReader(build.ReplaceAllLiteralString(series, `go="`+b.Go+`",revision="`+b.Revision+`",version="`+b.Version+`"`))
}

func TestCollectorExportsEverySeries(t *testing.T) {
	for _, c := range []struct {
		name   string
		source Source
		want   string
	}{
		{"OK full", full, `
# HELP demarc_agent_events_total Events that the agent read from a ring.
# TYPE demarc_agent_events_total counter
demarc_agent_events_total{ring="allowed"} 18
demarc_agent_events_total{ring="denied"} 9
# HELP demarc_agent_flows_lost_total Events missing between those that the agent read from a ring.
# TYPE demarc_agent_flows_lost_total counter
demarc_agent_flows_lost_total{ring="allowed"} 2
demarc_agent_flows_lost_total{ring="denied"} 1
# HELP demarc_agent_read_errors_total Times that the kernel's counters could not be read.
# TYPE demarc_agent_read_errors_total counter
demarc_agent_read_errors_total 5
# HELP demarc_applies_total Policies that this agent was asked to apply, by what became of them.
# TYPE demarc_applies_total counter
demarc_applies_total{result="applied"} 3
demarc_applies_total{result="refused"} 2
# HELP demarc_apply_duration_seconds How long the last policy took to apply; only after one.
# TYPE demarc_apply_duration_seconds gauge
demarc_apply_duration_seconds{step="check"} 0.25
demarc_apply_duration_seconds{step="core"} 1.5
# HELP demarc_bindings Cgroups bound to an identity.
# TYPE demarc_bindings gauge
demarc_bindings{workload="unmanaged",zone=""} 31
demarc_bindings{workload="web",zone="edge"} 2
# HELP demarc_build_info Build of this agent; always 1.
# TYPE demarc_build_info gauge
demarc_build_info{BUILD} 1
# HELP demarc_canary_timestamp_seconds When the canary last proved that the kernel enforces.
# TYPE demarc_canary_timestamp_seconds gauge
demarc_canary_timestamp_seconds 1700.25
# HELP demarc_change_deadline_timestamp_seconds When the unconfirmed change is taken back; only while there is one.
# TYPE demarc_change_deadline_timestamp_seconds gauge
demarc_change_deadline_timestamp_seconds 1800
# HELP demarc_shadow 1 while another policy is asked beside the one in force.
# TYPE demarc_shadow gauge
demarc_shadow 1
# HELP demarc_change_unconfirmed 1 while a change is in force for a time only.
# TYPE demarc_change_unconfirmed gauge
demarc_change_unconfirmed 1
# HELP demarc_core_connected 1 while the agent is connected to the core.
# TYPE demarc_core_connected gauge
demarc_core_connected 1
# HELP demarc_crossing_expiry_timestamp_seconds When a crossing ends; only for those that do.
# TYPE demarc_crossing_expiry_timestamp_seconds gauge
demarc_crossing_expiry_timestamp_seconds{crossing="break-glass"} 1500
# HELP demarc_detect_events_lost_total Events that no detector looked at.
# TYPE demarc_detect_events_lost_total counter
demarc_detect_events_lost_total 6
# HELP demarc_drift_total Things in the kernel that the core found changed by somebody else, since it started.
# TYPE demarc_drift_total counter
demarc_drift_total 4
# HELP demarc_enforcing 1 while every program is attached and an enforcing policy decides, as far as the agent knows.
# TYPE demarc_enforcing gauge
demarc_enforcing 1
# HELP demarc_faults_total Things that went wrong inside the kernel programs.
# TYPE demarc_faults_total counter
demarc_faults_total{fault="binding-full"} 0
demarc_faults_total{fault="counter-full"} 0
demarc_faults_total{fault="flow-full"} 0
demarc_faults_total{fault="handshake-full"} 0
demarc_faults_total{fault="limit-contended"} 0
demarc_faults_total{fault="port-full"} 0
demarc_faults_total{fault="replay-full"} 0
demarc_faults_total{fault="socket-storage"} 3
# HELP demarc_findings_total Findings, each once for every severity that it reached.
# TYPE demarc_findings_total counter
demarc_findings_total{severity="low",suppressed="bastion",technique="T1021.004",workload="jump",zone="edge"} 1
demarc_findings_total{severity="medium",suppressed="",technique="T1046",workload="web",zone="edge"} 2
# HELP demarc_inventory_bound Workloads of the inventory that have their identity.
# TYPE demarc_inventory_bound gauge
demarc_inventory_bound 2
# HELP demarc_inventory_problems Problems with the inventory.
# TYPE demarc_inventory_problems gauge
demarc_inventory_problems 1
# HELP demarc_inventory_workloads Workloads in the inventory.
# TYPE demarc_inventory_workloads gauge
demarc_inventory_workloads 3
# HELP demarc_journal_bytes Size of the journal.
# TYPE demarc_journal_bytes gauge
demarc_journal_bytes 1024
# HELP demarc_journal_dropped_total Flows that found no room in the journal, since the agent started.
# TYPE demarc_journal_dropped_total counter
demarc_journal_dropped_total 6
# HELP demarc_journal_flows_total Flows written to the journal since there is one.
# TYPE demarc_journal_flows_total counter
demarc_journal_flows_total 70
# HELP demarc_journal_max_bytes Size that the journal may have.
# TYPE demarc_journal_max_bytes gauge
demarc_journal_max_bytes 4096
# HELP demarc_limits What this host's kernel cannot do for demarc; demarc status says which.
# TYPE demarc_limits gauge
demarc_limits 2
# HELP demarc_map_entries Entries of a map of the kernel.
# TYPE demarc_map_entries gauge
demarc_map_entries{map="bindings"} 33
demarc_map_entries{map="counts"} 12
# HELP demarc_map_max_entries Entries that a map of the kernel has room for.
# TYPE demarc_map_max_entries gauge
demarc_map_max_entries{map="bindings"} 16384
demarc_map_max_entries{map="counts"} 65536
# HELP demarc_policy_applied_timestamp_seconds When the policy in force was applied.
# TYPE demarc_policy_applied_timestamp_seconds gauge
demarc_policy_applied_timestamp_seconds 1000.5
# HELP demarc_policy_expiry_timestamp_seconds When the policy in force expires; only if it does.
# TYPE demarc_policy_expiry_timestamp_seconds gauge
demarc_policy_expiry_timestamp_seconds 2000
# HELP demarc_policy_generation Grows with every change of what is in force.
# TYPE demarc_policy_generation gauge
demarc_policy_generation 12
# HELP demarc_policy_info Policy in force; always 1.
# TYPE demarc_policy_info gauge
demarc_policy_info{digest="abc",mode="enforce",name="shop",version="7"} 1
# HELP demarc_problems Problems that the core reports; demarc status says which.
# TYPE demarc_problems gauge
demarc_problems 1
# HELP demarc_programs Programs that have to be attached.
# TYPE demarc_programs gauge
demarc_programs 24
# HELP demarc_programs_attached Programs that the core found attached.
# TYPE demarc_programs_attached gauge
demarc_programs_attached 23
# HELP demarc_quarantined 1 for each workload that has its forensic crossings only.
# TYPE demarc_quarantined gauge
demarc_quarantined{workload="api",zone="app"} 1
# HELP demarc_ring_events_total Events made for a ring, lost ones included.
# TYPE demarc_ring_events_total counter
demarc_ring_events_total{ring="allowed"} 20
demarc_ring_events_total{ring="denied"} 10
# HELP demarc_ring_lost_total Events that found no room in a ring.
# TYPE demarc_ring_lost_total counter
demarc_ring_lost_total{ring="allowed"} 2
demarc_ring_lost_total{ring="denied"} 1
# HELP demarc_state 1 for the state of enforcement, 0 for the others.
# TYPE demarc_state gauge
demarc_state{state="degraded"} 0
demarc_state{state="enforcing"} 1
demarc_state{state="idle"} 0
demarc_state{state="observing"} 0
demarc_state{state="unknown"} 0
# HELP demarc_tag_key_expiry_timestamp_seconds When a tag key ends; only for keys that do.
# TYPE demarc_tag_key_expiry_timestamp_seconds gauge
demarc_tag_key_expiry_timestamp_seconds{epoch="1"} 3000
# HELP demarc_tag_key_send_timestamp_seconds From when on a tag key is sent with; only for keys that say so.
# TYPE demarc_tag_key_send_timestamp_seconds gauge
demarc_tag_key_send_timestamp_seconds{epoch="2"} 2900
# HELP demarc_tag_key_sending 1 for the tag key that is sent with, 0 for the others.
# TYPE demarc_tag_key_sending gauge
demarc_tag_key_sending{epoch="1"} 1
demarc_tag_key_sending{epoch="2"} 0
# HELP demarc_verdicts_total Verdicts, counted in the kernel without loss.
# TYPE demarc_verdicts_total counter
demarc_verdicts_total{crossing="",direction="egress",dst_workload="",dst_zone="",reason="no-crossing",src_workload="web",src_zone="edge",verdict="deny"} 4
demarc_verdicts_total{crossing="web-api",direction="ingress",dst_workload="api",dst_zone="app",reason="crossing",src_workload="web",src_zone="edge",verdict="allow"} 9
`},
		{"OK core away", fixed{State: "unknown"}, `
# HELP demarc_agent_events_total Events that the agent read from a ring.
# TYPE demarc_agent_events_total counter
demarc_agent_events_total{ring="allowed"} 0
demarc_agent_events_total{ring="denied"} 0
# HELP demarc_agent_flows_lost_total Events missing between those that the agent read from a ring.
# TYPE demarc_agent_flows_lost_total counter
demarc_agent_flows_lost_total{ring="allowed"} 0
demarc_agent_flows_lost_total{ring="denied"} 0
# HELP demarc_agent_read_errors_total Times that the kernel's counters could not be read.
# TYPE demarc_agent_read_errors_total counter
demarc_agent_read_errors_total 0
# HELP demarc_applies_total Policies that this agent was asked to apply, by what became of them.
# TYPE demarc_applies_total counter
demarc_applies_total{result="applied"} 0
demarc_applies_total{result="refused"} 0
# HELP demarc_build_info Build of this agent; always 1.
# TYPE demarc_build_info gauge
demarc_build_info{BUILD} 1
# HELP demarc_core_connected 1 while the agent is connected to the core.
# TYPE demarc_core_connected gauge
demarc_core_connected 0
# HELP demarc_detect_events_lost_total Events that no detector looked at.
# TYPE demarc_detect_events_lost_total counter
demarc_detect_events_lost_total 0
# HELP demarc_enforcing 1 while every program is attached and an enforcing policy decides, as far as the agent knows.
# TYPE demarc_enforcing gauge
demarc_enforcing 0
# HELP demarc_state 1 for the state of enforcement, 0 for the others.
# TYPE demarc_state gauge
demarc_state{state="degraded"} 0
demarc_state{state="enforcing"} 0
demarc_state{state="idle"} 0
demarc_state{state="observing"} 0
demarc_state{state="unknown"} 1
`},
	} {
		t.Run(c.name, func(t *testing.T) {
			registry := prometheus.NewPedanticRegistry()
			registry.MustRegister(Collector{c.source})
			if err := testutil.GatherAndCompare(registry, expected(c.want)); err != nil {
				t.Error(err)
			}
			if problems, err := testutil.GatherAndLint(registry); len(problems) > 0 || err != nil {
				t.Errorf("lint: %v, %v", problems, err)
			}
		})
	}
}

func TestProbes(t *testing.T) {
	for _, c := range []struct {
		name   string
		source fixed
		path   string
		code   int
		body   string
	}{
		{"OK alive without core", fixed{}, "/healthz", 200, "ok\n"},
		{"OK ready", full, "/readyz", 200, "ok\n"},
		{"bad core away", fixed{}, "/readyz", 503, "the core is not connected\n"},
		{"bad not enforcing", fixed{Connected: true}, "/readyz", 503, "not enforcing\n"},
	} {
		w := httptest.NewRecorder()
		Handler(c.source).ServeHTTP(w, httptest.NewRequest("GET", c.path, nil))
		if w.Code != c.code || w.Body.String() != c.body {
			t.Errorf("%s: %d %q", c.name, w.Code, w.Body)
		}
	}
}

func server(t *testing.T, webConfig string) *Server {
	t.Helper()
	s, err := NewServer("127.0.0.1:0", webConfig, full)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestServer(t *testing.T) {
	s := server(t, "")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	<-s.Ready()
	transport := &http.Transport{}
	res, err := (&http.Client{Transport: transport}).Get("http://" + s.Addr().String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(res.Body)
	res.Body.Close()
	if err != nil || !strings.Contains(string(b), "\ndemarc_enforcing 1\n") || !strings.Contains(string(b), "\ngo_goroutines ") {
		t.Errorf("metrics: %v\n%s", err, b)
	}
	transport.CloseIdleConnections()
	used, err := NewServer(s.Addr().String(), "", full)
	if err != nil {
		t.Fatal(err)
	}
	if err := used.Run(ctx); err == nil || !strings.HasPrefix(err.Error(), "listen on 127.0.0.1:") {
		t.Errorf("a used address: %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
