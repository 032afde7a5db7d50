package envelope

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"

	"github.com/demarc/demarc/policy/image"
)

// Decode reads an envelope around an image. It takes less than JSON allows: no
// member that it does not know and none twice, no escapes in strings, nothing
// behind the object. It never panics, and allocates less than len(b).
func Decode(b []byte) (*Envelope, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("envelope: %d bytes, at most %d", len(b), MaxSize)
	}
	e := &Envelope{}
	p := parser{rest: b}
	err := p.object(map[string]func() error{
		"payload": func() (err error) {
			e.Payload, err = p.base64(image.MaxSize)
			return err
		},
		"payloadType": func() error {
			text, err := p.text()
			if err == nil && string(text) != PayloadType {
				err = fmt.Errorf("payloadType is %.80q, not %q", text, PayloadType)
			}
			return err
		},
		"signatures": func() (err error) {
			e.Signatures, err = p.signatures()
			return err
		},
	})
	if p.space(); err == nil && len(p.rest) > 0 {
		err = errors.New("something follows the object")
	}
	if err != nil {
		return nil, fmt.Errorf("envelope: byte %d: %w", len(b)-len(p.rest)+1, err)
	}
	return e, nil
}

// parser reads JSON off the front.
type parser struct{ rest []byte }

// object reads an object with these members, in any order. All must be there but
// the key's name, which is only a hint.
func (p *parser) object(members map[string]func() error) error {
	if !p.take('{') {
		return errors.New("an object is needed here")
	}
	for more := true; more; more = p.take(',') {
		name, err := p.text()
		if err != nil {
			return err
		}
		read := members[string(name)]
		if read == nil {
			return fmt.Errorf("member %.80q is unknown here, or given twice", name)
		}
		delete(members, string(name))
		if !p.take(':') {
			return errors.New("a colon is needed here")
		}
		if err := read(); err != nil {
			return err
		}
	}
	if !p.take('}') {
		return errors.New("the object does not end here")
	}
	delete(members, "keyid")
	for name := range members {
		return fmt.Errorf("the object holds no %q", name)
	}
	return nil
}

func (p *parser) signatures() (all []Signature, err error) {
	if !p.take('[') {
		return nil, errors.New("a list is needed here")
	}
	for more := true; more; more = p.take(',') {
		if len(all) == MaxSignatures {
			return nil, fmt.Errorf("more than %d signatures", MaxSignatures)
		}
		var s Signature
		if err := p.object(map[string]func() error{
			"keyid": func() error {
				text, err := p.text()
				if err == nil && len(text) > maxKeyID {
					err = fmt.Errorf("keyid is longer than %d bytes", maxKeyID)
				}
				s.KeyID = string(text)
				return err
			},
			"sig": func() (err error) {
				s.Bytes, err = p.base64(maxSignature)
				return err
			},
		}); err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	if !p.take(']') {
		return nil, errors.New("the list does not end here")
	}
	return all, nil
}

// base64 reads bytes in the standard or the URL alphabet, padded, in their one
// encoding.
func (p *parser) base64(most int) ([]byte, error) {
	text, err := p.text()
	if err != nil {
		return nil, err
	}
	form := base64.StdEncoding.Strict()
	if bytes.ContainsAny(text, "-_") {
		form = base64.URLEncoding.Strict()
	}
	if len(text) > form.EncodedLen(most) {
		return nil, fmt.Errorf("more than %d bytes", most)
	}
	out := make([]byte, form.DecodedLen(len(text)))
	n, err := form.Decode(out, text)
	return out[:n], err
}

// text reads a string of printable ASCII without escapes: nothing in an envelope
// needs more.
func (p *parser) text() ([]byte, error) {
	if !p.take('"') {
		return nil, errors.New("a string is needed here")
	}
	for i, c := range p.rest {
		switch {
		case c == '"':
			text := p.rest[:i]
			p.rest = p.rest[i+1:]
			return text, nil
		case c < ' ' || c > '~' || c == '\\':
			p.rest = p.rest[i:]
			return nil, fmt.Errorf("character %#x is not used here", c)
		}
	}
	return nil, errors.New("the string does not end")
}

// take skips space, and the character if it comes next.
func (p *parser) take(c byte) bool {
	p.space()
	if len(p.rest) == 0 || p.rest[0] != c {
		return false
	}
	p.rest = p.rest[1:]
	return true
}

func (p *parser) space() { p.rest = bytes.TrimLeft(p.rest, " \t\r\n") }
