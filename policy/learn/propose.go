package learn

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

// maxPorts is how many ports one workload may use toward another, or toward all
// addresses, before it looks like a scan, or like ports that are chosen at random.
const maxPorts = 32

// ErrNothing means that nothing was seen that could be proposed.
var ErrNothing = errors.New("nothing can be proposed")

// Proposal is a policy that allows what was seen.
type Proposal struct {
	Text []byte
	// Added is what the base does not have, in words; empty = it allows all of it.
	Added []string
	// Refused is what was seen and is not proposed, and why.
	Refused []string
	Lost    uint64
}

// workload is one that is proposed.
type workload struct {
	name, zone string
	place      place
	found      []policy.Selector // by metadata
	seen       []string          // processes
}

// network is a set of addresses that is proposed.
type network struct {
	name, zone string
	cidrs      []netip.Prefix
	exact      int // addresses that were seen, where cidrs are more; 0 = cidrs are those
}

// crossing is one that is proposed. Its ends are terms of the policy.
type crossing struct {
	name      string
	from, to  string
	ports     []port
	evidence  tally
	pair      [2]netip.AddrPort
	by        example
	apart     bool // its ends are on different hosts
	dissolved bool // it is refused after all
}

// draft is a proposal in the making.
type draft struct {
	*Learner
	names     map[place]string // of workloads
	taken     map[string]bool  // names of workloads, networks and crossings, each behind its kind
	workloads []*workload
	networks  []*network
	crossings []*crossing
	zones     []zone // lowest first
	unmanaged string // zone of unmanaged processes
	outside   string // zone of proposed networks
}

type zone struct {
	name  string
	trust int
}

// Propose ends learning.
func (l *Learner) Propose() (*Proposal, error) {
	l.foldAll()
	switch {
	case l.unnamed != "":
		return nil, fmt.Errorf("flows name workload %s, which is not declared: give the policy that was in force with --base", l.unnamed)
	case l.full:
		return nil, fmt.Errorf("more than %d kinds of flows: choose some, as with demarc flows --from", maxEdges)
	}
	d := &draft{Learner: l, names: map[place]string{}, taken: map[string]bool{}}
	if b := l.options.Base; b != nil {
		for _, w := range b.Workloads {
			d.names[place{declared, w.Name}], d.taken["workload/"+w.Name] = w.Name, true
		}
		for _, n := range b.Networks {
			d.taken["network/"+n.Name] = true
		}
		for _, c := range b.Crossings {
			d.taken["crossing/"+c.Name] = true
		}
	}
	edges := d.mergedEdges()
	edges = d.withoutScans(edges)
	d.nameWorkloads(edges)
	d.placeInZones(edges)
	d.cross(edges)
	if l.options.Base == nil && len(d.crossings) == 0 {
		return &Proposal{Refused: l.sortedRefusals(), Lost: l.lost}, fmt.Errorf("%w, of %s", ErrNothing, &l.seen)
	}
	// A crossing that breaks a rule of the base is no proposal, but for a person to
	// decide. Taking one out cannot make another one wrong, but may leave a workload or
	// a network that nothing needs.
	for range len(d.crossings) + 1 {
		text, lines := d.write()
		p, err := policy.Parse("learned.yaml", text)
		if err == nil {
			_, err = policy.Build(p)
		}
		if err == nil {
			return &Proposal{Text: text, Added: d.added(), Refused: l.sortedRefusals(), Lost: l.lost}, nil
		}
		var problems policy.Errors
		if !errors.As(err, &problems) || !d.dissolve(problems, lines) {
			return nil, fmt.Errorf("what was seen makes no valid policy: %w", err)
		}
	}
	return nil, errors.New("what was seen makes no valid policy")
}

