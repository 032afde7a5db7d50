package hubble

import (
	"slices"
	"strings"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"k8s.io/apimachinery/pkg/labels"
)

// labelled takes label selectors as Kubernetes does, in which a key may name the
// label's source: "demarc:zone in (edge, app)".
func labelled(b *builder, field string, values []string, of func(*flowpb.Flow) []string) {
	if !bounded(b, field, values) {
		return
	}
	var all []labels.Selector
	for _, v := range values {
		s, err := labels.Parse(dotted(v))
		if err != nil {
			b.fail(field, "%q: %v", v, err)
			return
		}
		all = append(all, s)
	}
	b.add(func(f *flowpb.Flow) bool {
		has := labelSet(of(f))
		return slices.ContainsFunc(all, func(s labels.Selector) bool { return s.Matches(has) })
	})
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
