package core

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// store keeps the image in force and the one before it on disk, for the next
// start. Each file is whole or not there: it is written aside, flushed, renamed,
// and its directory flushed.
type store struct{ dir string }

func (s store) active() string   { return filepath.Join(s.dir, "active.img") }
func (s store) previous() string { return filepath.Join(s.dir, "previous.img") }
func (s store) next() string     { return filepath.Join(s.dir, "next.img") }

// load reads an image. None is no error.
func (s store) load(file string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read stored image: %w", err)
	}
	return b, nil
}

// stage writes the image that is about to be in force. What can fail for want of
// room or of a sound disk fails here, before anything changed.
func (s store) stage(image []byte) error {
	f, err := os.OpenFile(s.next(), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("store image: %w", err)
	}
	defer f.Close()
	if _, err := f.Write(image); err != nil {
		return fmt.Errorf("store image: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("store image: %w", err)
	}
	return nil
}

// commit makes the staged image the active one, and what was active the previous
// one. A crash in between leaves the active image in two places and none lost.
func (s store) commit() error {
	err := os.Remove(s.previous())
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = os.Link(s.active(), s.previous())
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // no active one yet
		return fmt.Errorf("keep previous image: %w", err)
	}
	if err := os.Rename(s.next(), s.active()); err != nil {
		return fmt.Errorf("store image: %w", err)
	}
	return s.flush()
}

func (s store) flush() error {
	dir, err := os.Open(s.dir)
	if err == nil {
		err = dir.Sync()
		dir.Close()
	}
	if err != nil {
		return fmt.Errorf("flush %s: %w", s.dir, err)
	}
	return nil
}
