// Package trust reads the directory of the keys whose signatures put an image in
// force.
package trust

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/policy/envelope"
)

const (
	maxKeys = 16
	maxFile = 4096 // bytes; a key needs 113
)

// Read reads every key of a directory. What else is in there is refused, because a
// key that is not read for its name or form would not be missed. The directory and
// its files must be root's, or the caller's own, and no link leads to them; each is
// judged by its descriptor and read once. No key is no error.
func Read(dir string) ([]envelope.Key, error) {
	d, err := open(unix.AT_FDCWD, dir, unix.O_DIRECTORY)
	if err != nil {
		return nil, fmt.Errorf("trust directory: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(maxKeys + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("trust directory: %w", err)
	}
	if len(names) > maxKeys {
		return nil, proto.Refuse("remove some", "trust directory %s holds more than %d files", dir, maxKeys)
	}
	slices.Sort(names)
	var keys []envelope.Key
	for _, name := range names {
		k, err := readKey(d, name)
		if err != nil {
			return nil, proto.Refuse("leave only Ed25519 public keys there, as demarc keys generate signing makes them",
				"trust directory %s: %s: %w", dir, name, err)
		}
		keys = append(keys, k)
	}
	return keys, nil
}

func readKey(dir *os.File, name string) (envelope.Key, error) {
	f, err := open(int(dir.Fd()), name, 0)
	if err != nil {
		return envelope.Key{}, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(text) > maxFile {
		err = fmt.Errorf("larger than %d bytes", maxFile)
	}
	if err != nil {
		return envelope.Key{}, err
	}
	return envelope.ParseKey(text)
}

// open opens a file, or with O_DIRECTORY a directory, that only root and the caller
// can change. Nobody can put a link in the way.
func open(at int, path string, kind uint64) (*os.File, error) {
	// Not blocking, because opening a pipe waits for its writer.
	how := unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | kind, Resolve: unix.RESOLVE_NO_SYMLINKS}
	fd, err := unix.Openat2(at, path, &how)
	for errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) { // EAGAIN: a rename raced with the walk
		fd, err = unix.Openat2(at, path, &how)
	}
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("a symbolic link is in the path %s", path)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	want := uint32(unix.S_IFREG)
	if kind == unix.O_DIRECTORY {
		want = unix.S_IFDIR
	}
	var stat unix.Stat_t
	err = unix.Fstat(fd, &stat)
	switch {
	case err != nil:
	case stat.Mode&unix.S_IFMT != want:
		err = errors.New("not a regular file")
	case stat.Uid != 0 && stat.Uid != uint32(os.Geteuid()), stat.Mode&0o022 != 0:
		err = fmt.Errorf("others than root can write it (mode %#o, owner %d)", stat.Mode&0o7777, stat.Uid)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
