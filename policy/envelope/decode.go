package envelope

import (
	"bytes"
	"encoding/base64"
	"fmt"

	"github.com/demarc/demarc/internal/strict"
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
	r := reader{strict.New("envelope", b)}
	err := r.Object(map[string]func() error{
		"payload": func() error { return r.base64(&e.Payload, image.MaxSize) },
		"payloadType": func() error {
			text, err := r.Plain()
			if err == nil && string(text) != PayloadType {
				err = r.Fail("payloadType is %.80q, not %q", text, PayloadType)
			}
			return err
		},
		"signatures": func() error {
			return r.List(func() error {
				if len(e.Signatures) == MaxSignatures {
					return r.Fail("more than %d signatures", MaxSignatures)
				}
				s, err := r.signature()
				e.Signatures = append(e.Signatures, s)
				return err
			})
		},
	}, "payload", "payloadType", "signatures")
	if err == nil && e.Signatures == nil {
		err = r.Fail("there is no signature")
	}
	if err == nil {
		err = r.End()
	}
	if err != nil {
		return nil, err
	}
	return e, nil
}

type reader struct{ *strict.Reader }

// signature has a key's name, which is only a hint, or none.
func (r reader) signature() (s Signature, err error) {
	err = r.Object(map[string]func() error{
		"keyid": func() error {
			text, err := r.Plain()
			if err == nil && len(text) > maxKeyID {
				err = r.Fail("keyid is longer than %d bytes", maxKeyID)
			}
			s.KeyID = string(text)
			return err
		},
		"sig": func() error { return r.base64(&s.Bytes, maxSignature) },
	}, "sig")
	return s, err
}

// base64 reads bytes in the standard or the URL alphabet, padded, in their one
// encoding.
func (r reader) base64(out *[]byte, most int) error {
	text, err := r.Plain()
	if err != nil {
		return err
	}
	form := base64.StdEncoding.Strict()
	if bytes.ContainsAny(text, "-_") {
		form = base64.URLEncoding.Strict()
	}
	if len(text) > form.EncodedLen(most) {
		return r.Fail("more than %d bytes", most)
	}
	*out = make([]byte, form.DecodedLen(len(text)))
	n, err := form.Decode(*out, text)
	if *out = (*out)[:n]; err != nil {
		return r.Fail("%v", err)
	}
	return nil
}
