package policy

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

var (
	selectorKeys   = []string{"systemdUnit", "cgroup", "kubernetes", "container"}
	kubernetesKeys = []string{"namespace", "podName", "podLabels", "serviceAccount"}
	containerKeys  = []string{"name", "image", "labels"}
	// unitTypes are the systemd units that have processes in a cgroup of their own.
	// A slice has none: its units do.
	unitTypes = []string{".service", ".scope", ".socket", ".mount", ".swap"}
)

const selectsNothing = "an empty selector selects nothing; say which processes are meant"

// selector reads one item of a workload's `match`: exactly one kind, and never
// one that selects everything by leaving something out.
func (r *reporter) selector(n *node) (Selector, bool) {
	if n.kind == mapNode && len(n.entries) == 0 || n.kind == nullNode {
		r.add(n.pos, selectsNothing, "selector is empty")
		return Selector{}, false
	}
	f, ok := r.fields(n, "selector", selectorKeys)
	if !ok || len(f.node.entries) == 0 {
		return Selector{}, false
	}
	if len(f.node.entries) > 1 {
		r.add(f.node.entries[1].pos, "write a list item for each; they are alternatives", "selector has more than one kind: %s and %s", f.node.entries[0].key, f.node.entries[1].key)
		return Selector{}, false
	}
	s := Selector{Pos: n.pos}
	v := f.node.entries[0].value
	switch f.node.entries[0].key {
	case "systemdUnit":
		s.Kind = image.SelectUnit
		s.Path, ok = r.unit(v)
	case "cgroup":
		s.Kind = image.SelectCgroup
		s.Path, ok = r.cgroup(v)
	case "kubernetes":
		s.Kind = image.SelectKubernetes
		ok = r.kubernetes(v, &s)
	case "container":
		s.Kind = image.SelectContainer
		ok = r.container(v, &s)
	}
	return s, ok
}

// unit reads a unit name with at most one '*'. What the kernel can look up bounds
// the part after it.
func (r *reporter) unit(n *node) (string, bool) {
	s, ok := r.ascii(n, "systemdUnit", image.MaxPath)
	if !ok {
		return "", false
	}
	for i := range len(s) {
		c := s[i]
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && !strings.ContainsRune(`:-_.\@*`, rune(c)) {
			r.add(n.pos, `systemd-escape shows how systemd spells a unit name`, "systemdUnit %s holds the character %q", quote(s), c)
			return "", false
		}
	}
	prefix, suffix, glob := strings.Cut(s, "*")
	if glob && strings.Contains(suffix, "*") {
		r.add(n.pos, "write an item for each pattern", "systemdUnit %s has more than one *", quote(s))
		return "", false
	}
	if glob && prefix == "" && (suffix == "" || slices.Contains(unitTypes, suffix)) {
		r.add(n.pos, "name the unit, or part of its name", "systemdUnit %s selects everything", quote(s))
		return "", false
	}
	i := strings.LastIndexByte(s, '.')
	if i < 0 || !slices.Contains(unitTypes, s[i:]) {
		hint := "a unit name ends in one of: " + strings.Join(unitTypes, " ")
		switch {
		case strings.HasSuffix(s, ".slice"):
			hint = "select a slice by its cgroup path"
		case i < 0:
			hint = "write " + s + ".service"
		}
		r.add(n.pos, hint, "systemdUnit %s is not a unit with processes", quote(s))
		return "", false
	}
	if i == 0 || strings.HasPrefix(s, "@") {
		r.add(n.pos, "name the unit", "systemdUnit %s has no name before its type", quote(s))
		return "", false
	}
	if glob && len(suffix) >= abi.UnitSuffix {
		r.add(n.pos, "move the * nearer to the end", "systemdUnit %s has %d bytes after the *; at most %d can be matched", quote(s), len(suffix), abi.UnitSuffix-1)
		return "", false
	}
	return s, true
}

// cgroup reads a path below the managed root.
func (r *reporter) cgroup(n *node) (string, bool) {
	s, ok := r.text(n, "cgroup", image.MaxPath)
	if !ok {
		return "", false
	}
	for _, c := range s {
		if c < ' ' || c > '~' {
			r.add(n.pos, "", "cgroup %s holds the character %U", quote(s), c)
			return "", false
		}
	}
	if clean := path.Clean("/" + s); clean != s {
		r.add(n.pos, "write "+clean, "cgroup %s is not a clean absolute path", quote(s))
		return "", false
	}
	return s, true
}

