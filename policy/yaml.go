package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
)

// Bounds of a document. Size, lines and values are checked before the YAML parser
// sees the text, because they bound what it allocates. The large policy that must
// fit has 100,000 crossings: 20 MB and 3 million values.
const (
	maxSource  = 64 << 20 // bytes
	maxLine    = 1 << 20  // bytes
	maxValues  = 8 << 20  // characters that could start another value
	maxDepth   = 32       // collections within collections
	maxAliases = 16       // uses of anchors
)

// nodeKind is what a YAML value is. The zero kind is an empty value.
type nodeKind uint8

const (
	nullNode nodeKind = iota
	stringNode
	intNode   // plain decimal digits
	otherNode // a plain scalar that YAML reads as a boolean, a float, hex, ...
	mapNode
	listNode
)

func (k nodeKind) String() string {
	return [...]string{"nothing", "a string", "a number", "a number or boolean", "a mapping", "a list"}[k]
}

// node is a YAML value with its place: what is left of YAML once anchors, styles
// and tags are dealt with.
type node struct {
	kind    nodeKind
	flow    bool   // written as {...} or [...]
	block   bool   // string: written as | or >
	anchor  string // its name, if it has one
	alias   string // the anchor it was copied from, if it was
	text    string // of a scalar
	pos     Pos
	dash    int // item: line of its dash; only readLayout knows it
	end     int // line of the last token; only readLayout knows it
	entries []entry
	items   []*node
}

// entry is one key and value of a mapping.
type entry struct {
	key   string
	pos   Pos
	value *node
}

// allowedRune says whether a character may stand in a policy: printable ones and
// the line feed. Control characters, bidirectional overrides and invisible
// spaces make a text read differently from what it says.
func allowedRune(r rune) bool { return r == '\n' || unicode.IsPrint(r) }

// checkText refuses what no YAML parser should be asked about. It reports each
// kind of problem once, where it first occurs.
func (r *reporter) checkText() bool {
	before := len(r.errs)
	if len(r.src) > maxSource {
		r.add(Pos{}, "split it, or use zones instead of listing every pair", "policy of %d bytes is larger than the limit of %d", len(r.src), maxSource)
		return false
	}
	if bytes.HasPrefix(r.src, []byte("\xef\xbb\xbf")) {
		r.add(Pos{1, 1}, "save the file as UTF-8 without a byte order mark", "byte order mark at the start")
		return false
	}
	seen := map[rune]bool{}
	line, column, start, values := 1, 1, 0, 0
	for i := 0; i < len(r.src); {
		c, n := rune(r.src[i]), 1
		if c >= utf8.RuneSelf {
			c, n = utf8.DecodeRune(r.src[i:])
		}
		if c == '\n' {
			line, column, start = line+1, 1, i+1
			i++
			continue
		}
		if c == '%' && i == start {
			r.add(Pos{line, 1}, "remove it", "YAML directives are not used in policies")
			return false
		}
		if c == ',' || c == ':' || c == '-' || c == '[' || c == '{' {
			if values++; values > maxValues {
				r.add(Pos{line, column}, "split it, or use zones instead of listing every pair", "policy has more than %d values", maxValues)
				return false
			}
		}
		if i-start == maxLine {
			r.add(Pos{line, 1}, "write one item on a line", "line is longer than %d bytes", maxLine)
			return false
		}
		if (!allowedRune(c) || (c == utf8.RuneError && n == 1)) && !seen[c] && len(seen) < 16 {
			seen[c] = true
			at := Pos{line, column}
			switch {
			case c == utf8.RuneError && n == 1:
				r.add(at, "save the file as UTF-8", "text is not UTF-8")
			case c == '\r':
				r.add(at, "save the file with Unix line endings", "carriage return")
			case c == '\t':
				r.add(at, "use spaces", "tab")
			case c == 0:
				r.add(at, "", "NUL byte")
			default:
				r.add(at, "write it as an escape in double quotes if it is meant", "character %U is not allowed", c)
			}
		}
		column++
		i += n
	}
	return len(r.errs) == before
}

// readYAML reads one document. It returns nil after reporting why it cannot.
func (r *reporter) readYAML() (root *node) {
	if !r.checkText() {
		return nil
	}
	defer r.recovered(func() { root = nil })
	loader := yaml.NewDecoder(bytes.NewReader(r.src))
	var first, second yaml.Node
	err := loader.Decode(&first)
	if errors.Is(err, io.EOF) || err == nil && isEmpty(&first) {
		r.add(Pos{}, "a policy starts with apiVersion: "+apiVersion, "document is empty")
		return nil
	}
	if err == nil {
		switch err = loader.Decode(&second); {
		case errors.Is(err, io.EOF):
			err = nil
		case err == nil:
			at := Pos{second.Line, second.Column}
			r.add(at, "write each policy to its own file", "more than one YAML document")
			return nil
		}
	}
	if err != nil {
		r.syntax(err)
		return nil
	}
	c := converter{reporter: r, anchors: map[*yaml.Node]*node{}}
	root = c.node(first.Content[0], 0)
	if len(r.errs) > 0 {
		return nil
	}
	return root
}

