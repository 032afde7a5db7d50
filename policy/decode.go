package policy

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// fields are the entries of a mapping whose keys are known and unique.
type fields struct {
	node *node
}

// get returns the value of a key, or nil where the key is absent.
func (f fields) get(key string) *node {
	if f.node == nil {
		return nil
	}
	for i := range f.node.entries {
		if f.node.entries[i].key == key {
			return f.node.entries[i].value
		}
	}
	return nil
}

// fields reads a mapping with a closed set of keys. Unknown and repeated keys are
// reported and dropped: the first of two stands.
func (r *reporter) fields(n *node, what string, keys []string) (fields, bool) {
	if !r.mapping(n, what) {
		return fields{}, false
	}
	known := &node{kind: mapNode, pos: n.pos, entries: n.entries[:0:0]}
	for _, e := range n.entries {
		if !slices.Contains(keys, e.key) {
			hint := r.nearest(e.key, keys)
			if hint == "" {
				hint = "known keys: " + strings.Join(keys, ", ")
			}
			r.add(e.pos, hint, "unknown key %s in %s", quote(e.key), what)
			continue
		}
		if (fields{known}).get(e.key) != nil {
			r.add(e.pos, "keep one of them", "key %s is given twice in %s", quote(e.key), what)
			continue
		}
		known.entries = append(known.entries, e)
	}
	return fields{known}, true
}

// mapping requires a mapping with at least one entry.
func (r *reporter) mapping(n *node, what string) bool {
	if n.kind != mapNode {
		r.wrong(n, what, "a mapping")
		return false
	}
	if len(n.entries) == 0 {
		r.add(n.pos, "remove the key, or say what it holds", "%s is empty", what)
		return false
	}
	return true
}

// named walks a mapping from names that the author chose to values.
func (r *reporter) named(n *node, section, what string, each func(name string, e entry)) {
	if !r.mapping(n, section) {
		return
	}
	seen := make(map[string]Pos, len(n.entries))
	for _, e := range n.entries {
		if !r.validName(e.key, e.pos, what) {
			continue
		}
		if first, ok := seen[e.key]; ok {
			r.add(e.pos, "rename or remove one of them", "%s %s is already declared at line %d", what, e.key, first.Line)
			continue
		}
		seen[e.key] = e.pos
		each(e.key, e)
	}
}

// list requires a list with at least one item.
func (r *reporter) list(n *node, what string) []*node {
	if n.kind != listNode {
		hint := ""
		if n.kind == stringNode && plainScalar(n.text) {
			hint = fmt.Sprintf("write it as a list: [%s]", n.text)
		}
		if n.kind == nullNode {
			r.wrong(n, what, "a list")
		} else {
			r.add(n.pos, hint, "%s is %s, not a list", what, n.kind)
		}
		return nil
	}
	if len(n.items) == 0 {
		r.add(n.pos, "an empty list selects nothing; say what it holds or remove the key", "%s is empty", what)
	}
	return n.items
}

// wrong reports a value of another kind than asked for.
func (r *reporter) wrong(n *node, what, want string) {
	switch n.kind {
	case nullNode:
		r.add(n.pos, "write "+want+" or remove the key", "%s is empty", what)
	case intNode, otherNode:
		hint := ""
		if want == "a string" {
			hint = fmt.Sprintf("quote it: %q", n.text)
		}
		r.add(n.pos, hint, "%s is %s, not %s", what, n.kind, want)
	default:
		r.add(n.pos, "", "%s is %s, not %s", what, n.kind, want)
	}
}

// text requires a string of 1 to limit bytes.
func (r *reporter) text(n *node, what string, limit int) (string, bool) {
	if n.kind != stringNode {
		r.wrong(n, what, "a string")
		return "", false
	}
	if n.text == "" {
		r.add(n.pos, "write its value or remove the key", "%s is empty", what)
		return "", false
	}
	if len(n.text) > limit {
		r.add(n.pos, "", "%s is longer than %d bytes", what, limit)
		return "", false
	}
	for _, c := range n.text {
		if !allowedRune(c) || c == '\n' {
			r.add(n.pos, "", "%s holds the character %U", what, c)
			return "", false
		}
	}
	return n.text, true
}

