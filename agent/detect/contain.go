package detect

import (
	"fmt"
	"strings"
	"time"
)

// families are detectors whose findings rest on the same signals: of two of one
// family, one says nothing that the other does not. A detector that is not here is
// a family of its own.
var families = map[string]string{
	"port-scan": "denied contacts", "host-sweep": "denied contacts", "slow-scan": "denied contacts",
	"upward-probe": "denied contacts", "spread": "denied contacts",
	"fan-out": "administration", "brute-force": "administration", "chain": "administration", "transfer": "administration",
}

// Containment decides whether a finding is reason enough to quarantine a workload
// without asking anybody, and has it done. Time is that of the findings. It belongs
// to one goroutine.
type Containment struct {
	Config *Config
	// Quarantine reduces a workload to its forensic crossings for a time. It says no
	// for whatever reason, and what it does is in the core's audit log.
	Quarantine func(workload string, d time.Duration, reason string) error
	// Policy in force, for roles.
	Policy *Policy

	done     map[string]time.Time            // workload -> until when it is quarantined
	when     []time.Time                     // of the latest ones, for the limit
	evidence map[string]map[string]time.Time // workload -> family -> last seen
}

const quarantinedUntil = "quarantined until "

// independentWithin is how far apart two signals may be that speak together.
const independentWithin = time.Hour

// workloadsConsidered bounds what is remembered; the policy bounds it, too.
const workloadsConsidered = 1 << 16

// Consider decides, and returns what was done, in words; "" = there is nothing to
// say. A finding may be considered again when it gets worse.
func (c *Containment) Consider(f *Finding) string {
	switch mode := c.Config.mode(f.Technique); {
	case mode == Off || f.SuppressedBy != "" || f.Severity < Medium:
		return ""
	case mode == Advise:
		return "advised"
	}
	w := f.Subject.Workload
	if w == "" {
		return "advised: it is not a workload of this policy that could be quarantined"
	}
	if c.done == nil {
		c.done, c.evidence = map[string]time.Time{}, map[string]map[string]time.Time{}
	}
	at := f.LastSeen
	if until, ok := c.done[w]; ok && at.Before(until) {
		if strings.HasPrefix(f.Action, quarantinedUntil) {
			return f.Action // this is the finding that led to it, seen once more
		}
		return "the workload is in quarantine until " + until.UTC().Format(time.RFC3339)
	}
	if n := c.note(w, f, at); !f.Certain && n < c.Config.Quarantine.Signals {
		return fmt.Sprintf("advised: %d of %d independent signals", n, c.Config.Quarantine.Signals)
	}
	if c.Policy != nil && c.Policy.role(w, at, []string{"management"}) != "" {
		return "advised: a workload with the role management is never quarantined by itself"
	}
	q := c.Config.Quarantine
	for len(c.when) > 0 && at.Sub(c.when[0]) > q.Within {
		c.when = c.when[1:]
	}
	if len(c.when) >= q.Limit {
		return fmt.Sprintf("advised: %d workloads were quarantined within %s, which is the limit", len(c.when), q.Within)
	}
	if c.Quarantine == nil {
		return "advised: this agent cannot quarantine"
	}
	reason := fmt.Sprintf("finding %s, %s by %s", f.ID, f.Technique.ID, f.Detector)
	if err := c.Quarantine(w, q.For, reason); err != nil {
		return fmt.Sprintf("could not quarantine: %s", err)
	}
	c.when = append(c.when, at)
	c.done[w] = at.Add(q.For)
	return fmt.Sprintf(quarantinedUntil+"%s", c.done[w].UTC().Format(time.RFC3339))
}

// note remembers that a family speaks against a workload, and returns how many do.
func (c *Containment) note(w string, f *Finding, at time.Time) int {
	seen := c.evidence[w]
	if seen == nil {
		if len(c.evidence) >= workloadsConsidered {
			return 1
		}
		seen = map[string]time.Time{}
		c.evidence[w] = seen
	}
	family := families[f.Detector]
	if family == "" {
		family = f.Detector
	}
	seen[family] = at
	for name, last := range seen {
		if at.Sub(last) > independentWithin {
			delete(seen, name)
		}
	}
	return len(seen)
}

// Automatic says whether a finding may lead to a quarantine.
func (c *Containment) Automatic(f *Finding) bool { return c.Config.mode(f.Technique) == Automatic }
