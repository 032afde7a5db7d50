package exporter

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/internal/version"
)

// Every series, with labels that take only declared names and fixed words, so that
// a policy bounds how many there are. docs/metrics.md describes them.
var (
	buildInfo   = series("build_info", "Build of this agent; always 1.", "version", "revision", "go")
	connected   = series("core_connected", "1 while the agent is connected to the core.")
	enforcing   = series("enforcing", "1 while every program is attached and an enforcing policy decides, as far as the agent knows.")
	state       = series("state", "1 for the state of enforcement, 0 for the others.", "state")
	policyInfo  = series("policy_info", "Policy in force; always 1.", "name", "version", "digest", "mode")
	generation  = series("policy_generation", "Grows with every change of what is in force.")
	applied     = series("policy_applied_timestamp_seconds", "When the policy in force was applied.")
	expires     = series("policy_expiry_timestamp_seconds", "When the policy in force expires; only if it does.")
	grants      = series("crossing_expiry_timestamp_seconds", "When a crossing ends; only for those that do.", "crossing")
	bindings    = series("bindings", "Cgroups bound to an identity.", "zone", "workload")
	quarantined = series("quarantined", "1 for each workload that has its forensic crossings only.", "zone", "workload")
	verdicts    = series("verdicts_total", "Verdicts, counted in the kernel without loss.",
		"direction", "verdict", "reason", "crossing", "src_zone", "src_workload", "dst_zone", "dst_workload")
	ringEvents   = series("ring_events_total", "Events made for a ring, lost ones included.", "ring")
	ringLost     = series("ring_lost_total", "Events that found no room in a ring.", "ring")
	received     = series("agent_events_total", "Events that the agent read from a ring.", "ring")
	flowsLost    = series("agent_flows_lost_total", "Events missing between those that the agent read from a ring.", "ring")
	readErrors   = series("agent_read_errors_total", "Times that the kernel's counters could not be read.")
	faults       = series("faults_total", "Things that went wrong inside the kernel programs.", "fault")
	findings     = series("findings_total", "Findings, each once for every severity that it reached.", "technique", "severity", "zone", "workload", "suppressed")
	unseen       = series("detect_events_lost_total", "Events that no detector looked at.")
	invWorkloads = series("inventory_workloads", "Workloads in the inventory.")
	invBound     = series("inventory_bound", "Workloads of the inventory that have their identity.")
	invProblems  = series("inventory_problems", "Problems with the inventory.")

	programs     = series("programs", "Programs that have to be attached.")
	attached     = series("programs_attached", "Programs that the core found attached.")
	problems     = series("problems", "Problems that the core reports; demarc status says which.")
	limits       = series("limits", "What this host's kernel cannot do for demarc; demarc status says which.")
	drift        = series("drift_total", "Things in the kernel that the core found changed by somebody else, since it started.")
	proved       = series("canary_timestamp_seconds", "When the canary last proved that the kernel enforces.")
	unconfirmed  = series("change_unconfirmed", "1 while a change is in force for a time only.")
	inShadow     = series("shadow", "1 while another policy is asked beside the one in force.")
	deadline     = series("change_deadline_timestamp_seconds", "When the unconfirmed change is taken back; only while there is one.")
	keyFrom      = series("tag_key_send_timestamp_seconds", "From when on a tag key is sent with; only for keys that say so.", "epoch")
	keyUntil     = series("tag_key_expiry_timestamp_seconds", "When a tag key ends; only for keys that do.", "epoch")
	keySending   = series("tag_key_sending", "1 for the tag key that is sent with, 0 for the others.", "epoch")
	mapEntries   = series("map_entries", "Entries of a map of the kernel.", "map")
	mapMax       = series("map_max_entries", "Entries that a map of the kernel has room for.", "map")
	applies      = series("applies_total", "Policies that this agent was asked to apply, by what became of them.", "result")
	applyTook    = series("apply_duration_seconds", "How long the last policy took to apply; only after one.", "step")
	journalBytes = series("journal_bytes", "Size of the journal.")
	journalMax   = series("journal_max_bytes", "Size that the journal may have.")
	journalFlows = series("journal_flows_total", "Flows written to the journal since there is one.")
	journalLost  = series("journal_dropped_total", "Flows that found no room in the journal, since the agent started.")

	all = []*prometheus.Desc{
		buildInfo, connected, enforcing, state, policyInfo, generation, applied, expires, grants, bindings, quarantined, verdicts, ringEvents, ringLost,
		received, flowsLost, readErrors, faults, findings, unseen, invWorkloads, invBound, invProblems,
		programs, attached, problems, limits, drift, proved, unconfirmed, inShadow, deadline, keyFrom, keyUntil, keySending,
		mapEntries, mapMax, applies, applyTook, journalBytes, journalMax, journalFlows, journalLost,
	}
)