// ascii requires a string of printable ASCII without spaces.
func (r *reporter) ascii(n *node, what string, limit int) (string, bool) {
	s, ok := r.text(n, what, limit)
	if !ok {
		return "", false
	}
	for _, c := range s {
		if c <= ' ' || c > '~' {
			r.add(n.pos, "", "%s holds the character %U", what, c)
			return "", false
		}
	}
	return s, true
}

// word requires one of a few words and returns its index.
func (r *reporter) word(n *node, what string, words ...string) (int, bool) {
	if n.kind != stringNode {
		r.wrong(n, what, "one of "+strings.Join(words, ", "))
		return 0, false
	}
	if i := slices.Index(words, n.text); i >= 0 {
		return i, true
	}
	hint := r.nearest(n.text, words)
	if hint == "" {
		hint = "one of: " + strings.Join(words, ", ")
	}
	r.add(n.pos, hint, "unknown %s %s", what, quote(n.text))
	return 0, false
}

// boolean requires true or false, spelt so.
func (r *reporter) boolean(n *node, what string) bool {
	if n.kind == otherNode && (n.text == "true" || n.text == "false") {
		return n.text == "true"
	}
	r.wrong(n, what, "true or false")
	return false
}

// number requires a decimal number from low to high.
func (r *reporter) number(n *node, what string, low, high uint64) (uint64, bool) {
	if n.kind != intNode {
		if n.kind == otherNode {
			r.add(n.pos, "write decimal digits", "%s %s is not a whole decimal number", what, quote(n.text))
			return 0, false
		}
		r.wrong(n, what, "a number")
		return 0, false
	}
	v, err := strconv.ParseUint(n.text, 10, 64)
	if err != nil || v < low || v > high {
		limit := strconv.FormatUint(high, 10)
		if high == math.MaxUint64 {
			limit = "2^64-1"
		}
		r.add(n.pos, "", "%s %s is not between %d and %s", what, quote(n.text), low, limit)
		return 0, false
	}
	return v, true
}

// moment requires an RFC 3339 time in whole seconds since 1970.
func (r *reporter) moment(n *node, what string) (time.Time, bool) {
	s, ok := r.text(n, what, 64)
	if !ok {
		return time.Time{}, false
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil || t.Nanosecond() != 0 || t.Unix() <= 0 {
		r.add(n.pos, "write a time such as 2030-01-31T12:00:00Z", "%s %s is not an RFC 3339 time in whole seconds", what, quote(s))
		return time.Time{}, false
	}
	return t.UTC(), true
}

// name requires a name of the policy's own.
func (r *reporter) name(n *node, what string) (string, bool) {
	if n.kind != stringNode {
		r.wrong(n, what, "a string")
		return "", false
	}
	return n.text, r.validName(n.text, n.pos, what)
}

const maxNameBytes = 63

// validName reports names that are not [a-z0-9]([-a-z0-9]*[a-z0-9])?.
func (r *reporter) validName(s string, at Pos, what string) bool {
	if isName(s) {
		return true
	}
	hint := "use a-z, 0-9 and inner hyphens, at most 63 bytes"
	if lower := strings.ReplaceAll(strings.ToLower(s), "_", "-"); isName(lower) {
		hint = "write " + lower
	}
	r.add(at, hint, "%s %s is not a valid name", what, quote(s))
	return false
}

func isName(s string) bool {
	if s == "" || len(s) > maxNameBytes || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// quote shows what the author wrote, cut to a readable length and with nothing
// in it that a terminal or a log reader would act on.
func quote(s string) string {
	const limit = 80
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "") + "..."
	}
	return strconv.QuoteToASCII(s)
}
