package policy

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// Bounds of the flows that Diff judges and lists.
const (
	maxDiffVisits   = 100_000_000
	maxDiffVerdicts = 200
)

// Difference is what a new policy means that an old one does not.
type Difference struct {
	Changes  []Change        `json:"changes"`  // of declarations
	Verdicts []VerdictChange `json:"verdicts"` // of flows, at the time of comparison
	// Truncated: not every flow was judged, or not every change is listed.
	Truncated bool `json:"truncated,omitempty"`
}

// Change is one declaration that differs.
type Change struct {
	Kind  string `json:"kind"` // added, removed, changed
	What  string `json:"what"` // "workload web", "crossing web-api", "policy"
	Field string `json:"field,omitempty"`
	Old   string `json:"old,omitempty"`
	New   string `json:"new,omitempty"`
}

// VerdictChange is a flow that the new policy judges differently.
type VerdictChange struct {
	From  string      `json:"from"`
	To    string      `json:"to"`
	Ports string      `json:"ports"` // that are judged alike
	Old   abi.Verdict `json:"old"`
	New   abi.Verdict `json:"new"`
	By    string      `json:"by,omitempty"` // the crossing that allows it, old or new
}

// Empty says whether the policies mean the same.
func (d *Difference) Empty() bool { return len(d.Changes) == 0 && len(d.Verdicts) == 0 && !d.Truncated }

