package kubernetes

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/demarc/demarc/policy/image"
)

// Bounds of one policy that the writer keeps.
const (
	maxTerms   = 1024 // of one end of a crossing
	maxZones   = 1000 // namespaces; beyond, all pods are in one zone
	maxPurpose = 400  // bytes
)

// writer writes a policy down.
type writer struct {
	*cluster
	options Options

	units    []unit
	names    []string       // of the units' workloads
	unitOf   []int          // by pod
	zoneOf   []string       // by pod
	zones    map[string]int // pods in each
	outside  string         // the zone of everybody who is no pod
	networks map[string]string
	blocks   []namedBlocks
	waiver   string
}

type namedBlocks struct {
	name   string
	blocks []netip.Prefix
}

// name names zones and workloads. A workload's name comes from what it is, never from
// what else there is, so that its identity stays when others come and go.
func (w *writer) name(units []unit) {
	w.units, w.unitOf, w.zoneOf = units, make([]int, len(w.pods)), make([]string, len(w.pods))
	namespaces := map[string]bool{}
	for i := range w.pods {
		namespaces[w.pods[i].namespace] = true
	}
	w.zones = map[string]int{}
	for i := range w.pods {
		zone := "pods"
		if len(namespaces) <= maxZones {
			zone = plain(w.pods[i].namespace)
		}
		w.zoneOf[i] = zone
		w.zones[zone]++
	}
	for w.outside = "outside"; w.zones[w.outside] > 0; w.outside += "-0" {
	}
	taken := map[string]bool{}
	for i, u := range units {
		first := &w.pods[u.pods[0]]
		name := joined(first.namespace, first.name)
		if len(u.pods) > 1 {
			k := &w.kinds[first.kind]
			name = joined(first.namespace, appOf(k.labels)+"-"+short(k.key()))
		}
		for taken[name] { // two groups of one kind that policies tell apart, by their addresses
			name = joined(first.namespace, first.name+"-"+short(name))
		}
		taken[name] = true
		w.names = append(w.names, name)
		for _, p := range u.pods {
			w.unitOf[p] = i
		}
	}
}

// appOf is what people call the pods with these labels.
func appOf(l labels.Set) string {
	for _, key := range [...]string{"app.kubernetes.io/name", "app", "k8s-app", "name"} {
		if v := l[key]; v != "" {
			return v
		}
	}
	return "pods"
}

// joined names a pod of a namespace. "--" stands between the two; where either holds
// it itself or the name is too long, a hash keeps names apart.
func joined(namespace, name string) string {
	whole := namespace + "--" + name
	if out := whole; strings.Count(out, "--") == 1 && plain(out) == out {
		return out
	}
	return plain(strings.ReplaceAll(whole, "--", "-") + "." + short(whole))
}

// plain is a text as a name of the policy language: itself where it is one.
func plain(s string) string {
	clean := strings.Trim(strings.Map(func(c rune) rune {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-':
			return c
		case c >= 'A' && c <= 'Z':
			return c - 'A' + 'a'
		}
		return '-'
	}, s), "-")
	if clean == s && len(s) <= image.MaxName {
		return s
	}
	const digits = 8
	clean = clean[:min(len(clean), image.MaxName-digits-1)]
	return strings.Trim(clean, "-") + "-" + short(s)
}

