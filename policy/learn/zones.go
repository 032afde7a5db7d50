package learn

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/demarc/demarc/policy"
)

// outsideZone is where networks are that nobody declared.
const outsideZone = "outside"

// placeInZones gives workloads a zone. Without a base, a workload's tier is how many
// crossings it is from outside: so no crossing skips a level, and networks enter the
// lowest one. With one, a new workload goes where most of its crossings keep the
// rules, and best to where it was so far, with unmanaged processes.
func (d *draft) placeInZones(all []edgeOf) {
	if b := d.options.Base; b != nil {
		d.placeInBase(b, all)
		return
	}
	tiers := d.tiers(all)
	d.outside = outsideZone
	deepest := 1
	for _, w := range d.workloads {
		w.zone = tierName(tiers[w.place])
		deepest = max(deepest, tiers[w.place])
	}
	for _, e := range all {
		if e.from.kind == 0 || e.to.kind == 0 {
			d.zones = []zone{{outsideZone, 0}}
			break
		}
	}
	for t := range deepest {
		d.zones = append(d.zones, zone{tierName(t + 1), 10 * (t + 1)})
	}
	d.unmanaged = tierName(1)
}

func tierName(tier int) string { return fmt.Sprintf("tier-%d", tier) }

// tiers are the distances from outside, from 1 on. What nothing leads to is as near to
// what it calls as the rules ask.
func (d *draft) tiers(all []edgeOf) map[place]int {
	tier := map[place]int{}
	var next []place
	for _, e := range all {
		if e.from.kind == 0 && tier[e.to] == 0 {
			tier[e.to] = 1
			next = append(next, e.to)
		}
	}
	for len(next) > 0 {
		at := next[0]
		next = next[1:]
		for _, e := range all {
			if e.from == at && e.to.kind != 0 && tier[e.to] == 0 {
				tier[e.to] = tier[at] + 1
				next = append(next, e.to)
			}
		}
	}
	reached := map[place]bool{}
	for p := range tier {
		reached[p] = true
	}
	for _, w := range d.workloads {
		if tier[w.place] == 0 {
			tier[w.place] = 1
		}
	}
	for changed := true; changed; {
		changed = false
		for _, e := range all {
			if e.from.kind != 0 && e.to.kind != 0 && !reached[e.from] && tier[e.to] > tier[e.from]+1 {
				tier[e.from], changed = tier[e.to]-1, true
			}
		}
	}
	return tier
}

func (d *draft) placeInBase(b *policy.Policy, all []edgeOf) {
	trust := map[string]int{}
	for _, z := range b.Zones {
		trust[z.Name] = int(z.Trust)
		d.zones = append(d.zones, zone{z.Name, int(z.Trust)})
	}
	slices.SortFunc(d.zones, func(x, y zone) int { return cmp.Or(cmp.Compare(x.trust, y.trust), cmp.Compare(x.name, y.name)) })
	d.outside, d.unmanaged = d.zones[0].name, b.Unmanaged.Zone
	levels := make([]int, len(d.zones))
	for i, z := range d.zones {
		levels[i] = z.trust
	}
	levels = slices.Compact(levels)
	zoneOf := map[place]string{}
	for _, w := range b.Workloads {
		zoneOf[place{declared, w.Name}] = w.Zone
	}
	// A breach is a way up that skips a level.
	breach := func(from, to int) bool {
		i, _ := slices.BinarySearch(levels, from)
		return to > from && levels[i+1] < to
	}
	level := func(p place) int {
		if p.kind == 0 {
			return levels[0]
		}
		if z, ok := zoneOf[p]; ok {
			return trust[z]
		}
		return trust[d.unmanaged]
	}
	for _, w := range d.workloads {
		best, fewest := d.unmanaged, -1
		for _, z := range append([]zone{{d.unmanaged, trust[d.unmanaged]}}, d.zones...) {
			breaches := 0
			for _, e := range all {
				if e.from == w.place && e.to != w.place && breach(z.trust, level(e.to)) || e.to == w.place && e.from != w.place && breach(level(e.from), z.trust) {
					breaches++
				}
			}
			if fewest < 0 || breaches < fewest {
				best, fewest = z.name, breaches
			}
		}
		w.zone, zoneOf[w.place] = best, best
	}
}
