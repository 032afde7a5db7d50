package keyring

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/demarc/demarc/agent/core/strict"
	"github.com/demarc/demarc/bpf/abi"
)

// Parse reads a keyring:
//
//	{"keys": [{"epoch": 3, "key": "<32 hex digits>", "accept": "<RFC 3339>", "send": ..., "until": ...}]}
//
// Nothing may be unknown, twice, or behind it. Errors start with file:line:col and
// never show a key. The text is overwritten where keys stood in it.
func Parse(file string, text []byte) (_ *Ring, err error) {
	p := parser{secrets: takeSecrets(text)}
	p.Reader = strict.New(file, text)
	r := &Ring{}
	defer func() {
		clear(p.secrets)
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
		return nil, fmt.Errorf("%s: %s", bad.at.place, bad.text)
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
	*strict.Reader
	secrets [][KeySize]byte
}

func (p *parser) ring(r *Ring) error {
	given := false
	err := p.Object(func(string) error {
		given = true
		return p.List(func() error {
			k, err := p.key()
			if r.Keys = append(r.Keys, k); err == nil && len(r.Keys) > abi.Epochs {
				err = p.Fail("more than %d keys", abi.Epochs)
			}
			return err
		})
	}, "keys")
	if err != nil {
		return err
	}
	if !given {
		return p.Fail(`the object holds no "keys"`)
	}
	return p.End()
}

func (p *parser) key() (Key, error) {
	p.Next()
	k := Key{place: p.Position()}
	numbered := false
	err := p.Object(func(key string) (err error) {
		switch key {
		case "epoch":
			numbered, err = true, p.epoch(&k.Epoch)
		case "key":
			k.secret, err = p.secret()
		case "accept":
			err = p.time(&k.Accept)
		case "send":
			err = p.time(&k.Send)
		case "until":
			err = p.time(&k.Until)
		}
		return err
	}, "epoch", "key", "accept", "send", "until")
	if err == nil && (!numbered || k.secret == nil) {
		err = fmt.Errorf(`%s: a key needs "epoch" and "key"`, k.place)
	}
	if err == nil {
		k.Print = sha256.Sum256(k.secret[:])
	}
	return k, err
}

func (p *parser) epoch(out *uint8) error {
	var n uint64
	if err := p.Value(&n); err != nil || n >= abi.Epochs {
		return p.Fail("an epoch is a number from 0 to %d", abi.Epochs-1)
	}
	*out = uint8(n)
	return nil
}

// secret takes the key that a number stands for. It is looked for in the text as
// it is: digits written as escapes are no number of ours.
func (p *parser) secret() (*[KeySize]byte, error) {
	var text string
	raw := p.Next()
	if err := p.Value(&text); err == nil && len(text) == 2*KeySize && bytes.HasPrefix(raw, []byte(`"`+text+`"`)) {
		if n, err := strconv.ParseUint(text, 10, 64); err == nil && n >= 1 && n <= uint64(len(p.secrets)) {
			secret := new([KeySize]byte)
			*secret = p.secrets[n-1]
			return secret, nil
		}
	}
	return nil, p.Fail("a key is %d hex digits", 2*KeySize)
}

func (p *parser) time(out *time.Time) error {
	var text string
	if err := p.Value(&text); err == nil {
		if t, err := time.Parse(time.RFC3339, text); err == nil && t.Nanosecond() == 0 && t.Unix() > 0 {
			*out = t.UTC()
			return nil
		}
	}
	return p.Fail("a time is like 2026-01-31T12:00:00Z, in whole seconds")
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
