package lateral_test

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/test/netlab"
)

// lab is a host that demarc guards, and machines around it without:
//
//	host (workloads of /lab) ----+
//	target1, target2, target3 ---+-- switch
//
// Each scenario has a workload of its own, so that what it finds is told apart.
type lab struct {
	t       *testing.T
	lab     *netlab.Lab
	host    *netlab.Namespace
	targets []*netlab.Namespace
	node    *netlab.Node
	client  *api.Client
	version int
}

// newLab starts a node with workloads, and the crossings that lead from them.
func newLab(t *testing.T, targets int, workloads []string, more string, options netlab.NodeOptions) *lab {
	t.Helper()
	l := &lab{t: t, lab: netlab.New(t)}
	l.host = l.lab.Namespace("host")
	for i := range targets {
		l.targets = append(l.targets, l.lab.Namespace(fmt.Sprintf("target%d", i+1)))
	}
	options.Home = l.host
	l.node = l.lab.Node(l.policy(workloads, more), options)
	l.dial()
	return l
}

func (l *lab) dial() {
	l.t.Helper()
	var err error
	l.client, err = api.NewClient(strings.TrimPrefix(l.node.DemarcEnv()[0], "DEMARC_SERVER="))
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(l.client.Close)
}

// policy declares workloads, each by the cgroup of its name.
func (l *lab) policy(workloads []string, more string) string {
	l.version++
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: lateral, version: %d}
trustDomain: lab.example
zones: {outside: {trust: 0}, edge: {trust: 10}, data: {trust: 30}}
networks:
  target: {zone: outside, cidrs: [%s/32, "%s/128"]}
workloads:
  vault: {zone: data, match: [{cgroup: /lab/vault}]}
`, l.version, l.targets[0].IP4, l.targets[0].IP6)
	for _, w := range workloads {
		name, roles, _ := strings.Cut(w, " ")
		if roles != "" {
			roles = ", roles: [" + roles + "]"
		}
		fmt.Fprintf(&b, "  %s: {zone: edge, match: [{cgroup: /lab/%s}]%s}\n", name, name, roles)
	}
	b.WriteString("crossings:\n")
	for _, w := range workloads {
		name, _, _ := strings.Cut(w, " ")
		fmt.Fprintf(&b, "  - {name: %s-beat, from: [workload/%s], to: [network/target], ports: [tcp/9], identity: none, log: all}\n", name, name)
	}
	b.WriteString("  - {name: beat-vault, from: [workload/vault], to: [network/target], ports: [tcp/9], identity: none, log: all}\n")
	b.WriteString(more)
	return b.String()
}

// start runs a tool in a workload of the host.
func (l *lab) start(workload, tool string, args ...string) *netlab.Process {
	l.t.Helper()
	return l.host.Start(l.node.Cgroup("/lab/"+workload), netlab.Command{Path: lookPath(l.t, tool), Args: args})
}

func lookPath(t *testing.T, tool string) string {
	t.Helper()
	path, err := exec.LookPath(tool)
	if err != nil {
		t.Fatalf("find %s: %v; scripts/install test installs it", tool, err)
	}
	return path
}

// findings are those of now.
func (l *lab) findings(f detect.Filter) (all []detect.Finding) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for found, err := range l.client.Findings(ctx, f.Values()) {
		if err != nil {
			l.t.Fatalf("ask for findings: %v", err)
		}
		all = append(all, found)
	}
	return all
}

// describe says findings for a failure's message.
func describe(all []detect.Finding) string {
	var b strings.Builder
	for _, f := range all {
		process := "-"
		if f.Process != nil {
			process = fmt.Sprintf("%s[%d]", f.Process.Comm, f.Process.PID)
		}
		fmt.Fprintf(&b, "  %s %s %s %s %s x%d: %s\n", f.Technique.ID, f.Detector, f.Severity, f.Subject.Label(), process, f.Count, f.Title)
		if len(f.Evidence) > 0 && f.Evidence[0].Flow != nil {
			fmt.Fprintf(&b, "      %s\n", netlab.Describe(*f.Evidence[0].Flow))
		}
	}
	return b.String()
}
