package policy

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/identity"
	"github.com/demarc/demarc/policy/image"
)

// Probe asks whether one flow would pass.
type Probe struct {
	// From opens the flow, To accepts it: workload/NAME, network/NAME, an address,
	// unmanaged, or with an inventory pod/NAMESPACE/NAME. A network stands for the first
	// address of its first block.
	From string `json:"from"`
	To   string `json:"to"`
	Port string `json:"port"` // tcp/8080, udp/53, sctp/9, icmp/echo, icmp/3, icmp6/128, other

	At time.Time `json:"at,omitzero"` // zero = now
}

// Answer says what would happen to the flow, and why. An end that is an address
// has no verdict of its own, and counts as allowing.
//
// A workload's address is not known here, so a crossing that names networks admits
// no workload. It does admit a pod, whose address the inventory tells.
type Answer struct {
	Verdict  abi.Verdict `json:"verdict"`
	Crossing string      `json:"crossing"`          // that allows it; "" = none
	Line     int         `json:"line,omitempty"`    // of the crossing in the policy
	Reason   string      `json:"reason"`            // a sentence
	Egress   abi.Verdict `json:"egress"`            // of the end that opens
	Ingress  abi.Verdict `json:"ingress"`           // of the end that accepts
	Allowed  bool        `json:"allowed"`           // Verdict is allow
	Refuses  string      `json:"refuses,omitempty"` // the end that refuses: egress, ingress or both; "" = none
}

// Explain answers a probe. It fails for a probe that names something undeclared
// or that no end could judge.
func (p *Policy) Explain(probe Probe) (Answer, error) { return p.ExplainIn(nil, probe) }

// ExplainIn answers a probe that may name pods of an inventory.
func (p *Policy) ExplainIn(inv *identity.Inventory, probe Probe) (Answer, error) {
	return newExplainer(p, inv).explain(probe)
}

func newExplainer(p *Policy, inv *identity.Inventory) *explainer {
	x := &explainer{Evaluator: p.Evaluator(), ids: p.IDs()}
	if inv != nil {
		x.pods = p.pods(inv)
	}
	return x
}

// ExplainBatch reads probes as JSON lines, which may name pods of an inventory that is
// not nil, and writes one line for each, in order:
// the answer, or {"error": "..."} for a line that is no good probe. Blank lines
// are passed over. The returned error names the lines that were no good.
func ExplainBatch(p *Policy, inv *identity.Inventory, r io.Reader, w io.Writer) error {
	const maxLine = 1 << 20
	x := newExplainer(p, inv)
	out := bufio.NewWriter(w)
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	var bad []string
	n := 0
	for lines.Scan() {
		n++
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		var line any
		answer, err := x.line(lines.Bytes())
		if line = answer; err != nil {
			line = struct {
				Error string `json:"error"`
			}{fmt.Sprintf("line %d: %v", n, err)}
			bad = append(bad, strconv.Itoa(n))
		}
		if err := writeLine(out, line); err != nil {
			return fmt.Errorf("write answers: %w", err)
		}
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("write answers: %w", err)
	}
	if err := lines.Err(); errors.Is(err, bufio.ErrTooLong) {
		return fmt.Errorf("read probes: line %d is longer than %d bytes", n+1, maxLine)
	} else if err != nil {
		return fmt.Errorf("read probes: %w", err)
	}
	const show = 10
	switch {
	case len(bad) > show:
		return fmt.Errorf("read probes: %d bad lines, the first are %s", len(bad), strings.Join(bad[:show], ", "))
	case len(bad) > 0:
		return fmt.Errorf("read probes: bad line %s", strings.Join(bad, ", "))
	}
	return nil
}

