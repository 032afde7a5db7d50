package kubernetes

import (
	"fmt"
	"slices"

	"github.com/demarc/demarc/identity"
	"github.com/demarc/demarc/policy"
)

// Options say how a policy is made.
type Options struct {
	Name        string // of the policy
	Version     uint64
	TrustDomain string
	// NAT is what proofs may leave out: "none", or "destination" where connections go
	// to service addresses that a host rewrites.
	NAT string
	// Group says which pods share a workload.
	Group Grouping
}

// Grouping says which pods share a workload, and with it an identity.
type Grouping string

const (
	// ByPod gives each pod a workload of its own, whatever policies say: its identity
	// stays as long as its name.
	ByPod Grouping = "pod"
	// ByReplica lets pods of a namespace share one that have the same labels and that
	// all policies treat alike.
	ByReplica Grouping = "replica"
	// Fitting is ByPod, or ByReplica where the image of that would be too large.
	Fitting Grouping = "auto"
)

// Result is an imported policy.
type Result struct {
	Source    []byte // of the policy, as text
	Policy    *policy.Policy
	Group     Grouping // ByPod or ByReplica
	Pods      int      // that have a workload
	Reported  Problems // what the policy cannot say; it refuses that
	Unmanaged int      // pods in their node's network, which no policy selects
}

// Import makes the policy that means for the pods of the inventory what the objects
// mean. It is pure: the same input gives the same text. An error of type Problems names
// objects that the API server would not take.
func Import(inv *identity.Inventory, objects *Objects, o Options) (*Result, error) {
	c := newCluster(inv)
	r := reader{cluster: c}
	all := r.boundaries(objects)
	if len(r.refused) > 0 {
		return nil, r.refused
	}
	if len(c.pods) == 0 {
		return nil, fmt.Errorf("the inventory has no pod that a policy could select")
	}
	table := newPortTable()
	views, of := c.views(all, table)
	classes := c.classes(views, of)
	crossings := c.declare(views, classes, table)

	out := &Result{Pods: len(c.pods), Reported: r.reported}
	for _, w := range inv.Workloads {
		if w.Namespace != "" && w.HostNetwork {
			out.Unmanaged++
		}
	}
	groupings := []Grouping{o.Group}
	if o.Group == Fitting {
		groupings = []Grouping{ByPod, ByReplica}
	}
	var err error
	for _, out.Group = range groupings {
		w := writer{cluster: c, options: o}
		w.name(c.units(classes, out.Group))
		if out.Source, err = policy.Format(o.Name+".yaml", w.write(crossings)); err != nil {
			return nil, fmt.Errorf("the import made no valid policy, which is a fault of demarc: %w", err)
		}
		if out.Policy, err = policy.Parse(o.Name+".yaml", out.Source); err != nil {
			return nil, fmt.Errorf("the import made no valid policy, which is a fault of demarc: %w", err)
		}
		if _, err = policy.Compile(out.Policy); err == nil {
			return out, nil
		}
	}
	return nil, err
}

// unit is pods that share a workload.
type unit struct {
	namespace string
	pods      []int // ascending
}

// units parts the pods into workloads, ascending by their first pod. The classes have
// been declared.
func (c *cluster) units(classes []class, g Grouping) []unit {
	var out []unit
	for i := range classes {
		index := map[int]int{} // by kind
		for _, p := range classes[i].pods {
			pod := &c.pods[p]
			at, seen := index[pod.kind]
			if alone := g == ByPod || len(pod.addresses) != 1 || classes[i].alone; !seen || alone {
				at = len(out)
				index[pod.kind] = at
				out = append(out, unit{namespace: pod.namespace})
			}
			out[at].pods = append(out[at].pods, p)
		}
	}
	slices.SortFunc(out, func(a, b unit) int { return a.pods[0] - b.pods[0] })
	return out
}
