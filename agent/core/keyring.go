package core

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"time"
	"unsafe"

	"github.com/demarc/demarc/agent/core/keyring"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
)

// keys are the tag keys in use: what was written to the kernel, and the ring it
// follows from. The keys themselves are in the file and in the kernel; here they
// are only on their way from one to the other.
type keys struct {
	ring    keyring.Ring // wiped
	entries [abi.Epochs]keyEntry
}

// keyEntry is a kernel entry without its key. The zero value is an empty one.
type keyEntry struct {
	valid        bool
	print        [32]byte
	since, until uint64 // ns of CLOCK_BOOTTIME; 0 = no bound
}

// same says whether nothing has to be written to turn one entry into the other.
func (e keyEntry) same(other keyEntry) bool {
	return e.valid == other.valid && e.print == other.print && near(e.since, other.since) && near(e.until, other.until)
}

// describe says which keys there are, and shows none.
func (k *keys) describe() (all []proto.TagKey) {
	sending := k.ring.Sending(time.Now())
	for i := range k.ring.Keys {
		key := &k.ring.Keys[i]
		all = append(all, proto.TagKey{Epoch: key.Epoch, From: key.SendFrom(), Until: key.Until, Sending: key == sending})
	}
	return all
}

// near takes two bounds for one: clocks are read one after the other, and the wall
// clock is always being disciplined a little.
func near(a, b uint64) bool {
	if a == 0 || b == 0 {
		return a == b
	}
	return time.Duration(a-b).Abs() < wallTolerance
}

// wall is the wall clock's time, to the precision that keys need.
func (c bootClock) wall() time.Time { return time.Unix(0, bootTime()+c.offset) }

// entryOf is what the kernel must hold for a key. What has expired must be gone.
func entryOf(k *keyring.Key, now time.Time, clock bootClock) keyEntry {
	if k.Expired(now) {
		return keyEntry{}
	}
	e := keyEntry{valid: true, print: k.Print}
	if !k.Accept.IsZero() {
		e.since = clock.at(k.Accept.Unix())
	}
	if !k.Until.IsZero() {
		e.until = clock.at(k.Until.Unix())
	}
	return e
}

// firstKeyring reads the keyring, and makes one with a random key if there is no
// file yet. The caller wipes it.
func firstKeyring(file string, now time.Time) (*keyring.Ring, error) {
	if missing(file) {
		if err := keyring.Create(file); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
	}
	return readKeyring(file, now)
}

// readKeyring reads a keyring that can be used: one without a key to send with
// would refuse every proven crossing. The caller wipes it.
func readKeyring(file string, now time.Time) (*keyring.Ring, error) {
	ring, err := keyring.Read(file)
	if err != nil {
		return nil, err
	}
	if ring.Sending(now) == nil {
		ring.Wipe()
		return nil, proto.Refuse("demarc keys generate tag --add "+file, "%s: no key may be sent with now", file)
	}
	return ring, nil
}

// useKeys puts the keyring into the kernel as the core starts, whatever is there.
func (c *Core) useKeys() error {
	clock := theClock()
	ring, err := firstKeyring(c.config.Keyring, clock.wall())
	if err != nil {
		return err
	}
	defer ring.Wipe()
	for epoch := range c.keys.entries {
		c.keys.entries[epoch] = keyEntry{valid: true} // unknown: equal to nothing
	}
	return c.writeKeys(ring, clock)
}

// followKeys is the upkeep of the keys at the time that a clock shows: it takes over
// what changed in the file, and moves the bounds of keys when the wall clock was stepped. A file that cannot be
// used changes nothing; the keys loaded before go on holding and ending as they
// were to.
func (c *Core) followKeys(clock bootClock) error {
	ring, err := readKeyring(c.config.Keyring, clock.wall())
	if err != nil {
		if other := c.writeKeys(&c.keys.ring, clock); other != nil {
			return other
		}
		return fmt.Errorf("%w; the keys loaded before stay in use", err)
	}
	defer ring.Wipe()
	return c.writeKeys(ring, clock)
}

