package policy

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/demarc/demarc/policy/image"
)

// Declared is the policy that an image says it was made from. It has everything that
// decides about a flow. What an image does not hold is left out: the text itself and
// places in it but for the lines of crossings, waivers, assertions, and the order and
// repetition of terms, ports and blocks within one list.
func Declared(img *image.Image) (*Policy, error) {
	p := &Policy{
		Name: img.Name, Version: img.Version, TrustDomain: img.TrustDomain, Mode: img.Mode, NotAfter: moment(img.NotAfter),
		Workloads: make([]Workload, len(img.Workloads)), Crossings: make([]Crossing, len(img.Crossings)),
	}
	for _, z := range img.Zones {
		p.Zones = append(p.Zones, Zone{Name: z.Name, Trust: z.Trust})
	}
	var err error
	zone := func(i uint16) string {
		if int(i) >= len(p.Zones) {
			err = cmp.Or(err, fmt.Errorf("the image names zone %d of %d", i, len(p.Zones)))
			return ""
		}
		return p.Zones[i].Name
	}
	p.Unmanaged = Unmanaged{Zone: zone(img.UnmanagedZone), Outbound: img.UnmanagedOutbound, Inbound: img.UnmanagedInbound}
	for i := range img.Workloads {
		w := &img.Workloads[i]
		p.Workloads[i] = Workload{Name: w.Name, Zone: zone(w.Zone)}
		for _, r := range w.Roles {
			p.Workloads[i].Roles = append(p.Workloads[i].Roles, Role{Name: r.Name, Until: moment(r.Until)})
		}
	}
	for i := range img.Selectors {
		s := &img.Selectors[i]
		if int64(s.Workload) >= int64(len(p.Workloads)) {
			return nil, fmt.Errorf("the image names workload %d of %d", s.Workload, len(p.Workloads))
		}
		match := Selector{
			Kind: s.Kind, Path: s.Path, Namespace: s.Namespace, ServiceAccount: s.ServiceAccount, Name: s.Name, Image: s.Image,
		}
		for _, l := range s.Labels {
			if match.Labels == nil {
				match.Labels = map[string]string{}
			}
			match.Labels[l.Key] = l.Value
		}
		w := &p.Workloads[s.Workload]
		w.Match = append(w.Match, match)
	}
	for i := range img.Networks {
		n := &img.Networks[i]
		p.Networks = append(p.Networks, Network{Name: n.Name, Zone: zone(n.Zone), CIDRs: n.CIDRs})
	}
	terms := func(all []image.Term) []Term {
		out := make([]Term, len(all))
		for i, t := range all {
			name, known := "", true
			switch {
			case t.Kind == image.TermWorkload && int64(t.Index) < int64(len(p.Workloads)):
				name = p.Workloads[t.Index].Name
			case t.Kind == image.TermZone && int64(t.Index) < int64(len(p.Zones)):
				name = p.Zones[t.Index].Name
			case t.Kind == image.TermNetwork && int64(t.Index) < int64(len(p.Networks)):
				name = p.Networks[t.Index].Name
			default:
				known = t.Kind == image.TermUnmanaged || t.Kind == image.TermAny
			}
			if !known {
				err = cmp.Or(err, fmt.Errorf("the image has a term of kind %d that names %d", t.Kind, t.Index))
			}
			out[i] = Term{Kind: t.Kind, Name: name}
		}
		return out
	}
	for i := range img.Crossings {
		c := &img.Crossings[i]
		p.Crossings[i] = Crossing{
			Pos: Pos{Line: int(c.Line)}, Name: c.Name, From: terms(c.From), To: terms(c.To), Ports: c.Ports,
			Need: c.Need, NAT: c.NAT, Side: c.Side, Log: c.Log, Refuse: c.Refuse, Decoy: c.Decoy, Forensic: c.Forensic, Rate: c.Rate, Burst: c.Burst,
			Since: moment(c.Since), Until: moment(c.Until), Purpose: c.Purpose,
		}
	}
	return p, err
}

// moment is a time as an image holds it; 0 is the zero time.
func moment(seconds int64) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return time.Unix(seconds, 0).UTC()
}

