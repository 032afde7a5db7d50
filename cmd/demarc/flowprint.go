package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"

	observerpb "github.com/cilium/cilium/api/v1/observer"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/agent/hubble"
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
	numeric  bool
	nodeName bool
	silent   bool
	headed   bool

	counts bool      // the next two are needed
	shown  int       // flows so far
	newest time.Time // of them
}

func newFlowPrinter(env *environment, o *flowsOptions) *flowPrinter {
	color := o.color == "always" || o.color == "auto" && env.IsTerminal && env.Getenv("NO_COLOR") == "" && env.Getenv("TERM") != "dumb"
	return &flowPrinter{out: env.Stdout, err: env.Stderr, form: o.output, layout: timeFormats[o.timeFormat], color: color && !o.noColor,
		numeric: o.numeric, nodeName: o.nodeName, silent: o.silent, counts: o.reconnect}
}

// done says whether as many flows were shown as were asked for; 0 = no bound.
func (p *flowPrinter) done(first int) bool { return first > 0 && p.shown >= first }

// writeError is an error of the output, not of the agent.
type writeError struct{ error }

func (e writeError) Unwrap() error { return e.error }

// stream prints the lines of an agent's answer.
func (p *flowPrinter) stream(lines iter.Seq2[[]byte, error]) error {
	for text, err := range lines {
		if err != nil {
			return err
		}
		// The agent's JSON is what -o json shows; there is no need to take it apart.
		if p.form == "json" && !p.counts && !slices.ContainsFunc(text, func(c byte) bool { return c < 0x20 || c > 0x7e }) {
			if _, err := p.out.Write(append(text, '\n')); err != nil {
				return writeError{fmt.Errorf("write flows: %w", err)}
			}
			continue
		}
		var line api.Line
		if err := json.Unmarshal(text, &line); err != nil {
			return fmt.Errorf("read flows: %w", err)
		}
		if line.Flow != nil {
			p.shown, p.newest = p.shown+1, line.Time
		}
		if err := p.print(line); err != nil {
			return writeError{fmt.Errorf("write flows: %w", err)}
		}
	}
	return nil
}

func (p *flowPrinter) print(l api.Line) error {
	if l.Flow == nil && p.form != "json" && p.form != "jsonpb" {
		if p.silent {
			return nil
		}
		_, err := fmt.Fprintf(p.err, "lost %s\n", plural(int(l.Lost), "flow"))
		return err
	}
	switch p.form {
	case "json":
		return p.json(l)
	case "jsonpb":
		return p.jsonpb(l)
	}
	f := *l.Flow
	p.prepare(&f)
	switch p.form {
	case "compact":
		_, err := io.WriteString(p.out, p.compact(&f)+"\n")
		return err
	case "dict":
		return p.dict(&f)
	}
	return p.row(&f)
}

// prepare makes a flow fit to be shown: nothing in it can move a cursor or start a
// line, whoever the agent is.
func (p *flowPrinter) prepare(f *flow.Flow) {
	for _, s := range []*string{&f.Node, &f.Protocol, &f.Crossing, &f.Comm} {
		*s = inert(*s)
	}
	for _, e := range []*flow.Endpoint{&f.Source, &f.Destination} {
		for _, s := range []*string{&e.Workload, &e.Zone, &e.Reserved, &e.Cgroup, &e.Pod, &e.Container, &e.Image} {
			*s = inert(*s)
		}
		e.Networks = slices.Clone(e.Networks)
		for i := range e.Networks {
			e.Networks[i] = inert(e.Networks[i])
		}
		if p.numeric {
			e.Workload, e.Zone, e.Reserved, e.Networks = "", "", "", nil
		}
	}
}

