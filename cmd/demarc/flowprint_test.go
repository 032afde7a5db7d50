package main

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"testing"
	"time"

	observerpb "github.com/cilium/cilium/api/v1/observer"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// lines are what an agent might send.
func lines() []api.Line {
	at := time.Date(2026, 11, 23, 19, 31, 2, 123e6, time.UTC).In(time.Local)
	web := flow.Endpoint{Address: netip.MustParseAddr("10.0.1.2"), Port: 44312, Identity: 0x101, Workload: "web", Zone: "edge", Cgroup: "/lab/web"}
	db := flow.Endpoint{Address: netip.MustParseAddr("fd00::2"), Port: 5432, Identity: 0x202, Workload: "postgres", Zone: "data"}
	raw := web
	raw.Address, raw.Port = netip.Addr{}, 0
	return []api.Line{
		{Flow: &flow.Flow{Time: at, Node: "n1", Verdict: abi.Deny, Reason: abi.NoCrossingFor, Hook: record.HookConnect, Protocol: "tcp", Source: web, Destination: db, PID: 812, Comm: "nginx", Proof: abi.ProofIdentity}},
		{Lost: 12, Where: &flow.Loss{Kernel: 12}},
		{Flow: &flow.Flow{Time: at, Node: "n1", Verdict: abi.Allow, Reason: abi.ByCrossing, Direction: abi.Ingress, Hook: record.HookIngress, Protocol: "tcp", Source: web, Destination: db, Crossing: "web-db"}},
		{Flow: &flow.Flow{Time: at, Node: "n1", Verdict: abi.Audit, Reason: abi.RawSocket, Hook: record.HookSockCreate, Source: raw, Comm: "ping"}},
	}
}