// sameDeclarations compares a policy with what its image declares, once and field by
// field: names, identities, zones, selectors, blocks, and all of every crossing. Of
// much of that no verdict of Decide depends, but the kernel's does: proof, address
// translation, limits. Numbers of crossings are Verify's.
func sameDeclarations(p *Policy, img *image.Image) error {
	d, err := Declared(img)
	if err != nil {
		return err
	}
	if p.Source != nil && sha256.Sum256(p.Source) != img.Digest {
		return fmt.Errorf("image and policy differ: digest: the image was made from another text")
	}
	if err := sameFields("policy", policyFields(p), policyFields(d)); err != nil {
		return err
	}
	ids := p.IDs()
	numbered := make(map[string]image.ID, len(ids))
	for i := range img.Workloads {
		numbered[img.Workloads[i].Name] = img.Workloads[i].ID
	}
	describe := func(ids map[string]image.ID) func(*Workload) []field {
		return func(w *Workload) []field { return declaredWorkload(w, ids[w.Name]) }
	}
	zone := func(z *Zone) []field { return []field{{"name", z.Name}, {"trust", fmt.Sprint(z.Trust)}} }
	network := func(n *Network) []field {
		blocks := slices.Clone(n.CIDRs)
		slices.SortFunc(blocks, comparePrefixes)
		return []field{{"name", n.Name}, {"zone", n.Zone}, {"cidrs", join(slices.Compact(blocks), netip.Prefix.String)}}
	}
	if err := sameSection("zone", p.Zones, d.Zones, zone, zone); err != nil {
		return err
	}
	if err := sameSection("workload", p.Workloads, d.Workloads, describe(ids), describe(numbered)); err != nil {
		return err
	}
	if err := sameSection("network", p.Networks, d.Networks, network, network); err != nil {
		return err
	}
	for i := range min(len(p.Crossings), len(d.Crossings)) {
		if a, b := &p.Crossings[i], &d.Crossings[i]; !sameCrossing(a, b) {
			return sameFields("crossing "+a.Name, declaredCrossing(a), declaredCrossing(b))
		}
	}
	if n, m := len(p.Crossings), len(d.Crossings); n != m {
		return fmt.Errorf("image and policy differ: the policy has %d crossings, the image %d", n, m)
	}
	return nil
}

// sameSection compares declarations one by one; both lists are sorted by name.
func sameSection[T any](what string, p, d []T, ours, theirs func(*T) []field) error {
	for i := range min(len(p), len(d)) {
		mine := ours(&p[i])
		if err := sameFields(what+" "+mine[0].value, mine, theirs(&d[i])); err != nil {
			return err
		}
	}
	if len(p) != len(d) {
		return fmt.Errorf("image and policy differ: the policy has %d %ss, the image %d", len(p), what, len(d))
	}
	return nil
}

func sameFields(what string, p, d []field) error {
	for i := range p {
		if p[i] != d[i] {
			return fmt.Errorf("image and policy differ: %s: %s: the policy says %s, the image %s",
				what, p[i].name, orNone(p[i].value), orNone(d[i].value))
		}
	}
	return nil
}

func declaredWorkload(w *Workload, id image.ID) []field {
	var roles, match []string
	for _, r := range w.Roles {
		roles = append(roles, r.Name+" "+timeText(r.Until))
	}
	slices.Sort(roles)
	for _, s := range w.Match {
		s.Pos = Pos{}
		match = append(match, fmt.Sprintf("%q", fmt.Sprintf("%+v", s)))
	}
	return []field{
		{"name", w.Name}, {"zone", w.Zone}, {"identity", fmt.Sprint(id)},
		{"roles", strings.Join(roles, ", ")}, {"match", strings.Join(match, ", ")},
	}
}

// sameCrossing compares all that an image holds of a crossing, as meant: two lists
// that name the same ends or ports are the same.
func sameCrossing(a, b *Crossing) bool {
	return a.Name == b.Name && a.Pos.Line == b.Pos.Line && sameTerms(a.From, b.From) && sameTerms(a.To, b.To) &&
		(slices.Equal(a.Ports, b.Ports) || slices.Equal(normalSpans(a.Ports), normalSpans(b.Ports))) &&
		a.Need == b.Need && a.NAT == b.NAT && a.Side == b.Side && a.Log == b.Log && a.Refuse == b.Refuse && a.Decoy == b.Decoy && a.Forensic == b.Forensic &&
		a.Rate == b.Rate && a.Burst == b.Burst && a.Since.Equal(b.Since) && a.Until.Equal(b.Until) && a.Purpose == b.Purpose
}

func sameTerms(a, b []Term) bool {
	same := func(a, b Term) bool { return a.Kind == b.Kind && a.Name == b.Name }
	return slices.EqualFunc(a, b, same) || sortedTerms(a) == sortedTerms(b)
}

// declaredCrossing is everything that sameCrossing compares, as text.
func declaredCrossing(c *Crossing) []field {
	fields := crossingFields(&Policy{Crossings: []Crossing{*c}})[c.Name]
	return append([]field{{"name", c.Name}, {"line", fmt.Sprint(c.Pos.Line)}}, fields...)
}
