package policy

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/demarc/demarc/policy/image"
)

// What a document of this language says about itself.
const (
	apiVersion = "demarc.dev/v1alpha1"
	kind       = "BoundaryPolicy"
)

var (
	policyKeys = []string{"apiVersion", "kind", "metadata", "trustDomain", "zones", "workloads", "networks", "crossings",
		"unmanaged", "mode", "assertions"}
	metadataKeys  = []string{"name", "version", "notAfter"}
	zoneKeys      = []string{"trust"}
	workloadKeys  = []string{"zone", "match", "roles", "waive"}
	networkKeys   = []string{"zone", "cidrs"}
	unmanagedKeys = []string{"zone", "outbound", "inbound"}
	roleKeys      = []string{"role", "until"}
	waiverKeys    = []string{"rule", "reason"}
	assertionKeys = []string{"never", "allow"}

	roleNames = []string{"scanner", "bastion", "proxy", "monitor", "management"}
)

// document is a policy while it is read.
type document struct {
	*reporter
	now time.Time
	p   *Policy

	// Declared names and where, the wrongly declared ones too, so that one mistake
	// is one message.
	zones, workloads, networks map[string]Pos
	crossings                  map[string]Pos

	trust         map[string]uint16 // of each good zone
	zoneOf        map[string]string // of each good workload
	networkZone   map[string]string
	zoneWorkloads map[string]int
	waived        map[string][]Waiver // by workload
	notes         []crossingNotes     // by index of p.Crossings
	partial       bool                // a crossing could not be read: do not judge what is missing
}

// Parse decodes a policy and checks everything that can be known from its text:
// syntax, references, selectors and trust rules. It reports all problems at once:
// the error is then of type Errors. The policy keeps src, which must not change
// afterwards.
func Parse(file string, src []byte) (*Policy, error) {
	return parse(file, src, time.Now())
}

func parse(file string, src []byte, now time.Time) (*Policy, error) {
	d := &document{
		reporter: &reporter{file: file, src: src}, now: now, p: &Policy{File: file, Source: src},
		zones: map[string]Pos{}, workloads: map[string]Pos{}, networks: map[string]Pos{}, crossings: map[string]Pos{},
		trust: map[string]uint16{}, zoneOf: map[string]string{}, networkZone: map[string]string{},
		zoneWorkloads: map[string]int{}, waived: map[string][]Waiver{},
	}
	if root := d.readYAML(); root != nil {
		d.policy(root)
	}
	if err := d.err(); err != nil {
		return nil, err
	}
	return d.p, nil
}

func (d *document) policy(root *node) {
	f, ok := d.fields(root, "policy", policyKeys)
	if !ok {
		return
	}
	require := func(key, hint string) *node {
		n := f.get(key)
		if n == nil {
			d.add(root.pos, hint, "policy has no %s", key)
		}
		return n
	}
	if n := require("apiVersion", "write apiVersion: "+apiVersion); n != nil {
		d.word(n, "apiVersion", apiVersion)
	}
	if n := require("kind", "write kind: "+kind); n != nil {
		d.word(n, "kind", kind)
	}
	if n := require("metadata", "write metadata: {name: shop, version: 1}"); n != nil {
		d.metadata(n)
	}
	if n := require("trustDomain", "write trustDomain: shop.example"); n != nil {
		d.trustDomain(n)
	}
	if n := f.get("mode"); n != nil {
		i, _ := d.word(n, "mode", "enforce", "observe")
		d.p.Mode = image.Mode(i)
	}
	if n := require("zones", "write zones: {app: {trust: 10}}"); n != nil {
		d.readZones(n)
	}
	if n := require("workloads", "write workloads: {web: {zone: app, match: [{systemdUnit: nginx.service}]}}"); n != nil {
		d.readWorkloads(n)
	}
	if n := f.get("networks"); n != nil {
		d.readNetworks(n)
	}
	d.readUnmanaged(f.get("unmanaged"))
	if n := f.get("crossings"); n != nil {
		d.readCrossings(n)
	}
	if n := f.get("assertions"); n != nil {
		d.readAssertions(n)
	}
	d.checkOverlap()
	d.checkTrust()

	byName := func(a, b string) int { return strings.Compare(a, b) }
	slices.SortFunc(d.p.Zones, func(a, b Zone) int { return byName(a.Name, b.Name) })
	slices.SortFunc(d.p.Workloads, func(a, b Workload) int { return byName(a.Name, b.Name) })
	slices.SortFunc(d.p.Networks, func(a, b Network) int { return byName(a.Name, b.Name) })
}