// mergedEdges are the edges whose ends can be declared, in a fixed order. A cgroup
// below another one that was seen is part of it.
func (d *draft) mergedEdges() []edgeOf {
	paths := map[string]place{}
	for e := range d.edges {
		for _, p := range []place{e.from, e.to} {
			if p.kind == cgroup || p.kind == container {
				paths[p.name] = p
			}
		}
	}
	// What was seen before it had a name is who has the cgroup.
	for p, m := range d.met {
		if p.kind == pods || p.kind == called || p.kind == imaged {
			for at := range m.cgroups {
				paths[at] = p
			}
		}
	}
	above := func(path string, kinds ...kind) (place, bool) {
		for i := 1; i <= len(path); i++ {
			if p, ok := paths[path[:i]]; ok && (i == len(path) || path[i] == '/') && slices.Contains(kinds, p.kind) {
				return p, true
			}
		}
		return place{}, false
	}
	top := func(p place) place {
		switch p.kind {
		case cgroup, container:
			if whole, ok := above(p.name, cgroup, container, pods, called, imaged); ok {
				if m, part := d.met[whole], d.met[p]; m != nil && part != nil && whole != p {
					maps.Copy(m.scopes, part.scopes)
				}
				return whole
			}
		case pods, called, imaged:
			// A path above theirs that is a workload leaves no room for another one.
			for _, at := range slices.Sorted(maps.Keys(d.met[p].cgroups)) {
				if p, ok := above(at, cgroup, container); ok {
					return p
				}
			}
		}
		return p
	}
	merged := map[edgeKey]*edge{}
	for key, e := range d.edges {
		key.from, key.to = top(key.from), top(key.to)
		what := endText2(key.from) + " -> " + endText2(key.to) + " " + key.port.String()
		switch {
		case key.from.kind == unmanaged || key.to.kind == unmanaged:
			d.refuseAll(what, "a local process of no workload is at one end: declare a workload for it, or a crossing with unmanaged", e)
			continue
		case key.from.kind == session || key.to.kind == session:
			d.refuseAll(what, "a person's session is no workload", e)
			continue
		case key.from.kind == kernelSide || key.to.kind == kernelSide:
			d.refuseAll(what, "the kernel itself is no workload", e)
			continue
		case key.from.kind == 0 && key.to.kind == 0:
			d.refuseAll(what, "neither end is known", e)
			continue
		}
		if b := d.options.Base; b != nil && covered(b, key, e) {
			continue
		}
		if had := merged[key]; had != nil {
			had.join(e)
			continue
		}
		merged[key] = e
	}
	var all []edgeOf
	for key, e := range merged {
		all = append(all, edgeOf{key, e})
	}
	slices.SortFunc(all, func(a, b edgeOf) int {
		return cmp.Or(comparePlaces(a.from, b.from), comparePlaces(a.to, b.to), cmp.Compare(a.port.protocol, b.port.protocol), cmp.Compare(a.port.number, b.port.number))
	})
	return all
}

// covered says whether a base declares all of an edge, and takes out of it the peers
// that it declares. An edge that was seen under the base itself is not: its reason says
// that no crossing declared it.
func covered(b *policy.Policy, key edgeKey, e *edge) bool {
	number := key.port.number
	if key.port.protocol == "icmp" {
		number = 8
	}
	zones := map[string]string{}
	for _, w := range b.Workloads {
		zones[w.Name] = w.Zone
	}
	cidrs := map[string][]netip.Prefix{}
	for _, n := range b.Networks {
		cidrs[n.Name] = n.CIDRs
	}
	for _, c := range b.Crossings {
		ports := slices.ContainsFunc(c.Ports, func(s image.Span) bool {
			return s.Proto == key.port.proto() && s.Low <= number && number <= s.High
		})
		if !ports {
			continue
		}
		names := func(terms []policy.Term, p place) bool {
			return slices.ContainsFunc(terms, func(t policy.Term) bool {
				switch t.Kind {
				case image.TermAny:
					return true
				case image.TermWorkload:
					return p == place{declared, t.Name}
				case image.TermZone:
					return p.kind == declared && zones[p.name] == t.Name
				}
				return false
			})
		}
		if (key.from.kind == 0 || names(c.From, key.from)) && (key.to.kind == 0 || names(c.To, key.to)) {
			terms := c.From
			if key.to.kind == 0 {
				terms = c.To
			}
			if key.from.kind != 0 && key.to.kind != 0 {
				return true
			}
			for a := range e.peers {
				for _, t := range terms {
					if t.Kind == image.TermAny || t.Kind == image.TermNetwork && holds(cidrs[t.Name], []netip.Addr{a}) {
						delete(e.peers, a)
					}
				}
			}
			if len(e.peers) == 0 && !e.more {
				return true
			}
		}
	}
	return false
}

// proto is the protocol as an image has it.
func (p port) proto() image.Proto {
	switch p.protocol {
	case "tcp":
		return image.TCP
	case "udp":
		return image.UDP
	case "sctp":
		return image.SCTP
	}
	return image.ICMP
}

func endText2(p place) string {
	if p == (place{}) {
		return "an address"
	}
	return p.String()
}

