// Package yamlfile decodes small YAML files strictly: unknown and duplicate keys,
// anchors, tags and several documents are errors, and every error says where.
package yamlfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// Bounds of a file. The parser recurses once for each level, so depth is bounded
// before it runs.
const (
	MaxSize  = 4 << 20
	maxDepth = 32
)

// Error is a problem at a place. Line and Column count from 1; 0 is the whole file.
type Error struct {
	File         string
	Line, Column int
	Msg          string
	Hint         string // how to mend it; may be empty
}

func (e *Error) Error() string {
	at := e.File
	if e.Line > 0 {
		at = fmt.Sprintf("%s:%d:%d", e.File, e.Line, e.Column)
	}
	if e.Hint == "" {
		return fmt.Sprintf("%s: %s", at, e.Msg)
	}
	return fmt.Sprintf("%s: %s\nhint: %s", at, e.Msg, e.Hint)
}

// File is a decoded file that still knows where things are.
type File struct {
	name string
	root *ast.File
}

// Decode reads src into out, a pointer to a struct with yaml tags. Values that a
// field's own UnmarshalYAML refuses come back with their place too. An empty file
// leaves out as it is.
func Decode(name string, src []byte, out any) (*File, error) {
	f := &File{name: name}
	if err := f.lex(src); err != nil {
		return nil, err
	}
	root, err := parser.ParseBytes(src, 0)
	if err != nil {
		return nil, f.wrap(err)
	}
	f.root = root
	if n := documents(root); n > 1 {
		return nil, &Error{File: name, Msg: fmt.Sprintf("%d YAML documents", n), Hint: "keep one document in the file"}
	}
	if documents(root) == 0 {
		return f, nil // the decoder would clear what out holds
	}
	if err := yaml.NewDecoder(bytes.NewReader(src), yaml.Strict()).Decode(out); err != nil && !errors.Is(err, io.EOF) {
		return nil, f.wrap(err)
	}
	return f, nil
}

// lex refuses what the parser should not see.
func (f *File) lex(src []byte) error {
	switch {
	case len(src) > MaxSize:
		return &Error{File: f.name, Msg: fmt.Sprintf("%d bytes, at most %d are read", len(src), MaxSize)}
	case !utf8.Valid(src):
		return &Error{File: f.name, Msg: "not valid UTF-8"}
	case bytes.IndexByte(src, 0) >= 0:
		return &Error{File: f.name, Msg: "contains a NUL byte"}
	case bytes.HasPrefix(src, []byte("\xef\xbb\xbf")):
		return &Error{File: f.name, Msg: "starts with a byte order mark", Hint: "save the file as UTF-8 without BOM"}
	}
	depth := 0
	indents := []int{0}
	for _, t := range lexer.Tokenize(string(src)) {
		switch t.Type {
		case token.AnchorType, token.AliasType, token.MergeKeyType:
			return f.at(t, "anchors and aliases are not allowed here", "write the value out")
		case token.TagType:
			return f.at(t, "tags are not allowed here", "remove "+t.Value)
		case token.SequenceStartType, token.MappingStartType:
			depth++
		case token.SequenceEndType, token.MappingEndType:
			depth--
		}
		column := t.Position.Column
		for len(indents) > 1 && indents[len(indents)-1] >= column {
			indents = indents[:len(indents)-1]
		}
		indents = append(indents, column)
		if depth > maxDepth || len(indents) > 4*maxDepth {
			return f.at(t, fmt.Sprintf("nested deeper than %d levels", maxDepth), "")
		}
	}
	return nil
}

func documents(root *ast.File) int {
	n := 0
	for _, d := range root.Docs {
		if _, comment := d.Body.(*ast.CommentGroupNode); d.Body != nil && !comment {
			n++
		}
	}
	return n
}

// Errorf makes an error at a YAML path such as "$.workloads[3].cgroup", or at the
// nearest place above it that the file has.
func (f *File) Errorf(path, hint, format string, args ...any) error {
	e := &Error{File: f.name, Msg: fmt.Sprintf(format, args...), Hint: hint}
	for path != "" && path != "$" {
		if p, err := yaml.PathString(path); err == nil {
			if n, err := p.FilterFile(f.root); err == nil && n != nil && n.GetToken() != nil {
				pos := start(n).Position
				e.Line, e.Column = pos.Line, pos.Column
				return e
			}
		}
		path = path[:max(strings.LastIndexAny(path, ".["), 0)]
	}
	e.Line, e.Column = 1, 1
	return e
}

// Locate returns the line and column, from 1, of a YAML path such as "$.spec.egress[0]"
// in one document, or of the nearest place above it that the document has.
func Locate(src []byte, path string) (line, column int) {
	root, err := parser.ParseBytes(src, 0)
	if err != nil {
		return 1, 1
	}
	var e *Error
	errors.As((&File{root: root}).Errorf(path, "", ""), &e)
	return e.Line, e.Column
}

// start is the first token of a node; a mapping's own token is its first colon.
func start(n ast.Node) *token.Token {
	switch n := n.(type) {
	case *ast.MappingNode:
		if !n.IsFlowStyle && len(n.Values) > 0 {
			return start(n.Values[0])
		}
	case *ast.MappingValueNode:
		return n.Key.GetToken()
	}
	return n.GetToken()
}

func (f *File) at(t *token.Token, msg, hint string) error {
	return &Error{File: f.name, Line: t.Position.Line, Column: t.Position.Column, Msg: msg, Hint: hint}
}

// wrap gives an error of the YAML library our form.
func (f *File) wrap(err error) error {
	var known yaml.Error
	if !errors.As(err, &known) {
		return &Error{File: f.name, Msg: err.Error()}
	}
	msg, hint := known.GetMessage(), ""
	var unknown *yaml.UnknownFieldError
	if errors.As(err, &unknown) {
		hint = "check the spelling; unknown keys are never ignored"
	}
	e := &Error{File: f.name, Msg: msg, Hint: hint}
	if t := known.GetToken(); t != nil && t.Position != nil {
		e.Line, e.Column = t.Position.Line, t.Position.Column
	}
	return e
}
