package keyring

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"github.com/demarc/demarc/bpf/abi"
)

// Parse reads a keyring:
//
//	{"keys": [{"epoch": 3, "key": "<32 hex digits>", "accept": "<RFC 3339>", "send": ..., "until": ...}]}
//
// Nothing may be unknown, twice, or behind it. Errors start with file:line:col and
// never show a key. The text is overwritten where keys stood in it.
func Parse(file string, text []byte) (_ *Ring, err error) {
	p := parser{file: file, text: text, secrets: takeSecrets(text)}
	p.decoder = json.NewDecoder(bytes.NewReader(text))
	r := &Ring{}
	defer func() {
		for _, s := range p.secrets {
			clear(s[:])
		}
		if err != nil {
			r.Wipe()
		}
	}()
	if err := p.ring(r); err != nil {
		return nil, err
	}
	if bad := r.check(); bad.text != "" {
		if bad.at == nil {
			return nil, fmt.Errorf("%s: %s", file, bad.text)
		}
		return nil, fmt.Errorf("%s:%d:%d: %s", file, bad.at.line, bad.at.column, bad.text)
	}
	slices.SortFunc(r.Keys, func(a, b Key) int { return int(a.Epoch) - int(b.Epoch) })
	return r, nil
}

// takeSecrets takes every long run of hex digits out of the text and leaves its
// number, as many digits long, so that whatever reads the text then, copies it or
// complains about it has no key in its hands. A run that is no key becomes zeros.
func takeSecrets(text []byte) [][KeySize]byte {
	const least = KeySize // half a key is a secret too
	// Room for all of them: growing would leave copies behind.
	secrets := make([][KeySize]byte, 0, len(text)/(2*KeySize))
	for i := 0; i < len(text); i++ {
		start := i
		for i < len(text) && isHex(text[i]) {
			i++
		}
		run := text[start:i]
		if len(run) < least {
			continue
		}
		number := 0
		if len(run) == 2*KeySize {
			secrets = secrets[:len(secrets)+1]
			number = len(secrets)
			_, _ = hex.Decode(secrets[number-1][:], run) // only hex digits
		}
		for at := len(run) - 1; at >= 0; at-- {
			run[at] = byte('0' + number%10)
			number /= 10
		}
	}
	return secrets
}

func isHex(b byte) bool { return '0' <= b && b <= '9' || 'a' <= b && b <= 'f' || 'A' <= b && b <= 'F' }

type parser struct {
	file    string
	text    []byte
	decoder *json.Decoder
	at      int // where the current token or value starts
	secrets [][KeySize]byte
}

func (p *parser) ring(r *Ring) error {
	if err := p.delimiter('{', "a JSON object"); err != nil {
		return err
	}
	if token, err := p.token(); err != nil {
		return err
	} else if token == json.Delim('}') {
		return p.fail(`the object holds no "keys"`)
	} else if token != "keys" {
		return p.fail("unknown key: only %q is known here", "keys")
	}
	if err := p.delimiter('[', "a list"); err != nil {
		return err
	}
	for p.decoder.More() {
		k, err := p.key()
		if err != nil {
			return err
		}
		r.Keys = append(r.Keys, k)
		if len(r.Keys) > abi.Epochs {
			return p.fail("more than %d keys", abi.Epochs)
		}
	}
	if _, err := p.token(); err != nil { // the closing bracket
		return err
	}
	if token, err := p.token(); err != nil {
		return err
	} else if token != json.Delim('}') {
		return p.fail("unknown key or the same one twice: only %q is known here", "keys")
	}
	p.advance()
	if _, err := p.decoder.Token(); !errors.Is(err, io.EOF) {
		return p.fail("something follows the object")
	}
	return nil
}

func (p *parser) key() (k Key, err error) {
	if err := p.delimiter('{', "an object"); err != nil {
		return k, err
	}
	start := p.at
	seen := map[string]bool{}
	var secret *[KeySize]byte
	for p.decoder.More() {
		token, err := p.token()
		if err != nil {
			return k, err
		}
		name, _ := token.(string)
		if seen[name] {
			return k, p.fail("%q is given twice", name)
		}
		switch name {
		case "epoch":
			k.Epoch, err = p.epoch()
		case "key":
			secret, err = p.secret()
		case "accept":
			k.Accept, err = p.time()
		case "send":
			k.Send, err = p.time()
		case "until":
			k.Until, err = p.time()
		default:
			return k, p.fail("unknown key %q: use epoch, key, accept, send, until", name)
		}
		if err != nil {
			return k, err
		}
		seen[name] = true
	}
	if _, err := p.token(); err != nil { // the closing brace
		return k, err
	}
	p.at = start
	if !seen["epoch"] || !seen["key"] {
		return k, p.fail(`a key needs "epoch" and "key"`)
	}
	line, column := p.position()
	made := newKey(k.Epoch, secret)
	made.Accept, made.Send, made.Until, made.line, made.column = k.Accept, k.Send, k.Until, line, column
	return made, nil
}

