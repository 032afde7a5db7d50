package agent

import (
	"context"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// asked returns the findings that a query asks for, each in short.
func asked(t *testing.T, r *running, query string) []string {
	t.Helper()
	v, err := url.ParseQuery(query)
	if err != nil {
		t.Fatal(err)
	}
	out := []string{}
	for f, err := range r.client.Findings(t.Context(), v) {
		if err != nil {
			return append(out, "error: "+err.Error())
		}
		out = append(out, strings.TrimSpace(f.Technique.ID+" "+f.Severity.String()+" "+f.Subject.Label()+" "+f.Action))
	}
	return out
}

// scan emits denials of web at different ports, as the kernel tells them.
func scan(t *testing.T, core *standIn, id uint32, ports int) {
	t.Helper()
	for i := range ports {
		tuple := abi.Tuple{Proto: 6, DestinationPort: uint16(1000 + i)}
		copy(tuple.Destination[:], []byte{10: 0xff, 11: 0xff, 12: 10, 15: 2})
		core.emit(t, record.RingDenied, record.Event{
			Kind: record.EventVerdict, Hook: record.HookConnect, Time: uint64(i+1) * 1e9, Seq: uint64(i + 1), Epoch: 1, Subject: id, PID: 77,
			Comm: [16]byte{'n', 'm', 'a', 'p'}, Proof: abi.ProofUnknown, Verdict: abi.Deny, Reason: abi.NoCrossingFor, Tuple: tuple,
		})
	}
}

func TestFindingsAreServedAndKept(t *testing.T) {
	core := newStandIn()
	dir := t.TempDir()
	sink := filepath.Join(t.TempDir(), "ocsf.jsonl")
	state := func(c *Config) {
		c.State, c.Detect = dir, detect.DefaultConfig()
		c.Detect.Log = detect.Log{File: sink, Form: "ocsf"}
	}
	r := start(t, core, state)
	img := compile(t, source)
	if _, err := r.client.Apply(t.Context(), img, 0); err != nil {
		t.Fatal(err)
	}
	followed := make(chan detect.Finding, 64)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	go func() {
		for f, err := range r.client.Findings(ctx, url.Values{"follow": {"true"}, "severity": {"medium"}}) {
			if err == nil {
				followed <- f
			}
		}
		close(followed)
	}()
	scan(t, core, ids(t, img)["web"], 20)
	want := []string{"T1046 medium edge/web advised", "T1046 medium edge/web advised"}
	eventually(t, "two findings", func() bool { return cmp.Equal(want, asked(t, r, "severity=medium")) })
	if f, ok := <-followed; !ok || f.Process == nil || f.Process.PID != 77 || f.Process.Comm != "nmap" || len(f.Evidence) == 0 {
		t.Errorf("followed: %+v", f)
	}
	for query, want := range map[string][]string{
		"severity=high": {}, "technique=T1018": {}, "technique=t1046": want, "workload=edge/web": want, "workload=api": {},
		"since=2001-01-01T00:00:00Z": want, "since=2999-01-01T00:00:00Z": {},
		"severity=terrible": {`error: unknown severity "terrible"`}, "sevrity=low": {`error: unknown parameter "sevrity"`},
		"since=x": {`error: since: "x" is no time (RFC 3339)`}, "follow=x": {`error: follow: "x" is no truth value`},
	} {
		if d := cmp.Diff(want, asked(t, r, query)); d != "" {
			t.Errorf("%q (-want +got):\n%s", query, d)
		}
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}

	lines, err := os.ReadFile(sink)
	if err != nil || !strings.Contains(string(lines), `"class_uid":2004`) || !strings.Contains(string(lines), `"action":"advised"`) {
		t.Errorf("log: %v\n%.500s", err, lines)
	}

	// Another agent has them still, and what was being written when a crash came
	// costs that line alone.
	file := filepath.Join(dir, "findings.jsonl")
	f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"id":"half`); err != nil {
		t.Fatal(err)
	}
	f.Close()
	r = start(t, core, state)
	eventually(t, "findings of before", func() bool { return cmp.Equal(want, asked(t, r, "severity=medium")) })
	if s, err := r.client.Status(t.Context()); err != nil || len(s.Problems) > 0 {
		t.Errorf("problems %q, %v", s.Problems, err)
	}
}

// Where nothing can be kept the agent works on, and says so.
func TestFindingsThatCannotBeKept(t *testing.T) {
	core := newStandIn()
	core.images, core.epoch = [][]byte{compile(t, source)}, 1
	missing := filepath.Join(t.TempDir(), "missing")
	r := start(t, core, func(c *Config) { c.State = missing })
	eventually(t, "problem shows", func() bool {
		s, err := r.client.Status(t.Context())
		return err == nil && len(s.Problems) == 1 && strings.HasPrefix(s.Problems[0], "findings: keep findings: open "+missing)
	})
	eventually(t, "policy is known", func() bool { return r.link.view().Names != nil })
	scan(t, core, ids(t, core.images[0])["web"], 20)
	eventually(t, "findings", func() bool { return len(asked(t, r, "severity=medium")) == 2 })
}
