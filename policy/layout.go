package policy

import (
	"errors"
	"io"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/scanner"
	"github.com/goccy/go-yaml/token"
)

// The layout of a document, comments and the ends of its values included, comes
// from a second YAML library: the fast one that Parse uses does not keep it, and
// this one is too slow, and too easily made slower, to be asked about a text that
// Parse has not bounded. Format compares what both read.

// maxExplained is the largest text whose syntax error is looked for a second time,
// to know its column. Small, because that may take the square of it.
const maxExplained = 64 << 10

// tokens splits the text into tokens.
func (r *reporter) tokens() token.Tokens {
	var s scanner.Scanner
	s.Init(string(r.src))
	var all token.Tokens
	for {
		chunk, err := s.Scan()
		if errors.Is(err, io.EOF) {
			return all
		}
		all.Add(chunk...)
	}
}

// explainSyntax returns where the text stops being YAML, and why, or nothing.
func (r *reporter) explainSyntax() (at Pos, msg string) {
	defer func() {
		if recover() != nil {
			at, msg = Pos{}, ""
		}
	}()
	tokens := r.tokens()
	if depth(tokens) > maxDepth {
		return Pos{}, ""
	}
	_, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	var syntax interface {
		GetToken() *token.Token
		GetMessage() string
	}
	if !errors.As(err, &syntax) || syntax.GetToken() == nil {
		return Pos{}, ""
	}
	return position(syntax.GetToken()), strings.TrimSpace(syntax.GetMessage())
}

// depth bounds how deep a parser of the tokens would go.
func depth(tokens token.Tokens) int {
	open, most := 0, 0
	for _, t := range tokens {
		switch t.Type {
		case token.MappingStartType, token.SequenceStartType:
			open++
		case token.MappingEndType, token.SequenceEndType:
			open--
		case token.SequenceEntryType, token.MappingKeyType, token.TagType, token.AnchorType:
			if t.Prev != nil && t.Prev.Type == t.Type && t.Prev.Position.Line == t.Position.Line {
				open++
			}
		}
		most = max(most, open)
	}
	return most
}

// comment is one comment of the source, without its '#'.
type comment struct {
	pos  Pos
	text string
	own  bool // alone on its line
}

// readLayout reads a document that readYAML accepted, with its comments.
func (r *reporter) readLayout() (root *node, comments []comment) {
	defer r.recovered(func() { root, comments = nil, nil })
	tokens := r.tokens()
	for i, t := range tokens {
		if t.Type == token.CommentType {
			own := i == 0 || tokens[i-1].Position.Line < t.Position.Line
			comments = append(comments, comment{pos: position(t), text: t.Value, own: own})
		}
	}
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		r.add(Pos{}, "", "not YAML: %v", err)
		return nil, nil
	}
	for _, d := range file.Docs {
		if d.Body != nil {
			l := layout{reporter: r, anchors: map[string]*node{}}
			return l.node(d.Body), comments
		}
	}
	r.add(Pos{}, "", "document is empty")
	return nil, nil
}

func position(t *token.Token) Pos {
	if t == nil || t.Position == nil {
		return Pos{}
	}
	return Pos{t.Position.Line, t.Position.Column}
}

// layout turns the library's tree into ours.
type layout struct {
	*reporter
	anchors map[string]*node
}

func (l *layout) node(n ast.Node) *node {
	if n == nil {
		return &node{}
	}
	t := n.GetToken()
	out := &node{pos: position(t)}
	out.end = out.pos.Line
	switch n := n.(type) {
	case *ast.NullNode:
		if t.Type == token.NullType && t.Value != "" {
			out.text = t.Value
		}
	case *ast.StringNode:
		out.kind, out.text = stringNode, n.Value
		out.end += strings.Count(strings.TrimSpace(t.Origin), "\n")
	case *ast.LiteralNode:
		out.kind, out.text, out.block = stringNode, n.Value.Value, true
		out.pos = position(n.Start)
		out.end = out.pos.Line + strings.Count(strings.TrimRight(n.Value.GetToken().Origin, "\n "), "\n") + 1
	case *ast.IntegerNode:
		out.kind, out.text = intNode, t.Value
		if !plainDecimal(t.Value) {
			out.kind = otherNode
		}
	case *ast.BoolNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		out.kind, out.text = otherNode, t.Value
	case *ast.MappingNode:
		out.kind, out.flow = mapNode, n.IsFlowStyle
		out.entries = make([]entry, 0, len(n.Values))
		for _, v := range n.Values {
			l.entry(out, v)
		}
		if n.IsFlowStyle && n.End != nil {
			out.end = max(out.end, n.End.Position.Line)
		}
		if !n.IsFlowStyle && len(out.entries) > 0 {
			out.pos = out.entries[0].pos
		}
	case *ast.MappingValueNode:
		out.kind, out.flow = mapNode, n.IsFlowStyle
		l.entry(out, n)
		if len(out.entries) > 0 {
			out.pos = out.entries[0].pos
		}
	case *ast.SequenceNode:
		out.kind, out.flow = listNode, n.IsFlowStyle
		out.items = make([]*node, 0, len(n.Values))
		for i, v := range n.Values {
			item := l.node(v)
			if item.pos == (Pos{}) {
				item.pos = out.pos
			}
			item.dash = item.pos.Line
			if i < len(n.Entries) && n.Entries[i].Start != nil {
				item.dash = n.Entries[i].Start.Position.Line
			}
			out.items = append(out.items, item)
			out.end = max(out.end, item.end)
		}
		if n.IsFlowStyle && n.End != nil {
			out.end = max(out.end, n.End.Position.Line)
		}
	case *ast.AnchorNode:
		value := l.node(n.Value)
		name := n.Name.GetToken().Value
		value.anchor = name
		if value.pos == (Pos{}) {
			value.pos = out.pos
		}
		l.anchors[name] = value
		return value
	case *ast.AliasNode:
		name := n.Value.GetToken().Value
		from := l.anchors[name]
		if from != nil {
			same := *from
			same.anchor, same.alias, same.pos, same.end = "", name, out.pos, out.end
			return &same
		}
		l.add(out.pos, "define it before its first use", "no anchor named %s", name)
	default:
		l.add(out.pos, "", "%s is not used in policies", strings.ToLower(n.Type().String()))
	}
	return out
}

func (l *layout) entry(m *node, v *ast.MappingValueNode) {
	key, ok := v.Key.(ast.Node)
	t := key.GetToken()
	e := entry{pos: position(t), value: l.node(v.Value)}
	switch k := key.(type) {
	case *ast.StringNode:
		e.key = k.Value
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.NullNode:
		e.key = t.Value
	default:
		ok = false
	}
	if !ok {
		l.add(e.pos, "write `key: value`", "key is not a plain word")
		return
	}
	if e.value.pos == (Pos{}) || e.value.kind == nullNode && e.value.text == "" {
		e.value.pos, e.value.end = e.pos, e.pos.Line
	}
	m.entries = append(m.entries, e)
	m.end = max(m.end, e.pos.Line, e.value.end)
}
