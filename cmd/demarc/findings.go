package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

type findingsOptions struct {
	filter   detect.Filter
	severity string
	since    string
	follow   bool
	output   string
	from     string // a recording in place of the agent
	policy   string // policy or image that the recording was made under
	config   string // thresholds for the recording
	id       string // show this one
}

func newFindingsCommand(env *environment) *cobra.Command {
	var o findingsOptions
	c := &cobra.Command{
		Use:   "findings",
		Short: "Show suspected lateral movement, with its evidence",
		Long: `Show suspected lateral movement, with its evidence.

What a declared role explains is shown only with --suppressed. With --from the
detectors run on a recording instead: lines of "demarc flows -o json", or of events.
Its times are those of the events, so a day takes seconds.`,
		Example: `  demarc findings --severity medium
  demarc findings -f -o ocsf
  demarc findings show 5f0c9a
  demarc flows --all -o json | demarc findings --from - --policy shop.yaml`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return findingsRun(c.Context(), env, o) },
	}
	f := c.Flags()
	f.BoolVarP(&o.follow, "follow", "f", false, "go on as findings appear and change")
	f.Var(&choice{&o.severity, detect.Severities()}, "severity", "this `severity` or worse: info, low, medium, high, critical")
	complete(c, "severity", detect.Severities()...)
	f.StringVar(&o.filter.Technique, "technique", "", "ATT&CK `id`; T1021 selects T1021.004, too")
	var ids []string
	for _, t := range detect.Techniques {
		ids = append(ids, t.ID)
	}
	complete(c, "technique", ids...)
	f.StringVar(&o.filter.Workload, "workload", "", "`workload`, or ZONE/WORKLOAD")
	f.StringVar(&o.since, "since", "", "seen at or after this `time` (RFC 3339), or in the last 10m")
	f.BoolVar(&o.filter.Suppressed, "suppressed", false, "those that a role explains, too")
	f.StringVar(&o.from, "from", "", "run the detectors on this recording; - is standard input")
	f.StringVar(&o.policy, "policy", "", "policy or image that the recording was made under, for zones and roles")
	f.StringVar(&o.config, "config", "", "`file` with thresholds for the recording: what agent.yaml has below detect")
	outputFlag(c, &o.output, "table", "wide", "json", "yaml", "jsonl", "ocsf")
	c.AddCommand(newFindingsShowCommand(env))
	return c
}

func newFindingsShowCommand(env *environment) *cobra.Command {
	o := findingsOptions{filter: detect.Filter{Suppressed: true}}
	c := &cobra.Command{
		Use: "show ID", Short: "Show one finding whole; the beginning of its id is enough", Args: oneArgument("id"),
		RunE: func(c *cobra.Command, args []string) error {
			o.id, o.filter.ID = args[0], args[0]
			return findingsRun(c.Context(), env, o)
		},
	}
	c.Flags().StringVar(&o.from, "from", "", "run the detectors on this recording; - is standard input")
	c.Flags().StringVar(&o.policy, "policy", "", "policy or image that the recording was made under, for zones and roles")
	outputFlag(c, &o.output, "text", "json", "yaml", "ocsf")
	return c
}

func findingsRun(ctx context.Context, env *environment, o findingsOptions) error {
	if o.severity != "" {
		if err := o.filter.Severity.UnmarshalText([]byte(o.severity)); err != nil {
			return usageError{err}
		}
	}
	if o.since != "" {
		at, err := sinceTime(o.since, time.Now())
		if err != nil {
			return err
		}
		o.filter.Since = at
	}
	if o.from == "" && (o.policy != "" || o.config != "") {
		return usagef("--policy and --config go with --from: the agent has its own")
	}
	if o.from != "" && o.follow {
		return usagef("a recording cannot be followed: leave -f or --from out")
	}
	source := liveFindings
	if o.from != "" {
		source = recordedFindings
	}
	found, done, err := source(ctx, env, &o)
	if err != nil {
		return err
	}
	defer done()
	p := findingPrinter{out: env.Stdout, form: o.output}
	if o.follow {
		return p.follow(found)
	}
	var all []detect.Finding
	for f, err := range found {
		if err != nil {
			return err
		}
		all = append(all, f)
	}
	slices.SortStableFunc(all, func(a, b detect.Finding) int {
		return cmp.Or(cmp.Compare(b.Severity, a.Severity), b.LastSeen.Compare(a.LastSeen), cmp.Compare(a.ID, b.ID))
	})
	if o.id == "" {
		return p.list(all)
	}
	switch len(all) {
	case 0:
		return hintError{fmt.Errorf("there is no finding %q", o.id), "see: demarc findings --suppressed"}
	case 1:
		return p.show(&all[0])
	}
	return fmt.Errorf("%d findings begin with %q", len(all), o.id)
}

