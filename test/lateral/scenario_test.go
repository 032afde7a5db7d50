package lateral_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/test/netlab"
)

// all says that every scenario is to run, as `make lateral` does; otherwise those
// that are quick.
var all = os.Getenv("DEMARC_LATERAL") == "all"

// scenario is what an intruder does, and what has to be found of it.
type scenario struct {
	name      string
	do        func(*run) // starts it, and returns
	technique string
	detector  string
	severity  detect.Severity // at least
	process   string          // that the finding has to name; "" = it is on another machine
	within    time.Duration   // of its beginning
	slow      bool            // only with all
}

// run is one scenario at work.
type run struct {
	*lab
	workload string
	source   *netlab.Namespace // another machine; nil = the workload
	from     time.Time
}

// tool starts a program in the workload, or on the other machine.
func (r *run) tool(name string, args ...string) *netlab.Process {
	r.t.Helper()
	if r.source == nil {
		return r.start(r.workload, name, args...)
	}
	return r.source.Start(r.lab.lab.Cgroup(r.workload), netlab.Command{Path: lookPath(r.t, name), Args: args})
}

// soon waits for what a scenario needs to happen; scenarios run side by side, so that
// one that fails leaves the others alone.
func (r *run) soon(what string, holds func() bool) {
	r.t.Helper()
	for end := time.Now().Add(30 * time.Second); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Errorf("%s: not within 30 s", what)
			return
		}
	}
}

// result is a line of the table.
type result struct {
	scenario
	found detect.Finding
	delay time.Duration
}

// await waits until the scenario's finding is there.
func (r *run) await(s *scenario) result {
	r.t.Helper()
	subject := "edge/" + r.workload
	if r.source != nil {
		subject = r.source.IP4.String() + " " + r.source.IP6.String()
	}
	var seen []detect.Finding
	for time.Since(r.from) < s.within {
		seen = r.findings(detect.Filter{Suppressed: true})
		seen = slices.DeleteFunc(seen, func(f detect.Finding) bool { return !strings.Contains(subject, f.Subject.Label()) })
		i := slices.IndexFunc(seen, func(f detect.Finding) bool {
			return f.Technique.ID == s.technique && f.Detector == s.detector && f.Severity >= s.severity && (s.process == "" || f.Process != nil && f.Process.Comm == s.process && f.Process.PID > 0)
		})
		if i >= 0 {
			return result{*s, seen[i], time.Since(r.from)}
		}
		time.Sleep(20 * time.Millisecond)
	}
	r.t.Errorf("%s: no %s %s by %q of %s within %s; there are:\n%s", s.name, s.technique, s.detector, s.process, subject, s.within, describe(seen))
	return result{scenario: *s}
}

// table prints what was found, as docs/detection.md shows it.
func table(t *testing.T, results []result) {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 1, ' ', 0)
	fmt.Fprintln(w, "| scenario\t| technique\t| detector\t| severity\t| names\t| delay\t| within\t|")
	fmt.Fprintln(w, "|---\t|---\t|---\t|---\t|---\t|---\t|---\t|")
	for _, r := range results {
		if r.found.ID == "" {
			continue
		}
		fmt.Fprintf(w, "| %s\t| %s\t| %s\t| %s\t| %s\t| %s\t| %s\t|\n", r.name, r.technique, r.found.Detector, r.found.Severity, cmp.Or(r.process, "the subject"), r.delay.Round(10*time.Millisecond), r.within)
	}
	w.Flush()
	t.Logf("found:\n%s", b.String())
}

// name of a scenario's workload.
func workloadOf(i int) string { return fmt.Sprintf("s%02d", i) }

// runAll runs scenarios side by side, a few at a time.
func runAll(t *testing.T, scenarios []scenario, start func(i int, s *scenario) *run) {
	t.Helper()
	results := make([]result, len(scenarios))
	var group sync.WaitGroup
	room := make(chan struct{}, 4)
	for i := range scenarios {
		group.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			r := start(i, &scenarios[i])
			r.from = time.Now()
			scenarios[i].do(r)
			results[i] = r.await(&scenarios[i])
		})
	}
	group.Wait()
	table(t, results)
}

// recorded is a file for what the detectors are given, and the agent's configuration that
// has it written; "" where DEMARC_RECORD names no directory for recordings.
func recorded(t *testing.T, l *netlab.Lab) (file, lines string) {
	t.Helper()
	if os.Getenv("DEMARC_RECORD") == "" {
		return "", ""
	}
	file = filepath.Join(l.Dir(), "recording.jsonl")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Chmod(file, 0o666)); err != nil { // the agent is nobody
		t.Fatal(err)
	}
	return file, "detect: {record: " + file + "}\n"
}

// record divides a recording by the detectors that its workloads are for, into the
// directory that DEMARC_RECORD names.
func record(t *testing.T, file string, detectors map[string]string) {
	t.Helper()
	if file == "" {
		return
	}
	r, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	all := map[string]*bytes.Buffer{}
	for e, err := range detect.Replay(r) {
		if err != nil {
			t.Fatal(err)
		}
		var whose []string
		if e.Flow != nil {
			whose = []string{e.Flow.Source.Workload, e.Flow.Destination.Workload}
		} else {
			whose = []string{e.Signal.Workload}
		}
		for _, w := range whose {
			if detectors[w] == "" {
				continue
			}
			b := all[detectors[w]]
			if b == nil {
				b = new(bytes.Buffer)
				all[detectors[w]] = b
			}
			if err := json.NewEncoder(b).Encode(e); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	for detector, b := range all {
		if err := os.WriteFile(filepath.Join(os.Getenv("DEMARC_RECORD"), "sensor-"+detector+".jsonl"), b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// record writes the flows to a file in the directory that DEMARC_RECORD names, for tests
// that run the detectors on them and for trying thresholds.
func (l *lab) record() {
	l.t.Helper()
	dir := os.Getenv("DEMARC_RECORD")
	if dir == "" {
		return
	}
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	for _, f := range l.node.Flows() {
		if err := encoder.Encode(detect.Event{Flow: &f}); err != nil {
			l.t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, l.t.Name()+".jsonl"), b.Bytes(), 0o644); err != nil {
		l.t.Fatal(err)
	}
}

// quick leaves out what only `make lateral` runs.
func quick(scenarios []scenario) []scenario {
	if all {
		return scenarios
	}
	return slices.DeleteFunc(scenarios, func(s scenario) bool { return s.slow })
}
