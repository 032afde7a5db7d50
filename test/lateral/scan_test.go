package lateral_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// Scans from a workload. It may open sockets, but none that makes packets of its
// own: nmap's connect scan is found for its contacts, and every other way for the
// socket that it needs, which is refused.
func TestScansFromWorkload(t *testing.T) {
	nmap := func(args string) func(*run) {
		return func(r *run) {
			args = strings.NewReplacer("TARGET6", r.targets[0].IP6.String(), "TARGET", r.targets[0].IP4.String()).Replace(args)
			r.tool("nmap", append([]string{"-n", "-Pn", "--max-retries", "0"}, strings.Fields(args)...)...)
		}
	}
	const prompt = 20 * time.Second
	scenarios := quick([]scenario{
		{"nmap -sT, one host", nmap("-sT -p 1-100 TARGET"), "T1046", "port-scan", detect.Medium, "nmap", prompt, false},
		{"nmap -sT -6, one host", nmap("-6 -sT -p 1-100 TARGET6"), "T1046", "port-scan", detect.Medium, "nmap", prompt, false},
		{"nmap -sT -T2, one host", nmap("-sT -T2 -p 1-100 TARGET"), "T1046", "port-scan", detect.Medium, "nmap", 45 * time.Second, true},
		{"nmap -sT -T3, one host", nmap("-sT -T3 -p 1-100 TARGET"), "T1046", "port-scan", detect.Medium, "nmap", prompt, true},
		{"nmap -sT -T4, one host", nmap("-sT -T4 -p 1-100 TARGET"), "T1046", "port-scan", detect.Medium, "nmap", prompt, true},
		{"nmap -sT --scan-delay 1s", nmap("-sT --scan-delay 1s -p 1-100 TARGET"), "T1046", "port-scan", detect.Medium, "nmap", 45 * time.Second, true},
		{"nmap -sT, one port of many hosts", nmap("-sT -p 8081 10.66.0.0/25"), "T1018", "host-sweep", detect.Medium, "nmap", prompt, false},
		{"nmap -sT, some ports of many hosts", nmap("-sT -p 21,25,80,443,8081 10.66.0.0/26"), "T1046", "port-scan", detect.Medium, "nmap", prompt, false},
		{"nmap -sS", nmap("-sS -p 1-100 TARGET"), "T1040", "raw-socket", detect.Medium, "nmap", prompt, false},
		{"nmap -sU", nmap("-sU -p 1-100 TARGET"), "T1040", "raw-socket", detect.Medium, "nmap", prompt, true},
		{"nmap -sA", nmap("-sA -p 1-100 TARGET"), "T1040", "raw-socket", detect.Medium, "nmap", prompt, true},
		{"nmap -sF", nmap("-sF -p 1-100 TARGET"), "T1040", "raw-socket", detect.Medium, "nmap", prompt, true},
		{"nmap -sX", nmap("-sX -p 1-100 TARGET"), "T1040", "raw-socket", detect.Medium, "nmap", prompt, true},
		{"nmap -sN", nmap("-sN -p 1-100 TARGET"), "T1040", "raw-socket", detect.Medium, "nmap", prompt, true},
		{"nmap -sS -f", nmap("-sS -f -p 1-100 TARGET"), "T1040", "raw-socket", detect.Medium, "nmap", prompt, true},
		{"nmap -sS -D", nmap("-sS -D 10.66.0.77,10.66.0.78 -p 1-100 TARGET"), "T1040", "raw-socket", detect.Medium, "nmap", prompt, true},
		{"nmap -sS -6", nmap("-6 -sS -p 1-100 TARGET6"), "T1040", "raw-socket", detect.Medium, "nmap", prompt, true},
	})
	var workloads []string
	for i := range scenarios {
		workloads = append(workloads, workloadOf(i))
	}
	// In a container nmap asks for a raw socket itself; beside a device of the host
	// it would take a packet socket first, whose frames demarc drops.
	l := &lab{t: t, lab: netlab.New(t)}
	host := l.lab.Host("host")
	l.targets = append(l.targets, l.lab.Namespace("target"))
	box := host.Routed("box")
	l.host = box.Namespace
	l.node = l.lab.Node(l.policy(workloads, ""), netlab.NodeOptions{Home: host.Namespace})
	l.dial()
	runAll(t, scenarios, func(i int, _ *scenario) *run { return &run{lab: l, workload: workloads[i]} })
	l.record()
}