func (w *writer) write(all []declared) []byte {
	w.networks = map[string]string{}
	loopback := []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
	everybody := make([]int, len(w.pods))
	for i := range everybody {
		everybody[i] = i
	}
	self := "a pod reaches itself"
	all = append([]declared{
		{from: end{pods: everybody}, to: end{network: loopback}, ports: everyPort, by: self},
		{from: end{network: loopback}, to: end{pods: everybody}, ports: everyPort, by: self},
	}, all...)
	var crossings []string
	taken := map[string]bool{}
	for i := range all {
		d := &all[i]
		for _, from := range chunks(w.terms(d.from)) {
			for _, to := range chunks(w.terms(d.to)) {
				crossings = append(crossings, w.crossing(d, from, to, taken))
			}
		}
	}

	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("# Made by `demarc policy import kubernetes`. Change the Kubernetes objects and import them again.")
	line("apiVersion: demarc.dev/v1alpha1")
	line("kind: BoundaryPolicy")
	line("metadata: {name: %s, version: %d}", w.options.Name, w.options.Version)
	line("trustDomain: %q", w.options.TrustDomain)
	line("zones:")
	line("  %q: {trust: 0}", w.outside)
	zones := make([]string, 0, len(w.zones))
	for z := range w.zones {
		zones = append(zones, z)
	}
	slices.Sort(zones)
	for _, z := range zones {
		line("  %q: {trust: 10}", z)
	}
	line("workloads:")
	for i, u := range w.units {
		line("  %q:", w.names[i])
		line("    zone: %q", w.zoneOf[u.pods[0]])
		line("    match:")
		for _, p := range u.pods {
			pod := &w.pods[p]
			if pod.cgroup != "" {
				line("      - {cgroup: %q}", pod.cgroup)
			} else {
				line("      - {kubernetes: {namespace: %q, podName: %q}}", pod.namespace, pod.name)
			}
		}
	}
	line("networks:")
	slices.SortFunc(w.blocks, func(a, b namedBlocks) int { return strings.Compare(a.name, b.name) })
	for _, n := range w.blocks {
		line("  %q:", n.name)
		line("    zone: %q", w.outside)
		line("    cidrs:")
		for _, p := range n.blocks {
			line("      - %q", p)
		}
	}
	line("crossings:")
	for _, c := range crossings {
		b.WriteString(c)
	}
	line("unmanaged: {zone: %q, outbound: allow, inbound: allow}", w.outside)
	return []byte(b.String())
}

// terms are the words for one end: zones where all pods of one are meant.
func (w *writer) terms(e end) []string {
	if e.network != nil {
		return []string{"network/" + w.network(e.network)}
	}
	inZone := map[string]int{}
	for _, p := range e.pods {
		inZone[w.zoneOf[p]]++
	}
	var out []string
	for _, p := range e.pods {
		t := "workload/" + w.names[w.unitOf[p]]
		if zone := w.zoneOf[p]; inZone[zone] == w.zones[zone] && inZone[zone] > 1 {
			t = "zone/" + zone
		}
		out = append(out, t)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// network names blocks by what they are.
func (w *writer) network(blocks []netip.Prefix) string {
	text := fmt.Sprint(blocks)
	if name, known := w.networks[text]; known {
		return name
	}
	var name string
	switch {
	case slices.Equal(blocks, families):
		name = "anywhere"
	case len(blocks) == 2 && blocks[0].Addr().IsLoopback() && blocks[1].Addr().IsLoopback():
		name = "loopback"
	case len(blocks) == 1 && blocks[0].Addr().Is4():
		name = strings.NewReplacer(".", "-", "/", "-").Replace(text[1 : len(text)-1])
	default:
		name = "blocks-" + short(text)
	}
	w.networks[text] = name
	w.blocks = append(w.blocks, namedBlocks{name, blocks})
	return name
}

func chunks(terms []string) [][]string { return slices.Collect(slices.Chunk(terms, maxTerms)) }

// crossing writes one. Its name comes from what it declares.
func (w *writer) crossing(d *declared, from, to []string, taken map[string]bool) string {
	ports := quoted(d.ports.words())
	what := fmt.Sprint(from, to, ports, d.side)
	brief := func(terms []string) string {
		_, name, _ := strings.Cut(terms[0], "/")
		return name[:min(len(name), 20)]
	}
	name := plain(strings.Trim(brief(from), "-") + "-to-" + strings.Trim(brief(to), "-") + "-" + short(what))
	for taken[name] {
		name = plain(name + "-" + short(name))
	}
	taken[name] = true

	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, "    "+format+"\n", args...) }
	fmt.Fprintf(&b, "  - name: %q\n", name)
	line("from: [%s]", strings.Join(quoted(from), ", "))
	line("to: [%s]", strings.Join(quoted(to), ", "))
	line("ports: [%s]", strings.Join(ports, ", "))
	switch {
	case d.from.network == nil && d.to.network == nil && w.options.NAT == "destination":
		line("nat: destination")
	}
	if d.side != image.BothSides {
		line("side: %s", [...]string{image.EgressSide: "egress", image.IngressSide: "ingress"}[d.side])
	}
	line("log: denied")
	purpose := d.by[:min(len(d.by), maxPurpose)]
	line("purpose: %q", purpose)
	if d.from.network != nil {
		line("waive: {rule: higher-needs-limit, reason: %q}", "Kubernetes knows no limits: "+purpose)
	}
	return b.String()
}

func quoted(words []string) []string {
	out := make([]string, 0, len(words))
	for _, s := range words {
		out = append(out, fmt.Sprintf("%q", s))
	}
	return out
}
