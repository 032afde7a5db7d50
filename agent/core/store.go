package core

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/policy/envelope"
)

// store keeps records on disk for the next start: the image in force, the one
// before it, and the floor. Each is in two files, NAME.a and NAME.b, so that one may
// be lost or spoilt. A file is whole or not there: it is written aside, flushed,
// renamed, and its directory flushed. Its bytes, numbers little-endian:
//
//	magic     8   "DEMARCST"
//	sequence  u64 never 0; of two good copies the one with the higher is newer
//	length    u64 of the content
//	checksum  32  SHA-256 of magic, sequence, length and content
//	content       what was applied, as it came; or the floor
type store struct {
	dir      string
	log      *slog.Logger
	active   uint64 // sequence of the image in force; 0 = none was read or written
	newest   uint64 // highest sequence of an image
	problems error  // of copies that could not be written; the other ones are good
}

// Names of records. Nothing that a policy says ever becomes the name of a file.
const (
	activeImage   = "active"
	previousImage = "previous"
	nextImage     = "next" // staged, and nothing yet
	floorRecord   = "floor"
)

const (
	recordMagic = "DEMARCST"
	recordFirst = 8 + 8 + 8 // bytes before the checksum
	recordStart = recordFirst + sha256.Size
)

var copies = [...]string{"a", "b"}

func (s *store) file(name, copy string) string { return filepath.Join(s.dir, name+"."+copy) }

// used says whether an image was ever put in force here.
func (s *store) used() bool {
	return !missing(s.file(activeImage, "a")) || !missing(s.file(activeImage, "b"))
}

// load reads the newer of a record's good copies, and writes the other one again if
// it is not the same. None is no error; none that is good is one.
func (s *store) load(name string) (content []byte, err error) {
	var sequences [len(copies)]uint64 // 0 = no good copy
	var newest uint64
	for i, copy := range copies {
		b, sequence, bad := readRecord(s.file(name, copy))
		switch {
		case errors.Is(bad, fs.ErrNotExist):
		case bad != nil:
			err = errors.Join(err, bad)
			s.log.Warn("a stored copy cannot be used", "problem", bad)
		case name == previousImage && sequence == s.active:
			// An interrupted commit had not brought its successor yet.
		default:
			if sequences[i] = sequence; sequence > newest {
				content, newest = b, sequence
			}
		}
	}
	if newest == 0 {
		return nil, err
	}
	first := recordHead(newest, content)
	for i, copy := range copies {
		if sequences[i] != newest {
			s.problems = errors.Join(s.problems, s.write(name, copy, first, content))
		}
	}
	if name == activeImage {
		s.active = newest
	}
	if name != floorRecord {
		s.newest = max(s.newest, newest)
	}
	return content, nil
}

// stage writes the image that is about to be in force. What can fail for want of
// room or of a sound disk fails here, before anything changed.
func (s *store) stage(image []byte) error {
	if err := s.put(nextImage, s.newest+1, image); err != nil {
		s.unstage()
		return proto.Refuse("make room for it in "+s.dir+", or mend the disk; what is in force goes on", "store image: %w", err)
	}
	return nil
}

// unstage takes away what was staged: the room is for what is in force.
func (s *store) unstage() {
	for _, copy := range copies {
		_ = os.Remove(s.file(nextImage, copy))
	}
}

// put writes both copies of a record.
func (s *store) put(name string, sequence uint64, content []byte) (err error) {
	head := recordHead(sequence, content)
	for _, copy := range copies {
		err = errors.Join(err, s.write(name, copy, head, content))
	}
	return err
}

// commit makes the staged image the active one, and what was active the previous
// one: first in one copy, then in the other. The first decides whether it came to
// pass; the second is mended at the next start.
func (s *store) commit() error {
	if err := s.advance(copies[0]); err != nil {
		return proto.Refuse("mend the disk; what was in force goes on", "store image: %w", err)
	}
	s.newest++
	s.active = s.newest
	s.problems = s.advance(copies[1])
	return nil
}

// advance moves one copy on, or back if a step fails.
func (s *store) advance(copy string) error {
	active, previous, next := s.file(activeImage, copy), s.file(previousImage, copy), s.file(nextImage, copy)
	err := os.Rename(active, previous)
	first := errors.Is(err, fs.ErrNotExist)
	if err != nil && !first {
		return err
	}
	if err = os.Rename(next, active); err == nil {
		if err = s.flush(); err == nil {
			return nil
		}
	}
	if first {
		_ = os.Remove(active)
	} else {
		_ = os.Rename(previous, active)
	}
	return err
}

// recordHead is what comes before the content of a record.
func recordHead(sequence uint64, content []byte) []byte {
	b := binary.LittleEndian.AppendUint64([]byte(recordMagic), sequence)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(content)))
	sum := sha256.New()
	sum.Write(b)
	sum.Write(content)
	return sum.Sum(b)
}

// write puts one copy of a record in the place of what is there.
func (s *store) write(name, copy string, head, content []byte) error {
	file := s.file(name, copy)
	f, err := os.OpenFile(file+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(head)
	if err == nil {
		_, err = f.Write(content)
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return err
	}
	return s.flush()
}

// readRecord reads one copy, if it is as it was written.
func readRecord(file string) (content []byte, sequence uint64, err error) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	torn := fmt.Errorf("%s is torn or was changed", file)
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if size := info.Size(); size <= recordStart || size > recordStart+envelope.MaxSize {
		return nil, 0, torn
	}
	b := make([]byte, info.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, 0, fmt.Errorf("read %s: %w", file, err)
	}
	sequence, content = binary.LittleEndian.Uint64(b[8:]), b[recordStart:]
	if sequence == 0 || string(b[:recordStart]) != string(recordHead(sequence, content)) {
		return nil, 0, torn
	}
	return content, sequence, nil
}

func (s *store) flush() error {
	dir, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