// Scans from a machine without demarc: what reaches a workload's ports is judged
// there, whatever segments and fragments it is made of. The process is elsewhere.
func TestScansFromOutside(t *testing.T) {
	const ports = 20
	nmap := func(args string) func(*run) {
		return func(r *run) {
			args = strings.NewReplacer("HOST6", r.host.IP6.String(), "HOST", r.host.IP4.String()).Replace(args)
			r.tool("nmap", append([]string{"-n", "-Pn", "-p", fmt.Sprintf("7000-%d", 7000+ports-1), "--max-retries", "1"}, strings.Fields(args)...)...)
		}
	}
	const prompt = 20 * time.Second
	scenarios := quick([]scenario{
		{"nmap -sS from outside", nmap("-sS HOST"), "T1046", "port-scan", detect.Medium, "", prompt, false},
		{"nmap -sT from outside", nmap("-sT HOST"), "T1046", "port-scan", detect.Medium, "", prompt, true},
		{"nmap -sU from outside", nmap("-sU HOST"), "T1046", "port-scan", detect.Medium, "", 45 * time.Second, true},
		{"nmap -sA from outside", nmap("-sA HOST"), "T1046", "port-scan", detect.Medium, "", prompt, false},
		{"nmap -sF from outside", nmap("-sF HOST"), "T1046", "port-scan", detect.Medium, "", prompt, true},
		{"nmap -sX from outside", nmap("-sX HOST"), "T1046", "port-scan", detect.Medium, "", prompt, true},
		{"nmap -sN from outside", nmap("-sN HOST"), "T1046", "port-scan", detect.Medium, "", prompt, true},
		{"nmap -sS -f from outside", nmap("-sS -f HOST"), "T1046", "port-scan", detect.Medium, "", prompt, false},
		{"nmap -sS -D from outside", nmap("-sS -D 10.66.0.200,10.66.0.201 HOST"), "T1046", "port-scan", detect.Medium, "", prompt, true},
		{"nmap -sS -T2 from outside", nmap("-sS -T2 HOST"), "T1046", "port-scan", detect.Medium, "", 45 * time.Second, true},
		{"nmap -sS -T3 from outside", nmap("-sS -T3 HOST"), "T1046", "port-scan", detect.Medium, "", prompt, true},
		{"nmap -sS -T4 from outside", nmap("-sS -T4 HOST"), "T1046", "port-scan", detect.Medium, "", prompt, true},
		{"nmap -sS --scan-delay 1s from outside", nmap("-sS --scan-delay 1s HOST"), "T1046", "port-scan", detect.Medium, "", 45 * time.Second, true},
		{"nmap -sT -6 from outside", nmap("-6 -sT HOST6"), "T1046", "port-scan", detect.Medium, "", prompt, true},
		{"nmap -sU -6 from outside", nmap("-6 -sU HOST6"), "T1046", "port-scan", detect.Medium, "", 45 * time.Second, true},
		{"nmap -sS, one port of many hosts, from outside", func(r *run) {
			r.tool("nmap", "-n", "-Pn", "-sS", "-p", "7000", "--max-retries", "1", "10.66.7.1-40")
		}, "T1018", "host-sweep", detect.Medium, "", prompt, true},
		{"nmap -sS -6 from outside", nmap("-6 -sS HOST6"), "T1046", "port-scan", detect.Medium, "", prompt, false},
	})
	l := newLab(t, 1, nil, "", netlab.NodeOptions{})
	for i := range 40 {
		l.host.Address(netip.PrefixFrom(l.address(i), 16))
	}
	server := l.host.Probe(l.node.Cgroup("/lab/vault"))
	for port := range ports {
		server.Must(probe.Call{Op: "serve", Address: fmt.Sprintf(":%d", 7000+port)})
	}
	var sources []*netlab.Namespace
	for i := range scenarios {
		sources = append(sources, l.lab.Namespace(fmt.Sprintf("outside%d", i)))
	}
	runAll(t, scenarios, func(i int, _ *scenario) *run {
		return &run{lab: l, workload: fmt.Sprintf("outside%d", i), source: sources[i]}
	})
	l.record()
}