// inert writes bytes that are no printable ASCII as \xNN.
func inert(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r > 0x7e }) {
		return s
	}
	var b strings.Builder
	for _, c := range []byte(s) {
		if c < 0x20 || c > 0x7e {
			fmt.Fprintf(&b, `\x%02x`, c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// json writes a line as the agent's API has it.
func (p *flowPrinter) json(l api.Line) error {
	b, err := json.Marshal(l)
	if err != nil {
		return err
	}
	_, err = p.out.Write(append(asciiJSON(b), '\n'))
	return err
}

// jsonpb writes what Hubble's clients write and read.
func (p *flowPrinter) jsonpb(l api.Line) error {
	var all []*observerpb.GetFlowsResponse
	if l.Flow != nil {
		f := hubble.Flow(l.Flow)
		all = append(all, &observerpb.GetFlowsResponse{ResponseTypes: &observerpb.GetFlowsResponse_Flow{Flow: f}, NodeName: f.NodeName, Time: f.Time})
	} else if l.Where != nil {
		all = hubble.Lost(*l.Where, "", time.Now())
	}
	for _, r := range all {
		// Protobuf's own form has spaces at random; encoding/json takes them out.
		b, err := json.Marshal(r)
		if err != nil {
			return err
		}
		if _, err := p.out.Write(append(asciiJSON(b), '\n')); err != nil {
			return err
		}
	}
	return nil
}

// asciiJSON escapes what JSON allows and terminals may obey: anything beyond ASCII.
func asciiJSON(b []byte) []byte {
	if !slices.ContainsFunc(b, func(c byte) bool { return c > 0x7e }) {
		return b
	}
	var out []byte
	for _, r := range string(b) {
		switch {
		case r <= 0x7e:
			out = append(out, byte(r))
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			out = fmt.Appendf(out, `\u%04x\u%04x`, high, low)
		default:
			out = fmt.Appendf(out, `\u%04x`, r)
		}
	}
	return out
}

// verdictWords are what people read; colours are of the ANSI terminal.
var verdictWords = map[abi.Verdict]struct{ word, color string }{
	abi.Deny:        {"DENIED", "31"},
	abi.Allow:       {"ALLOWED", "32"},
	abi.Provisional: {"OPENING", "33"},
	abi.Audit:       {"AUDIT", "33"},
	abi.WouldDeny:   {"WOULD DENY", "33"},
	abi.WouldAllow:  {"WOULD ALLOW", "33"},
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
	node := ""
	if p.nodeName {
		node = " [" + f.Node + "]"
	}
	line := fmt.Sprintf("%s%s  %s  %s -> %s", f.Time.Local().Format(p.layout), node, p.verdict(f.Verdict, 7), party(f.Source), party(f.Destination))
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

// dict is one flow as lines of KEY: VALUE, with a line between two flows.
func (p *flowPrinter) dict(f *flow.Flow) error {
	var b strings.Builder
	if p.headed {
		b.WriteString("------------\n")
	}
	p.headed = true
	pair := func(key, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%11s: %s\n", key, value)
		}
	}
	pair("TIMESTAMP", f.Time.Local().Format(p.layout))
	if p.nodeName {
		pair("NODE", f.Node)
	}
	pair("SOURCE", party(f.Source))
	pair("DESTINATION", party(f.Destination))
	pair("CONTAINER", container(f.Source)+container(f.Destination))
	pair("IMAGE", f.Source.Image+f.Destination.Image)
	pair("PROTOCOL", f.Protocol)
	pair("VERDICT", strings.TrimRight(p.verdict(f.Verdict, 0), " "))
	pair("REASON", f.Reason.String())
	pair("DIRECTION", f.Direction.String())
	pair("CROSSING", f.Crossing)
	pair("HOOK", f.Hook.String())
	pair("PROOF", f.Proof.String())
	if f.PID != 0 || f.Comm != "" {
		pair("PROCESS", strings.TrimSpace(fmt.Sprintf("%d %s", f.PID, f.Comm)))
	}
	_, err := io.WriteString(p.out, b.String())
	return err
}

// container is what the inventory calls an endpoint: "shop/api-1", "shop/api-1:api",
// "redis", or "".
func container(e flow.Endpoint) string {
	if e.Pod != "" && e.Container != "" {
		return e.Pod + ":" + e.Container
	}
	return e.Pod + e.Container
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
	{"CONTAINER", 20, true, func(f *flow.Flow) string { return container(f.Source) + container(f.Destination) }},
	{"CGROUP", 20, true, func(f *flow.Flow) string { return f.Source.Cgroup + f.Destination.Cgroup }},
}

func (p *flowPrinter) row(f *flow.Flow) error {
	var b strings.Builder
	line := func(at, verdict string, cell func(int) string) {
		b.WriteString(at + "  " + verdict)
		rest := ""
		for i, c := range columns {
			if c.wide && p.form != "wide" && !(c.name == "NODE" && p.nodeName) {
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