// String has one line for each change: +, - or ~, then what.
func (d *Difference) String() string {
	var b strings.Builder
	for _, c := range d.Changes {
		switch c.Kind {
		case "added":
			fmt.Fprintf(&b, "+ %s\n", c.What)
		case "removed":
			fmt.Fprintf(&b, "- %s\n", c.What)
		default:
			fmt.Fprintf(&b, "~ %s: %s: %s -> %s\n", c.What, c.Field, orNone(c.Old), orNone(c.New))
		}
	}
	for _, v := range d.Verdicts {
		word := "newly allowed"
		if v.New != abi.Allow {
			word = "newly denied"
		}
		fmt.Fprintf(&b, "! %s: %s -> %s %s", word, v.From, v.To, v.Ports)
		if v.By != "" {
			fmt.Fprintf(&b, " (%s)", v.By)
		}
		b.WriteByte('\n')
	}
	if d.Truncated {
		b.WriteString("! there may be more flows whose verdict changes\n")
	}
	return b.String()
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// Diff compares two policies: their declarations field by field, and what they
// decide for flows between workloads, unmanaged processes and addresses. Verdicts
// are those of now. Of large policies only flows of ends that a change names are
// judged, and the difference says so.
func Diff(old, new *Policy) *Difference {
	d := &Difference{}
	d.fields("policy", policyFields(old), policyFields(new))
	d.declared("zone", zoneFields(old), zoneFields(new))
	d.declared("workload", workloadFields(old), workloadFields(new))
	d.declared("network", networkFields(old), networkFields(new))
	d.declared("crossing", crossingFields(old), crossingFields(new))
	if was, is := commonOrder(old, new), commonOrder(new, old); !slices.Equal(was, is) {
		d.Changes = append(d.Changes, Change{
			Kind: "changed", What: "crossings", Field: "order", Old: list(was, asIs), New: list(is, asIs),
		})
	}
	if len(d.Changes) > 0 {
		d.flows(old, new)
	}
	return d
}

// field is one property of a declaration, as text.
type field struct{ name, value string }

func (d *Difference) fields(what string, old, new []field) {
	for i := range old {
		if old[i].value != new[i].value {
			d.Changes = append(d.Changes, Change{
				Kind: "changed", What: what, Field: old[i].name, Old: old[i].value, New: new[i].value,
			})
		}
	}
}

func (d *Difference) declared(kind string, old, new map[string][]field) {
	all := slices.Collect(maps.Keys(old))
	for name := range new {
		if old[name] == nil {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	for _, name := range all {
		what := kind + " " + name
		switch {
		case old[name] == nil:
			d.Changes = append(d.Changes, Change{Kind: "added", What: what})
		case new[name] == nil:
			d.Changes = append(d.Changes, Change{Kind: "removed", What: what})
		default:
			d.fields(what, old[name], new[name])
		}
	}
}

func policyFields(p *Policy) []field {
	return []field{
		{"name", p.Name}, {"version", fmt.Sprint(p.Version)}, {"trustDomain", p.TrustDomain},
		{"mode", [...]string{"enforce", "observe"}[p.Mode&1]}, {"notAfter", timeText(p.NotAfter)},
		{"unmanaged zone", p.Unmanaged.Zone}, {"unmanaged outbound", allowText(p.Unmanaged.Outbound)},
		{"unmanaged inbound", allowText(p.Unmanaged.Inbound)},
	}
}

func zoneFields(p *Policy) map[string][]field {
	out := map[string][]field{}
	for _, z := range p.Zones {
		out[z.Name] = []field{{"trust", fmt.Sprint(z.Trust)}}
	}
	return out
}

func workloadFields(p *Policy) map[string][]field {
	ids := p.IDs()
	out := map[string][]field{}
	for i := range p.Workloads {
		w := &p.Workloads[i]
		var match, roles []string
		for j := range w.Match {
			match = append(match, w.Match[j].String())
		}
		for _, r := range w.Roles {
			text := r.Name
			if !r.Until.IsZero() {
				text += " until " + timeText(r.Until)
			}
			roles = append(roles, text)
		}
		slices.Sort(roles)
		out[w.Name] = []field{
			{"zone", w.Zone}, {"identity", fmt.Sprint(ids[w.Name])},
			{"match", strings.Join(match, ", ")}, {"roles", strings.Join(roles, ", ")},
		}
	}
	return out
}

func networkFields(p *Policy) map[string][]field {
	out := map[string][]field{}
	for i := range p.Networks {
		n := &p.Networks[i]
		blocks := slices.Clone(n.CIDRs)
		slices.SortFunc(blocks, comparePrefixes)
		out[n.Name] = []field{{"zone", n.Zone}, {"cidrs", join(slices.Compact(blocks), netip.Prefix.String)}}
	}
	return out
}

func crossingFields(p *Policy) map[string][]field {
	out := map[string][]field{}
	for i := range p.Crossings {
		c := &p.Crossings[i]
		limit := ""
		if c.Rate > 0 {
			limit = fmt.Sprintf("%d/h, burst %d", c.Rate, c.Burst)
		}
		out[c.Name] = []field{
			{"from", sortedTerms(c.From)}, {"to", sortedTerms(c.To)}, {"ports", join(normalSpans(c.Ports), spanText)},
			{"identity", [...]string{"required", "sender", "none", ""}[c.Need&3]},
			{"nat", [...]string{"none", "source", "destination", ""}[c.NAT&3]},
			{"side", [...]string{"both", "egress", "ingress", ""}[c.Side&3]},
			{"log", [...]string{"denied", "all", "none", ""}[c.Log&3]},
			{"refuse", [...]string{"reject", "drop"}[c.Refuse&1]},
			{"decoy", fmt.Sprint(c.Decoy)}, {"forensic", fmt.Sprint(c.Forensic)}, {"limit", limit},
			{"since", timeText(c.Since)}, {"until", timeText(c.Until)}, {"purpose", c.Purpose},
		}
	}
	return out
}

func sortedTerms(terms []Term) string {
	var out []string
	for _, t := range terms {
		out = append(out, t.String())
	}
	slices.Sort(out)
	return strings.Join(slices.Compact(out), ", ")
}

func join[T any](all []T, text func(T) string) string {
	var out []string
	for _, v := range all {
		out = append(out, text(v))
	}
	return strings.Join(out, ", ")
}

func asIs(s string) string { return s }

func timeText(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

func allowText(allowed bool) string {
	if allowed {
		return "allow"
	}
	return "deny"
}

// commonOrder is the order in one policy of the crossings that both have.
func commonOrder(of, with *Policy) []string {
	has := map[string]bool{}
	for i := range with.Crossings {
		has[with.Crossings[i].Name] = true
	}
	var out []string
	for i := range of.Crossings {
		if has[of.Crossings[i].Name] {
			out = append(out, of.Crossings[i].Name)
		}
	}
	return out
}

// flows judges flows under both policies and lists those whose verdict differs.
func (d *Difference) flows(old, new *Policy) {
	was, is := explainer{Evaluator: old.Evaluator(), ids: old.IDs()}, explainer{Evaluator: new.Evaluator(), ids: new.IDs()}
	ports := jointPorts(old, new)
	ends := slices.Concat(processes(old, new), addressEnds(old, new))
	left := maxDiffVisits
	each := 2 * (2 + len(old.Crossings) + len(new.Crossings)) // visits to judge one flow
	if len(ends)*len(ends)*len(ports) > left/each {
		ends, ports = d.touched(ends, old, new), d.touchedPorts(ports, old, new)
		d.Truncated = true
	}
	now := time.Now()
	for _, from := range ends {
		for _, to := range ends {
			if from.address.IsValid() && to.address.IsValid() {
				continue // nothing here judges a flow between two others
			}
			for _, port := range ports {
				if left -= each; left < 0 {
					return
				}
				a, by := verdict(was.judge(flow{from: from.in(was), to: to.in(was), port: port.port, now: now}))
				b, byNew := verdict(is.judge(flow{from: from.in(is), to: to.in(is), port: port.port, now: now}))
				if a == b {
					continue
				}
				if len(d.Verdicts) == maxDiffVerdicts {
					d.Truncated = true
					return
				}
				change := VerdictChange{From: from.name, To: to.name, Ports: port.text, Old: a, New: b}
				if by >= 0 {
					change.By = old.Crossings[by].Name
				} else if byNew >= 0 {
					change.By = new.Crossings[byNew].Name
				}
				d.Verdicts = append(d.Verdicts, change)
			}
		}
	}
}

// verdict is that of both ends together, and the crossing that allows it; -1 if
// there is none.
func verdict(egress, ingress Decision) (abi.Verdict, int) {
	if egress.Verdict != abi.Allow || ingress.Verdict != abi.Allow {
		return abi.Deny, -1
	}
	return abi.Allow, max(egress.Crossing, ingress.Crossing)
}

// in is the end as one policy knows it. A workload that the policy does not
// declare is an unmanaged process to it.
func (e end) in(x explainer) end {
	if e.address.IsValid() {
		return e
	}
	if name, is := strings.CutPrefix(e.name, "workload/"); is && x.ids[name] != image.None {
		return end{name: e.name, id: x.ids[name]}
	}
	return end{name: e.name, id: image.Unmanaged}
}

// processes are all local ends that either policy has.
func processes(old, new *Policy) []end {
	var names []string
	for _, p := range [...]*Policy{old, new} {
		for i := range p.Workloads {
			names = append(names, "workload/"+p.Workloads[i].Name)
		}
	}
	slices.Sort(names)
	out := []end{{name: "unmanaged"}}
	for _, n := range slices.Compact(names) {
		out = append(out, end{name: n})
	}
	return out
}

// addressEnds is an address of each part that the networks of both policies cut
// out together, named after the networks that hold it.
func addressEnds(old, new *Policy) []end {
	both := &Policy{Networks: slices.Concat(old.Networks, new.Networks)}
	var out []end
	for _, a := range both.representativeAddresses() {
		if a.IsValid() {
			out = append(out, end{name: a.String(), address: a})
		}
	}
	return out
}

// touched keeps the ends that a changed declaration names.
func (d *Difference) touched(ends []end, old, new *Policy) []end {
	changed := map[string]bool{}
	for _, c := range d.Changes {
		changed[c.What] = true
	}
	keep := map[string]bool{"unmanaged": true}
	for _, p := range [...]*Policy{old, new} {
		for i := range p.Workloads {
			if w := &p.Workloads[i]; changed["workload "+w.Name] {
				keep["workload/"+w.Name] = true
			}
		}
		for i := range p.Crossings {
			c := &p.Crossings[i]
			if !changed["crossing "+c.Name] {
				continue
			}
			for _, t := range slices.Concat(c.From, c.To) {
				keep[t.String()] = true
			}
		}
	}
	return slices.DeleteFunc(ends, func(e end) bool { return !e.address.IsValid() && !keep[e.name] })
}

// touchedPorts keeps the ports that a changed crossing covers. A change of
// something else can matter on every port.
func (d *Difference) touchedPorts(ports []jointPort, old, new *Policy) []jointPort {
	changed := map[string]bool{}
	for _, c := range d.Changes {
		if !strings.HasPrefix(c.What, "crossing ") {
			return ports
		}
		changed[c.What] = true
	}
	var spans []image.Span
	for _, p := range [...]*Policy{old, new} {
		for i := range p.Crossings {
			if changed["crossing "+p.Crossings[i].Name] {
				spans = append(spans, p.Crossings[i].Ports...)
			}
		}
	}
	return slices.DeleteFunc(ports, func(p jointPort) bool { return !covers(spans, p.port) })
}

// jointPort is a port that stands for all that both policies treat alike.
type jointPort struct {
	port image.Port
	text string
}

// jointPorts is one port of each class that the crossings of both policies make
// together.
func jointPorts(old, new *Policy) []jointPort {
	var all []image.Crossing
	for _, p := range [...]*Policy{old, new} {
		for i := range p.Crossings {
			all = append(all, image.Crossing{Ports: normalSpans(p.Crossings[i].Ports)})
		}
	}
	left := budget(image.MaxExpansion)
	ranges, _, err := portClasses(all, &left)
	if err != nil {
		return nil // too many to compare; each policy alone may still compile
	}
	byClass := map[uint16][]image.Span{}
	var order []uint16
	for _, r := range ranges {
		if byClass[r.Class] == nil {
			order = append(order, r.Class)
		}
		byClass[r.Class] = append(byClass[r.Class], r.Span)
	}
	var out []jointPort
	for _, class := range order {
		spans := byClass[class]
		out = append(out, jointPort{image.Port{Proto: spans[0].Proto, Number: spans[0].Low}, list(spans, spanText)})
	}
	return out
}
