package kubernetes

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/demarc/demarc/identity"
)

// pod is what counts of a Pod.
type pod struct {
	Metadata struct {
		Namespace       string            `json:"namespace"`
		Name            string            `json:"name"`
		UID             string            `json:"uid"`
		ResourceVersion string            `json:"resourceVersion"`
		Labels          map[string]string `json:"labels"`
		Annotations     static            `json:"annotations"`
	} `json:"metadata"`
	Spec struct {
		NodeName       string      `json:"nodeName"`
		ServiceAccount string      `json:"serviceAccountName"`
		Init           []container `json:"initContainers"`
		Containers     []container `json:"containers"`
		Ephemeral      []container `json:"ephemeralContainers"`
	} `json:"spec"`
	Status struct {
		Init       []state `json:"initContainerStatuses"`
		Containers []state `json:"containerStatuses"`
		Ephemeral  []state `json:"ephemeralContainerStatuses"`
	} `json:"status"`
}

// static tells of a pod that the kubelet has from a file: what the API server shows is
// a mirror, with a UID of its own, and cgroups are named by this one.
type static struct {
	Hash   string `json:"kubernetes.io/config.hash"`
	Mirror string `json:"kubernetes.io/config.mirror"`
}

type container struct {
	Name  string `json:"name"`
	Image string `json:"image"` // as it was asked for
}

type state struct {
	Name  string `json:"name"`
	ID    string `json:"containerID"` // RUNTIME://ID
	State struct {
		Running *struct{} `json:"running"`
	} `json:"state"`
}

var (
	word = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?$`)
	hash = regexp.MustCompile(`^[0-9a-f]{32}$`)
	ids  = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}://([0-9a-f]{64})$`)
)

// here says whether it is a pod of this node, whatever the server was asked for.
func (k pod) here(node string) bool {
	m := k.Metadata
	return k.Spec.NodeName == node && word.MatchString(m.Namespace) && word.MatchString(m.Name) && word.MatchString(m.UID)
}

// uid is what its cgroups are named by. Who makes pods may write annotations, so a hash
// must not look like the UID of a pod that was not made from a file.
func (k pod) uid() string {
	if a := k.Metadata.Annotations; a.Mirror != "" && hash.MatchString(a.Hash) {
		return a.Hash
	}
	return k.Metadata.UID
}

func (k pod) key() string { return k.Metadata.Namespace + "/" + k.Metadata.Name }

// running lists the workloads of its running containers by their ids, without their
// cgroups.
func (k pod) running() map[string][]identity.Workload {
	all := make(map[string][]identity.Workload)
	m := k.Metadata
	whole := identity.Workload{Namespace: m.Namespace, Name: m.Name, Labels: m.Labels, ServiceAccount: k.Spec.ServiceAccount}
	add := func(specs []container, states []state) {
		for _, s := range states {
			id := ids.FindStringSubmatch(s.ID)
			if s.State.Running == nil || id == nil || !word.MatchString(s.Name) {
				continue
			}
			inner := identity.Workload{Name: s.Name, Labels: map[string]string{ // those that the kubelet gives to containers
				"io.kubernetes.container.name": s.Name, "io.kubernetes.pod.name": m.Name, "io.kubernetes.pod.namespace": m.Namespace, "io.kubernetes.pod.uid": k.uid()}}
			if i := slices.IndexFunc(specs, func(c container) bool { return c.Name == s.Name }); i >= 0 {
				inner.Image = specs[i].Image
			}
			all[id[1]] = []identity.Workload{inner, whole}
		}
	}
	add(k.Spec.Init, k.Status.Init)
	add(k.Spec.Containers, k.Status.Containers)
	add(k.Spec.Ephemeral, k.Status.Ephemeral)
	return all
}

// workloads finds the cgroups of all running containers. One that two pods have, that
// is in two places, or below another pod belongs to nobody, and the reason is told. One
// that is in no place may not be there yet.
func workloads(pods []pod, t *tree) (inv *identity.Inventory, strange []error, missing bool) {
	slices.SortFunc(pods, func(a, b pod) int { return cmp.Compare(a.Metadata.UID, b.Metadata.UID) })
	owners := make(map[string][]int)
	running := make([]map[string][]identity.Workload, len(pods))
	for i, k := range pods {
		running[i] = k.running()
		for id := range running[i] {
			owners[id] = append(owners[id], i)
		}
	}
	places := t.find(owners)
	inv = &identity.Inventory{Namespaces: map[string]identity.Namespace{}}
	var lines []string
	for id, of := range owners {
		at := places[id]
		k := pods[of[0]]
		switch {
		case len(of) > 1:
			lines = append(lines, fmt.Sprintf("container %.12s: both %s and %s have it: not bound", id, k.key(), pods[of[1]].key()))
		case len(at) == 0:
			missing = true
		case len(at) > 1:
			lines = append(lines, fmt.Sprintf("container %.12s of %s: both %s and %s carry its id: not bound", id, k.key(), at[0].path, at[1].path))
		case at[0].pod != k.uid():
			lines = append(lines, fmt.Sprintf("container %.12s of %s: %s is not below its pod: not bound", id, k.key(), at[0].path))
		default:
			for _, w := range running[of[0]][id] {
				w.Cgroup = at[0].path
				inv.Workloads = append(inv.Workloads, w)
			}
		}
	}
	slices.SortFunc(inv.Workloads, func(a, b identity.Workload) int {
		return cmp.Or(cmp.Compare(a.Cgroup, b.Cgroup), cmp.Compare(a.Namespace, b.Namespace))
	})
	slices.Sort(lines)
	if more := len(lines) - maxProblems; more > 0 {
		lines = append(lines[:maxProblems], fmt.Sprintf("and %d more", more))
	}
	for _, l := range lines {
		strange = append(strange, fmt.Errorf("%s", strings.ToValidUTF8(l, "?")))
	}
	return inv, strange, missing
}
