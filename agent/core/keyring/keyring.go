// Package keyring is the file of tag keys: which there are, when each is accepted,
// and which one is sent with.
//
// Whoever has a key can be anybody. Errors and values that print never show one;
// who reads a ring wipes it.
package keyring

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"time"
)

// KeySize of SipHash, in bytes.
const KeySize = 16

// Key is one key and when it holds. Times are in whole seconds, UTC.
type Key struct {
	Epoch  uint8     // 0..15: the number that a tag names its key by
	Accept time.Time // tags are good from here on; zero = always were
	Send   time.Time // what leaves is tagged with it from here on; zero = from Accept on
	Until  time.Time // tags are good up to, not at; zero = for ever
	Print  [sha256.Size]byte

	secret *[KeySize]byte // on the heap, so that no copy stays on an old stack; nil = wiped
}

// Ring is a set of keys, by epoch.
type Ring struct{ Keys []Key }

// SendFrom is when it is first sent with, if nothing later is.
func (k *Key) SendFrom() time.Time {
	if k.Send.IsZero() {
		return k.Accept
	}
	return k.Send
}

// Expired says whether its end has passed.
func (k *Key) Expired(now time.Time) bool { return !k.Until.IsZero() && !now.Before(k.Until) }

// Accepted says whether tags made with it are good.
func (k *Key) Accepted(now time.Time) bool { return !now.Before(k.Accept) && !k.Expired(now) }

// Fingerprint tells keys apart without showing them: the first 8 hex digits of
// the key's SHA-256.
func (k *Key) Fingerprint() string { return hex.EncodeToString(k.Print[:4]) }

// Secret is the key itself, until it is wiped; then nil.
func (k *Key) Secret() *[KeySize]byte { return k.secret }

// Wipe overwrites the key. Its times and its fingerprint stay.
func (k *Key) Wipe() {
	if k.secret != nil {
		clear(k.secret[:])
		k.secret = nil
	}
}

// String leaves the key out.
func (k Key) String() string { return fmt.Sprintf("epoch %d (%s)", k.Epoch, k.Fingerprint()) }

// GoString leaves it out too.
func (k Key) GoString() string { return k.String() }

// New makes a random key.
func New(epoch uint8) (Key, error) {
	secret := new([KeySize]byte)
	if _, err := rand.Read(secret[:]); err != nil {
		return Key{}, fmt.Errorf("make key: %w", err)
	}
	return Key{Epoch: epoch, secret: secret, Print: Print(secret)}, nil
}

// Wipe overwrites all keys.
func (r *Ring) Wipe() {
	for i := range r.Keys {
		r.Keys[i].Wipe()
	}
}

// Sending is the key that what leaves is tagged with: of those that hold, the one
// to be sent with since the latest moment. Nil = none.
func (r *Ring) Sending(now time.Time) *Key {
	var best *Key
	for i := range r.Keys {
		k := &r.Keys[i]
		if !k.Accepted(now) || now.Before(k.SendFrom()) {
			continue
		}
		if best == nil || k.SendFrom().After(best.SendFrom()) {
			best = k
		}
	}
	return best
}
