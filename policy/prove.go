package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// Prove checks the policy's assertions, and reports every one that does not hold,
// with the path or the end that breaks it.
//
// A `never` is a promise about every time and every address plan: each window
// counts as open, and a workload may have any address, so that a crossing with
// networks may admit it. An `allow` is a promise about now that needs nobody's
// address: it counts no network as holding a workload.
func (p *Policy) Prove() error {
	if len(p.Assertions) == 0 {
		return nil
	}
	r := reporter{file: p.File, src: p.Source}
	g := newGraph(p)
	x := explainer{Evaluator: p.Evaluator(), ids: p.IDs()}
	now := time.Now()
	for i := range p.Assertions {
		a := &p.Assertions[i]
		if a.Never {
			if path := g.path(a); path != "" {
				r.add(a.Pos, "remove or narrow one of these crossings", "assertion does not hold: never %s to %s: %s", a.From, a.To, path)
			}
		} else if problem := x.disallowed(a, now); problem != "" {
			r.add(a.Pos, "declare a crossing, or drop the assertion", "assertion does not hold: allow %s to %s: %s", a.From, a.To, problem)
		}
	}
	return r.err()
}

// disallowed looks for ends of an `allow` that would be refused now, and says why;
// "" if there are none.
func (x *explainer) disallowed(a *Assertion, now time.Time) string {
	const most = 1 << 20
	if a.Port == nil {
		return "names no port"
	}
	from, to := x.ends(a.From), x.ends(a.To)
	switch {
	case len(from) == 0:
		return fmt.Sprintf("%s is nobody in particular", a.From)
	case len(to) == 0:
		return fmt.Sprintf("%s is nobody in particular", a.To)
	case !from[0].local() && !to[0].local():
		return "neither end is a workload or unmanaged, so nothing here judges it"
	case len(from)*len(to) > most:
		return fmt.Sprintf("%d pairs are too many to try; name workloads", len(from)*len(to))
	}
	text := spanText(image.Span{Proto: a.Port.Proto, Low: a.Port.Number, High: a.Port.Number})
	for _, f := range from {
		for _, t := range to {
			d := x.answer(flow{from: f, to: t, port: *a.Port, portText: text, now: now})
			if d.Verdict != abi.Allow {
				return d.Reason
			}
		}
	}
	return ""
}

// ends are the ends that a term of an `allow` names: a zone's workloads, one
// address of each part of a network that other networks cut out of it.
func (x *explainer) ends(t Term) []end {
	var out []end
	switch t.Kind {
	case image.TermWorkload:
		out = append(out, end{name: t.String(), id: x.ids[t.Name]})
	case image.TermZone:
		for i := range x.policy.Workloads {
			if w := &x.policy.Workloads[i]; w.Zone == t.Name {
				out = append(out, end{name: "workload/" + w.Name, id: x.ids[w.Name]})
			}
		}
	case image.TermNetwork:
		for _, a := range x.policy.edges() {
			if x.networks[t.Name].contains(a) {
				out = append(out, end{name: a.String(), address: a})
			}
		}
	case image.TermUnmanaged:
		out = append(out, end{name: t.String(), id: image.Unmanaged})
	}
	return out
}

// graph has a node for each workload, one for the unmanaged processes, one for
// each network, and one for every address in no network. The first two kinds are
// local: demarc judges them.
type graph struct {
	policy   *Policy
	index    map[string]int // workload -> node
	networks map[string]int // network -> node
	members  map[string][]int
	overlap  map[string][]int // network -> nodes of the networks that share an address with it
	nodes    int
}

func newGraph(p *Policy) *graph {
	g := &graph{
		policy: p, index: map[string]int{}, networks: map[string]int{},
		members: map[string][]int{}, overlap: map[string][]int{},
	}
	for i := range p.Workloads {
		w := &p.Workloads[i]
		g.index[w.Name] = i
		g.members[w.Zone] = append(g.members[w.Zone], i)
	}
	for i := range p.Networks {
		g.networks[p.Networks[i].Name] = g.unmanaged() + 1 + i
	}
	g.nodes = g.unmanaged() + 1 + len(p.Networks) + 1
	for i := range p.Networks {
		for j := range p.Networks {
			if overlap(p.Networks[i].CIDRs, p.Networks[j].CIDRs) {
				g.overlap[p.Networks[i].Name] = append(g.overlap[p.Networks[i].Name], g.unmanaged()+1+j)
			}
		}
	}
	return g
}

