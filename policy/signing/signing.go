// Package signing makes signing keys and signs images with them. The trusted core
// only verifies: policy/envelope.
package signing

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/demarc/demarc/policy/envelope"
)

const privateBlock = "PRIVATE KEY"

// NewKey makes a key.
func NewKey() (ed25519.PrivateKey, error) {
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make signing key: %w", err)
	}
	return k, nil
}

// Public is the half of a key that verifies.
func Public(k ed25519.PrivateKey) ed25519.PublicKey { return k.Public().(ed25519.PublicKey) }

// FormatKey writes a key as PKCS#8 in PEM.
func FormatKey(k ed25519.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, fmt.Errorf("encode signing key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: privateBlock, Bytes: der}), nil
}

// FormatPublic writes the half that verifies as envelope.ParseKey reads it.
func FormatPublic(k ed25519.PublicKey) []byte {
	der, err := x509.MarshalPKIXPublicKey(k)
	if err != nil {
		panic(err) // never: it is a key of a known kind
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

// ParseKey reads one Ed25519 private key as PKCS#8 in PEM. Its errors never show
// what the text holds.
func ParseKey(text []byte) (ed25519.PrivateKey, error) {
	block, rest := pem.Decode(text)
	if block == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("not one PEM block and nothing else")
	}
	if block.Type != privateBlock {
		return nil, fmt.Errorf("a %.40q, not a %q", block.Type, privateBlock)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if ed, ok := k.(ed25519.PrivateKey); err == nil && ok {
		return ed, nil
	}
	return nil, errors.New("not an Ed25519 key in PKCS#8")
}

// Sign puts an image into an envelope with a signature of each key. The same image
// and keys give the same bytes.
func Sign(img []byte, keys ...ed25519.PrivateKey) ([]byte, error) {
	if len(keys) == 0 || len(keys) > envelope.MaxSignatures {
		return nil, fmt.Errorf("sign image: %d keys, want 1 to %d", len(keys), envelope.MaxSignatures)
	}
	type signature struct {
		KeyID string `json:"keyid"`
		Sig   []byte `json:"sig"`
	}
	out := struct {
		Payload     []byte      `json:"payload"`
		PayloadType string      `json:"payloadType"`
		Signatures  []signature `json:"signatures"`
	}{Payload: img, PayloadType: envelope.PayloadType}
	signed := envelope.PAE(envelope.PayloadType, img)
	for _, k := range keys {
		out.Signatures = append(out.Signatures, signature{envelope.KeyID(Public(k)), ed25519.Sign(k, signed)})
	}
	b, err := json.Marshal(out)
	return append(b, '\n'), err
}