// writeKeys makes the kernel hold a ring's keys and send with the right one. New
// keys come first and old ones go last, so that there is one to send with at any
// moment. The ring is the one in use then, and wiped.
func (c *Core) writeKeys(ring *keyring.Ring, clock bootClock) error {
	now := clock.wall()
	var want [abi.Epochs]keyEntry
	var from [abi.Epochs]*keyring.Key
	for i := range ring.Keys {
		k := &ring.Keys[i]
		want[k.Epoch], from[k.Epoch] = entryOf(k, now, clock), k
	}
	for epoch, entry := range want {
		if entry.valid && !entry.same(c.keys.entries[epoch]) {
			if err := c.writeKey(epoch, entry, from[epoch]); err != nil {
				return err
			}
		}
	}
	if err := c.sendWith(ring.Sending(now)); err != nil {
		return err
	}
	for epoch, entry := range want {
		if !entry.valid && c.keys.entries[epoch].valid {
			if err := c.writeKey(epoch, entry, nil); err != nil {
				return err
			}
		}
	}
	ring.Wipe()
	c.keys.ring = *ring
	return nil
}

// writeKey writes one kernel entry. A key that was wiped after it was loaded is
// still in the kernel, where only its bounds change.
func (c *Core) writeKey(epoch int, want keyEntry, k *keyring.Key) error {
	kernel := c.objects.Maps["keys"]
	// On the heap, and by its address: copies would stay where they were made.
	entry := new(abi.Key)
	defer func() { *entry = abi.Key{} }()
	if want.valid {
		if secret := k.Secret(); secret != nil {
			entry.Key = [2]uint64{binary.LittleEndian.Uint64(secret[:8]), binary.LittleEndian.Uint64(secret[8:])}
		} else if had := c.keys.entries[epoch]; !had.valid || !bytes.Equal(had.print[:], want.print[:]) {
			return fmt.Errorf("epoch %d holds again and was wiped: the file is needed", epoch)
		} else if err := kernel.Lookup(uint32(epoch), unsafe.Pointer(entry)); err != nil {
			return fmt.Errorf("read epoch %d: %w", epoch, err)
		}
		entry.Since, entry.Until, entry.Valid = want.since, want.until, 1
	}
	if err := kernel.Put(uint32(epoch), unsafe.Pointer(entry)); err != nil {
		return fmt.Errorf("load epoch %d: %w", epoch, err)
	}
	had := c.keys.entries[epoch]
	c.keys.entries[epoch] = want
	switch {
	case !want.valid && had.print == [32]byte{}: // whatever a former core left
	case !want.valid:
		c.log.Info("tag key wiped", "epoch", epoch)
		_ = c.record("core", auditKeys, nil, "key of epoch %d wiped", epoch)
	case had.print != want.print:
		c.log.Info("tag key loaded", "epoch", epoch, "fingerprint", k.Fingerprint())
		_ = c.record("core", auditKeys, nil, "key of epoch %d loaded, fingerprint %s", epoch, k.Fingerprint())
	}
	return nil
}

// sendWith changes the epoch that what leaves is tagged with. Without a key it
// stays: the kernel makes no tag once that key has ended.
func (c *Core) sendWith(k *keyring.Key) error {
	if k == nil {
		return nil
	}
	state, err := readState(c.objects)
	if err != nil || state.TagEpoch == uint64(k.Epoch) {
		return err
	}
	if err := changeState(c.objects, func(s *abi.State) { s.TagEpoch = uint64(k.Epoch) }); err != nil {
		return err
	}
	c.log.Info("tag key changes", "sending", k.Epoch)
	_ = c.record("core", auditKeys, nil, "sending with the key of epoch %d", k.Epoch)
	return nil
}