func (d *document) metadata(n *node) {
	f, ok := d.fields(n, "metadata", metadataKeys)
	if !ok {
		return
	}
	if v := f.get("name"); v != nil {
		d.p.Name, _ = d.name(v, "policy name")
	} else {
		d.add(n.pos, "write name: shop", "metadata has no name")
	}
	if v := f.get("version"); v != nil {
		d.p.Version, _ = d.number(v, "version", 1, math.MaxUint64)
	} else {
		d.add(n.pos, "write version: 1 and raise it with every change", "metadata has no version")
	}
	if v := f.get("notAfter"); v != nil {
		t, ok := d.moment(v, "notAfter")
		if ok && !t.After(d.now) {
			d.add(v.pos, "move it to a later time", "policy has been invalid since %s", t.Format(time.RFC3339))
		}
		d.p.NotAfter = t
	}
}

// trustDomain follows the SPIFFE ID specification, section 2.1.
func (d *document) trustDomain(n *node) {
	s, ok := d.text(n, "trustDomain", 255)
	if !ok {
		return
	}
	if strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789.-_") != "" || strings.ContainsFunc(s, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_')
	}) {
		d.add(n.pos, "use a-z, 0-9, dots, hyphens and underscores", "trustDomain %s is not a SPIFFE trust domain", quote(s))
		return
	}
	d.p.TrustDomain = s
}

func (d *document) readZones(n *node) {
	d.named(n, "zones", "zone", func(name string, e entry) {
		d.zones[name] = e.pos
		f, ok := d.fields(e.value, "zone", zoneKeys)
		if !ok {
			return
		}
		v := f.get("trust")
		if v == nil {
			d.add(e.pos, "write "+name+": {trust: 10}; 0 is the least trusted", "zone %s has no trust", name)
			return
		}
		trust, ok := d.number(v, "trust", 0, math.MaxUint16)
		if !ok {
			return
		}
		d.trust[name] = uint16(trust)
		d.p.Zones = append(d.p.Zones, Zone{Pos: e.pos, Name: name, Trust: uint16(trust)})
	})
	d.bound(n, "zones", len(d.p.Zones), image.MaxZones)
}

func (d *document) bound(n *node, what string, have, limit int) {
	if have > limit {
		d.add(n.pos, "", "%d %s are more than the limit of %d", have, what, limit)
	}
}

// inZone reads a reference to a zone.
func (d *document) inZone(n *node, owner string, at Pos) (string, bool) {
	if n == nil {
		d.add(at, "write zone: and one of the zones declared above", "%s has no zone", owner)
		return "", false
	}
	s, ok := d.name(n, "zone")
	if !ok {
		return "", false
	}
	if _, declared := d.zones[s]; !declared {
		d.add(n.pos, d.nearest(s, keysOf(d.zones)), "no zone named %s", s)
		return "", false
	}
	_, ok = d.trust[s]
	return s, ok
}

func (d *document) readWorkloads(n *node) {
	d.named(n, "workloads", "workload", func(name string, e entry) {
		d.workloads[name] = e.pos
		f, ok := d.fields(e.value, "workload", workloadKeys)
		if !ok {
			return
		}
		w := Workload{Pos: e.pos, Name: name}
		w.Zone, ok = d.inZone(f.get("zone"), "workload "+name, e.pos)
		if ok {
			d.zoneOf[name] = w.Zone
			d.zoneWorkloads[w.Zone]++
		}
		if v := f.get("match"); v != nil {
			for _, item := range d.list(v, "match") {
				if s, ok := d.selector(item); ok {
					w.Match = append(w.Match, s)
				}
			}
		} else {
			d.add(e.pos, "write match: [{systemdUnit: "+name+".service}]", "workload %s has no match: it would select nothing", name)
		}
		if v := f.get("roles"); v != nil {
			w.Roles = d.roles(v)
		}
		if v := f.get("waive"); v != nil {
			d.waived[name] = d.waivers(v, workloadRules)
		}
		d.p.Workloads = append(d.p.Workloads, w)
	})
	d.bound(n, "workloads", len(d.p.Workloads), image.MaxWorkloads)
}

