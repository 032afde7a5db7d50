package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/demarc/demarc/policy/image"
)

// Trust rules, by the names that `waive` uses.
const (
	ruleLimit       = "higher-needs-limit"
	ruleLog         = "higher-needs-log"
	ruleSkip        = "no-skip"
	ruleNetwork     = "network-lowest"
	ruleWildcard    = "wildcard-higher"
	ruleExpired     = "expired"
	ruleNever       = "never-matches"
	ruleUnreachable = "unreachable-workload"
)

var (
	crossingRules = []string{ruleLimit, ruleLog, ruleSkip, ruleNetwork, ruleWildcard, ruleExpired, ruleNever}
	workloadRules = []string{ruleUnreachable}
)

// checkTrust reports crossings that break a trust rule, and workloads that no
// crossing concerns.
func (d *document) checkTrust() {
	levels := make([]int, 0, len(d.trust))
	for _, t := range d.trust {
		levels = append(levels, int(t))
	}
	slices.Sort(levels)
	levels = slices.Compact(levels)
	if len(levels) == 0 {
		return // no zones: reported already
	}
	reached := reach{workloads: map[string]bool{}, zones: map[string]bool{}}
	for i := range d.p.Crossings {
		if c := &d.p.Crossings[i]; !d.notes[i].broken {
			d.checkCrossing(c, d.notes[i], levels)
			reached.add(d, c)
		}
	}
	if d.partial {
		return // the unreadable crossing may be the one that reaches the workload
	}
	for _, w := range d.p.Workloads {
		if reached.any || reached.workloads[w.Name] || w.Zone == "" || reached.zones[w.Zone] || waives(d.waived[w.Name], ruleUnreachable) {
			continue
		}
		d.add(w.Pos, "declare one, remove the workload, or waive rule "+ruleUnreachable, "no crossing reaches or leaves workload %s", w.Name)
	}
}

// reach collects who takes part in some crossing.
type reach struct {
	any              bool
	workloads, zones map[string]bool
}

func (r *reach) add(d *document, c *Crossing) {
	if d.neverMatches(c) != "" {
		return
	}
	for _, t := range slices.Concat(c.From, c.To) {
		switch t.Kind {
		case image.TermAny:
			r.any = true
		case image.TermWorkload:
			r.workloads[t.Name] = true
		case image.TermZone:
			r.zones[t.Name] = true
		}
	}
}

func waives(ws []Waiver, rule string) bool {
	return slices.ContainsFunc(ws, func(w Waiver) bool { return w.Rule == rule })
}

// level returns the trust of a term's zone; `any` is as little trusted as the
// lowest zone.
func (d *document) level(t Term, levels []int) (int, bool) {
	zone := t.Name
	switch t.Kind {
	case image.TermAny:
		return levels[0], true
	case image.TermWorkload:
		zone = d.zoneOf[t.Name]
	case image.TermNetwork:
		zone = d.networkZone[t.Name]
	case image.TermUnmanaged:
		zone = d.p.Unmanaged.Zone
	}
	trust, ok := d.trust[zone]
	return int(trust), ok
}

func (d *document) checkCrossing(c *Crossing, notes crossingNotes, levels []int) {
	breach := func(rule string, at Pos, hint, format string, args ...any) {
		if waives(c.Waive, rule) {
			return
		}
		if hint != "" {
			hint += ", or "
		}
		d.add(at, hint+"waive rule "+rule+" with a reason", "crossing %s %s", c.Name, fmt.Sprintf(format, args...))
	}
	if why := d.neverMatches(c); why != "" {
		breach(ruleNever, c.Pos, "remove it", "can never match: %s", why)
	}
	if !c.Until.IsZero() && !c.Until.After(d.now) {
		breach(ruleExpired, c.Pos, "remove it", "expired at %s", c.Until.Format(time.RFC3339))
	}
	// One message a rule and crossing: the first pair that breaks it.
	told := map[string]bool{}
	once := func(rule string, at Pos, hint, format string, args ...any) {
		if !told[rule] {
			told[rule] = true
			breach(rule, at, hint, format, args...)
		}
	}
	for _, to := range c.To {
		high, ok := d.level(to, levels)
		if !ok {
			continue
		}
		for _, from := range c.From {
			low, ok := d.level(from, levels)
			if !ok || high <= low {
				continue
			}
			way := fmt.Sprintf("from %s (trust %d) into the higher %s (trust %d)", from, low, to, high)
			if c.Rate == 0 {
				once(ruleLimit, c.Pos, "write limit: {connections: 100/s}", "has no limit and leads %s", way)
			}
			if !notes.logged {
				once(ruleLog, c.Pos, "write log: denied", "does not name its log and leads %s", way)
			}
			if from.Kind == image.TermAny || from.Kind == image.TermZone {
				once(ruleWildcard, from.Pos, "name the workloads", "leads %s for whoever there is", way)
			}
			i, _ := slices.BinarySearch(levels, low)
			if next := levels[i+1]; next < high {
				if from.Kind == image.TermNetwork {
					once(ruleNetwork, to.Pos, fmt.Sprintf("enter at trust %d (%s)", next, d.zonesAt(next)), "leads %s, which is not the lowest zone above it", way)
				} else {
					once(ruleSkip, to.Pos, fmt.Sprintf("go by way of trust %d (%s)", next, d.zonesAt(next)), "leads %s and skips a level in between", way)
				}
			}
			if len(told) == 5 {
				return
			}
		}
	}
}

// zonesAt names the zones of a trust level.
func (d *document) zonesAt(level int) string {
	var names []string
	for _, z := range d.p.Zones {
		if int(z.Trust) == level {
			names = append(names, "zone/"+z.Name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// neverMatches says why no flow can ever be admitted by a crossing, or "".
func (d *document) neverMatches(c *Crossing) string {
	live := func(t Term) bool { return t.Kind != image.TermZone || d.zoneWorkloads[t.Name] > 0 }
	for _, terms := range [][]Term{c.From, c.To} {
		if !slices.ContainsFunc(terms, live) {
			return fmt.Sprintf("no workload is in %s", terms[0])
		}
	}
	local := func(t Term) bool { return live(t) && t.Kind != image.TermNetwork }
	from, to := slices.ContainsFunc(c.From, local), slices.ContainsFunc(c.To, local)
	switch {
	case !from && !to:
		return "both ends are networks, and neither is of this host"
	case !from && c.Side == image.EgressSide, !to && c.Side == image.IngressSide:
		return "it holds only at the end that is a network, which is not of this host"
	}
	return ""
}