func (r *reporter) kubernetes(n *node, s *Selector) bool {
	if n.kind == nullNode || n.kind == mapNode && len(n.entries) == 0 {
		r.add(n.pos, selectsNothing, "kubernetes selector is empty")
		return false
	}
	f, ok := r.fields(n, "kubernetes selector", kubernetesKeys)
	if !ok {
		return false
	}
	ok = len(f.node.entries) > 0
	if v := f.get("namespace"); v != nil {
		var fine bool
		s.Namespace, fine = r.name(v, "namespace")
		ok = ok && fine
	}
	if v := f.get("podName"); v != nil {
		text, fine := r.ascii(v, "podName", 253)
		switch {
		case fine && !isSubdomain(text):
			r.add(v.pos, "use a-z, 0-9, hyphens and dots", "podName %s is not a Kubernetes name", quote(text))
			fine = false
		case fine && f.get("namespace") == nil:
			r.add(v.pos, "write namespace: beside it", "podName %s stands without its namespace", quote(text))
			fine = false
		}
		s.Name, ok = text, ok && fine
	}
	if v := f.get("serviceAccount"); v != nil {
		text, fine := r.ascii(v, "serviceAccount", 253)
		if fine && !isSubdomain(text) {
			r.add(v.pos, "use a-z, 0-9, hyphens and dots", "serviceAccount %s is not a Kubernetes name", quote(text))
			fine = false
		}
		s.ServiceAccount, ok = text, ok && fine
	}
	if v := f.get("podLabels"); v != nil {
		var fine bool
		s.Labels, fine = r.labels(v, "podLabels", true)
		ok = ok && fine
	}
	return ok
}

func (r *reporter) container(n *node, s *Selector) bool {
	if n.kind == nullNode || n.kind == mapNode && len(n.entries) == 0 {
		r.add(n.pos, selectsNothing, "container selector is empty")
		return false
	}
	f, ok := r.fields(n, "container selector", containerKeys)
	if !ok {
		return false
	}
	ok = len(f.node.entries) > 0
	for _, field := range []struct {
		key string
		to  *string
	}{{"name", &s.Name}, {"image", &s.Image}} {
		v := f.get(field.key)
		if v == nil {
			continue
		}
		text, fine := r.ascii(v, "container "+field.key, 255)
		if fine && strings.ContainsAny(text, "*?") {
			r.add(v.pos, "write the exact "+field.key, "container %s %s has a wildcard", field.key, quote(text))
			fine = false
		}
		*field.to, ok = text, ok && fine
	}
	if v := f.get("labels"); v != nil {
		var fine bool
		s.Labels, fine = r.labels(v, "labels", false)
		ok = ok && fine
	}
	return ok
}

// labels reads keys and values that must all be present. kubernetes asks for the
// syntax of Kubernetes labels; container runtimes accept any text.
func (r *reporter) labels(n *node, what string, kubernetes bool) (map[string]string, bool) {
	if n.kind == nullNode || n.kind == mapNode && len(n.entries) == 0 {
		r.add(n.pos, selectsNothing, "%s is empty", what)
		return nil, false
	}
	if !r.mapping(n, what) {
		return nil, false
	}
	out, ok := make(map[string]string, len(n.entries)), true
	for _, e := range n.entries {
		value, fine := r.text(e.value, fmt.Sprintf("value of label %s", quote(e.key)), 255)
		switch {
		case !fine:
			ok = false
		case kubernetes && !isLabelKey(e.key), !kubernetes && (e.key == "" || len(e.key) > 255 || !printableASCII(e.key)):
			r.add(e.pos, "", "label %s is not a valid label key", quote(e.key))
			ok = false
		case kubernetes && !isLabelValue(value), !printableASCII(value):
			r.add(e.value.pos, "", "value %s of label %s is not a valid label value", quote(value), e.key)
			ok = false
		}
		if _, twice := out[e.key]; twice {
			r.add(e.pos, "keep one of them", "label %s is given twice", quote(e.key))
			ok = false
		}
		out[e.key] = value
	}
	return out, ok
}

func printableASCII(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// isSubdomain reports RFC 1123 subdomains, which Kubernetes uses for names.
func isSubdomain(s string) bool {
	if len(s) > 253 {
		return false
	}
	for part := range strings.SplitSeq(s, ".") {
		if !isName(part) {
			return false
		}
	}
	return true
}

// isLabelValue reports values that Kubernetes allows, but for the empty one.
func isLabelValue(s string) bool {
	if s == "" || len(s) > 63 {
		return false
	}
	alnum := func(c byte) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
	}
	for i := range len(s) {
		if !alnum(s[i]) && (i == 0 || i == len(s)-1 || !strings.ContainsRune("-_.", rune(s[i]))) {
			return false
		}
	}
	return true
}

func isLabelKey(s string) bool {
	prefix, name, ok := strings.Cut(s, "/")
	if !ok {
		return isLabelValue(s)
	}
	return isSubdomain(prefix) && isLabelValue(name)
}