func (d *document) roles(n *node) []Role {
	var out []Role
	seen := map[string]bool{}
	for _, item := range d.list(n, "roles") {
		r, v := Role{Pos: item.pos}, item
		if item.kind == mapNode {
			f, ok := d.fields(item, "role", roleKeys)
			if !ok {
				continue
			}
			if v = f.get("role"); v == nil {
				d.add(item.pos, "write {role: bastion, until: ...}", "role has no name")
				continue
			}
			if until := f.get("until"); until != nil {
				if r.Until, ok = d.moment(until, "until"); !ok {
					continue
				}
			}
		}
		i, ok := d.word(v, "role", roleNames...)
		if !ok {
			continue
		}
		r.Name = roleNames[i]
		if seen[r.Name] {
			d.add(item.pos, "keep one of them", "role %s is given twice", r.Name)
			continue
		}
		seen[r.Name] = true
		out = append(out, r)
	}
	return out
}

func (d *document) waivers(n *node, rules []string) []Waiver {
	items := []*node{n}
	if n.kind == listNode {
		items = d.list(n, "waive")
	}
	var out []Waiver
	for _, item := range items {
		f, ok := d.fields(item, "waive", waiverKeys)
		if !ok {
			continue
		}
		w := Waiver{Pos: item.pos}
		rule, reason := f.get("rule"), f.get("reason")
		if rule == nil {
			d.add(item.pos, "one of: "+strings.Join(rules, ", "), "waive names no rule")
		} else if i, ok := d.word(rule, "rule", rules...); ok {
			w.Rule = rules[i]
		}
		if reason == nil {
			d.add(item.pos, "say why the breach is accepted", "waive gives no reason")
		} else {
			w.Reason, _ = d.text(reason, "reason", image.MaxText)
		}
		if slices.ContainsFunc(out, func(o Waiver) bool { return o.Rule == w.Rule && w.Rule != "" }) {
			d.add(item.pos, "keep one of them", "rule %s is waived twice", w.Rule)
			continue
		}
		if w.Rule != "" && w.Reason != "" {
			out = append(out, w)
		}
	}
	return out
}

func (d *document) readNetworks(n *node) {
	d.named(n, "networks", "network", func(name string, e entry) {
		d.networks[name] = e.pos
		f, ok := d.fields(e.value, "network", networkKeys)
		if !ok {
			return
		}
		nw := Network{Pos: e.pos, Name: name}
		nw.Zone, ok = d.inZone(f.get("zone"), "network "+name, e.pos)
		if ok {
			d.networkZone[name] = nw.Zone
		}
		v := f.get("cidrs")
		if v == nil {
			d.add(e.pos, "write cidrs: [10.0.0.0/8]", "network %s has no cidrs", name)
			return
		}
		seen := map[netip.Prefix]bool{}
		for _, item := range d.list(v, "cidrs") {
			prefix, ok := d.cidr(item)
			if !ok {
				continue
			}
			if seen[prefix] {
				d.add(item.pos, "remove one of them", "cidr %s is given twice", prefix)
				continue
			}
			seen[prefix] = true
			nw.CIDRs = append(nw.CIDRs, prefix)
		}
		d.p.Networks = append(d.p.Networks, nw)
	})
	d.bound(n, "networks", len(d.p.Networks), image.MaxNetworks)
}