func TestFlowPrinter(t *testing.T) {
	local := time.Local
	time.Local = time.UTC
	defer func() { time.Local = local }()
	const lost = "lost 12 flows\n"
	for _, c := range []struct {
		name     string
		env      environment
		options  flowsOptions
		out, err string
	}{
		{"OK compact", environment{}, flowsOptions{output: "compact", timeFormat: "compact", color: "auto"},
			`19:31:02.123  DENIED   edge/web (10.0.1.2:44312) -> data/postgres ([fd00::2]:5432) tcp  egress no-crossing  hook=connect pid=812 (nginx)
19:31:02.123  ALLOWED  edge/web (10.0.1.2:44312) -> data/postgres ([fd00::2]:5432) tcp  ingress crossing web-db  hook=ingress
19:31:02.123  AUDIT    edge/web -> -  egress raw-socket  hook=sock_create (ping)
`, lost},
		{"OK table", environment{}, flowsOptions{output: "table", timeFormat: "RFC3339", color: "auto"},
			`TIME                  VERDICT  SOURCE                                DESTINATION                           PROTOCOL  DIRECTION  REASON          CROSSING
2026-11-23T19:31:02Z  DENIED   edge/web (10.0.1.2:44312)             data/postgres ([fd00::2]:5432)        tcp       egress     no-crossing     -
2026-11-23T19:31:02Z  ALLOWED  edge/web (10.0.1.2:44312)             data/postgres ([fd00::2]:5432)        tcp       ingress    crossing        web-db
2026-11-23T19:31:02Z  AUDIT    edge/web                              -                                     -         egress     raw-socket      -
`, lost},
		{"OK colour", environment{IsTerminal: true}, flowsOptions{output: "compact", timeFormat: "compact", color: "auto"},
			"19:31:02.123  \x1b[31mDENIED \x1b[0m  edge/web (10.0.1.2:44312) -> data/postgres ([fd00::2]:5432) tcp  egress no-crossing  hook=connect pid=812 (nginx)\n" +
				"19:31:02.123  \x1b[32mALLOWED\x1b[0m  edge/web (10.0.1.2:44312) -> data/postgres ([fd00::2]:5432) tcp  ingress crossing web-db  hook=ingress\n" +
				"19:31:02.123  \x1b[33mAUDIT  \x1b[0m  edge/web -> -  egress raw-socket  hook=sock_create (ping)\n", lost},
		{"OK json", environment{IsTerminal: true}, flowsOptions{output: "json", timeFormat: "compact", color: "auto"},
			`{"time":"2026-11-23T19:31:02.123Z","node":"n1","verdict":"deny","reason":"no-crossing","direction":"egress","hook":"connect","protocol":"tcp","source":{"address":"10.0.1.2","port":44312,"identity":257,"workload":"web","zone":"edge","cgroup":"/lab/web"},"destination":{"address":"fd00::2","port":5432,"identity":514,"workload":"postgres","zone":"data"},"proof":"identity","pid":812,"comm":"nginx","cpu":0,"seq":0,"epoch":0}
{"lost":12,"where":{"kernel":12}}
{"time":"2026-11-23T19:31:02.123Z","node":"n1","verdict":"allow","reason":"crossing","direction":"ingress","hook":"ingress","protocol":"tcp","source":{"address":"10.0.1.2","port":44312,"identity":257,"workload":"web","zone":"edge","cgroup":"/lab/web"},"destination":{"address":"fd00::2","port":5432,"identity":514,"workload":"postgres","zone":"data"},"crossing":"web-db","proof":"none","cpu":0,"seq":0,"epoch":0}
{"time":"2026-11-23T19:31:02.123Z","node":"n1","verdict":"audit","reason":"raw-socket","direction":"egress","hook":"sock_create","source":{"identity":257,"workload":"web","zone":"edge","cgroup":"/lab/web"},"destination":{},"proof":"none","comm":"ping","cpu":0,"seq":0,"epoch":0}
`, ""},
		{"OK dict", environment{}, flowsOptions{output: "dict", timeFormat: "RFC3339", color: "auto", nodeName: true},
			`  TIMESTAMP: 2026-11-23T19:31:02Z
       NODE: n1
     SOURCE: edge/web (10.0.1.2:44312)
DESTINATION: data/postgres ([fd00::2]:5432)
   PROTOCOL: tcp
    VERDICT: DENIED
     REASON: no-crossing
  DIRECTION: egress
       HOOK: connect
      PROOF: identity
    PROCESS: 812 nginx
------------
  TIMESTAMP: 2026-11-23T19:31:02Z
       NODE: n1
     SOURCE: edge/web (10.0.1.2:44312)
DESTINATION: data/postgres ([fd00::2]:5432)
   PROTOCOL: tcp
    VERDICT: ALLOWED
     REASON: crossing
  DIRECTION: ingress
   CROSSING: web-db
       HOOK: ingress
      PROOF: none
------------
  TIMESTAMP: 2026-11-23T19:31:02Z
       NODE: n1
     SOURCE: edge/web
DESTINATION: -
    VERDICT: AUDIT
     REASON: raw-socket
  DIRECTION: egress
       HOOK: sock_create
      PROOF: none
    PROCESS: 0 ping
`, lost},
		{"OK numeric, and the node", environment{}, flowsOptions{output: "compact", timeFormat: "compact", color: "auto", numeric: true, nodeName: true, silent: true},
			`19:31:02.123 [n1]  DENIED   identity-257 (10.0.1.2:44312) -> identity-514 ([fd00::2]:5432) tcp  egress no-crossing  hook=connect pid=812 (nginx)
19:31:02.123 [n1]  ALLOWED  identity-257 (10.0.1.2:44312) -> identity-514 ([fd00::2]:5432) tcp  ingress crossing web-db  hook=ingress
19:31:02.123 [n1]  AUDIT    identity-257 -> -  egress raw-socket  hook=sock_create (ping)
`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			env := c.env
			env.Stdout, env.Stderr, env.Getenv = &stdout, &stderr, func(string) string { return "" }
			p := newFlowPrinter(&env, &c.options)
			for _, l := range lines() {
				if err := p.print(l); err != nil {
					t.Fatal(err)
				}
			}
			if d := cmp.Diff(c.out, stdout.String()); d != "" {
				t.Errorf("stdout (-want +got):\n%s", d)
			}
			if d := cmp.Diff(c.err, stderr.String()); d != "" {
				t.Errorf("stderr (-want +got):\n%s", d)
			}
		})
	}
}

