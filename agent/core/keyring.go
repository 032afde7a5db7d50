package core

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
)

// keyring is the file of tag keys.
type keyring struct {
	Keys []struct {
		Epoch uint8  `json:"epoch"` // 0..15
		Key   string `json:"key"`   // 32 hex digits: the 16 bytes of a SipHash key
	} `json:"keys"`
}

// loadKeyring reads the keys and makes a first one if there is no file yet. The
// last epoch listed tags what this host sends. A file that others could have read
// or written is refused: whoever has a key can be anybody.
func loadKeyring(file string) (keys [abi.Epochs]abi.Key, tag uint64, err error) {
	if _, err := os.Lstat(file); errors.Is(err, fs.ErrNotExist) {
		if err := makeKeyring(file); err != nil {
			return keys, 0, err
		}
	}
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return keys, 0, fmt.Errorf("open keyring: %w", err)
	}
	defer f.Close()
	var stat unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &stat); err != nil {
		return keys, 0, fmt.Errorf("check keyring: %w", err)
	}
	if stat.Mode != unix.S_IFREG|0o600 || stat.Uid != uint32(os.Geteuid()) {
		return keys, 0, proto.Refuse("chown root and chmod 600 it, or remove it to have a new one made",
			"keyring %s has mode %#o and owner %d", file, stat.Mode&0o7777, stat.Uid)
	}
	text := make([]byte, 8192)
	n, err := f.Read(text)
	if err != nil {
		return keys, 0, fmt.Errorf("read keyring: %w", err)
	}
	var ring keyring
	if err := proto.Unmarshal(text[:n], &ring); err != nil {
		return keys, 0, fmt.Errorf("read keyring %s: %w", file, err)
	}
	for _, k := range ring.Keys {
		b, err := hex.DecodeString(k.Key)
		if err != nil || len(b) != 16 || k.Epoch >= abi.Epochs || keys[k.Epoch].Valid != 0 {
			return keys, 0, fmt.Errorf("read keyring %s: epoch %d is not one of 0..15 with 32 hex digits", file, k.Epoch)
		}
		keys[k.Epoch].Key = [2]uint64{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}
		keys[k.Epoch].Valid = 1
		tag = uint64(k.Epoch)
	}
	if len(ring.Keys) == 0 {
		return keys, 0, fmt.Errorf("read keyring %s: no key", file)
	}
	return keys, tag, nil
}

// makeKeyring writes one random key. A crash leaves a whole file or none.
func makeKeyring(file string) error {
	var key [16]byte
	if _, err := rand.Read(key[:]); err != nil {
		return fmt.Errorf("make key: %w", err)
	}
	text := fmt.Sprintf("{\"keys\": [{\"epoch\": 1, \"key\": \"%x\"}]}\n", key)
	aside := file + ".new"
	f, err := os.OpenFile(aside, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err == nil {
		_, err = f.WriteString(text)
		err = errors.Join(err, f.Chmod(0o600), f.Sync(), f.Close())
	}
	if err == nil {
		err = os.Rename(aside, file)
	}
	if err != nil {
		return fmt.Errorf("make keyring: %w", err)
	}
	return nil
}

// loadKeys puts the keyring into the kernel. Epochs without a key are emptied.
func loadKeys(o *objects, keys [abi.Epochs]abi.Key) error {
	for epoch := range keys {
		if err := o.Maps["keys"].Put(uint32(epoch), &keys[epoch]); err != nil {
			return fmt.Errorf("load key: %w", err)
		}
	}
	return nil
}
