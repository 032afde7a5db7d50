package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// timeFormats by the names that other tools give them; compact is local time.
var timeFormats = map[string]string{
	"compact":      "15:04:05.000",
	"StampMilli":   time.StampMilli,
	"DateTime":     time.DateTime,
	"RFC3339":      time.RFC3339,
	"RFC3339Milli": "2006-01-02T15:04:05.000Z07:00",
	"RFC3339Nano":  time.RFC3339Nano,
	"RFC1123Z":     time.RFC1123Z,
}

func timeFormatNames() []string { return slices.Sorted(maps.Keys(timeFormats)) }

// flowPrinter writes flows line by line in one form.
type flowPrinter struct {
	out, err io.Writer
	form     string
	layout   string
	color    bool
	headed   bool
}

func newFlowPrinter(env *environment, o *flowsOptions) *flowPrinter {
	color := o.color == "always" || o.color == "auto" && env.IsTerminal && env.Getenv("NO_COLOR") == "" && env.Getenv("TERM") != "dumb"
	return &flowPrinter{out: env.Stdout, err: env.Stderr, form: o.output, layout: timeFormats[o.timeFormat], color: color && !o.noColor}
}

func (p *flowPrinter) print(l api.Line) error {
	if p.form == "json" {
		return json.NewEncoder(p.out).Encode(l)
	}
	if l.Flow == nil {
		_, err := fmt.Fprintf(p.err, "lost %s\n", plural(int(l.Lost), "flow"))
		return err
	}
	if p.form == "compact" {
		_, err := io.WriteString(p.out, p.compact(l.Flow)+"\n")
		return err
	}
	return p.row(l.Flow)
}

// verdictWords are what people read; colours are of the ANSI terminal.
var verdictWords = map[abi.Verdict]struct{ word, color string }{
	abi.Deny:        {"DENIED", "31"},
	abi.Allow:       {"ALLOWED", "32"},
	abi.Provisional: {"OPENING", "33"},
	abi.Audit:       {"AUDIT", "33"},
}

// verdict is the word, padded, in its colour: the padding must not count the
// colour's bytes.
func (p *flowPrinter) verdict(v abi.Verdict, width int) string {
	w := verdictWords[v]
	word := fmt.Sprintf("%-*s", width, w.word)
	if !p.color {
		return word
	}
	return "\x1b[" + w.color + "m" + word + "\x1b[0m"
}

// compact is one flow in one line:
//
//	19:31:02.123  DENIED   edge/web (10.0.1.2:44312) -> data/postgres (10.0.3.2:5432) tcp  egress no-crossing  hook=connect pid=812 (nginx)
func (p *flowPrinter) compact(f *flow.Flow) string {
	line := fmt.Sprintf("%s  %s  %s -> %s", f.Time.Local().Format(p.layout), p.verdict(f.Verdict, 7), party(f.Source), party(f.Destination))
	if f.Protocol != "" {
		line += " " + f.Protocol
	}
	line += fmt.Sprintf("  %s %s", f.Direction, f.Reason)
	if f.Crossing != "" {
		line += " " + f.Crossing
	}
	line += fmt.Sprintf("  hook=%s", f.Hook)
	if f.PID != 0 {
		line += fmt.Sprintf(" pid=%d", f.PID)
	}
	if f.Comm != "" {
		line += " (" + f.Comm + ")"
	}
	return line
}

// party is an endpoint by name, with its address where one is known.
func party(e flow.Endpoint) string {
	place := e.Place()
	if place == "" {
		if e.Identity == 0 {
			return "-"
		}
		return e.Label()
	}
	return e.Label() + " (" + place + ")"
}

// columns of the table, with widths that most flows keep; a stream cannot wait for
// its widest cell.
var columns = []struct {
	name  string
	width int
	wide  bool
	cell  func(*flow.Flow) string
}{
	{"SOURCE", 36, false, func(f *flow.Flow) string { return party(f.Source) }},
	{"DESTINATION", 36, false, func(f *flow.Flow) string { return party(f.Destination) }},
	{"PROTOCOL", 8, false, func(f *flow.Flow) string { return f.Protocol }},
	{"DIRECTION", 9, false, func(f *flow.Flow) string { return f.Direction.String() }},
	{"REASON", 14, false, func(f *flow.Flow) string { return f.Reason.String() }},
	{"CROSSING", 16, false, func(f *flow.Flow) string { return f.Crossing }},
	{"HOOK", 11, true, func(f *flow.Flow) string { return f.Hook.String() }},
	{"PROOF", 8, true, func(f *flow.Flow) string { return f.Proof.String() }},
	{"PID", 7, true, func(f *flow.Flow) string {
		if f.PID == 0 {
			return ""
		}
		return strconv.FormatUint(uint64(f.PID), 10)
	}},
	{"COMM", 15, true, func(f *flow.Flow) string { return f.Comm }},
	{"NODE", 12, true, func(f *flow.Flow) string { return f.Node }},
	{"CGROUP", 20, true, func(f *flow.Flow) string { return f.Source.Cgroup + f.Destination.Cgroup }},
}

func (p *flowPrinter) row(f *flow.Flow) error {
	var b strings.Builder
	line := func(at, verdict string, cell func(int) string) {
		b.WriteString(at + "  " + verdict)
		rest := ""
		for i, c := range columns {
			if c.wide && p.form != "wide" {
				continue
			}
			text := cell(i)
			if text == "" {
				text = "-"
			}
			rest += fmt.Sprintf("  %-*s", c.width, text)
		}
		b.WriteString(strings.TrimRight(rest, " ") + "\n")
	}
	at := f.Time.Local().Format(p.layout)
	if !p.headed {
		p.headed = true
		line(fmt.Sprintf("%-*s", len(at), "TIME"), fmt.Sprintf("%-7s", "VERDICT"), func(i int) string { return columns[i].name })
	}
	line(at, p.verdict(f.Verdict, 7), func(i int) string { return columns[i].cell(f) })
	_, err := io.WriteString(p.out, b.String())
	return err
}

// crossingNames lists the crossings of the policy in force.
func crossingNames(ctx context.Context, client *api.Client) ([]string, error) {
	b, err := client.Image(ctx)
	if err != nil {
		return nil, err
	}
	img, err := image.Decode(b)
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(img.Crossings))
	for _, c := range img.Crossings {
		names = append(names, c.Name)
	}
	return names, nil
}
