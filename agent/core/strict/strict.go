// Package strict reads the JSON that people write for the core: nothing unknown,
// nothing twice, nothing behind it, and every complaint says where, as file:line:col.
package strict

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Reader goes through one text. What it hands out points into nothing of it.
type Reader struct {
	file    string
	text    []byte
	decoder *json.Decoder
	at      int // where the current token or value starts
}

// New begins at the start of a text. The file is named in complaints only.
func New(file string, text []byte) *Reader {
	return &Reader{file: file, text: text, decoder: json.NewDecoder(bytes.NewReader(text))}
}

// Object reads an object, which may have these keys; value reads what belongs to one.
func (r *Reader) Object(value func(key string) error, keys ...string) error {
	if err := r.open('{', "object"); err != nil {
		return err
	}
	seen := map[string]bool{}
	for r.decoder.More() {
		token, err := r.token()
		if err != nil {
			return err
		}
		key, _ := token.(string)
		if seen[key] {
			return r.Fail("%q is given twice", key)
		}
		if seen[key] = true; !slices.Contains(keys, key) {
			return r.Fail("unknown key %q: use %s", key, strings.Join(keys, ", "))
		}
		if err := value(key); err != nil {
			return err
		}
	}
	_, err := r.token() // the closing brace
	return err
}

// List reads a list; element reads each element.
func (r *Reader) List(element func() error) error {
	if err := r.open('[', "list"); err != nil {
		return err
	}
	for r.decoder.More() {
		if err := element(); err != nil {
			return err
		}
	}
	_, err := r.token()
	return err
}

// Value reads a value of what it is put into.
func (r *Reader) Value(out any) error {
	r.advance()
	return r.located(r.decoder.Decode(out))
}

// End refuses what is left.
func (r *Reader) End() error {
	r.advance()
	if _, err := r.decoder.Token(); !errors.Is(err, io.EOF) {
		return r.Fail("something follows the object")
	}
	return nil
}

// Next is the text from the next token or value on.
func (r *Reader) Next() []byte {
	r.advance()
	return r.text[r.at:]
}

// Fail is a complaint about the current token or value.
func (r *Reader) Fail(format string, args ...any) error {
	return fmt.Errorf("%s: %s", r.Position(), fmt.Sprintf(format, args...))
}

// Position is where the current token or value starts.
func (r *Reader) Position() string {
	before := r.text[:min(r.at, len(r.text))]
	line, column := 1+bytes.Count(before, []byte("\n")), len(before)-bytes.LastIndexByte(before, '\n')
	return fmt.Sprintf("%s:%d:%d", r.file, line, column)
}

func (r *Reader) open(delimiter json.Delim, what string) error {
	token, err := r.token()
	if err == nil && token != delimiter {
		return r.Fail("a JSON %s is needed", what)
	}
	return err
}

func (r *Reader) token() (json.Token, error) {
	r.advance()
	token, err := r.decoder.Token()
	return token, r.located(err)
}

// advance moves to the first byte of the next token.
func (r *Reader) advance() {
	r.at = int(r.decoder.InputOffset())
	for r.at < len(r.text) && bytes.IndexByte([]byte(" \t\r\n:,"), r.text[r.at]) >= 0 {
		r.at++
	}
}

func (r *Reader) located(err error) error {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &syntax):
		r.at = max(r.at, int(syntax.Offset)-1)
	case errors.As(err, &kind):
		return r.Fail("a %s is not expected here", kind.Value)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return r.Fail("the file ends too early")
	}
	return fmt.Errorf("%s: %w", r.Position(), err)
}