func (p *parser) epoch() (uint8, error) {
	var n uint64
	p.advance()
	if err := p.decoder.Decode(&n); err != nil || n >= abi.Epochs {
		return 0, p.fail("an epoch is a number from 0 to %d", abi.Epochs-1)
	}
	return uint8(n), nil
}

// secret takes the key that a number stands for. It is looked for in the text as
// it is: digits written as escapes are no number of ours.
func (p *parser) secret() (*[KeySize]byte, error) {
	var text string
	p.advance()
	raw := p.text[p.at:]
	if err := p.decoder.Decode(&text); err == nil && len(text) == 2*KeySize && bytes.HasPrefix(raw, []byte(`"`+text+`"`)) {
		if n, err := strconv.ParseUint(text, 10, 64); err == nil && n >= 1 && n <= uint64(len(p.secrets)) {
			secret := new([KeySize]byte)
			*secret = p.secrets[n-1]
			return secret, nil
		}
	}
	return nil, p.fail("a key is %d hex digits", 2*KeySize)
}

func (p *parser) time() (time.Time, error) {
	var text string
	p.advance()
	if err := p.decoder.Decode(&text); err == nil {
		if t, err := time.Parse(time.RFC3339, text); err == nil && t.Nanosecond() == 0 && t.Unix() > 0 {
			return t.UTC(), nil
		}
	}
	return time.Time{}, p.fail("a time is like 2026-01-31T12:00:00Z, in whole seconds")
}

func (p *parser) delimiter(want json.Delim, what string) error {
	token, err := p.token()
	if err == nil && token != want {
		return p.fail("%s is needed here", what)
	}
	return err
}

func (p *parser) token() (json.Token, error) {
	p.advance()
	token, err := p.decoder.Token()
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &syntax):
		p.at = max(p.at, int(syntax.Offset)-1)
		return nil, p.fail("%v", err)
	case err != nil:
		return nil, p.fail("the file ends too early")
	}
	return token, nil
}

// advance moves to the first byte of the next token.
func (p *parser) advance() {
	p.at = int(p.decoder.InputOffset())
	for p.at < len(p.text) && bytes.IndexByte([]byte(" \t\r\n:,"), p.text[p.at]) >= 0 {
		p.at++
	}
}

func (p *parser) fail(format string, args ...any) error {
	line, column := p.position()
	return fmt.Errorf("%s:%d:%d: %s", p.file, line, column, fmt.Sprintf(format, args...))
}

func (p *parser) position() (line, column int) {
	before := p.text[:min(p.at, len(p.text))]
	return 1 + bytes.Count(before, []byte("\n")), len(before) - bytes.LastIndexByte(before, '\n')
}

// encode writes a ring as Parse reads it, one key a line. The caller wipes it.
func (r *Ring) encode() []byte {
	// Room for all of it, so that no copy is left behind by growing.
	b := make([]byte, 0, 32+len(r.Keys)*256)
	b = append(b, "{\"keys\": ["...)
	for i := range r.Keys {
		k := &r.Keys[i]
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, "\n  {\"epoch\": "...)
		b = strconv.AppendUint(b, uint64(k.Epoch), 10)
		b = append(b, ", \"key\": \""...)
		b = hex.AppendEncode(b, k.secret[:])
		b = append(b, '"')
		for _, t := range []struct {
			name string
			at   time.Time
		}{{"accept", k.Accept}, {"send", k.Send}, {"until", k.Until}} {
			if !t.at.IsZero() {
				b = append(b, ", \""+t.name+"\": \""...)
				b = t.at.UTC().AppendFormat(b, time.RFC3339)
				b = append(b, '"')
			}
		}
		b = append(b, '}')
	}
	return append(b, "\n]}\n"...)
}
