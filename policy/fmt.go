package policy

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/goccy/go-yaml/token"
)

// Width of the lines that Format writes, in characters. Only values that cannot
// be broken, and comments, go beyond.
const formatWidth = 140

// Format writes a policy canonically: two spaces of indent, no needless quotes, a
// collection in braces or brackets on one line if it was written so and fits, and
// over several lines otherwise; one blank line at most. Comments stay where they
// were. The meaning does not change: Format decodes what it wrote and fails if it
// is not the same. The document need not be valid as a policy, but must be YAML
// that a policy could be written in.
func Format(file string, src []byte) ([]byte, error) {
	r := &reporter{file: file, src: src}
	meaning := r.readYAML()
	if meaning == nil {
		return nil, r.err()
	}
	if !r.uniqueKeys(meaning) {
		return nil, r.err()
	}
	root, comments := r.readLayout()
	if root == nil {
		return nil, r.err()
	}
	f := &formatter{comments: comments}
	f.value(root, 0)
	f.commentsBefore(int(^uint(0)>>1), 0)
	out := append(bytes.Trim(f.out.Bytes(), "\n"), '\n')

	again := &reporter{file: file, src: out}
	same := again.readYAML()
	_, kept := again.readLayout()
	if same == nil || !sameMeaning(meaning, same) || !sameComments(comments, kept) {
		return nil, fmt.Errorf("format %s: the formatted text would not mean the same; please report this file", file)
	}
	return out, nil
}

// uniqueKeys reports keys that a mapping has twice.
func (r *reporter) uniqueKeys(n *node) bool {
	ok, seen := true, make(map[string]bool, len(n.entries))
	for _, e := range n.entries {
		if seen[e.key] {
			r.add(e.pos, "keep one of them", "key %s is given twice", quote(e.key))
			ok = false
		}
		seen[e.key] = true
		ok = r.uniqueKeys(e.value) && ok
	}
	for _, item := range n.items {
		ok = r.uniqueKeys(item) && ok
	}
	return ok
}

// formatter writes nodes, and puts each comment back at its place among them.
type formatter struct {
	out      bytes.Buffer
	comments []comment // not written yet
	last     int       // source line that was written last, for blank lines
}

// commentsBefore writes the comments above a source line, and the blank line that
// was before it.
func (f *formatter) commentsBefore(line, indent int) {
	for len(f.comments) > 0 && f.comments[0].pos.Line < line {
		c := f.comments[0]
		f.comments = f.comments[1:]
		f.blank(c.pos.Line)
		f.startLine()
		fmt.Fprintf(&f.out, "%s#%s\n", strings.Repeat(" ", indent), strings.TrimRight(c.text, " "))
		f.last = c.pos.Line
	}
	if line < int(^uint(0)>>1) {
		f.blank(line)
		f.last = max(f.last, line)
	}
}

// blank keeps one blank line where the source had some.
func (f *formatter) blank(line int) {
	if f.last > 0 && line > f.last+1 && f.out.Len() > 0 && !bytes.HasSuffix(f.out.Bytes(), []byte("\n\n")) {
		f.startLine()
		f.out.WriteByte('\n')
	}
}

func (f *formatter) startLine() {
	if n := f.out.Len(); n > 0 && f.out.Bytes()[n-1] != '\n' {
		f.out.WriteByte('\n')
	}
}

// endLine ends the line of a source line, with its comment if it had one.
func (f *formatter) endLine(line int) {
	if len(f.comments) > 0 && f.comments[0].pos.Line <= line && !f.comments[0].own {
		fmt.Fprintf(&f.out, " #%s", strings.TrimRight(f.comments[0].text, " "))
		f.comments = f.comments[1:]
	}
	f.last = max(f.last, line)
	f.startLine()
}

// commented says whether a comment lies within a node, so that it cannot become
// one line.
func (f *formatter) commented(n *node) bool {
	i, _ := slices.BinarySearchFunc(f.comments, n.pos, func(c comment, p Pos) int { return c.pos.compare(p) })
	return i < len(f.comments) && (f.comments[i].pos.Line < n.end)
}

// value writes a node that stands on lines of its own.
func (f *formatter) value(n *node, indent int) {
	switch {
	case n.kind == mapNode && len(n.entries) > 0:
		for _, e := range n.entries {
			f.commentsBefore(e.pos.Line, indent)
			f.out.WriteString(strings.Repeat(" ", indent))
			f.entry(e, indent)
		}
	case n.kind == listNode && len(n.items) > 0:
		for _, item := range n.items {
			f.commentsBefore(item.dash, indent)
			f.out.WriteString(strings.Repeat(" ", indent) + "-")
			f.item(item, indent)
		}
	default:
		f.commentsBefore(n.pos.Line, indent)
		f.out.WriteString(strings.Repeat(" ", indent) + anchored(n) + inline(n))
		f.endLine(n.end)
	}
}

// oneLine returns a node as it would stand after a key, if it may.
func (f *formatter) oneLine(n *node, used int) (string, bool) {
	if n.alias != "" || n.kind != mapNode && n.kind != listNode || len(n.entries)+len(n.items) == 0 {
		return anchored(n) + inline(n), true
	}
	if !n.flow || f.commented(n) {
		return "", false
	}
	s := anchored(n) + inline(n)
	return s, used+len([]rune(s)) <= formatWidth
}

