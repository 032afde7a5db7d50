package keyring

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
)

// maxFile bounds the file, in bytes: 16 keys need less than a third.
const maxFile = 8192

// Read reads a keyring. A file that others could have read or written is refused.
// The caller wipes the ring.
func Read(file string) (*Ring, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open keyring: %w", err)
	}
	defer f.Close()
	var stat unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &stat); err != nil {
		return nil, fmt.Errorf("check keyring: %w", err)
	}
	if stat.Mode|0o200 != unix.S_IFREG|0o600 || stat.Uid != uint32(os.Geteuid()) {
		return nil, proto.Refuse("make it a file of its user's own, with mode 0600 or 0400",
			"keyring %s has mode %#o and owner %d", file, stat.Mode&0o7777, stat.Uid)
	}
	text := make([]byte, maxFile+1)
	defer clear(text)
	switch n, err := io.ReadFull(f, text); {
	case err == nil:
		return nil, fmt.Errorf("read keyring: %s is larger than %d bytes", file, maxFile)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return Parse(file, text[:n])
	default:
		return nil, fmt.Errorf("read keyring: %w", err)
	}
}

// Create writes a keyring of one random key, whole, where there is no file yet; else
// the error is fs.ErrExist.
func Create(file string) error {
	k, err := New(1)
	if err != nil {
		return err
	}
	defer k.Wipe()
	text := append(make([]byte, 0, 128), `{"keys": [{"epoch": 1, "key": "`...) // it never grows: no copy is left behind
	text = append(hex.AppendEncode(text, k.secret[:]), "\"}]}\n"...)
	defer clear(text)
	return Write(file, text, os.Link)
}

// Write leaves a whole file or what was there, also after a crash. How it comes to its
// place is up to put.
func Write(file string, text []byte, put func(from, to string) error) error {
	dir := filepath.Dir(file)
	f, err := os.CreateTemp(dir, "."+filepath.Base(file)+"-") // mode 0600
	if err != nil {
		return fmt.Errorf("write keyring: %w", err)
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = put(f.Name(), file)
	}
	// A renamed file has left this name.
	if gone := os.Remove(f.Name()); !errors.Is(gone, fs.ErrNotExist) {
		err = errors.Join(err, gone)
	}
	var d *os.File
	if err == nil {
		d, err = os.Open(dir)
	}
	if err == nil {
		err = errors.Join(d.Sync(), d.Close())
	}
	if err != nil {
		return fmt.Errorf("write keyring: %w", err)
	}
	return nil
}
