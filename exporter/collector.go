package exporter

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/internal/version"
)

// Every series, with labels that take only declared names and fixed words, so that
// a policy bounds how many there are. docs/metrics.md describes them.
var (
	buildInfo  = series("build_info", "Build of this agent; always 1.", "version", "revision", "go")
	connected  = series("core_connected", "1 while the agent is connected to the core.")
	enforcing  = series("enforcing", "1 while every program is attached and an enforcing policy decides, as far as the agent knows.")
	policyInfo = series("policy_info", "Policy in force; always 1.", "name", "version", "digest", "mode")
	generation = series("policy_generation", "Grows with every change of what is in force.")
	applied    = series("policy_applied_timestamp_seconds", "When the policy in force was applied.")
	bindings   = series("bindings", "Cgroups bound to an identity.", "zone", "workload")
	verdicts   = series("verdicts_total", "Verdicts, counted in the kernel without loss.",
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
	all          = []*prometheus.Desc{
		buildInfo, connected, enforcing, policyInfo, generation, applied, bindings, verdicts, ringEvents, ringLost,
		received, flowsLost, readErrors, faults, findings, unseen, invWorkloads, invBound, invProblems,
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
	if p := s.Policy; p != nil {
		gauge(policyInfo, 1, p.Name, strconv.FormatUint(p.Version, 10), p.Digest, p.Mode)
		gauge(generation, float64(p.Generation))
		gauge(applied, float64(p.Applied.UnixMilli())/1000)
	}
	for _, b := range s.Bindings {
		gauge(bindings, float64(b.Count), b.Zone, b.Workload)
	}
	for _, v := range s.Verdicts {
		counter(verdicts, v.Count, v.Direction.String(), v.Verdict.String(), v.Reason.String(), v.Crossing,
			v.Source.Zone, v.Source.Workload, v.Destination.Zone, v.Destination.Workload)
	}
	for _, r := range s.Rings {
		counter(ringEvents, r.Made, r.Name)
		counter(ringLost, r.Lost, r.Name)
	}
	for ring, name := range [abi.Rings]string{abi.RingDenied: "denied", abi.RingAllowed: "allowed"} {
		counter(received, s.Received[ring], name)
		counter(flowsLost, s.Missed[ring], name)
	}
	counter(readErrors, s.ReadErrors)
	if s.Faults != nil {
		for i, n := range s.Faults {
			counter(faults, n, abi.Fault(i).String())
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

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
