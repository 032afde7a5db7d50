package kubernetes

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"

	"github.com/demarc/demarc/policy/image"
)

// class is pods that every view treats alike, as subjects and as peers.
type class struct {
	pods []int
	view [2]*view
	// alone: its pods prove who they are by a crossing from themselves to themselves.
	// Pods that shared a workload would reach each other by it.
	alone bool
}

func (c *cluster) classes(views []*view, of [2][]*view) []class {
	number := map[*view]int{}
	for i, v := range views {
		number[v] = i
	}
	index := map[[sha256.Size]byte]int{}
	var out []class
	var key []byte
	for i := range c.pods {
		key = key[:0]
		for d := range of {
			key = binary.LittleEndian.AppendUint32(key, uint32(number[of[d][i]]))
		}
		for _, v := range views {
			for _, n := range [...]int{v.identity[i], v.covered[i], v.anyhow[i]} {
				key = binary.LittleEndian.AppendUint32(key, uint32(n))
			}
		}
		sum := sha256.Sum256(key)
		at, seen := index[sum]
		if !seen {
			at = len(out)
			index[sum] = at
			out = append(out, class{view: [2]*view{of[0][i], of[1][i]}})
		}
		out[at].pods = append(out[at].pods, i)
	}
	return out
}

// flow is what is declared for ports of a pair of classes.
type flow struct {
	side  image.Side
	ports int // set of ports
}

// withPorts are the protocols that the API speaks of. ICMP has no answer that proves
// who is at the other end, so a crossing toward a pod would let its subject ping
// everybody: pods that policies tell apart do not ping each other.
var withPorts = normal([]image.Span{whole(image.TCP), whole(image.UDP), whole(image.SCTP)})

// pair is what two ends say of each other, as sets of ports.
type pair struct{ egress, coveredOut, ingress, coveredIn int }

// flows says what crossings by identity a pair needs. Where both ends admit, both must
// know each other, unless both know each other's address; where only one does, the
// crossing holds at that end alone.
func (t *portTable) flows(p pair) []flow {
	e, i := t.sets[p.egress].intersect(withPorts), t.sets[p.ingress].intersect(withPorts)
	byAddress := t.sets[p.coveredOut].intersect(t.sets[p.coveredIn])
	var out []flow
	for _, f := range [...]struct {
		side  image.Side
		ports ports
	}{
		{image.BothSides, e.intersect(i).minus(byAddress)},
		{image.EgressSide, e.minus(i).minus(t.sets[p.coveredOut])},
		{image.IngressSide, i.minus(e).minus(t.sets[p.coveredIn])},
	} {
		if n := t.number(f.ports); n != 0 {
			out = append(out, flow{f.side, n})
		}
	}
	return out
}

// declared is a crossing to be.
type declared struct {
	from, to end
	ports    ports
	side     image.Side
	by       string // the objects that it comes from
}

// end is one end of a crossing: pods, or addresses.
type end struct {
	pods    []int // ascending
	network []netip.Prefix
}

// declare makes all crossings.
func (c *cluster) declare(views []*view, classes []class, table *portTable) []declared {
	var out []declared
	out = append(out, c.declareAddresses(views, classes, table)...)
	return append(out, c.declareIdentities(classes, table)...)
}

