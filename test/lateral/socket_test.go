package lateral_test

import (
	"testing"
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/test/netlab"
)

// Sockets that make packets, and those that read what is on the wire.
func TestSockets(t *testing.T) {
	const prompt = 20 * time.Second
	scenarios := quick([]scenario{
		{"nping --tcp", func(r *run) {
			r.tool("nping", "--send-ip", "--tcp", "-p", "80", "-c", "3", r.targets[0].IP4.String())
		}, "T1040", "raw-socket", detect.Medium, "nping", prompt, false},
		{"nping --icmp", func(r *run) {
			r.tool("nping", "--send-ip", "--icmp", "-c", "3", r.targets[0].IP4.String())
		}, "T1040", "raw-socket", detect.Medium, "nping", prompt, true},
		{"nping --arp, by frames", func(r *run) {
			r.tool("nping", "--arp", "-c", "20", r.targets[0].IP4.String())
		}, "T1040", "raw-socket", detect.Medium, "nping", prompt, true},
		{"tcpdump", func(r *run) {
			r.tool("tcpdump", "-n", "-i", "any", "-w", "/dev/null")
		}, "T1040", "raw-socket", detect.Medium, "tcpdump", prompt, false},
		{"ping by a raw socket", func(r *run) {
			r.tool("ping", "-n", "-c", "3", r.targets[0].IP4.String())
		}, "T1040", "raw-socket", detect.Low, "ping", prompt, false},
	})
	var workloads []string
	for i := range scenarios {
		workloads = append(workloads, workloadOf(i))
	}
	l := newLab(t, 1, workloads, dials, netlab.NodeOptions{})
	runAll(t, scenarios, func(i int, _ *scenario) *run { return &run{lab: l, workload: workloads[i]} })
}
