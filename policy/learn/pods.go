package learn

import (
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/identity"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

// maxMembers bounds the cgroups of pods and containers whose names are remembered.
const maxMembers = 20_000

// members are the pods of one owner that were seen, or the cgroups of one container.
type members struct {
	pods    map[string]map[string]string // stable labels, by name of the pod
	cgroups map[string]bool              // of the pods, or of the container
	scopes  map[string]bool              // of containers in those that are slices, where systemd might start a unit, too
}

func newMembers() *members {
	return &members{pods: map[string]map[string]string{}, cgroups: map[string]bool{}, scopes: map[string]bool{}}
}

// What a policy can say. Flows may come from files, and names from a runtime.
var (
	namespaceName  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	podName        = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*$`)
	labelValue     = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
	containerWords = regexp.MustCompile(`^[!-)+->@-~]{1,255}$`) // printable ASCII without '*', '?' and spaces
)

// Kubernetes names pods by their owner: a ReplicaSet of a Deployment and a Job of a
// CronJob add a part of their own, all but a StatefulSet five random letters, and that
// a number.
var (
	replicaName = regexp.MustCompile(`^(.+?)(?:-[bcdfghjklmnpqrstvwxz2456789]{7,10}|-[0-9]{8,10})?-[bcdfghjklmnpqrstvwxz2456789]{5}$`)
	ordinalName = regexp.MustCompile(`^(.+)-[0-9]{1,5}$`)
)

// ownerOf is a pod's name without what tells it from others of its owner.
func ownerOf(pod string) string {
	for _, form := range []*regexp.Regexp{replicaName, ordinalName} {
		if m := form.FindStringSubmatch(pod); m != nil {
			return m[1]
		}
	}
	return pod
}

// meet finds out which pods or container a cgroup belongs to by the names in a flow,
// and remembers them. Where there are none that a policy could say, at stays.
func (l *Learner) meet(e flow.Endpoint, at place) place {
	if at.kind != container && at.kind != cgroup {
		return at // a unit's name is as good, and its own
	}
	who, name := byName(e, at)
	m := l.met[who]
	scope := scopeOf(e, at)
	if m == nil || !m.cgroups[at.name] || scope != "" && !m.scopes[scope] {
		if l.members == maxMembers {
			return at
		}
		l.members++
		if m == nil {
			m = newMembers()
			l.met[who] = m
		}
		m.cgroups[at.name] = true
		if scope != "" {
			m.scopes[scope] = true
		}
	}
	had, known := m.pods[name]
	if who.kind == pods && (!known && len(m.pods) <= len(m.cgroups) || known && len(had) < len(e.PodLabels)) {
		labels := map[string]string{}
		for _, key := range flow.StableLabels {
			if v := e.PodLabels[key]; labelValue.MatchString(v) {
				labels[key] = v
			}
		}
		m.pods[name] = labels
	}
	return who
}

// byName is who an endpoint is by its names, if a policy can say them, and its pod.
func byName(e flow.Endpoint, at place) (who place, inPod string) {
	namespace, name, ok := strings.Cut(e.Pod, "/")
	switch {
	case ok && namespaceName.MatchString(namespace) && len(name) <= 253 && podName.MatchString(name):
		return place{pods, namespace + "/" + ownerOf(name)}, name
	case e.Pod != "" || at.kind == container && pod.MatchString(path.Base(at.name)):
		return at, "" // containers of different pods share their names
	case containerWords.MatchString(e.Container):
		return place{called, e.Container}, ""
	case e.Container == "" && containerWords.MatchString(e.Image):
		return place{imaged, e.Image}, ""
	}
	return at, ""
}

// scopeOf is the container's own cgroup where that of its place is a slice: in that,
// systemd might start a unit, which the policy could not tell from it.
func scopeOf(e flow.Endpoint, at place) string {
	if !strings.HasSuffix(at.name, ".slice") {
		return ""
	}
	if _, scope, ok := identity.ContainerOf(e.Cgroup); ok {
		return scope
	}
	return ""
}

// selectors says how the policy finds the pods and containers among places: by the
// smallest stable set of labels, by a container's name or image. Those that no such
// selector tells from others are left out.
func (d *draft) selectors(places []place) map[place][]policy.Selector {
	found := map[place][]policy.Selector{}
	namespaces := map[string][]place{}
	for _, p := range places {
		switch p.kind {
		case pods:
			namespace, _, _ := strings.Cut(p.name, "/")
			namespaces[namespace] = append(namespaces[namespace], p)
		case called:
			found[p] = []policy.Selector{{Kind: image.SelectContainer, Name: p.name}}
		case imaged:
			found[p] = []policy.Selector{{Kind: image.SelectContainer, Image: p.name}}
		}
	}
	for namespace, owners := range namespaces {
		maps.Copy(found, d.podSelectors(namespace, owners))
	}
	// A process belongs to one workload: selectors that could find the same one are no
	// way to tell them apart.
	var taken []policy.Selector
	if b := d.options.Base; b != nil {
		for _, w := range b.Workloads {
			taken = append(taken, w.Match...)
		}
	}
	for _, p := range slices.SortedFunc(maps.Keys(found), comparePlaces) {
		if slices.ContainsFunc(found[p], func(s policy.Selector) bool {
			return slices.ContainsFunc(taken, func(t policy.Selector) bool { return overlap(s, t) })
		}) {
			delete(found, p)
			continue
		}
		taken = append(taken, found[p]...)
	}
	return found
}

// podSelectors selects the owners' pods of a namespace by that set of labels which
// tells most owners apart, the smallest one first; by the pods' names if there is none.
func (d *draft) podSelectors(namespace string, owners []place) map[place][]policy.Selector {
	var best map[place][]policy.Selector
	for _, keys := range labelSets() {
		tried := map[place][]policy.Selector{}
		holder := map[string]place{} // of a set of values
		shared := map[place]bool{}
		for _, p := range owners {
			for _, name := range slices.Sorted(maps.Keys(d.met[p].pods)) {
				labels := map[string]string{}
				text := ""
				for _, key := range keys {
					if v, ok := d.met[p].pods[name][key]; ok {
						labels[key], text = v, text+v+"\x00"
					}
				}
				if len(labels) < len(keys) {
					shared[p] = true
					continue
				}
				switch other, known := holder[text]; {
				case !known:
					holder[text] = p
					tried[p] = append(tried[p], policy.Selector{Kind: image.SelectKubernetes, Namespace: namespace, Labels: labels})
				case other != p:
					shared[p], shared[other] = true, true
				}
			}
		}
		maps.DeleteFunc(tried, func(p place, _ []policy.Selector) bool { return shared[p] })
		if len(tried) > len(best) {
			best = tried
		}
	}
	if len(best) > 0 {
		return best
	}
	best = map[place][]policy.Selector{}
	for _, p := range owners {
		for _, name := range slices.Sorted(maps.Keys(d.met[p].pods)) {
			best[p] = append(best[p], policy.Selector{Kind: image.SelectKubernetes, Namespace: namespace, Name: name})
		}
	}
	return best
}

// labelSets are the sets of stable labels, small ones first, and among those the ones
// that are believed most.
func labelSets() (all [][]string) {
	n := len(flow.StableLabels)
	for size := 1; size <= n; size++ {
		for bits := range 1 << n {
			var set []string
			for i, key := range flow.StableLabels {
				if bits>>i&1 != 0 {
					set = append(set, key)
				}
			}
			if len(set) == size {
				all = append(all, set)
			}
		}
	}
	return all
}

// overlap says whether two selectors by metadata could find the same process, as the
// check of a policy does: where they do not contradict each other.
func overlap(a, b policy.Selector) bool {
	if a.Kind != b.Kind {
		return false
	}
	for _, v := range [][2]string{{a.Namespace, b.Namespace}, {a.ServiceAccount, b.ServiceAccount}, {a.Name, b.Name}, {a.Image, b.Image}} {
		if v[0] != "" && v[1] != "" && v[0] != v[1] {
			return false
		}
	}
	for key, v := range a.Labels {
		if w, ok := b.Labels[key]; ok && v != w {
			return false
		}
	}
	return true
}

// finds says whether a selector by metadata finds an endpoint, as far as a flow tells.
func finds(s policy.Selector, e flow.Endpoint) bool {
	namespace, name, inPod := strings.Cut(e.Pod, "/")
	asked := func(want, have string) bool { return want == "" || want == have }
	switch s.Kind {
	case image.SelectKubernetes:
		if !inPod || s.ServiceAccount != "" || !asked(s.Namespace, namespace) || !asked(s.Name, name) {
			return false
		}
		for key, v := range s.Labels {
			if e.PodLabels[key] != v {
				return false
			}
		}
		return true
	case image.SelectContainer:
		return e.Container+e.Image != "" && len(s.Labels) == 0 && asked(s.Name, e.Container) && asked(s.Image, e.Image)
	}
	return false
}

// match is how the policy finds a workload, an item each, and what a person should
// look at.
func (w *workload) match(m *members) (items []policy.Selector, review string) {
	switch w.place.kind {
	case unit:
		return []policy.Selector{{Kind: image.SelectUnit, Path: w.place.name}}, ""
	case container:
		return m.paths(w.place), "this path ends with the container; a container or kubernetes selector outlives it"
	case cgroup:
		return []policy.Selector{{Kind: image.SelectCgroup, Path: w.place.name}}, ""
	}
	switch {
	case len(w.found) == 0:
		return m.paths(w.place), "no name or label tells these from others; their paths end with them, a selector of yours outlives them"
	case w.found[0].Name != "" && w.place.kind == pods:
		return w.found, "no label tells these pods from others; but for those of a StatefulSet, a pod's name ends with it"
	case w.place.kind == imaged:
		return w.found, "this is every container of the image"
	}
	return w.found, ""
}

// paths select members by their cgroups; without any, by the path that is the place.
func (m *members) paths(at place) (items []policy.Selector) {
	if m == nil {
		return []policy.Selector{{Kind: image.SelectCgroup, Path: at.name}}
	}
	all := maps.Clone(m.cgroups)
	for scope := range m.scopes {
		all[scope] = true
		for above := path.Dir(scope); above != "/"; above = path.Dir(above) {
			delete(all, above)
		}
	}
	for _, at := range topmost(all) {
		items = append(items, policy.Selector{Kind: image.SelectCgroup, Path: at})
	}
	return items
}

// topmost are paths, without those below others.
func topmost(paths map[string]bool) (out []string) {
	for _, p := range slices.Sorted(maps.Keys(paths)) {
		above := path.Dir(p)
		for above != "/" && above != "." && !paths[above] {
			above = path.Dir(above)
		}
		if !paths[above] {
			out = append(out, p)
		}
	}
	return out
}
