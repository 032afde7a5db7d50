package policy

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/demarc/demarc/policy/image"
)

var (
	crossingKeys = []string{"name", "from", "to", "ports", "identity", "limit", "until", "since", "log", "purpose", "nat", "side", "refuse",
		"decoy", "forensic", "waive"}
	limitKeys = []string{"connections", "burst"}
	neverKeys = []string{"from", "to", "port", "hops"}
	allowKeys = []string{"from", "to", "port"}
)

// maxHops bounds the length of the paths that an assertion forbids.
const maxHops = 16

// crossingNotes is what the trust rules need of a crossing and Crossing does not
// keep.
type crossingNotes struct {
	logged bool // it says what is logged
	broken bool // a part was wrong: judging the rest would mislead
}

func (d *document) readCrossings(n *node) {
	if n.kind != listNode {
		d.list(n, "crossings")
		d.partial = true
		return
	}
	d.bound(n, "crossings", len(n.items), image.MaxCrossings)
	d.p.Crossings = make([]Crossing, 0, len(n.items))
	for _, item := range n.items {
		before := len(d.errs) + d.dropped
		c, notes, ok := d.crossing(item)
		notes.broken = !ok || len(d.errs)+d.dropped > before
		d.partial = d.partial || notes.broken
		if ok {
			if before := len(d.p.Crossings) - 1; c.Forensic && before >= 0 && !d.p.Crossings[before].Forensic {
				d.add(c.Pos, "move it before all that are not forensic: of crossings that match, the first decides",
					"crossing %s is forensic and stands behind %s", c.Name, d.p.Crossings[before].Name)
			}
			d.p.Crossings = append(d.p.Crossings, c)
			d.notes = append(d.notes, notes)
		}
	}
}

func (d *document) crossing(n *node) (c Crossing, notes crossingNotes, ok bool) {
	f, ok := d.fields(n, "crossing", crossingKeys)
	if !ok {
		return c, notes, false
	}
	c.Pos = n.pos
	label := "crossing"
	if v := f.get("name"); v == nil {
		d.add(n.pos, "write name: web-api", "crossing has no name")
	} else if c.Name, ok = d.name(v, "crossing name"); ok {
		label = "crossing " + c.Name
		if first, twice := d.crossings[c.Name]; twice {
			d.add(v.pos, "rename or remove one of them", "crossing %s is already declared at line %d", c.Name, first.Line)
		} else {
			d.crossings[c.Name] = v.pos
		}
	}
	c.From = d.terms(f.get("from"), "from", label, n.pos)
	c.To = d.terms(f.get("to"), "to", label, n.pos)
	if v := f.get("ports"); v != nil {
		c.Ports = d.ports(v)
	} else {
		d.add(n.pos, "write ports: [tcp/443], or [any] if every protocol is meant", "%s has no ports", label)
	}
	d.identity(f.get("identity"), &c)
	if v := f.get("nat"); v != nil {
		i, _ := d.word(v, "nat", "none", "source", "destination")
		c.NAT = image.NAT(i)
		if c.NAT != image.NATNone && c.Need == image.NoProof && len(c.From) > 0 && len(c.To) > 0 {
			d.add(v.pos, "remove nat", "nat says what a proof may leave out, and nobody proves an identity here")
		}
	}
	if v := f.get("side"); v != nil {
		i, _ := d.word(v, "side", "both", "egress", "ingress")
		c.Side = image.Side(i)
	}
	if v := f.get("limit"); v != nil {
		d.limit(v, &c)
	}
	d.window(f, &c)
	if v := f.get("log"); v != nil {
		i, _ := d.word(v, "log", "denied", "all", "none")
		c.Log, notes.logged = image.Log(i), true
	}
	c.Refuse = defaultRefuse(c.From)
	if v := f.get("refuse"); v != nil {
		i, _ := d.word(v, "refuse", "reject", "drop")
		c.Refuse = image.Refuse(i)
	}
	if v := f.get("decoy"); v != nil {
		c.Decoy = d.boolean(v, "decoy")
	}
	if v := f.get("forensic"); v != nil {
		c.Forensic = d.boolean(v, "forensic")
	}
	if v := f.get("purpose"); v != nil {
		c.Purpose, _ = d.text(v, "purpose", image.MaxText)
	}
	if v := f.get("waive"); v != nil {
		c.Waive = d.waivers(v, crossingRules)
	}
	return c, notes, true
}

