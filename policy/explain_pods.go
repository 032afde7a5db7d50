package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/demarc/demarc/identity"
	"github.com/demarc/demarc/policy/image"
)

// podEnd is what is known about a pod of an inventory.
type podEnd struct {
	id        image.ID // of the workload that it belongs to; Unmanaged if to none
	addresses []netip.Addr
	problem   string // why it cannot be asked about
}

// pods finds the workload of each pod, as a host would: by its cgroup, or by what
// selectors ask of it. A pod in its node's network is an unmanaged process with the
// node's address.
func (p *Policy) pods(inv *identity.Inventory) map[string]podEnd {
	ids := p.IDs()
	cgroups := map[string]string{}
	exact := map[string][]string{} // by namespace/name
	type selected struct {
		by       image.Selector
		workload string
	}
	var others []selected
	for i := range p.Workloads {
		w := &p.Workloads[i]
		for j := range w.Match {
			switch s := &w.Match[j]; {
			case s.Kind == image.SelectCgroup:
				cgroups[strings.TrimSuffix(s.Path, "/")] = w.Name
			case s.Kind == image.SelectKubernetes && s.Name != "" && len(s.Labels) == 0 && s.ServiceAccount == "":
				key := s.Namespace + "/" + s.Name
				exact[key] = append(exact[key], w.Name)
			case s.Kind == image.SelectKubernetes:
				others = append(others, selected{compileSelector(0, s), w.Name})
			}
		}
	}
	out := make(map[string]podEnd, len(inv.Workloads))
	for _, w := range inv.Workloads {
		if w.Namespace == "" {
			continue
		}
		e := podEnd{id: image.Unmanaged}
		for _, a := range w.IPs {
			e.addresses = append(e.addresses, a.Unmap())
		}
		if !w.HostNetwork {
			found := slices.Clone(exact[w.Key()])
			for _, s := range others {
				if w.Matches(s.by) {
					found = append(found, s.workload)
				}
			}
			if name, is := around(cgroups, w.Cgroup); is { // the host looks there first
				found = []string{name}
			}
			slices.Sort(found)
			switch found = slices.Compact(found); len(found) {
			case 0:
			case 1:
				e.id = ids[found[0]]
			default:
				e.problem = fmt.Sprintf("workloads %s all select it", strings.Join(found, ", "))
			}
		}
		out[w.Key()] = e
	}
	return out
}

// around finds the workload of the nearest cgroup that is the path or above it.
func around(cgroups map[string]string, path string) (string, bool) {
	for path != "" {
		if name, is := cgroups[path]; is {
			return name, true
		}
		path = path[:strings.LastIndexByte(path, '/')]
	}
	return "", false
}

func (x *explainer) podEnd(side, text, key string) (end, error) {
	if x.pods == nil {
		return end{}, fmt.Errorf("%s %q: pods are known from an inventory only; name one with --inventory", side, text)
	}
	pod, known := x.pods[key]
	switch {
	case !known:
		return end{}, fmt.Errorf("%s %q: the inventory has no such pod", side, text)
	case pod.problem != "":
		return end{}, fmt.Errorf("%s %q: %s", side, text, pod.problem)
	}
	return end{name: text, id: pod.id, choice: pod.addresses}, nil
}

// together gives pods the address under which they meet the other end: the first of the
// first family that both have.
func together(from, to *end) error {
	if len(from.choice) == 0 && len(to.choice) == 0 {
		return nil
	}
	candidates := func(e *end) []netip.Addr {
		if e.choice == nil && e.address.IsValid() {
			return []netip.Addr{e.address}
		}
		return e.choice
	}
	a, b := candidates(from), candidates(to)
	switch {
	case len(a) == 0:
		to.address = b[0]
		return nil
	case len(b) == 0:
		from.address = a[0]
		return nil
	}
	for _, x := range a {
		for _, y := range b {
			if x.BitLen() == y.BitLen() {
				from.address, to.address = x, y
				return nil
			}
		}
	}
	return fmt.Errorf("from %s to %s: they have no address of one family", from.name, to.name)
}
