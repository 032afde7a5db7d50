package policy

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ReadFile reads a policy from a path that others may be able to
// tamper with. The file is opened once, judged by its descriptor and read once:
// what is returned is what was judged, whatever happens to the path meanwhile. It
// refuses symbolic links anywhere in the path, anything but regular files, files
// of another owner than root or the caller, files that others may write, and
// files larger than a policy may be. Links are followed in a directory that is mounted
// read-only, and no further than there: a kubelet's volumes are made of such.
func ReadFile(path string) ([]byte, error) { return ReadFileUpTo(path, maxSource) }

// ReadFileUpTo reads another file in the same way, such as an image, with its own
// limit in bytes.
func ReadFileUpTo(path string, most int64) ([]byte, error) {
	f, err := openPlain(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", path, err)
	}
	if err := trustedFile(&st, uint32(os.Geteuid()), most); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	b, err := readUpTo(f, most) // a file may have grown since
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return b, nil
}

// ReadAll reads a policy from a stream that has no path to judge, such as
// standard input, up to the size that a policy may have.
func ReadAll(r io.Reader) ([]byte, error) { return readUpTo(r, maxSource) }

func readUpTo(r io.Reader, most int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("larger than the limit of %d bytes", most)
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

// openPlain opens a path without following any symbolic link. Kernels before 5.6,
// and sandboxes that filter openat2, refuse links in the last component only.
func openPlain(path string) (*os.File, error) {
	// Not blocking, because opening a pipe waits for its writer.
	const flags = unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOCTTY
	how := unix.OpenHow{Flags: flags, Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS}
	var fd int
	var err error
	for {
		fd, err = unix.Openat2(unix.AT_FDCWD, path, &how)
		if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
			fd, err = unix.Open(path, flags, 0)
		}
		// EAGAIN: a rename raced with the walk; nothing was opened.
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			break
		}
	}
	if errors.Is(err, unix.ELOOP) {
		if f, err := openInVolume(path); err == nil {
			return f, nil
		}
		return nil, fmt.Errorf("open %s: a symbolic link is in the path; name the file itself", path)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openInVolume opens a file that is a link in a directory which is mounted read-only, so
// that nobody can turn the link by this path, and leads to a file below that directory.
func openInVolume(path string) (*os.File, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS}
	dir, err := unix.Openat2(unix.AT_FDCWD, filepath.Dir(path), &how)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	var at unix.Statfs_t
	if err := unix.Fstatfs(dir, &at); err != nil {
		return nil, err
	}
	if at.Flags&unix.ST_RDONLY == 0 {
		return nil, unix.ELOOP
	}
	how = unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV}
	fd, err := unix.Openat2(dir, filepath.Base(path), &how)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// trustedFile judges an open file as a source of policy for the user euid.
func trustedFile(st *unix.Stat_t, euid uint32, most int64) error {
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return errors.New("not a regular file")
	case st.Uid != 0 && st.Uid != euid:
		return fmt.Errorf("owned by user %d; it must belong to root or to you", st.Uid)
	case st.Mode&0o002 != 0:
		return errors.New("writable by everyone; remove that with chmod o-w")
	case euid == 0 && st.Mode&0o020 != 0 && st.Gid != 0:
		return fmt.Errorf("writable by group %d; remove that with chmod g-w", st.Gid)
	case st.Size > most:
		return fmt.Errorf("%d bytes are larger than the limit of %d", st.Size, most)
	}
	return nil
}
