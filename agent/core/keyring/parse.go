package keyring

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"regexp"
	"slices"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/internal/strict"
)

// Parse reads a keyring:
//
//	{"keys": [{"epoch": 3, "key": "<32 hex digits>", "accept": "<RFC 3339>", "send": ..., "until": ...}]}
//
// Nothing may be unknown, twice, or behind it. Errors start with file:line:col and
// never show a key. The text is overwritten, and a key is copied out of it only to where
// it is wiped.
func Parse(file string, text []byte) (_ *Ring, err error) {
	p := parser{strict.New("", text)}
	r := &Ring{}
	defer func() {
		if clear(text); err != nil {
			r.Wipe()
			err = fmt.Errorf("%s%s", file, mayBeKey.ReplaceAllString(err.Error(), "..."))
		}
	}()
	err = p.Object(map[string]func() error{"keys": func() error { return p.List(func() error { return p.key(r) }) }}, "keys")
	if err == nil && r.Keys == nil {
		err = p.Fail("there is no key")
	}
	if err == nil {
		err = p.End()
	}
	slices.SortFunc(r.Keys, func(a, b Key) int { return cmp.Compare(a.Epoch, b.Epoch) })
	return r, err
}

// mayBeKey is what no complaint shows, wherever in the file it stood: half a key is a
// secret too.
var mayBeKey = regexp.MustCompile("[0-9A-Fa-f]{16,}")

type parser struct{ *strict.Reader }

func (p parser) key(r *Ring) error {
	p.Next()
	start := *p.Reader
	k := Key{secret: new([KeySize]byte)}
	err := p.Object(map[string]func() error{
		"epoch": func() error {
			if p.Value(&k.Epoch) != nil || k.Epoch >= abi.Epochs {
				return p.Fail("an epoch is a number from 0 to %d", abi.Epochs-1)
			}
			return nil
		},
		"key": func() error {
			digits, err := p.Plain()
			if err == nil && len(digits) == 2*KeySize {
				_, err = hex.Decode(k.secret[:], digits)
			}
			if err != nil || len(digits) != 2*KeySize {
				return p.Fail("a key is %d hex digits", 2*KeySize)
			}
			return nil
		},
		"accept": func() error { return p.time(&k.Accept) },
		"send":   func() error { return p.time(&k.Send) },
		"until":  func() error { return p.time(&k.Until) },
	}, "epoch", "key")
	if err == nil {
		err = r.fits(&k)
		if err != nil {
			err = start.Fail("%v", err)
		}
	}
	k.Print = Print(k.secret)
	r.Keys = append(r.Keys, k)
	return err
}

// fits refuses what makes a ring ambiguous or a key senseless.
func (r *Ring) fits(k *Key) error {
	from := k.SendFrom()
	for i := range r.Keys {
		switch other := &r.Keys[i]; {
		case other.Epoch == k.Epoch:
			return fmt.Errorf("epoch %d is given twice", k.Epoch)
		case other.SendFrom().Equal(from):
			return fmt.Errorf("epochs %d and %d are sent with from the same moment: give each its own \"send\"", other.Epoch, k.Epoch)
		}
	}
	switch {
	case from.Before(k.Accept):
		return fmt.Errorf("epoch %d would be sent with before it is accepted", k.Epoch)
	case !k.Until.IsZero() && !from.Before(k.Until):
		return fmt.Errorf("epoch %d ends before it is sent with", k.Epoch)
	}
	return nil
}

func (p parser) time(out *time.Time) error {
	text, err := p.Plain()
	if err == nil {
		*out, err = time.Parse(time.RFC3339, string(text))
	}
	if err != nil || out.Nanosecond() != 0 || out.Unix() <= 0 {
		return p.Fail("a time is like 2026-01-31T12:00:00Z, in whole seconds")
	}
	*out = out.UTC()
	return nil
}