func overlap(a, b []netip.Prefix) bool {
	return slices.ContainsFunc(a, func(x netip.Prefix) bool { return slices.ContainsFunc(b, x.Overlaps) })
}

func (g *graph) unmanaged() int       { return len(g.policy.Workloads) }
func (g *graph) local(node int) bool  { return node <= g.unmanaged() }
func (g *graph) remote(node int) bool { return !g.local(node) }

func (g *graph) name(node int) string {
	switch {
	case node < g.unmanaged():
		return "workload/" + g.policy.Workloads[node].Name
	case node == g.unmanaged():
		return "unmanaged"
	case node < g.nodes-1:
		return "network/" + g.policy.Networks[node-g.unmanaged()-1].Name
	}
	return "any other address"
}

// side lists the nodes that a term of a crossing can mean.
func (g *graph) side(t Term) []int {
	switch t.Kind {
	case image.TermWorkload:
		return []int{g.index[t.Name]}
	case image.TermZone:
		return g.members[t.Name]
	case image.TermNetwork:
		return g.overlap[t.Name]
	case image.TermUnmanaged:
		return []int{g.unmanaged()}
	case image.TermAny:
		all := make([]int, g.nodes)
		for i := range all {
			all[i] = i
		}
		return all
	}
	return nil
}

// ends lists the nodes that a term of an assertion means. A zone is all that is
// in it: workloads, networks, and unmanaged processes if they are.
func (g *graph) ends(t Term) []int {
	switch t.Kind {
	case image.TermNetwork:
		return []int{g.networks[t.Name]}
	case image.TermZone:
		out := slices.Clone(g.members[t.Name])
		if g.policy.Unmanaged.Zone == t.Name {
			out = append(out, g.unmanaged())
		}
		for i := range g.policy.Networks {
			if n := &g.policy.Networks[i]; n.Zone == t.Name {
				out = append(out, g.networks[n.Name])
			}
		}
		return out
	}
	return g.side(t)
}

// step is how a node was reached: from another, by a crossing on each side (the
// same where one declares it to both), or by what unmanaged processes may do.
type step struct {
	reached   bool
	from      int
	out, into int // crossings; -1 = as unmanaged
}

// path looks for a path that a `never` forbids, and describes it; "" if there is
// none. A port limits only the last crossing of it.
func (g *graph) path(a *Assertion) string {
	frontier, seen := make([]bool, g.nodes), make([]bool, g.nodes)
	for _, n := range g.ends(a.From) {
		frontier[n], seen[n] = true, true
	}
	targets := g.ends(a.To)
	var steps [][]step
	for range max(a.Hops, 1) {
		last := g.reach(frontier, a.Port)
		for _, t := range targets {
			if last[t].reached {
				return g.describe(append(steps, last), t)
			}
		}
		all := last
		if a.Port != nil {
			all = g.reach(frontier, nil)
		}
		steps = append(steps, all)
		frontier = make([]bool, g.nodes)
		more := false
		for n := range all {
			if all[n].reached && !seen[n] {
				frontier[n], seen[n], more = true, true, true
			}
		}
		if !more {
			break
		}
	}
	return ""
}

// reach finds what the nodes of the frontier can open a flow to, on the port or
// on any.
func (g *graph) reach(frontier []bool, port *image.Port) []step {
	steps := make([]step, g.nodes)
	mark := func(to, from, out, into int) {
		if !steps[to].reached {
			steps[to] = step{true, from, out, into}
		}
	}

	// One crossing that names both ends admits on both sides. Of two ends elsewhere
	// neither is judged here, so nothing is declared between them.
	for i := range g.policy.Crossings {
		c := &g.policy.Crossings[i]
		if c.Decoy || port != nil && !covers(c.Ports, *port) { // a decoy lets nothing through
			continue
		}
		local, remote := g.source(c.From, frontier, g.local), g.source(c.From, frontier, g.remote)
		if local < 0 && remote < 0 {
			continue
		}
		for _, t := range c.To {
			for _, to := range g.side(t) {
				switch {
				case local >= 0:
					mark(to, local, i, i)
				case g.local(to):
					mark(to, remote, i, i)
				}
			}
		}
	}

	// Two crossings can admit a flow by the ends' addresses: one lets it out to a
	// network, another lets it in from one.
	exits := g.exits(frontier, port)
	for i := range g.policy.Crossings {
		c := &g.policy.Crossings[i]
		if c.Decoy || !names(c.From, image.TermNetwork) {
			continue
		}
		if exit, found := exits.through(c.Ports); found {
			for _, t := range c.To {
				for _, to := range g.side(t) {
					if g.local(to) && t.Kind != image.TermNetwork {
						mark(to, exit.from, exit.crossing, i)
					}
				}
			}
		}
	}

	// Unmanaged processes need no crossing of their own.
	u := g.unmanaged()
	if g.policy.Unmanaged.Outbound && frontier[u] {
		for to := u + 1; to < g.nodes; to++ {
			mark(to, u, -1, -1)
		}
	}
	if g.policy.Unmanaged.Inbound {
		if len(exits) > 0 {
			mark(u, exits[0].from, exits[0].crossing, -1)
		}
		for from := u + 1; from < g.nodes; from++ {
			if frontier[from] {
				mark(u, from, -1, -1)
			}
		}
	}
	return steps
}

