// Package envelope is how an image is signed: the image and its signatures in one
// DSSE envelope (github.com/secure-systems-lab/dsse), over all of it at once.
package envelope

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/demarc/demarc/policy/image"
)

// PayloadType says what the payload is. It is signed with it, so that a signature
// for something else is never one for an image.
const PayloadType = "application/vnd.demarc.image"

const (
	MaxSignatures = 8                          // in one envelope
	MaxSize       = image.MaxSize/3*4 + 64<<10 // bytes of an encoded envelope
	maxSignature  = 1 << 10                    // bytes; those of other schemes may be longer than ours
	maxKeyID      = 256                        // bytes
)

// Envelope is a decoded one. Nothing in it is believed before Signer named a key.
type Envelope struct {
	Payload    []byte
	Signatures []Signature
}

// Signature is one of an envelope. KeyID is a hint for people: nobody signed it.
type Signature struct {
	KeyID string
	Bytes []byte
}

// Key verifies signatures.
type Key struct {
	ID     string // KeyID of Public
	Public ed25519.PublicKey
}

// Open takes the image out of what may be put in force: an image, or an envelope
// around one. The envelope is nil for a bare image.
func Open(b []byte) (img []byte, e *Envelope, err error) {
	if bytes.HasPrefix(b, []byte(image.Magic)) {
		return b, nil, nil
	}
	if e, err = Decode(b); err != nil {
		return nil, nil, fmt.Errorf("not an image: %w", err)
	}
	return e.Payload, e, nil
}

// Signer is the first of the keys that made one of the signatures; none is false.
// Whatever else there is besides a good signature does not matter.
func (e *Envelope) Signer(keys []Key) (Key, bool) {
	signed := PAE(PayloadType, e.Payload)
	for _, s := range e.Signatures {
		for _, k := range keys {
			if len(s.Bytes) == ed25519.SignatureSize && ed25519.Verify(k.Public, signed, s.Bytes) {
				return k, true
			}
		}
	}
	return Key{}, false
}

// PAE is what is signed: DSSE's pre-authentication encoding.
func PAE(payloadType string, payload []byte) []byte {
	return append(fmt.Appendf(nil, "DSSEv1 %d %s %d ", len(payloadType), payloadType, len(payload)), payload...)
}

// pkix is what comes before an Ed25519 key in its one DER encoding (RFC 8410).
var pkix = []byte{0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00}

const (
	publicBlock = "PUBLIC KEY"
	pemStart    = "-----BEGIN "
)

// KeyID names a key: the SHA-256 of its DER encoding, in hex.
func KeyID(k ed25519.PublicKey) string {
	sum := sha256.Sum256(append(pkix[:len(pkix):len(pkix)], k...))
	return hex.EncodeToString(sum[:])
}

// ParseKey reads one Ed25519 public key in PEM, and nothing else.
func ParseKey(text []byte) (Key, error) {
	block, rest := pem.Decode(text)
	switch {
	case block == nil || !bytes.HasPrefix(text, []byte(pemStart)) || len(bytes.TrimSpace(rest)) > 0 || len(block.Headers) > 0:
		return Key{}, errors.New("not one PEM block and nothing else")
	case block.Type != publicBlock:
		return Key{}, fmt.Errorf("a %.40q, not a %q", block.Type, publicBlock)
	case !bytes.HasPrefix(block.Bytes, pkix) || len(block.Bytes) != len(pkix)+ed25519.PublicKeySize:
		return Key{}, errors.New("not an Ed25519 key")
	}
	public := ed25519.PublicKey(block.Bytes[len(pkix):])
	return Key{ID: KeyID(public), Public: public}, nil
}
