package kubernetes

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/demarc/demarc/policy/image"
)

// view is what one set of rules lets its subjects do in one direction: with whom, on
// which ports. Subjects that the same objects select share it.
//
// Peers are admitted in two ways. By address: blocks that hold no pod that is
// refused. By identity: pods, each on the ports that all of its addresses have.
// Pods that are admitted by address on the same ports need no identity.
type view struct {
	direction image.Direction
	order     []*boundary // that select the subjects, in the order of judgement
	subject   *kind       // one of the subjects: its ports, its node

	byAddress map[int][]span // addresses by the set of ports
	identity  []int          // set of ports by pod
	covered   []int          // of identity, what byAddress admits too
	anyhow    []int          // set of ports by pod, on some of its addresses
	origins   map[string]bool
}

// ruling is what the tiers say about one peer.
type ruling struct {
	allowed ports
	origins []string // objects whose rules allow something; none: nothing forbids it
}

// rule goes through the tiers, as the API describes it, for all ports at once.
func (v *view) rule(peerKind int, peer *kind, address netip.Addr) ruling {
	destination := peer
	if v.direction == image.Ingress {
		destination = v.subject
	}
	var out ruling
	open := everyPort // that no rule has decided about
	allow := func(p ports, origin string) {
		if len(p) > 0 {
			out.allowed = out.allowed.union(p)
			out.origins = append(out.origins, origin)
		}
	}
	var passed ports // to the next tier
	at := admin
	for _, b := range v.order {
		if b.tier == networkPolicy {
			continue
		}
		if b.tier != at { // from Admin to Baseline
			open, passed, at = open.union(passed), nil, b.tier
			if v.isolated() {
				break
			}
		}
		for i := range b.rules[v.direction] {
			r := &b.rules[v.direction][i]
			if len(open) == 0 {
				break
			}
			if !r.peer(peerKind, address) {
				continue
			}
			hit := r.ports(destination).intersect(open)
			open = open.minus(hit)
			switch r.action {
			case accept:
				allow(hit, r.origin)
			case pass:
				passed = passed.union(hit)
			}
		}
	}
	open = open.union(passed)
	if !v.isolated() {
		out.allowed = out.allowed.union(open)
		return out
	}
	for _, b := range v.order {
		if b.tier != networkPolicy || !b.isolates[v.direction] {
			continue
		}
		for i := range b.rules[v.direction] {
			if r := &b.rules[v.direction][i]; r.peer(peerKind, address) {
				allow(r.ports(destination).intersect(open), r.origin)
			}
		}
	}
	return out
}

// isolated says whether a NetworkPolicy selects the subjects in this direction: then
// it decides, and Baseline is not asked.
func (v *view) isolated() bool {
	return slices.ContainsFunc(v.order, func(b *boundary) bool { return b.tier == networkPolicy && b.isolates[v.direction] })
}

// blocks are all that the rules of the view name.
func (v *view) blocks() []netip.Prefix {
	var out []netip.Prefix
	for _, b := range v.order {
		for i := range b.rules[v.direction] {
			for _, x := range b.rules[v.direction][i].blocks {
				if x.IsValid() {
					out = append(append(out, x.Prefix), x.except...)
				}
			}
		}
	}
	return out
}

// ownNode is the rule that the API has for every pod that a NetworkPolicy isolates:
// its node may reach it.
func (c *cluster) ownNode(node string) *boundary {
	r := rule{action: accept, origin: "the pods' own node", everyPort: true, kinds: make([]bool, len(c.kinds))}
	for _, p := range addressBlocks(c.nodes[node].IPs) {
		r.blocks = append(r.blocks, block{Prefix: p})
	}
	return &boundary{tier: networkPolicy, label: "node " + node, rules: [2][]rule{image.Ingress: {r}}, isolates: [2]bool{image.Ingress: true}}
}

