package e2e_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/test/netlab"
)

// Before anything changes, `apply` names the live connections that a change would
// cut: those that it cuts then, and no others.
func TestApplyNamesCuts(t *testing.T) {
	const both, one = `crossings:
  - {name: first, from: [workload/web], to: [workload/db], ports: [tcp/7000]}
  - {name: second, from: [workload/web], to: [workload/db], ports: [tcp/7001]}
`, `crossings:
  - {name: second, from: [workload/web], to: [workload/db], ports: [tcp/7001]}
`
	e := newEnds(t, both, netlab.NodeOptions{})
	e.server.serve(7000)
	e.server.serve(7001)
	var streams []string
	for _, port := range []uint16{7000, 7001} {
		for _, to := range e.both(port) {
			streams = append(streams, to.String())
		}
	}
	call[bool](e.client, "StartTraffic", TrafficArgs{Streams: streams})
	wire := e.db.Wire()
	dir := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return file
	}
	same, file := write("same.yaml", document(2, webAndDB+both)), write("one.yaml", document(2, webAndDB+one))

	if out, problems, code := e.node.Demarc("apply", same, "--dry-run"); code != 0 || out != "would cut no connection\n" {
		t.Errorf("nothing would change: %d\n%s%s", code, out, problems)
	}
	out, problems, code := e.node.Demarc("apply", file, "--dry-run", "-o", "json")
	var cuts struct {
		Total       int
		Connections []struct{ Workload, Remote, Local, Reason string }
	}
	if err := json.Unmarshal([]byte(out), &cuts); err != nil || code != 0 {
		t.Fatalf("dry run: %d, %v\n%s%s", code, err, out, problems)
	}
	if cuts.Total != 2 || len(cuts.Connections) != 2 {
		t.Errorf("would cut %+v, want the two to port 7000", cuts)
	}
	for _, c := range cuts.Connections {
		if !strings.HasSuffix(c.Remote, ":7000") && !strings.HasSuffix(c.Local, ":7000") || c.Reason != "no-crossing" {
			t.Errorf("would cut %+v", c)
		}
	}
	if s := statusOf(t, e.node); s.Policy.Version != 1 || len(s.Problems) > 0 {
		t.Errorf("a dry run changed something: %+v", s)
	}
	if out, problems, code = e.node.Demarc("apply", file); code != 0 || !strings.HasPrefix(problems, "would cut 2 connections:\n") {
		t.Errorf("apply: %d\n%s%s", code, out, problems)
	}
	wire.Forget()
	applied := time.Now()
	time.Sleep(500 * time.Millisecond)
	for _, to := range streams {
		if strings.HasSuffix(to, ":7001") {
			eventually(t, timeToAnswer, to+" lives", func() bool {
				return call[TrafficReply](e.client, "Traffic", true).Last["tcp "+to].After(applied)
			})
		}
	}
	for _, p := range wire.Packets(on(7000)) {
		t.Errorf("of a connection that was cut: %s", p)
	}
	call[TrafficReply](e.client, "StopTraffic", true)
}

// Whoever would cut the connection that they sit behind is told, and has to say
// that it is meant; also where it is the newest of more than a preview names.
func TestApplyNamesOwnSession(t *testing.T) {
	const open, shut = `crossings:
  - {name: first, from: [workload/web], to: [workload/db], ports: [tcp/7000]}
`, `crossings:
  - {name: first, from: [workload/web], to: [workload/db], ports: [tcp/7001]}
`
	const others = 1100
	e := newEnds(t, open, netlab.NodeOptions{})
	e.server.serve(7000)
	file := filepath.Join(t.TempDir(), "shut.yaml")
	if err := os.WriteFile(file, []byte(document(2, webAndDB+shut)), 0o644); err != nil {
		t.Fatal(err)
	}
	// bash runs a line in web, with a connection for each "$connect" in it.
	bash := func(line string, env ...string) *netlab.Process {
		return e.web.Start(e.node.Cgroup("/lab/web"), netlab.Command{
			Path: "/bin/bash",
			Args: []string{"-c", strings.ReplaceAll(line, "$connect", "exec {fd}<>/dev/tcp/"+e.db.IP4.String()+"/7000")},
			Env:  append(e.node.DemarcEnv(), env...),
		})
	}
	many := bash(fmt.Sprintf("ulimit -n 4096; for i in $(seq %d); do $connect || exit; done; echo ready; sleep 1000", others))
	defer many.Kill()
	eventually(t, time.Minute, "the others are there", func() bool { return strings.Contains(many.Output(), "ready") })
	dry := bash(e.node.DemarcPath() + " apply " + file + " --dry-run -o json")
	code := dry.Wait(30 * time.Second)
	var cuts struct {
		Total       int
		Connections []proto.Cut
		Unsure      bool `json:"session_unknown"`
	}
	if err := json.Unmarshal([]byte(dry.Output()), &cuts); err != nil || code != 0 || cuts.Total != others || len(cuts.Connections) >= others || !cuts.Unsure {
		t.Fatalf("dry run: %d, %v, %d of %d, unsure %v\n%.1000s", code, err, len(cuts.Connections), cuts.Total, cuts.Unsure, dry.Output())
	}
	other := cuts.Connections[len(cuts.Connections)-1]
	for _, tt := range []struct {
		line, env string
		want, not string
		code      int
		version   uint64
	}{
		// A shell that holds a connection, as sshd would, calls the command.
		{"$connect; $apply", "", "it would cut the session that this command runs in", "not known", 1, 1},
		// One that holds none is called from somewhere, too.
		{"$apply --dry-run", "", "whether your own session is among them is not known", "YOUR SESSION", 0, 1},
		{"$apply", fmt.Sprintf("SSH_CONNECTION=%s %d %s %d", other.Remote.Addr(), other.Remote.Port(), other.Local.Addr(), other.Local.Port()),
			"it would cut the session that this command runs in", "not known", 1, 1},
		{"$connect; $apply --confirm-within 60s", "", "YOUR SESSION", "not known", 0, 2},
	} {
		shell := bash(strings.ReplaceAll(tt.line, "$apply", e.node.DemarcPath()+" apply "+file), tt.env)
		code := shell.Wait(30 * time.Second)
		if out := shell.Output(); code != tt.code || !strings.Contains(out, tt.want) || strings.Contains(out, tt.not) || strings.Contains(out, "YOUR SESSION") == (tt.not == "YOUR SESSION") {
			t.Errorf("%s: %d\n%s", tt.line, code, out)
		}
		if s := statusOf(t, e.node); s.Policy.Version != tt.version {
			t.Errorf("%s: version %d is in force, want %d", tt.line, s.Policy.Version, tt.version)
		}
	}
}
