// Package strict reads JSON in place: nothing unknown, nothing twice, nothing behind
// it, and every complaint says where, as name:line:col. It keeps no copy of the text,
// so that whoever wipes that has wiped all.
package strict

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Reader goes through one text.
type Reader struct {
	name string
	text []byte
	at   int // where the current token or value starts
	end  int // behind it
}

// New begins at the start of a text. Its name is for complaints only.
func New(name string, text []byte) *Reader { return &Reader{name: name, text: text} }

// Object reads an object, in which each member is read by its function. Those needed
// must be there.
func (r *Reader) Object(members map[string]func() error, needed ...string) error {
	seen := map[string]bool{}
	err := r.each("object", '{', '}', func() error {
		name, err := r.Plain()
		switch read := members[string(name)]; {
		case err != nil:
			return err
		case seen[string(name)]:
			return r.Fail("%q is given twice", name)
		case read == nil:
			return r.Fail("unknown key %.80q: use %s", name, strings.Join(slices.Sorted(maps.Keys(members)), ", "))
		case !r.take(':'):
			return r.Fail("a colon is needed here")
		default:
			seen[string(name)] = true
			return read()
		}
	})
	for _, name := range needed {
		if err == nil && !seen[name] {
			err = r.Fail("the object holds no %q", name)
		}
	}
	return err
}

// List reads a list; element reads each element.
func (r *Reader) List(element func() error) error { return r.each("list", '[', ']', element) }

func (r *Reader) each(what string, open, end byte, element func() error) error {
	if !r.take(open) {
		return r.Fail("a JSON %s is needed", what)
	}
	for first := true; !r.take(end); first = false {
		if !first && !r.take(',') {
			return r.Fail("a comma or the end of the %s is needed here", what)
		}
		if err := element(); err != nil {
			return err
		}
	}
	return nil
}

// Raw is the next string, number or word as it stands in the text.
func (r *Reader) Raw() ([]byte, error) {
	r.Next()
	rest, n := r.text[r.at:], 1
	if bytes.HasPrefix(rest, []byte(`"`)) {
		for escaped := true; escaped; n++ {
			end := bytes.IndexByte(rest[n:], '"')
			if end < 0 {
				return nil, r.Fail("the string does not end")
			}
			n += end
			escaped = (n-len(bytes.TrimRight(rest[:n], `\`)))%2 != 0
		}
	} else if n = bytes.IndexAny(rest, "{}[],: \t\r\n"); n < 0 {
		n = len(rest)
	}
	if n == 0 {
		return nil, r.Fail("a plain value is needed here")
	}
	r.end = r.at + n
	return rest[:n], nil
}

// Plain is the next string, which must be of printable ASCII without escapes: it is
// what stands in the text.
func (r *Reader) Plain() ([]byte, error) {
	if r.Next() != '"' {
		return nil, r.Fail("a string is needed here")
	}
	raw, err := r.Raw()
	if err != nil {
		return nil, err
	}
	text := raw[1 : len(raw)-1]
	for _, c := range text {
		if c < ' ' || c > '~' || c == '\\' {
			return nil, r.Fail("character %#x is not used here", c)
		}
	}
	return text, nil
}

// Value reads a plain value of what it is put into.
func (r *Reader) Value(out any) error {
	raw, err := r.Raw()
	if err != nil {
		return err
	}
	var kind *json.UnmarshalTypeError
	if err := json.Unmarshal(raw, out); errors.As(err, &kind) {
		return r.Fail("a %s is not expected here", kind.Value)
	} else if err != nil {
		return r.Fail("this is no JSON value: %v", err)
	}
	return nil
}

// End refuses what is left.
func (r *Reader) End() error {
	if r.Next(); r.at < len(r.text) {
		return r.Fail("something follows the object")
	}
	return nil
}

// Next is the first byte of the next token or value; 0 = there is none.
func (r *Reader) Next() byte {
	for r.at = r.end; r.at < len(r.text) && bytes.IndexByte([]byte(" \t\r\n"), r.text[r.at]) >= 0; {
		r.at++
	}
	if r.end = r.at; r.at < len(r.text) {
		return r.text[r.at]
	}
	return 0
}

// take passes a byte if it is next.
func (r *Reader) take(c byte) bool {
	found := r.Next() == c
	if found {
		r.end++
	}
	return found
}

// Fail is a complaint about the current token or value.
func (r *Reader) Fail(format string, args ...any) error {
	if r.at == len(r.text) {
		format, args = "the file ends too early", nil
	}
	before := r.text[:r.at]
	line, column := 1+bytes.Count(before, []byte("\n")), len(before)-bytes.LastIndexByte(before, '\n')
	return fmt.Errorf("%s:%d:%d: %s", r.name, line, column, fmt.Sprintf(format, args...))
}