func series(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("demarc_"+name, help, labels, nil)
}

// Collector makes metrics of a source's snapshots.
type Collector struct{ Source Source }

// Describe implements prometheus.Collector.
func (c Collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range all {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (c Collector) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	s := c.Source.Snapshot()
	b := version.Get()
	gauge(buildInfo, 1, b.Version, b.Revision, b.Go)
	gauge(connected, truth(s.Connected))
	gauge(enforcing, truth(s.Enforcing))
	for _, word := range States {
		gauge(state, truth(word == s.State), word)
	}
	if p := s.Policy; p != nil {
		gauge(policyInfo, 1, p.Name, strconv.FormatUint(p.Version, 10), p.Digest, p.Mode)
		gauge(generation, float64(p.Generation))
		gauge(applied, seconds(p.Applied))
		if !p.Expires.IsZero() {
			gauge(expires, seconds(p.Expires))
		}
		for _, g := range p.Grants {
			gauge(grants, seconds(g.Until), g.Crossing)
		}
	}
	if s.Core != nil {
		s.Core.collect(gauge, counter)
	}
	if j := s.Journal; j != nil {
		gauge(journalBytes, float64(j.Bytes))
		gauge(journalMax, float64(j.Max))
		counter(journalFlows, j.Written)
		counter(journalLost, j.Dropped)
	}
	for _, m := range s.Maps {
		gauge(mapEntries, float64(m.Entries), m.Name)
		gauge(mapMax, float64(m.Max), m.Name)
	}
	counter(applies, s.Applies.Applied, "applied")
	counter(applies, s.Applies.Refused, "refused")
	if s.Applies.Core > 0 {
		gauge(applyTook, s.Applies.Check.Seconds(), "check")
		gauge(applyTook, s.Applies.Core.Seconds(), "core")
	}
	for _, b := range s.Bindings {
		gauge(bindings, float64(b.Count), b.Zone, b.Workload)
	}
	for _, p := range s.Quarantined {
		gauge(quarantined, 1, p.Zone, p.Workload)
	}
	for _, v := range s.Verdicts {
		counter(verdicts, v.Count, v.Direction.String(), v.Verdict.String(), v.Reason.String(), v.Crossing,
			v.Source.Zone, v.Source.Workload, v.Destination.Zone, v.Destination.Workload)
	}
	for _, r := range s.Rings {
		counter(ringEvents, r.Made, r.Name)
		counter(ringLost, r.Lost, r.Name)
	}
	for ring, name := range [record.Rings]string{record.RingDenied: "denied", record.RingAllowed: "allowed"} {
		counter(received, s.Received[ring], name)
		counter(flowsLost, s.Missed[ring], name)
	}
	counter(readErrors, s.ReadErrors)
	if s.Faults != nil {
		for i, n := range s.Faults {
			counter(faults, n, record.Fault(i).String())
		}
	}
	for f, n := range s.Findings {
		counter(findings, n, f.Technique, f.Severity, f.Zone, f.Workload, f.SuppressedBy)
	}
	counter(unseen, s.Unseen)
	if i := s.Inventory; i != nil {
		gauge(invWorkloads, float64(i.Workloads))
		gauge(invBound, float64(i.Bound))
		gauge(invProblems, float64(i.Problems))
	}
}

func (c *Core) collect(gauge func(*prometheus.Desc, float64, ...string), counter func(*prometheus.Desc, uint64, ...string)) {
	gauge(programs, float64(c.Programs))
	gauge(attached, float64(c.Attached))
	gauge(problems, float64(c.Problems))
	gauge(limits, float64(c.Limits))
	counter(drift, c.Drifts)
	if !c.Proved.IsZero() {
		gauge(proved, seconds(c.Proved))
	}
	gauge(unconfirmed, truth(!c.Unconfirmed.IsZero()))
	gauge(inShadow, truth(c.Shadow))
	if !c.Unconfirmed.IsZero() {
		gauge(deadline, seconds(c.Unconfirmed))
	}
	for _, k := range c.Keys {
		epoch := strconv.Itoa(int(k.Epoch))
		if !k.From.IsZero() {
			gauge(keyFrom, seconds(k.From), epoch)
		}
		if !k.Until.IsZero() {
			gauge(keyUntil, seconds(k.Until), epoch)
		}
		gauge(keySending, truth(k.Sending), epoch)
	}
}

// seconds since 1970, to the millisecond: more would not survive being a float.
func seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