func (d *document) cidr(n *node) (netip.Prefix, bool) {
	s, ok := d.text(n, "cidr", 64)
	if !ok {
		return netip.Prefix{}, false
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		hint := "write an address and a length, such as 10.0.0.0/8"
		if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
			hint = fmt.Sprintf("write %s/%d", a, a.BitLen())
		}
		d.add(n.pos, hint, "cidr %s is not an address block", quote(s))
		return netip.Prefix{}, false
	}
	if p.Addr().Is4In6() {
		hint := "write the IPv4 block"
		if p.Bits() >= 96 {
			hint = fmt.Sprintf("write %s", netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96).Masked())
		}
		d.add(n.pos, hint, "cidr %s is an IPv4 block written as IPv6", quote(s))
		return netip.Prefix{}, false
	}
	if masked := p.Masked(); masked != p {
		d.add(n.pos, "write "+masked.String(), "cidr %s has bits set beyond its length", quote(s))
		return netip.Prefix{}, false
	}
	return p, true
}

// readUnmanaged reads the section, or gives its defaults: the lowest zone, and
// what unmanaged processes do among themselves is left alone.
func (d *document) readUnmanaged(n *node) {
	u := Unmanaged{Outbound: true, Inbound: true}
	lowest := uint16(math.MaxUint16)
	for _, z := range d.p.Zones {
		if u.Zone == "" || z.Trust < lowest || z.Trust == lowest && z.Name < u.Zone {
			u.Zone, lowest = z.Name, z.Trust
		}
	}
	if n != nil {
		u.Pos = n.pos
		if f, ok := d.fields(n, "unmanaged", unmanagedKeys); ok {
			if v := f.get("zone"); v != nil {
				if zone, ok := d.inZone(v, "unmanaged", n.pos); ok {
					u.Zone = zone
				}
			}
			for _, side := range []struct {
				key string
				to  *bool
			}{{"outbound", &u.Outbound}, {"inbound", &u.Inbound}} {
				if v := f.get(side.key); v != nil {
					i, ok := d.word(v, side.key, "allow", "deny")
					*side.to = ok && i == 0
				}
			}
		}
	}
	d.p.Unmanaged = u
}

// term reads one end of a crossing or an assertion.
func (d *document) term(n *node, what string) (Term, bool) {
	s, ok := d.text(n, what, 128)
	if !ok {
		return Term{}, false
	}
	t := Term{Pos: n.pos}
	switch s {
	case "any":
		t.Kind = image.TermAny
		return t, true
	case "unmanaged":
		t.Kind = image.TermUnmanaged
		return t, true
	}
	kind, name, ok := strings.Cut(s, "/")
	var declared map[string]Pos
	switch {
	case ok && kind == "workload":
		t.Kind, declared = image.TermWorkload, d.workloads
	case ok && kind == "zone":
		t.Kind, declared = image.TermZone, d.zones
	case ok && kind == "network":
		t.Kind, declared = image.TermNetwork, d.networks
	default:
		hint := "write workload/NAME, zone/NAME, network/NAME, unmanaged or any"
		if !ok {
			hint = d.guessTerm(s, hint)
		} else if near := d.nearest(kind, []string{"workload", "zone", "network"}); near != "" {
			hint = strings.TrimSuffix(near, "?") + "/" + name + "?"
		}
		d.add(n.pos, hint, "%s %s is not a peer", what, quote(s))
		return Term{}, false
	}
	if _, ok := declared[name]; !ok {
		hint := d.nearest(name, keysOf(declared))
		if hint == "" {
			hint = d.guessTerm(name, "")
		}
		d.add(n.pos, hint, "no %s named %s", kind, quote(name))
		return Term{}, false
	}
	t.Name = name
	return t, true
}

// guessTerm says what a bare or wrongly prefixed name would be.
func (d *document) guessTerm(name, otherwise string) string {
	for _, c := range []struct {
		kind     string
		declared map[string]Pos
	}{{"workload", d.workloads}, {"zone", d.zones}, {"network", d.networks}} {
		if _, ok := c.declared[name]; ok {
			return "did you mean " + c.kind + "/" + name + "?"
		}
	}
	return otherwise
}

// keysOf returns the keys in order, for suggestions that do not change from run
// to run.
func keysOf(m map[string]Pos) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