// recovered turns a panic of a YAML library into a problem of the document. The
// libraries are large and not written for hostile text; what they do to one
// document is no reason for the caller to die.
func (r *reporter) recovered(cleanup func()) {
	if v := recover(); v != nil {
		r.add(Pos{}, "", "text cannot be read as YAML: %v", v)
		cleanup()
	}
}

func isEmpty(doc *yaml.Node) bool {
	return len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" && doc.Content[0].Value == ""
}

// syntax reports what is wrong with the text as YAML. The parser knows the line
// and the formatter's often knows the column too.
func (r *reporter) syntax(err error) {
	if len(r.src) <= maxExplained {
		if at, msg := r.explainSyntax(); at.Line > 0 {
			r.add(at, "", "not YAML: %s", msg)
			return
		}
	}
	at, msg := Pos{}, strings.TrimPrefix(err.Error(), "yaml: ")
	var alias string
	if n, _ := fmt.Sscanf(msg, "unknown anchor '%s", &alias); n == 1 {
		alias = strings.TrimSuffix(alias, "'")
		r.add(r.find("*"+alias), "define it before its first use", "no anchor named %s", alias)
		return
	}
	var line int
	if n, _ := fmt.Sscanf(msg, "line %d:", &line); n == 1 {
		at = Pos{line, 1}
		_, msg, _ = strings.Cut(msg, ": ")
	}
	r.add(at, "", "not YAML: %s", msg)
}

// find returns where a text first stands, or the zero position.
func (r *reporter) find(text string) Pos {
	before, _, found := bytes.Cut(r.src, []byte(text))
	if !found {
		return Pos{}
	}
	line := before[bytes.LastIndexByte(before, '\n')+1:]
	return Pos{1 + bytes.Count(before, []byte("\n")), 1 + utf8.RuneCount(line)}
}

// converter turns the library's tree into ours.
type converter struct {
	*reporter
	anchors map[*yaml.Node]*node
	aliases int
	within  int  // anchors around the current node
	deep    bool // told that it is too deep
}

func (c *converter) node(n *yaml.Node, depth int) *node {
	out := &node{pos: Pos{n.Line, n.Column}, anchor: n.Anchor}
	if n.Style&yaml.TaggedStyle != 0 {
		c.add(out.pos, "remove it", "YAML tags are not used in policies")
		return out
	}
	if depth > maxDepth {
		if !c.deep {
			c.add(out.pos, "", "nested deeper than %d levels", maxDepth)
		}
		c.deep = true
		return out
	}
	if n.Anchor != "" {
		c.within++
		defer func() { c.within--; c.anchors[n] = out }()
	}
	switch n.Kind {
	case yaml.ScalarNode:
		out.kind, out.text = scalarKind(n), n.Value
	case yaml.MappingNode:
		out.kind, out.flow = mapNode, n.Style&yaml.FlowStyle != 0
		out.entries = make([]entry, 0, len(n.Content)/2)
		for i := 0; i+1 < len(n.Content); i += 2 {
			c.entry(out, n.Content[i], n.Content[i+1], depth)
		}
	case yaml.SequenceNode:
		out.kind, out.flow = listNode, n.Style&yaml.FlowStyle != 0
		out.items = make([]*node, 0, len(n.Content))
		for _, v := range n.Content {
			out.items = append(out.items, c.node(v, depth+1))
		}
	case yaml.AliasNode:
		return c.alias(n, out)
	}
	return out
}

func (c *converter) alias(n *yaml.Node, out *node) *node {
	c.aliases++
	from := c.anchors[n.Alias]
	switch {
	case c.aliases > maxAliases:
		if c.aliases == maxAliases+1 {
			c.add(out.pos, "write the values out", "more than %d aliases", maxAliases)
		}
		return out
	case c.within > 0 || from == nil:
		// An alias within an anchor is how a small text becomes a huge value.
		c.add(out.pos, "write the value out", "alias *%s inside an anchor", n.Value)
		return out
	}
	same := *from
	same.anchor, same.alias, same.pos = "", n.Value, out.pos
	return &same
}

func (c *converter) entry(m *node, k, v *yaml.Node, depth int) {
	at := Pos{k.Line, k.Column}
	switch {
	case k.Tag == "!!merge":
		c.add(at, "write the keys out", "YAML merge keys are not used in policies")
		return
	case k.Kind != yaml.ScalarNode || k.Anchor != "" || k.Style&yaml.TaggedStyle != 0:
		c.add(at, "write `key: value`", "key is not a plain word")
		return
	}
	value := c.node(v, depth+1)
	if value.kind == nullNode && value.text == "" {
		value.pos = at
	}
	m.entries = append(m.entries, entry{key: k.Value, pos: at, value: value})
}

// scalarKind says what YAML's core schema makes of a scalar. Times are strings
// here, and only plain decimal digits are numbers.
func scalarKind(n *yaml.Node) nodeKind {
	if n.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) != 0 {
		return stringNode
	}
	switch n.Tag {
	case "!!null":
		return nullNode
	case "!!str", "!!timestamp":
		return stringNode
	}
	if plainDecimal(n.Value) {
		return intNode
	}
	return otherNode
}

// plainDecimal reports whether s is decimal digits without a leading zero. YAML
// also reads signs, underscores, octal and hex as numbers; a policy must not
// depend on that.
func plainDecimal(s string) bool {
	if s == "" || len(s) > 1 && s[0] == '0' {
		return false
	}
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return true
}