func (d *document) terms(n *node, side, label string, at Pos) []Term {
	if n == nil {
		d.add(at, "write "+side+": [workload/NAME]", "%s has no %s", label, side)
		return nil
	}
	items := d.list(n, side)
	out := make([]Term, 0, len(items))
	for _, item := range items {
		t, ok := d.term(item, side)
		if !ok {
			continue
		}
		if slices.ContainsFunc(out, func(o Term) bool { return o.Kind == t.Kind && o.Name == t.Name }) {
			d.add(item.pos, "remove one of them", "%s names %s twice", side, item.text)
			continue
		}
		out = append(out, t)
		if len(out) > maxTerms {
			d.add(item.pos, "use a zone", "%s names more than %d peers", side, maxTerms)
			break
		}
	}
	return out
}

// maxTerms bounds one end of a crossing; it keeps the look for repeated terms
// from growing with the square of the document.
const maxTerms = 1024

// canProve says whether a term names somebody who can prove an identity.
func canProve(t Term) bool { return t.Kind == image.TermWorkload || t.Kind == image.TermZone }

// identity sets what the crossing's peers must prove, and refuses what cannot be
// asked of them.
func (d *document) identity(n *node, c *Crossing) {
	from, to := slices.ContainsFunc(c.From, canProve), slices.ContainsFunc(c.To, canProve)
	onlyICMP := len(c.Ports) > 0 && !slices.ContainsFunc(c.Ports, func(s image.Span) bool {
		return s.Proto != image.ICMP && s.Proto != image.ICMP6
	})
	c.Need = image.NoProof
	if from && to {
		c.Need = image.Required
		if onlyICMP {
			c.Need = image.Sender
		}
	}
	if n == nil {
		return
	}
	i, ok := d.word(n, "identity", "required", "sender", "none")
	if !ok || len(c.From) == 0 || len(c.To) == 0 {
		return
	}
	need := image.Need(i)
	switch {
	case need == image.NoProof && from && to:
		d.add(n.pos, "remove identity; workloads on both sides prove themselves", "identity none between workloads or zones would admit by address alone")
		return
	case need != image.NoProof:
		for _, t := range slices.Concat(c.From, c.To) {
			if !canProve(t) {
				d.add(n.pos, "write identity: none, or give workloads and zones a crossing of their own", "identity %s: %s cannot prove an identity", n.text, t)
				return
			}
		}
	}
	if need == image.Sender && slices.ContainsFunc(c.Ports, func(s image.Span) bool { return s.Proto == image.TCP }) {
		d.add(n.pos, "TCP proves both sides in its handshake; remove identity", "identity sender cannot be used with tcp ports")
		return
	}
	if need == image.Required && onlyICMP {
		d.add(n.pos, "write identity: sender", "identity required cannot be used with icmp alone: the kernel answers, and proves nothing")
		return
	}
	c.Need = need
}

// String writes a term as the policy does.
func (t Term) String() string {
	switch t.Kind {
	case image.TermWorkload:
		return "workload/" + t.Name
	case image.TermZone:
		return "zone/" + t.Name
	case image.TermNetwork:
		return "network/" + t.Name
	case image.TermUnmanaged:
		return "unmanaged"
	case image.TermAny:
		return "any"
	}
	return fmt.Sprintf("term(%d)", t.Kind)
}

// defaultRefuse hides refusals from callers that are not ours.
func defaultRefuse(from []Term) image.Refuse {
	for _, t := range from {
		if t.Kind == image.TermNetwork || t.Kind == image.TermAny {
			return image.RefuseDrop
		}
	}
	return image.RefuseReject
}

// hourNanos is an hour in nanoseconds: MaxRate flows, one a nanosecond.
const hourNanos = uint64(time.Hour)

func (d *document) limit(n *node, c *Crossing) {
	f, ok := d.fields(n, "limit", limitKeys)
	if !ok {
		return
	}
	v := f.get("connections")
	if v == nil {
		d.add(n.pos, "write limit: {connections: 100/s}", "limit names no connections")
		return
	}
	rate, perSecond, bad := parseRate(v)
	if bad != nil {
		d.add(v.pos, bad.hint, "%s", bad.msg)
		return
	}
	burst := perSecond
	if b := f.get("burst"); b != nil {
		if burst, ok = d.number(b, "burst", 1, 1_000_000_000); !ok {
			return
		}
		if (burst - 1) > math.MaxInt64/(hourNanos/rate) {
			d.add(b.pos, "lower the burst", "burst %d takes longer than 292 years to refill", burst)
			return
		}
	}
	c.Rate, c.Burst = rate, burst
}

