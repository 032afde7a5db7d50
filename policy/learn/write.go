package learn

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

// document is text in the making, which knows what its lines are about.
type document struct {
	strings.Builder
	lines map[int]*crossing
	at    int // number of the next line, from 1
}

func (d *document) line(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	d.at += strings.Count(text, "\n") + 1
	d.WriteString(text + "\n")
}

// write is the policy, and which crossing each line is about.
func (d *draft) write() ([]byte, map[int]*crossing) {
	doc := &document{lines: map[int]*crossing{}, at: 1}
	if b := d.options.Base; b != nil {
		d.extend(doc, string(b.Source))
		return []byte(doc.String()), doc.lines
	}
	doc.line("# Learned from %s. Review it: what was seen need not be what was meant.", &d.seen)
	doc.line("# Zones are tiers: how many crossings a workload is from outside. Rename them to what they are.")
	doc.line("apiVersion: demarc.dev/v1alpha1\nkind: BoundaryPolicy")
	doc.line("metadata: {name: %s, version: %d}\ntrustDomain: %s", d.options.Name, d.options.Version, d.options.TrustDomain)
	doc.line("zones:")
	for _, z := range d.zones {
		doc.line("  %s: {trust: %d}", z.name, z.trust)
	}
	doc.line("workloads:")
	d.writeWorkloads(doc, "  ")
	if len(d.networks) > 0 {
		doc.line("networks:")
		d.writeNetworks(doc, "  ")
	}
	if len(d.crossings) > 0 {
		doc.line("crossings:")
		d.writeCrossings(doc, "  ")
	}
	doc.line("unmanaged: {zone: %s}", d.unmanaged)
	d.writeRefused(doc)
	return []byte(doc.String()), doc.lines
}

func (d *draft) writeWorkloads(doc *document, indent string) {
	for _, w := range d.workloads {
		if len(w.seen) > 0 {
			doc.line("%s# %s, seen running %s", indent, w.place, comment(strings.Join(w.seen, ", ")))
		}
		match, review := w.match(d.met[w.place])
		if review != "" {
			doc.line("%s# review: %s", indent, review)
		}
		items := make([]string, len(match))
		for i, s := range match {
			items[i] = selectorText(s)
		}
		doc.line("%s%s: {zone: %s, match: [%s]}", indent, w.name, w.zone, strings.Join(items, ", "))
	}
}

// selectorText is a selector as a policy has it.
func selectorText(s policy.Selector) string {
	var parts []string
	part := func(key, value string) {
		if value != "" {
			parts = append(parts, key+": "+strconv.Quote(value))
		}
	}
	switch s.Kind {
	case image.SelectUnit:
		part("systemdUnit", s.Path)
		return "{" + parts[0] + "}"
	case image.SelectCgroup:
		part("cgroup", s.Path)
		return "{" + parts[0] + "}"
	case image.SelectContainer:
		part("name", s.Name)
		part("image", s.Image)
		return "{container: {" + strings.Join(parts, ", ") + "}}"
	}
	for _, key := range slices.Sorted(maps.Keys(s.Labels)) {
		part(strconv.Quote(key), s.Labels[key])
	}
	labels := parts
	parts = nil
	part("namespace", s.Namespace)
	part("podName", s.Name)
	if len(labels) > 0 {
		parts = append(parts, "podLabels: {"+strings.Join(labels, ", ")+"}")
	}
	return "{kubernetes: {" + strings.Join(parts, ", ") + "}}"
}

func (d *draft) writeNetworks(doc *document, indent string) {
	for _, n := range d.networks {
		if n.exact > 0 {
			doc.line("%s# review: %d addresses were seen, too many to list; these blocks hold more", indent, n.exact)
		}
		words := make([]string, len(n.cidrs))
		for i, c := range n.cidrs {
			words[i] = strconv.Quote(c.String())
		}
		doc.line("%s%s: {zone: %s, cidrs: [%s]}", indent, n.name, n.zone, strings.Join(words, ", "))
	}
}

func (d *draft) writeCrossings(doc *document, indent string) {
	for _, c := range d.crossings {
		doc.line("%s# %s, at most %d in a second; %s", indent, &c.evidence, c.evidence.peak, c.example())
		if c.apart && c.ports[0].protocol == "udp" {
			doc.line("%s# review: between hosts; datagrams that nobody answers need identity: sender here, or they stop after 16", indent)
		}
		start := doc.at
		doc.line("%s- {name: %s, from: [%s], to: [%s], ports: [%s], limit: {connections: %d/s}, log: denied, purpose: learned}",
			indent, c.name, c.from, c.to, portList(c.ports), headroom(c.evidence.peak))
		for at := start; at < doc.at; at++ {
			doc.lines[at] = c
		}
	}
}

func (d *draft) writeRefused(doc *document) {
	if d.lost > 0 {
		doc.line("# %d flows were lost before they could be learned: what they were is not in here.", d.lost)
	}
	refused := d.sortedRefusals()
	if len(refused) == 0 {
		return
	}
	doc.line("# Seen, and not proposed:")
	for _, r := range refused {
		doc.line("#   %s", comment(r))
	}
}

// example is one flow and the process that made or took it.
func (c *crossing) example() string {
	text := fmt.Sprintf("for example %s -> %s", placeText(c.pair[0]), placeText(c.pair[1]))
	if !c.pair[0].IsValid() {
		text = "connected to " + placeText(c.pair[1]) + " and sent nothing, which asks for a route"
	}
	if by := c.by.String(); by != "" {
		text += " by " + comment(by)
	}
	return text
}

func placeText(p netip.AddrPort) string {
	if p.Port() == 0 {
		return p.Addr().String()
	}
	return p.String()
}

// comment keeps a name that somebody chose on its line.
func comment(s string) string { return strings.Map(printable, s) }

func printable(c rune) rune {
	if c < ' ' || c > '~' {
		return '?'
	}
	return c
}

// headroom is a limit three times what was seen, as a round number; at least 10.
func headroom(peak uint64) uint64 {
	want := max(3*peak, 10)
	for unit := uint64(10); ; unit *= 10 {
		for _, step := range []uint64{1, 2, 5} {
			if unit*step >= want {
				return unit * step
			}
		}
	}
}