// source is a node of the frontier that the side names and also accepts; -1 if
// there is none.
func (g *graph) source(side []Term, frontier []bool, also func(int) bool) int {
	for _, t := range side {
		for _, n := range g.side(t) {
			if frontier[n] && also(n) {
				return n
			}
		}
	}
	return -1
}

// exit lets a local node out to some network on a span of ports.
type exit struct {
	image.Span
	reach    uint16 // highest port of this and all exits before it of the protocol
	from     int
	crossing int // -1 = as unmanaged
}

// exits are ordered by protocol and lowest port.
type exits []exit

func (g *graph) exits(frontier []bool, port *image.Port) exits {
	var out exits
	add := func(s image.Span, from, crossing int) {
		if port != nil {
			if !covers([]image.Span{s}, *port) {
				return
			}
			s.Low, s.High = port.Number, port.Number
		}
		out = append(out, exit{Span: s, from: from, crossing: crossing})
	}
	for i := range g.policy.Crossings {
		c := &g.policy.Crossings[i]
		if c.Decoy || !names(c.To, image.TermNetwork) {
			continue
		}
		if from := g.source(c.From, frontier, g.local); from >= 0 {
			for _, s := range c.Ports {
				add(s, from, i)
			}
		}
	}
	if g.policy.Unmanaged.Outbound && frontier[g.unmanaged()] {
		for _, proto := range image.Protos {
			last, _ := proto.Last()
			add(image.Span{Proto: proto, High: last}, g.unmanaged(), -1)
		}
	}
	slices.SortStableFunc(out, func(a, b exit) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Low, b.Low))
	})
	for i := range out {
		out[i].reach = out[i].High
		if i > 0 && out[i-1].Proto == out[i].Proto {
			out[i].reach = max(out[i].reach, out[i-1].reach)
		}
	}
	return out
}

// through finds an exit that shares a port with the spans.
func (e exits) through(spans []image.Span) (exit, bool) {
	for _, s := range spans {
		// Behind is the first exit that begins above the span.
		behind, _ := slices.BinarySearchFunc(e, s, func(x exit, s image.Span) int {
			if x.Proto < s.Proto || x.Proto == s.Proto && x.Low <= s.High {
				return -1
			}
			return 1
		})
		for i := behind - 1; i >= 0 && e[i].Proto == s.Proto && e[i].reach >= s.Low; i-- {
			if e[i].High >= s.Low {
				return e[i], true
			}
		}
	}
	return exit{}, false
}

// describe tells the path to a node, which the last steps reached.
func (g *graph) describe(steps [][]step, node int) string {
	var hops []string
	for i := len(steps) - 1; i >= 0; i-- {
		s := steps[i][node]
		by := make([]string, 0, 2)
		for _, c := range [...]int{s.out, s.into} {
			text := "what unmanaged processes may do"
			if c >= 0 {
				text = "crossing " + g.policy.cite(&g.policy.Crossings[c])
			}
			if !slices.Contains(by, text) {
				by = append(by, text)
			}
		}
		hops = append(hops, fmt.Sprintf("%s reaches %s by %s", g.name(s.from), g.name(node), strings.Join(by, " and ")))
		node = s.from
	}
	slices.Reverse(hops)
	return strings.Join(hops, ", then ")
}
