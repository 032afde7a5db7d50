// Package keyfile writes keyrings.
package keyfile

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/demarc/demarc/agent/core/keyring"
)

// Create writes a keyring where there is no file yet; else the error is
// fs.ErrExist.
func Create(file string, r *keyring.Ring) error { return write(file, r, os.Link) }

// Replace writes a keyring in the place of what is there.
func Replace(file string, r *keyring.Ring) error { return write(file, r, os.Rename) }

// write writes what can be read again, or nothing.
func write(file string, r *keyring.Ring, put func(from, to string) error) error {
	text := encode(r)
	defer clear(text)
	again, err := keyring.Parse(file, bytes.Clone(text)) // which overwrites the copy
	if err != nil {
		return fmt.Errorf("write keyring: %w", err)
	}
	again.Wipe()
	return keyring.Write(file, text, put)
}

// encode writes a ring as it is read, one key a line. The caller wipes it.
func encode(r *keyring.Ring) []byte {
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
		b = hex.AppendEncode(b, k.Secret()[:])
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