func comparePlaces(a, b place) int {
	return cmp.Or(cmp.Compare(a.kind, b.kind), strings.Compare(a.name, b.name))
}

type edgeOf struct {
	edgeKey
	*edge
}

// join adds the evidence of another edge.
func (e *edge) join(o *edge) {
	e.tally.join(o.tally)
	maps.Copy(e.peers, o.peers)
	e.more, e.apart = e.more || o.more, e.apart || o.apart
	if slices.CompareFunc(o.pair[:], e.pair[:], netip.AddrPort.Compare) < 0 {
		e.pair = o.pair
	}
}

// join adds another tally. Its seconds may have been the same ones.
func (t *tally) join(o tally) {
	if t.count == 0 || o.count > 0 && o.first.Before(t.first) {
		t.first = o.first
	}
	if o.last.After(t.last) {
		t.last = o.last
	}
	t.count += o.count
	t.peak += o.peak
}

func (d *draft) refuseAll(what, why string, e *edge) {
	key := refusal{what, why}
	if d.refused[key] == nil {
		d.refused[key] = &tally{}
	}
	d.refused[key].join(e.tally)
}

// withoutScans takes out what goes to so many ports that no person would have meant it.
func (d *draft) withoutScans(all []edgeOf) []edgeOf {
	type pair struct {
		from, to place
		protocol string
	}
	ports := map[pair]int{}
	for _, e := range all {
		ports[pair{e.from, e.to, e.port.protocol}]++
	}
	return slices.DeleteFunc(all, func(e edgeOf) bool {
		n := ports[pair{e.from, e.to, e.port.protocol}]
		if n <= maxPorts {
			return false
		}
		d.refuseAll(endText2(e.from)+" -> "+endText2(e.to)+" "+e.port.protocol, fmt.Sprintf("%d ports look like a scan, or are chosen at random", n), e.edge)
		return true
	})
}

// free is a name of a kind that nothing else has.
func (d *draft) free(kind, name string) string {
	for n := 1; ; n++ {
		try := name
		if n > 1 {
			try = fmt.Sprintf("%s-%d", name, n)
		}
		if !d.taken[kind+"/"+try] {
			d.taken[kind+"/"+try] = true
			return try
		}
	}
}

func (d *draft) nameWorkloads(all []edgeOf) {
	found := map[place]bool{}
	for _, e := range all {
		for _, p := range []place{e.from, e.to} {
			switch p.kind {
			case unit, cgroup, container, pods, called, imaged:
				found[p] = true
			}
		}
	}
	places := slices.SortedFunc(maps.Keys(found), comparePlaces)
	selectors := d.selectors(places)
	for _, p := range places {
		w := &workload{name: d.free("workload", p.word()), place: p, found: selectors[p]}
		if by := d.judged[p]; by.comm != "" {
			w.seen = append(w.seen, by.comm)
		}
		d.names[p] = w.name
		d.workloads = append(d.workloads, w)
	}
	slices.SortFunc(d.workloads, func(a, b *workload) int { return strings.Compare(a.name, b.name) })
}

// cross makes crossings of edges: those between the same two ends are one for each
// class of protocols, those with addresses one for each set of peers.
func (d *draft) cross(all []edgeOf) {
	type key struct{ from, to, class string }
	made := map[key]*crossing{}
	sets := map[string]*network{}
	for _, e := range all {
		from, to := d.names[e.from], d.names[e.to]
		class := ""
		if p := e.port.protocol; p == "udp" || p == "icmp" {
			class = "-" + p
		}
		var name string
		k := key{class: class}
		var by example
		switch {
		case from != "" && to != "":
			name = from + "-" + to + class
			k.from, k.to, by = "workload/"+from, "workload/"+to, d.judged[e.from]
		case from != "":
			name = from + "-to-" + word(e.port)
			k.from, k.to, by = "workload/"+from, "network/"+d.network(sets, name, e.edge), d.judged[e.from]
		default:
			name = "to-" + to + "-" + word(e.port)
			k.from, k.to, by = "network/"+d.network(sets, name, e.edge), "workload/"+to, d.judged[e.to]
		}
		c := made[k]
		if c == nil {
			c = &crossing{name: d.free("crossing", name), from: k.from, to: k.to, pair: e.pair, by: by}
			made[k] = c
			d.crossings = append(d.crossings, c)
		}
		c.ports = append(c.ports, e.port)
		c.apart = c.apart || e.apart
		c.evidence.join(e.tally)
	}
	slices.SortFunc(d.crossings, func(a, b *crossing) int { return strings.Compare(a.name, b.name) })
	slices.SortFunc(d.networks, func(a, b *network) int { return strings.Compare(a.name, b.name) })
}