func TestColoursFollowTheEnvironment(t *testing.T) {
	for _, c := range []struct {
		name     string
		terminal bool
		vars     map[string]string
		options  flowsOptions
		want     bool
	}{
		{"OK terminal", true, nil, flowsOptions{color: "auto"}, true},
		{"bad pipe", false, nil, flowsOptions{color: "auto"}, false},
		{"bad NO_COLOR", true, map[string]string{"NO_COLOR": "1"}, flowsOptions{color: "auto"}, false},
		{"bad dumb terminal", true, map[string]string{"TERM": "dumb"}, flowsOptions{color: "auto"}, false},
		{"OK always", false, map[string]string{"NO_COLOR": "1"}, flowsOptions{color: "always"}, true},
		{"bad never", true, nil, flowsOptions{color: "never"}, false},
		{"bad --no-color", true, nil, flowsOptions{color: "auto", noColor: true}, false},
	} {
		env := &environment{IsTerminal: c.terminal, Getenv: func(k string) string { return c.vars[k] }}
		if got := newFlowPrinter(env, &c.options).color; got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestNotReversesOnlyTheNextFilter(t *testing.T) {
	env := &environment{Stdout: &bytes.Buffer{}, Stderr: &bytes.Buffer{}, Getenv: func(string) string { return "" }}
	flags := newFlowsCommand(env).Flags()
	// The command's own options cannot be reached: what it would ask for can.
	if err := flags.Parse([]string{"--verdict", "deny", "--not", "--port", "80", "--port", "443"}); err != nil {
		t.Fatal(err)
	}
	o := *flags.Lookup("verdict").Value.(*filterFlag).options
	query, err := o.query(flags)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := query.Encode(), "last=20&not-port=80&port=443&verdict=deny"; got != want {
		t.Errorf("asked %q, want %q", got, want)
	}
}

// TestOutputMovesNoCursor gives every form what a terminal would obey, as an agent
// that somebody took over might send it.
func TestOutputMovesNoCursor(t *testing.T) {
	const evil = "a\x1b]0;owned\x07\n\r\u009b31m\x7f\u202e\\"
	l := lines()[0]
	f := *l.Flow
	f.Comm, f.Node, f.Crossing, f.Protocol = evil, evil, evil, evil
	f.Source.Workload, f.Source.Zone, f.Source.Cgroup, f.Destination = evil, evil, evil, flow.Endpoint{Networks: []string{evil}}
	f.Source.Pod, f.Source.Container, f.Source.Image, f.Source.PodLabels = evil+"/"+evil, evil, evil, map[string]string{evil: evil}
	for _, form := range []string{"compact", "table", "wide", "dict", "json", "jsonpb"} {
		var stdout bytes.Buffer
		env := environment{Stdout: &stdout, Stderr: &stdout, Getenv: func(string) string { return "" }}
		p := newFlowPrinter(&env, &flowsOptions{output: form, timeFormat: "compact", color: "never", nodeName: true})
		text, err := json.Marshal(api.Line{Flow: &f})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.stream(func(yield func([]byte, error) bool) { yield(text, nil) }); err != nil {
			t.Fatal(err)
		}
		rows := map[string]int{"compact": 1, "table": 2, "wide": 2, "json": 1, "jsonpb": 1, "dict": 14}
		if got := bytes.Count(stdout.Bytes(), []byte("\n")); got != rows[form] {
			t.Errorf("%s: %d lines, want %d:\n%q", form, got, rows[form], stdout.String())
		}
		if i := bytes.IndexFunc(stdout.Bytes(), func(r rune) bool { return r != '\n' && (r < 0x20 || r > 0x7e) }); i >= 0 {
			t.Errorf("%s: byte %d of %q", form, i, stdout.String())
		}
	}
}

func TestJSONForHubble(t *testing.T) {
	var stdout bytes.Buffer
	env := environment{Stdout: &stdout, Stderr: &stdout, Getenv: func(string) string { return "" }}
	p := newFlowPrinter(&env, &flowsOptions{output: "jsonpb", timeFormat: "compact", color: "never"})
	for _, l := range lines()[:2] {
		if err := p.print(l); err != nil {
			t.Fatal(err)
		}
	}
	var got []*observerpb.GetFlowsResponse
	for text := range bytes.Lines(stdout.Bytes()) {
		r := &observerpb.GetFlowsResponse{}
		if err := protojson.Unmarshal(text, r); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		got = append(got, r)
	}
	if len(got) != 2 || got[0].GetFlow().GetSource().GetPodName() != "web" || got[0].GetNodeName() != "n1" || got[1].GetLostEvents().GetNumEventsLost() != 12 {
		t.Errorf("got %v", got)
	}
}
