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

	"github.com/demarc/demarc/bpf/abi"
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
	place  string         // in the file
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
	return Key{Epoch: epoch, secret: secret, Print: sha256.Sum256(secret[:])}, nil
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

// problem is what makes a ring ambiguous or senseless; at is the key it is told
// of, nil = the ring.
type problem struct {
	at   *Key
	text string
}

// check finds the first one; "" = none.
func (r *Ring) check() problem {
	if len(r.Keys) == 0 {
		return problem{nil, "there is no key"}
	}
	epochs := map[uint8]bool{}
	sends := map[int64]*Key{}
	for i := range r.Keys {
		k := &r.Keys[i]
		from := k.SendFrom()
		switch {
		case k.Epoch >= abi.Epochs:
			return problem{k, fmt.Sprintf("epoch %d is not one of 0..%d", k.Epoch, abi.Epochs-1)}
		case epochs[k.Epoch]:
			return problem{k, fmt.Sprintf("epoch %d is given twice", k.Epoch)}
		case from.Before(k.Accept):
			return problem{k, fmt.Sprintf("epoch %d would be sent with before it is accepted", k.Epoch)}
		case !k.Until.IsZero() && !from.Before(k.Until):
			return problem{k, fmt.Sprintf("epoch %d ends before it is sent with", k.Epoch)}
		}
		if other := sends[from.Unix()]; other != nil {
			return problem{k, fmt.Sprintf("epochs %d and %d are sent with from the same moment: give each its own \"send\"", other.Epoch, k.Epoch)}
		}
		epochs[k.Epoch], sends[from.Unix()] = true, k
	}
	return problem{}
}