func word(p port) string {
	if p.protocol == "icmp" {
		return "icmp"
	}
	return fmt.Sprintf("%s-%d", p.protocol, p.number)
}

// network is the name of the one that holds an edge's peers: one of the base, if it
// holds all of them, or a proposed one.
func (d *draft) network(sets map[string]*network, name string, e *edge) string {
	addresses := slices.SortedFunc(maps.Keys(e.peers), netip.Addr.Compare)
	if b := d.options.Base; b != nil && !e.more {
		for _, n := range b.Networks {
			if holds(n.CIDRs, addresses) {
				return n.Name
			}
		}
	}
	cidrs, exact := blocks(addresses, e.more)
	text := fmt.Sprint(cidrs)
	n := sets[text]
	if n == nil {
		name += "-peers"
		if len(cidrs) == 1 && cidrs[0].IsSingleIP() {
			name = clean("host-" + cidrs[0].Addr().String())
		}
		n = &network{name: d.free("network", name), zone: d.outside, cidrs: cidrs, exact: exact}
		sets[text] = n
		d.networks = append(d.networks, n)
	}
	return n.name
}

func holds(cidrs []netip.Prefix, addresses []netip.Addr) bool {
	for _, a := range addresses {
		if !slices.ContainsFunc(cidrs, func(c netip.Prefix) bool { return c.Contains(a) }) {
			return false
		}
	}
	return true
}

// Bounds of what a person still reads.
const (
	maxHosts  = 16
	maxBlocks = 32
)

// blocks are the addresses themselves if they are few, the /24 and /64 that they are
// in if those are, and otherwise everywhere. exact is how many addresses are meant
// where blocks hold more.
func blocks(addresses []netip.Addr, more bool) (cidrs []netip.Prefix, exact int) {
	add := func(bits4, bits6 int) {
		cidrs = nil
		for _, a := range addresses {
			bits := bits6
			if a.Is4() {
				bits = bits4
			}
			p, err := a.WithZone("").Prefix(bits)
			if err == nil && !slices.Contains(cidrs, p) {
				cidrs = append(cidrs, p)
			}
		}
	}
	if add(32, 128); len(cidrs) <= maxHosts && !more {
		return cidrs, 0
	}
	if add(24, 64); len(cidrs) <= maxBlocks && !more {
		return cidrs, len(addresses)
	}
	add(0, 0)
	return cidrs, len(addresses)
}

// dissolve takes out the crossings that errors are about.
func (d *draft) dissolve(problems policy.Errors, lines map[int]*crossing) bool {
	any := false
	for _, p := range problems {
		c := lines[p.Pos.Line]
		if c == nil || c.dissolved {
			continue
		}
		c.dissolved, any = true, true
		d.refuseAll(fmt.Sprintf("%s -> %s %s", c.from, c.to, portList(c.ports)), p.Msg+"; declare it yourself, with a waiver if it is meant", &edge{tally: c.evidence})
	}
	d.crossings = slices.DeleteFunc(d.crossings, func(c *crossing) bool { return c.dissolved })
	used := map[string]bool{}
	for _, c := range d.crossings {
		used[c.from], used[c.to] = true, true
	}
	d.workloads = slices.DeleteFunc(d.workloads, func(w *workload) bool { return !used["workload/"+w.name] })
	d.networks = slices.DeleteFunc(d.networks, func(n *network) bool { return !used["network/"+n.name] })
	return any
}

// added is what is not in the base, a line each.
func (d *draft) added() (lines []string) {
	for _, w := range d.workloads {
		lines = append(lines, fmt.Sprintf("workload %s in zone %s: %s", w.name, w.zone, w.place))
	}
	for _, n := range d.networks {
		lines = append(lines, fmt.Sprintf("network %s in zone %s", n.name, n.zone))
	}
	for _, c := range d.crossings {
		lines = append(lines, fmt.Sprintf("crossing %s: %s -> %s %s", c.name, c.from, c.to, portList(c.ports)))
	}
	return lines
}

func portList(ports []port) string {
	words := make([]string, len(ports))
	for i, p := range ports {
		words[i] = p.String()
	}
	return strings.Join(words, ", ")
}