// sinceTime takes a time, or a duration before now.
func sinceTime(s string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	at, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return at, usagef("--since: %q is no time (RFC 3339) or duration", s)
	}
	return at, nil
}

func liveFindings(ctx context.Context, env *environment, o *findingsOptions) (iter.Seq2[detect.Finding, error], func(), error) {
	client, err := env.client()
	if err != nil {
		return nil, nil, err
	}
	query := o.filter.Values()
	if o.follow {
		query.Set("follow", "true")
	}
	return client.Findings(ctx, query), client.Close, nil
}

// recordedFindings runs the detectors on a recording.
func recordedFindings(ctx context.Context, env *environment, o *findingsOptions) (iter.Seq2[detect.Finding, error], func(), error) {
	config := detect.DefaultConfig()
	if o.config != "" {
		c, err := detect.ReadConfig(o.config)
		if err != nil {
			return nil, nil, err
		}
		config = c
	}
	engine := detect.NewEngine(config)
	if o.policy != "" {
		img, err := policyImage(env, o.policy)
		if err != nil {
			return nil, nil, err
		}
		engine.SetPolicy(detect.PolicyOf(img))
	}
	in, name := env.Stdin, stdinName
	if o.from != "-" {
		f, err := os.Open(o.from)
		if err != nil {
			return nil, nil, fmt.Errorf("read recording: %w", err)
		}
		defer f.Close()
		in, name = f, o.from
	}
	store := detect.NewFindings()
	for e, err := range detect.Replay(in) {
		if err := cmp.Or(err, ctx.Err()); err != nil {
			return nil, nil, fmt.Errorf("%s:%w", name, err)
		}
		for _, f := range engine.See(e) {
			store.Add(f)
		}
	}
	all, _ := store.After(0)
	return func(yield func(detect.Finding, error) bool) {
		for _, f := range all {
			if o.filter.Match(&f) && !yield(f, nil) {
				return
			}
		}
	}, func() {}, nil
}

// policyImage reads an image, or a policy and compiles it.
func policyImage(env *environment, file string) (*image.Image, error) {
	b, err := readInput(env, file)
	if err != nil {
		return nil, err
	}
	if isImage(b) {
		img, err := openImage(env, file, trustOptions{})
		if err != nil {
			return nil, err
		}
		return img.Image, nil
	}
	p, err := policy.Parse(file, b)
	if err != nil {
		return nil, err
	}
	return policy.Compile(p)
}

// findingPrinter writes findings in one form.
type findingPrinter struct {
	out    io.Writer
	form   string
	headed bool
}

func (p *findingPrinter) list(all []detect.Finding) error {
	switch p.form {
	case "json", "yaml":
		if all == nil {
			all = []detect.Finding{}
		}
		return document(p.out, p.form, all)
	case "jsonl", "ocsf":
		for i := range all {
			if err := p.line(&all[i]); err != nil {
				return err
			}
		}
		return nil
	}
	heading := []string{"ID", "SEVERITY", "TECHNIQUE", "SUBJECT", "COUNT", "LAST", "PROCESS", "TITLE"}
	if p.form == "wide" {
		heading = append(heading, "CONFIDENCE", "DETECTOR", "FIRST", "NODE", "SUPPRESSED", "ACTION")
	}
	rows := make([][]string, 0, len(all))
	for i := range all {
		f := &all[i]
		row := []string{f.ID, f.Severity.String(), f.Technique.ID, flow.Escape(f.Subject.Label()), strconv.FormatUint(f.Count, 10), when(f.LastSeen), processName(f.Process), flow.Escape(f.Title)}
		if p.form == "wide" {
			row = append(row, fmt.Sprintf("%d%%", f.Confidence), f.Detector, when(f.FirstSeen), flow.Escape(f.Node), f.SuppressedBy, flow.Escape(f.Action))
		}
		rows = append(rows, row)
	}
	return table(p.out, heading, rows)
}