func writeLine(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

func (x *explainer) line(b []byte) (Answer, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var probe Probe
	if err := d.Decode(&probe); err != nil {
		return Answer{}, err
	}
	if _, err := d.Token(); err != io.EOF {
		return Answer{}, errors.New("more than one value")
	}
	return x.explain(probe)
}

// explainer explains many probes.
type explainer struct {
	*Evaluator
	ids  map[string]image.ID
	pods map[string]podEnd // by namespace/name; nil = there is no inventory
}

// end is one end of a probe: a local process with an identity, or an address.
type end struct {
	name    string
	id      image.ID // None = somebody elsewhere who proves nothing
	address netip.Addr
	choice  []netip.Addr // of a pod: it has one of these addresses, as the other end has
}

func (e end) local() bool { return e.id != image.None }

func (x *explainer) explain(probe Probe) (Answer, error) {
	from, err := x.end("from", probe.From)
	if err != nil {
		return Answer{}, err
	}
	to, err := x.end("to", probe.To)
	if err != nil {
		return Answer{}, err
	}
	if !from.local() && !to.local() {
		return Answer{}, fmt.Errorf("from %s to %s: neither end is a workload or unmanaged, so nothing here judges it", from.name, to.name)
	}
	if err := together(&from, &to); err != nil {
		return Answer{}, err
	}
	port, err := parseProbePort(probe.Port, from.address.Is6() || to.address.Is6())
	if err != nil {
		return Answer{}, err
	}
	f := flow{from: from, to: to, port: port, portText: probe.Port, now: probe.At}
	if f.now.IsZero() {
		f.now = time.Now()
	}
	return x.answer(f), nil
}

func (x *explainer) end(side, text string) (end, error) {
	kind, name, _ := strings.Cut(text, "/")
	switch kind {
	case "workload":
		if id := x.ids[name]; id != image.None {
			return end{name: text, id: id}, nil
		}
		return end{}, fmt.Errorf("%s %q: the policy declares no such workload", side, text)
	case "network":
		n := x.networks[name]
		if n == nil {
			return end{}, fmt.Errorf("%s %q: the policy declares no such network", side, text)
		}
		if len(n.CIDRs) == 0 {
			return end{}, fmt.Errorf("%s %q: the network has no addresses", side, text)
		}
		return end{name: text, address: n.CIDRs[0].Masked().Addr()}, nil
	case "zone", "any":
		return end{}, fmt.Errorf("%s %q: a probe is about one end; name a workload/, a network/, an address or unmanaged", side, text)
	}
	if kind == "pod" {
		return x.podEnd(side, text, name)
	}
	if text == "unmanaged" {
		return end{name: text, id: image.Unmanaged}, nil
	}
	if address, err := netip.ParseAddr(text); err == nil {
		address = address.Unmap().WithZone("")
		return end{name: address.String(), address: address}, nil
	}
	if x.ids[text] != image.None {
		return end{}, fmt.Errorf("%s %q: did you mean workload/%s?", side, text, text)
	}
	if x.networks[text] != nil {
		return end{}, fmt.Errorf("%s %q: did you mean network/%s?", side, text, text)
	}
	return end{}, fmt.Errorf("%s %q: not workload/NAME, network/NAME, pod/NAMESPACE/NAME, an address or unmanaged", side, text)
}

// flow is a probe whose names are known.
type flow struct {
	from, to end
	port     image.Port
	portText string
	now      time.Time
}

// query asks one end of a flow about the other.
func (f flow) query(d abi.Direction) Query {
	subject, peer := f.from, f.to
	if d == abi.Ingress {
		subject, peer = f.to, f.from
	}
	q := Query{Subject: subject.id, Direction: d, Port: f.port, Address: peer.address, Now: f.now}
	if peer.local() {
		q.Proof, q.Peer = abi.ProofIdentity, peer.id
	}
	return q
}

// judge asks both ends. An end elsewhere allows.
func (e *Evaluator) judge(f flow) (egress, ingress Decision) {
	egress = Decision{Verdict: abi.Allow, Crossing: -1}
	ingress = egress
	if f.from.local() {
		egress = e.Evaluate(f.query(abi.Egress))
	}
	if f.to.local() {
		ingress = e.Evaluate(f.query(abi.Ingress))
	}
	return egress, ingress
}

func (x *explainer) answer(f flow) Answer {
	egress, ingress := x.judge(f)
	a := Answer{Egress: egress.Verdict, Ingress: ingress.Verdict}
	switch out, in := egress.Verdict == abi.Allow, ingress.Verdict == abi.Allow; {
	case out && in:
		a.Allowed = true
	case out:
		a.Refuses = "ingress"
	case in:
		a.Refuses = "egress"
	default:
		a.Refuses = "both"
	}
	var decides int
	switch a.Verdict, decides = verdict(egress, ingress); {
	case egress.Verdict != abi.Allow:
		a.Reason = x.denial(f, abi.Egress, egress.Reason)
	case ingress.Verdict != abi.Allow:
		a.Reason = x.denial(f, abi.Ingress, ingress.Reason)
	case decides < 0:
		a.Reason = "no workload is involved, and the policy lets unmanaged processes do it"
	default:
		c := &x.policy.Crossings[decides]
		a.Crossing, a.Line = c.Name, c.Pos.Line
		a.Reason = fmt.Sprintf("crossing %s allows it", x.policy.cite(c))
	}
	return a
}

// denial says why one end refuses.
func (x *explainer) denial(f flow, d abi.Direction, reason abi.Reason) string {
	q := f.query(d)
	peer := f.to
	if d == abi.Ingress {
		peer = f.from
	}
	switch reason {
	case abi.NotInWindow:
		for i := range x.policy.Crossings {
			c := &x.policy.Crossings[i]
			if x.has(subjectSide(c, q), q.Subject) && covers(c.Ports, q.Port) && x.admits(peerSide(c, q), q) {
				return fmt.Sprintf("crossing %s declares it, but only %s", x.policy.cite(c), c.windowText())
			}
		}
	case abi.TagMissing:
		i, _ := x.first(q, func(c *Crossing) bool { return provable(peerSide(c, q)) })
		if i >= 0 {
			return fmt.Sprintf("crossing %s asks for a proven identity, and %s proves none", x.policy.cite(&x.policy.Crossings[i]), peer.name)
		}
	}
	text := fmt.Sprintf("no crossing lets %s reach %s on %s", f.from.name, f.to.name, f.portText)
	if d == abi.Ingress {
		text = fmt.Sprintf("no crossing lets %s accept %s on %s", f.to.name, f.from.name, f.portText)
	}
	if near := x.near(q); near != "" {
		text += "; nearest: " + near
	}
	return text
}

// near names the crossing that comes nearest to admitting the query, and what it
// admits instead: best one that only the port keeps away, then one that admits
// another source, then one that leads to another destination.
func (x *explainer) near(q Query) string {
	var best *Crossing
	bestScore := 0
	for i := range x.policy.Crossings {
		c := &x.policy.Crossings[i]
		mine, theirs, port := x.has(subjectSide(c, q), q.Subject), x.admits(peerSide(c, q), q), covers(c.Ports, q.Port)
		from, to := mine, theirs
		if q.Direction == abi.Ingress {
			from, to = theirs, mine
		}
		score := 0
		switch {
		case from && to:
			score = 3
		case to && port:
			score = 2
		case from && port:
			score = 1
		}
		if score > bestScore {
			best, bestScore = c, score
		}
	}
	switch bestScore {
	case 3:
		return fmt.Sprintf("%s on %s", x.policy.cite(best), list(best.Ports, spanText))
	case 2:
		return fmt.Sprintf("%s from %s", x.policy.cite(best), list(best.From, Term.String))
	case 1:
		return fmt.Sprintf("%s to %s", x.policy.cite(best), list(best.To, Term.String))
	}
	return ""
}

// cite is a crossing's name and place.
func (p *Policy) cite(c *Crossing) string { return fmt.Sprintf("%s (%s)", c.Name, p.place(c.Pos)) }

func (p *Policy) place(pos Pos) string { return fmt.Sprintf("%s:%d", p.File, pos.Line) }

func (c *Crossing) windowText() string {
	switch {
	case c.Since.IsZero():
		return "until " + c.Until.UTC().Format(time.RFC3339)
	case c.Until.IsZero():
		return "from " + c.Since.UTC().Format(time.RFC3339)
	}
	return "from " + c.Since.UTC().Format(time.RFC3339) + " until " + c.Until.UTC().Format(time.RFC3339)
}

// list joins a few elements, and says how many more there are.
func list[T any](all []T, text func(T) string) string {
	const show = 4
	var out []string
	for i, v := range all {
		if i == show {
			out = append(out, fmt.Sprintf("%d more", len(all)-show))
			break
		}
		out = append(out, text(v))
	}
	return strings.Join(out, ", ")
}

// protoName is a protocol and its word in the language.
type protoName struct {
	name  string
	proto image.Proto
}

var protoNames = []protoName{
	{"tcp", image.TCP}, {"udp", image.UDP}, {"sctp", image.SCTP},
	{"icmp", image.ICMP}, {"icmp6", image.ICMP6}, {"other", image.Other},
}

// spanText is a span as a policy writes it.
func spanText(s image.Span) string {
	i := slices.IndexFunc(protoNames, func(p protoName) bool { return p.proto == s.Proto })
	if i < 0 || s.Proto == image.Other {
		return "other"
	}
	last, _ := s.Proto.Last()
	switch name := protoNames[i].name; {
	case s.Low == 0 && s.High == last:
		return name + "/*"
	case s.Low == s.High:
		return fmt.Sprintf("%s/%d", name, s.Low)
	default:
		return fmt.Sprintf("%s/%d-%d", name, s.Low, s.High)
	}
}

// parseProbePort reads one port. The name of an ICMP type means that of the
// probe's address family.
func parseProbePort(text string, v6 bool) (image.Port, error) {
	kind, number, _ := strings.Cut(strings.ToLower(text), "/")
	for _, p := range protoNames {
		if p.name != kind {
			continue
		}
		if p.proto == image.Other {
			if number == "" && strings.EqualFold(text, kind) {
				return image.Port{Proto: image.Other}, nil
			}
			break
		}
		if types, named := icmpNames[number]; named && p.proto == image.ICMP {
			if v6 {
				return image.Port{Proto: image.ICMP6, Number: types[1]}, nil
			}
			return image.Port{Proto: image.ICMP, Number: types[0]}, nil
		}
		if n, ok := portNumber(number, p.proto); ok {
			return image.Port{Proto: p.proto, Number: n}, nil
		}
		break
	}
	return image.Port{}, fmt.Errorf("port %q: a probe needs one port, as tcp/8080, udp/53, icmp/echo or other", text)
}
