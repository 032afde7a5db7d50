package detect

import (
	"net/netip"
	"slices"
	"time"

	"github.com/demarc/demarc/policy/image"
)

// Policy is what detectors know of the policy in force. The zero value knows
// nothing, and suppresses nothing.
type Policy struct {
	roles    map[string][]image.Role // by workload
	trust    map[string]uint16       // by zone
	zones    map[string]string       // of networks and workloads: "network/lan", "workload/web"
	decoys   map[string]bool         // crossings
	exact    map[string]bool         // networks of single addresses
	networks map[string][]string     // networks that a crossing leads to, by crossing
	ports    map[string][]image.Span // that crossings lead to, by "workload/web", "zone/edge", "any"
}

// PolicyOf takes from an image what detectors need.
func PolicyOf(img *image.Image) *Policy {
	p := &Policy{
		roles: map[string][]image.Role{}, trust: map[string]uint16{}, zones: map[string]string{},
		decoys: map[string]bool{}, exact: map[string]bool{}, networks: map[string][]string{},
		ports: map[string][]image.Span{},
	}
	for _, z := range img.Zones {
		p.trust[z.Name] = z.Trust
	}
	for _, w := range img.Workloads {
		p.roles[w.Name] = w.Roles
		p.zones["workload/"+w.Name] = img.Zones[w.Zone].Name
	}
	for _, n := range img.Networks {
		p.zones["network/"+n.Name] = img.Zones[n.Zone].Name
		p.exact[n.Name] = !slices.ContainsFunc(n.CIDRs, func(c netip.Prefix) bool { return !c.IsSingleIP() })
	}
	for _, c := range img.Crossings {
		p.decoys[c.Name] = c.Decoy
		for _, t := range c.To {
			to := ""
			switch t.Kind {
			case image.TermNetwork:
				p.networks[c.Name] = append(p.networks[c.Name], img.Networks[t.Index].Name)
				continue
			case image.TermWorkload:
				to = "workload/" + img.Workloads[t.Index].Name
			case image.TermZone:
				to = "zone/" + img.Zones[t.Index].Name
			case image.TermAny:
				to = "any"
			}
			p.ports[to] = append(p.ports[to], c.Ports...)
		}
	}
	return p
}

// role returns the first of some roles that a workload has at a time.
func (p *Policy) role(workload string, at time.Time, of []string) string {
	for _, r := range p.roles[workload] {
		if (r.Until == 0 || at.Unix() < r.Until) && slices.Contains(of, r.Name) {
			return r.Name
		}
	}
	return ""
}

// leadsToOneAddress says whether a crossing names single addresses only: then
// somebody meant exactly those.
func (p *Policy) leadsToOneAddress(crossing string) bool {
	to := p.networks[crossing]
	return len(to) > 0 && !slices.ContainsFunc(to, func(n string) bool { return !p.exact[n] })
}

// serves says whether some crossing leads to a workload on a TCP port.
func (p *Policy) serves(workload, zone string, port uint16) bool {
	if port == 0 || workload == "" {
		return false
	}
	for _, to := range []string{"workload/" + workload, "zone/" + zone, "any"} {
		if slices.ContainsFunc(p.ports[to], func(s image.Span) bool { return s.Proto == image.TCP && s.Low <= port && port <= s.High }) {
			return true
		}
	}
	return false
}

// zoneOf is the zone of a party: its own, or the least trusted one of the networks
// that contain it.
func (p *Policy) zoneOf(zone string, networks []string) (string, bool) {
	if zone != "" {
		_, ok := p.trust[zone]
		return zone, ok
	}
	found := ""
	for _, n := range networks {
		z, ok := p.zones["network/"+n]
		if ok && (found == "" || p.trust[z] < p.trust[found]) {
			found = z
		}
	}
	return found, found != ""
}