// judge fills the view for all pods and addresses.
func (v *view) judge(c *cluster, table *portTable) {
	v.origins = map[string]bool{}
	note := func(r ruling) ports {
		for _, o := range r.origins {
			v.origins[o] = true
		}
		return r.allowed
	}
	parts := cut(v.blocks())
	outside := make([]ports, len(parts)) // what anybody of the part may do who is no pod
	for i, part := range parts {
		outside[i] = note(v.rule(-1, nil, part.low))
	}

	type asked struct{ kind, part int }
	known := map[asked]ports{}
	judge := func(kind, part int, address netip.Addr) ports {
		key := asked{kind, part}
		p, ok := known[key]
		if !ok {
			p = note(v.rule(kind, &c.kinds[kind], address))
			known[key] = p
		}
		return p
	}

	v.byAddress = map[int][]span{}
	v.identity, v.covered, v.anyhow = make([]int, len(c.pods)), make([]int, len(c.pods)), make([]int, len(c.pods))
	holes := make([][]netip.Addr, len(parts))
	for i := range c.pods {
		p := &c.pods[i]
		if len(p.addresses) == 0 {
			n := table.number(judge(p.kind, -1, netip.Addr{}))
			v.identity[i], v.anyhow[i] = n, n
			continue
		}
		identity, covered := everyPort, everyPort
		var anyhow ports
		for _, a := range p.addresses {
			part := find(parts, a)
			allowed := judge(p.kind, part, a)
			if outside[part].within(allowed) {
				covered = covered.intersect(outside[part])
			} else {
				holes[part] = append(holes[part], a)
				covered = nil
			}
			identity, anyhow = identity.intersect(allowed), anyhow.union(allowed)
		}
		v.identity[i], v.covered[i], v.anyhow[i] = table.number(identity), table.number(covered), table.number(anyhow)
		if slices.Equal(identity, anyhow) {
			continue
		}
		// Its addresses differ, so what only some of them may is a matter of address.
		for _, a := range p.addresses {
			part := find(parts, a)
			rest := judge(p.kind, part, a).minus(identity)
			if !slices.Contains(holes[part], a) {
				rest = rest.minus(outside[part])
			}
			if n := table.number(rest); n != 0 {
				v.byAddress[n] = append(v.byAddress[n], span{a, a})
			}
		}
	}
	for i, part := range parts {
		n := table.number(outside[i])
		if n == 0 {
			continue
		}
		slices.SortFunc(holes[i], netip.Addr.Compare)
		v.byAddress[n] = append(v.byAddress[n], part.without(slices.Compact(holes[i]))...)
	}
	for n, spans := range v.byAddress {
		v.byAddress[n] = merge(spans)
	}
}

// by names the objects that admit, for people.
func (v *view) by() string {
	if len(v.origins) == 0 {
		return "no policy for it"
	}
	all := make([]string, 0, len(v.origins))
	for o := range v.origins {
		all = append(all, o)
	}
	slices.Sort(all)
	const show = 4
	if len(all) > show {
		all = append(all[:show], fmt.Sprintf("%d more", len(all)-show))
	}
	return strings.Join(all, ", ")
}

// views gives each pod its view of each direction.
func (c *cluster) views(all []boundary, table *portTable) (views []*view, of [2][]*view) {
	index := map[string]*view{}
	byKind := [2][]*view{make([]*view, len(c.kinds)), make([]*view, len(c.kinds))}
	for d := range byKind {
		direction := image.Direction(d)
		for k := range c.kinds {
			v := &view{direction: direction, subject: &c.kinds[k]}
			var key strings.Builder
			fmt.Fprintf(&key, "%d", d)
			for i := range all {
				b := &all[i]
				if b.subjects[k] && (len(b.rules[d]) > 0 && b.tier != networkPolicy || b.isolates[d]) {
					v.order = append(v.order, b)
					fmt.Fprintf(&key, " %d", i)
				}
			}
			if direction == image.Ingress {
				fmt.Fprintf(&key, " %v", v.subject.ports)
				if node := v.subject.node; node != "" && v.isolated() {
					v.order = append(v.order, c.ownNode(node))
					fmt.Fprintf(&key, " %q", node)
				}
			}
			if index[key.String()] == nil {
				index[key.String()] = v
				views = append(views, v)
			}
			byKind[d][k] = index[key.String()]
		}
	}
	for _, v := range views {
		v.judge(c, table)
	}
	for d := range of {
		of[d] = make([]*view, len(c.pods))
		for i := range c.pods {
			of[d][i] = byKind[d][c.pods[i].kind]
		}
	}
	return views, of
}