// parseRate reads a number of connections a second, minute or hour. It returns
// them an hour, and a second rounded up.
func parseRate(n *node) (perHour, perSecond uint64, bad *hinted) {
	const hint = "write a number and a unit: 200/s, 30/m or 5/h"
	number, unit, ok := strings.Cut(n.text, "/")
	if n.kind != stringNode || !ok {
		return 0, 0, &hinted{fmt.Sprintf("connections %s is not a rate", quote(n.text)), hint}
	}
	scale := map[string]uint64{"s": 3600, "m": 60, "h": 1}[unit]
	if !plainDecimal(number) || scale == 0 {
		return 0, 0, &hinted{fmt.Sprintf("connections %s is not a rate", quote(n.text)), hint}
	}
	v, err := strconv.ParseUint(number, 10, 64)
	if err != nil || v > image.MaxRate/scale {
		return 0, 0, &hinted{fmt.Sprintf("connections %s is more than 1000000000/s", quote(n.text)), "remove the limit if there is none"}
	}
	if v == 0 {
		return 0, 0, &hinted{fmt.Sprintf("connections %s admits nothing", quote(n.text)), "remove the crossing, or raise the limit"}
	}
	return v * scale, (v*scale + 3599) / 3600, nil
}

func (d *document) window(f fields, c *Crossing) {
	since, until := f.get("since"), f.get("until")
	if since != nil {
		c.Since, _ = d.moment(since, "since")
	}
	if until != nil {
		c.Until, _ = d.moment(until, "until")
	}
	if !c.Since.IsZero() && !c.Until.IsZero() && !c.Since.Before(c.Until) {
		d.add(until.pos, "put until after since", "until is not after since: the crossing would never be open")
	}
}

func (d *document) readAssertions(n *node) {
	for _, item := range d.list(n, "assertions") {
		f, ok := d.fields(item, "assertion", assertionKeys)
		if !ok || len(f.node.entries) == 0 {
			continue
		}
		if len(f.node.entries) > 1 {
			d.add(item.pos, "write an item for each", "assertion says both never and allow")
			continue
		}
		d.assertion(f.node.entries[0].key == "never", item.pos, f.node.entries[0].value)
	}
}

// assertion reads one claim. A port that names two families (icmp/echo) is two
// claims.
func (d *document) assertion(never bool, at Pos, n *node) {
	keys, what := allowKeys, "allow"
	if never {
		keys, what = neverKeys, "never"
	}
	f, ok := d.fields(n, what, keys)
	if !ok {
		return
	}
	a := Assertion{Pos: at, Never: never}
	side := func(key string) (t Term, ok bool) {
		v := f.get(key)
		if v == nil {
			d.add(n.pos, "write "+key+": workload/NAME", "%s has no %s", what, key)
			return t, false
		}
		return d.term(v, key)
	}
	var okFrom, okTo bool
	a.From, okFrom = side("from")
	a.To, okTo = side("to")
	if never {
		a.Hops = 1
		if v := f.get("hops"); v != nil {
			hops, ok := d.number(v, "hops", 1, maxHops)
			if !ok {
				return
			}
			a.Hops = int(hops)
		}
	}
	ports := []*image.Port{nil}
	if v := f.get("port"); v != nil {
		s, ok := d.text(v, "port", 32)
		if !ok {
			return
		}
		spans, bad := parseSpans(s)
		if bad != nil {
			d.add(v.pos, bad.hint, "%s", bad.msg)
			return
		}
		if !(never && s == "any") {
			ports = ports[:0]
			for _, span := range spans {
				if span.Low != span.High || s == "any" {
					d.add(v.pos, "name one port, such as tcp/443", "port %s of an assertion is more than one", quote(s))
					return
				}
				ports = append(ports, &image.Port{Proto: span.Proto, Number: span.Low})
			}
		}
	} else if !never {
		d.add(n.pos, "write port: tcp/443", "allow has no port")
		return
	}
	if !okFrom || !okTo {
		return
	}
	for _, p := range ports {
		a.Port = p
		d.p.Assertions = append(d.p.Assertions, a)
	}
}