func (p *findingPrinter) line(f *detect.Finding) error {
	e := json.NewEncoder(p.out)
	e.SetEscapeHTML(false)
	if p.form == "ocsf" {
		return e.Encode(f.OCSF())
	}
	return e.Encode(f)
}

// follow prints each finding as it comes: a line of text, or of JSON.
func (p *findingPrinter) follow(found iter.Seq2[detect.Finding, error]) error {
	for f, err := range found {
		if errors.Is(err, context.Canceled) {
			return nil
		}
		if err != nil {
			return err
		}
		switch p.form {
		case "table", "wide":
			line := fmt.Sprintf("%s  %-8s  %-9s  %s  %s", when(f.LastSeen), f.Severity, f.Technique.ID, f.ID, flow.Escape(f.Title))
			if f.Process != nil {
				line += "  by " + processName(f.Process)
			}
			if f.SuppressedBy != "" {
				line += "  (suppressed: " + f.SuppressedBy + ")"
			}
			if f.Action != "" {
				line += "  [" + flow.Escape(f.Action) + "]"
			}
			_, err = fmt.Fprintln(p.out, line)
		case "yaml":
			_, err = fmt.Fprintln(p.out, "---")
			if err == nil {
				err = document(p.out, "yaml", &f)
			}
		default:
			err = p.line(&f)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// show prints one finding whole.
func (p *findingPrinter) show(f *detect.Finding) error {
	switch p.form {
	case "json", "yaml":
		return document(p.out, p.form, f)
	case "ocsf":
		return p.line(f)
	}
	w := printer{w: p.out}
	w.row("Finding", "%s", f.ID)
	w.row("Title", "%s", f.Title)
	w.row("Technique", "%s %s (%s)", f.Technique.ID, f.Technique.Name, f.Technique.Tactic)
	certain := ""
	if f.Certain {
		certain = ", a single event proves it"
	}
	w.row("Severity", "%s, confidence %d%%%s", f.Severity, f.Confidence, certain)
	w.row("Subject", "%s", f.Subject.Label())
	if pr := f.Process; pr != nil {
		w.row("Process", "%s, user %d, cgroup %s", processName(pr), pr.UID, cmp.Or(pr.Cgroup, "not known"))
		if pr.Exe != "" {
			w.row("", "%s", pr.Exe)
		}
	} else {
		w.row("Process", "not known")
	}
	if f.Node != "" {
		w.row("Node", "%s", f.Node)
	}
	w.row("Seen", "%d times, from %s to %s", f.Count, when(f.FirstSeen), when(f.LastSeen))
	w.row("Detector", "%s", f.Detector)
	if f.SuppressedBy != "" {
		w.row("Suppressed", "the workload has the role %s", f.SuppressedBy)
	}
	if f.Action != "" {
		w.row("Action", "%s", f.Action)
	}
	w.row("Advice", "%s", f.Advice)
	flows := flowPrinter{layout: timeFormats["DateTime"]}
	for i, e := range f.Evidence {
		label := ""
		if i == 0 {
			label = "Evidence"
		}
		if e.Flow != nil {
			w.row(label, "%s", flows.compact(e.Flow))
			continue
		}
		s := e.Signal
		text := fmt.Sprintf("%s  %s", when(s.Time), s.Kind)
		if place := party(s.Peer); place != "-" {
			text += " " + place + " " + s.Protocol
		}
		if s.Cause != "" {
			text += " " + s.Cause
		}
		if s.PID != 0 {
			text += fmt.Sprintf("  pid=%d (%s)", s.PID, s.Comm)
		}
		w.row(label, "%s", text)
	}
	return w.err
}

func when(t time.Time) string { return t.Local().Format(time.DateTime) }

func processName(p *detect.Process) string {
	if p == nil {
		return ""
	}
	return flow.Escape(fmt.Sprintf("%s[%d]", cmp.Or(p.Comm, "?"), p.PID))
}
