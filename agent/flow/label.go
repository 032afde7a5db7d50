package flow

import (
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/labels"
)

// ParseSelector makes a predicate on labels "source:key=value" of a label selector as
// Kubernetes writes them, in which a key may name the label's source:
// "demarc:zone in (edge, app)".
func ParseSelector(s string) (func(labels []string) bool, error) {
	selector, err := labels.Parse(dotted(s))
	if err != nil {
		return nil, err
	}
	return func(has []string) bool { return selector.Matches(labelSet(has)) }, nil
}

// Labels are what a selector finds an endpoint by. An identity that was claimed with a
// bad proof is nobody's, and shows as a label of its own only.
//
// The pod and the container that the inventory names are labels beside those.
func (e *Endpoint) Labels() []string {
	out := e.proved()
	if namespace, name, ok := strings.Cut(e.Pod, "/"); ok {
		out = append(out, "demarc:pod="+name, "demarc:pod-namespace="+namespace)
	}
	if e.Container != "" {
		out = append(out, "demarc:container="+e.Container)
	}
	return out
}

func (e *Endpoint) proved() (out []string) {
	switch {
	case e.Claimed && e.Workload != "":
		return []string{"demarc:claims=" + e.Zone + "/" + e.Workload}
	case e.Claimed:
		return []string{"demarc:claims=" + strconv.FormatUint(uint64(e.Identity), 10)}
	case e.Workload != "":
		return []string{"demarc:workload=" + e.Workload, "demarc:zone=" + e.Zone}
	case e.Reserved == "pending":
		return []string{"reserved:init"}
	case e.Reserved != "": // processes of the host itself
		out = []string{"reserved:host", "demarc:" + e.Reserved}
		if e.Zone != "" {
			out = append(out, "demarc:zone="+e.Zone)
		}
	case e.Identity == 0 && e.Address.IsValid():
		out = []string{"reserved:world"}
		for _, n := range e.Networks {
			out = append(out, "demarc:network="+n)
		}
	}
	return out
}

// anySource stands for a key that names no source.
const anySource = "any"

// dotted gives every key of a selector its source, with a dot between: Kubernetes'
// keys may hold no colon, and the first dot is where labelSet takes them apart.
func dotted(selector string) string {
	var out strings.Builder
	depth, key := 0, true
	for i := 0; i < len(selector); {
		c := selector[i]
		if key && c != ' ' && c != '!' && c != ',' {
			end := i + strings.IndexAny(selector[i:]+",", " =!,()")
			source, name, ok := strings.Cut(selector[i:end], ":")
			if !ok {
				source, name = anySource, selector[i:end]
			}
			out.WriteString(source + "." + name)
			i, key = max(end, i+1), false
			continue
		}
		switch c {
		case '(':
			depth++
		case ')':
			depth--
		case ',':
			key = depth == 0
		}
		out.WriteByte(c)
		i++
	}
	return out.String()
}

// labelSet are labels "source:key=value", as a selector asks for them.
type labelSet []string

func (s labelSet) Lookup(dotted string) (string, bool) {
	source, key, _ := strings.Cut(dotted, ".")
	for _, l := range s {
		name, value, _ := strings.Cut(l, "=")
		from, name, ok := cutSource(name)
		if name == key && (source == anySource || ok && from == source) {
			return value, true
		}
	}
	return "", false
}

func cutSource(label string) (source, key string, ok bool) {
	source, key, ok = strings.Cut(label, ":")
	if !ok {
		return "", label, false
	}
	return source, key, true
}

func (s labelSet) Has(key string) bool {
	_, ok := s.Lookup(key)
	return ok
}

func (s labelSet) Get(key string) string {
	value, _ := s.Lookup(key)
	return value
}