// entry writes a key and its value; the indent is already there.
func (f *formatter) entry(e entry, indent int) {
	key := scalar(e.key) + ":"
	f.out.WriteString(key)
	f.after(e.value, e.pos.Line, indent, indent+len(key)+1)
}

// after writes a value behind its key.
func (f *formatter) after(n *node, line, indent, used int) {
	if s, ok := f.oneLine(n, used); ok {
		if s != "" {
			f.out.WriteString(" " + s)
		}
		f.endLine(max(line, n.end))
		return
	}
	f.open(n, line)
	f.value(n, indent+2)
}

// open ends the line before a value that stands on lines of its own.
func (f *formatter) open(n *node, line int) {
	if n.anchor != "" {
		f.out.WriteString(" &" + n.anchor)
	}
	if n.flow {
		// A comment behind the bracket is about what comes first within it.
		f.startLine()
		return
	}
	f.endLine(line)
}

// item writes an item behind its dash.
func (f *formatter) item(n *node, indent int) {
	if s, ok := f.oneLine(n, indent+2); ok {
		if s != "" {
			f.out.WriteString(" " + s)
		}
		f.endLine(n.end)
		return
	}
	if n.anchor != "" {
		f.open(n, n.dash)
		f.value(n, indent+2)
		return
	}
	// What comes first stands behind the dash.
	for i, e := range n.entries {
		if i > 0 {
			f.commentsBefore(e.pos.Line, indent+2)
			f.out.WriteString(strings.Repeat(" ", indent+2))
		} else {
			f.out.WriteByte(' ')
		}
		f.entry(e, indent+2)
	}
	for i, item := range n.items {
		if i > 0 {
			f.commentsBefore(item.dash, indent+2)
			f.out.WriteString(strings.Repeat(" ", indent+2) + "-")
		} else {
			f.out.WriteString(" -")
		}
		f.item(item, indent+2)
	}
}

// anchored returns what stands before a value that is named.
func anchored(n *node) string {
	if n.anchor != "" && n.alias == "" {
		return "&" + n.anchor + " "
	}
	return ""
}

// inline writes a node on one line.
func inline(n *node) string {
	if n.alias != "" {
		return "*" + n.alias
	}
	switch n.kind {
	case nullNode, intNode, otherNode:
		return n.text
	case stringNode:
		return scalar(n.text)
	case listNode:
		parts := make([]string, len(n.items))
		for i, item := range n.items {
			parts[i] = anchored(item) + inline(item)
		}
		return "[" + strings.Join(parts, ", ") + "]"
	}
	parts := make([]string, len(n.entries))
	for i, e := range n.entries {
		parts[i] = strings.TrimRight(scalar(e.key)+": "+anchored(e.value)+inline(e.value), " ")
	}
	return "{" + strings.Join(parts, ", ") + "}"
}

// scalar writes a string without quotes if it is read back as the same string
// anywhere, and in double quotes otherwise.
func scalar(s string) string {
	if plainScalar(s) {
		return s
	}
	var b strings.Builder
	b.WriteByte('"')
	for _, c := range s {
		switch {
		case c == '"' || c == '\\':
			b.WriteByte('\\')
			b.WriteRune(c)
		case c == '\n':
			b.WriteString(`\n`)
		case allowedRune(c):
			b.WriteRune(c)
		case c > 0xffff:
			fmt.Fprintf(&b, `\U%08x`, c)
		default:
			fmt.Fprintf(&b, `\u%04x`, c)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// plainScalar reports strings of safe characters that YAML reads as strings.
func plainScalar(s string) bool {
	if s == "" || s[0] == '-' || s[0] == ' ' || s[len(s)-1] == ' ' || s[0] == '.' || s == "=" {
		return false
	}
	for i := range len(s) {
		c := s[i]
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		switch {
		case letter || strings.IndexByte("-_./+@ ()=;\\", c) >= 0:
		case i > 0 && c == '*' && s[i-1] != ' ': // api@*.service
		case i > 0 && c == ':' && i+1 < len(s) && s[i+1] != ' ': // times
			if s[i-1] == ':' || strings.Trim(s[:i], "0123456789abcdefABCDEF:") == "" {
				return false // an address: unquoted it is hard to read
			}
		default:
			return false
		}
	}
	return token.New(s, s, &token.Position{}).Type == token.StringType
}

// sameMeaning compares two documents but for their layout.
func sameMeaning(a, b *node) bool {
	if a.kind != b.kind || a.text != b.text || a.anchor != b.anchor || a.alias != b.alias ||
		len(a.entries) != len(b.entries) || len(a.items) != len(b.items) {
		return false
	}
	for i := range a.entries {
		if a.entries[i].key != b.entries[i].key || !sameMeaning(a.entries[i].value, b.entries[i].value) {
			return false
		}
	}
	for i := range a.items {
		if !sameMeaning(a.items[i], b.items[i]) {
			return false
		}
	}
	return true
}

func sameComments(a, b []comment) bool {
	return slices.EqualFunc(a, b, func(x, y comment) bool {
		return strings.TrimRight(x.text, " ") == strings.TrimRight(y.text, " ")
	})
}