// declareAddresses makes the crossings with networks. They hold at the pods' end.
func (c *cluster) declareAddresses(views []*view, classes []class, table *portTable) []declared {
	type key struct {
		direction image.Direction
		ports     int
		blocks    string
	}
	type group struct {
		pods    []int
		blocks  []netip.Prefix
		origins map[*view]bool
	}
	groups := map[key]*group{}
	var order []key
	for _, v := range views {
		var pods []int
		for i := range classes {
			if classes[i].view[v.direction] == v {
				pods = append(pods, classes[i].pods...)
			}
		}
		if len(pods) == 0 {
			continue
		}
		numbers := make([]int, 0, len(v.byAddress))
		for n := range v.byAddress {
			numbers = append(numbers, n)
		}
		slices.Sort(numbers)
		for _, n := range numbers {
			list := blocks(v.byAddress[n])
			k := key{v.direction, n, fmt.Sprint(list)}
			if groups[k] == nil {
				groups[k] = &group{blocks: list, origins: map[*view]bool{}}
				order = append(order, k)
			}
			groups[k].pods = append(groups[k].pods, pods...)
			groups[k].origins[v] = true
		}
	}
	var out []declared
	for _, k := range order {
		g := groups[k]
		slices.Sort(g.pods)
		d := declared{from: end{pods: g.pods}, to: end{network: g.blocks}, ports: table.sets[k.ports], by: origins(g.origins)}
		if k.direction == image.Ingress {
			d.from, d.to = d.to, d.from
		}
		out = append(out, d)
	}
	return out
}

func origins(views map[*view]bool) string {
	all := &view{origins: map[string]bool{}}
	for v := range views {
		for o := range v.origins {
			all.origins[o] = true
		}
	}
	return all.by()
}

// declareIdentities makes the crossings between pods: for each set of ports and side,
// sources with the same destinations share one. It marks classes whose pods must be alone.
func (c *cluster) declareIdentities(classes []class, table *portTable) []declared {
	type row struct {
		flow
		from int
	}
	known := map[pair][]flow{}
	to := map[row][]int{} // classes
	var rows []row
	var proofs []declared
	for s := range classes {
		out := classes[s].view[image.Egress]
		tags := ports(nil)
		for q := range classes {
			in := classes[q].view[image.Ingress]
			source, target := classes[s].pods[0], classes[q].pods[0]
			p := pair{out.identity[target], out.covered[target], in.identity[source], in.covered[source]}
			flows, seen := known[p]
			if !seen {
				flows = table.flows(p)
				known[p] = flows
			}
			for _, f := range flows {
				r := row{f, s}
				if to[r] == nil {
					rows = append(rows, r)
				}
				to[r] = append(to[r], q)
			}
			if out.anyhow[target] != out.identity[target] {
				// It lets some addresses of the target through by address alone. The target
				// may ask for an identity all the same.
				rest := table.sets[out.anyhow[target]].minus(table.sets[out.identity[target]])
				tags = tags.union(rest.intersect(table.sets[in.identity[source]]))
			}
		}
		if classes[s].alone = len(tags) > 0; classes[s].alone {
			for _, pod := range classes[s].pods {
				self := end{pods: []int{pod}}
				proofs = append(proofs, declared{from: self, to: self, ports: tags, side: image.EgressSide, by: "the other end asks who it is"})
			}
		}
	}

	type key struct {
		flow
		to string
	}
	groups := map[key][]int{} // classes
	var order []key
	targets := map[key][]int{}
	for _, r := range rows {
		k := key{r.flow, fmt.Sprint(to[r])}
		if groups[k] == nil {
			order = append(order, k)
			targets[k] = to[r]
		}
		groups[k] = append(groups[k], r.from)
	}
	members := func(of []int) []int {
		var out []int
		for _, i := range of {
			out = append(out, classes[i].pods...)
		}
		slices.Sort(out)
		return out
	}
	var out []declared
	for _, k := range order {
		named := map[*view]bool{}
		if k.side != image.IngressSide {
			for _, s := range groups[k] {
				named[classes[s].view[image.Egress]] = true
			}
		}
		if k.side != image.EgressSide {
			for _, q := range targets[k] {
				named[classes[q].view[image.Ingress]] = true
			}
		}
		out = append(out, declared{
			from: end{pods: members(groups[k])}, to: end{pods: members(targets[k])},
			ports: table.sets[k.ports], side: k.side, by: origins(named),
		})
	}
	return append(out, proofs...)
}

// short is a few hexadecimal digits of a text's hash.
func short(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:4])
}
