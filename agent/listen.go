package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// socket is a listening Unix socket that removes its file when it closes, unless
// another one has taken its place.
type socket struct {
	*net.UnixListener
	path string
	file os.FileInfo
}

// listen makes a Unix socket that its owner and group may use. A socket file that
// nobody serves is replaced; one that is served, or any other file, is refused.
func listen(path string) (*socket, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make socket directory: %w", err)
	}
	if err := safePlace(path); err != nil {
		return nil, err
	}
	// Of two agents that start at once one must see the other's socket.
	lock, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open socket directory: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock socket directory: %w", err)
	}
	if err := clearStale(path); err != nil {
		return nil, err
	}
	// The file takes the mode that the socket has when it is bound, less the umask,
	// so there is no moment at which others may connect. The chmod below gives the
	// group what the umask took.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o660) }); e != nil {
			return e
		}
		return err
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	unixListener := l.(*net.UnixListener)
	unixListener.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o660); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return &socket{unixListener, path, info}, nil
}

// safePlace says whether nobody but root and the agent can put another socket where
// one is expected.
func safePlace(path string) error {
	dir := filepath.Dir(path)
	var stat unix.Stat_t
	if err := unix.Stat(dir, &stat); err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	if stat.Uid != 0 && int(stat.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d, who could put another socket in the place of %s", dir, stat.Uid, filepath.Base(path))
	}
	if stat.Mode&0o002 != 0 && stat.Mode&unix.S_ISVTX == 0 {
		return fmt.Errorf("everybody may write to %s, and put another socket in the place of %s: chmod o-w it", dir, filepath.Base(path))
	}
	return nil
}

func clearStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("look at %s: %w", path, err)
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("listen on %s: there is a file that is no socket", path)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
		return fmt.Errorf("listen on %s: another agent serves it", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove stale socket: %w", err)
	}
	return nil
}

// Close stops listening and removes the file.
func (s *socket) Close() error {
	if now, err := os.Lstat(s.path); err == nil && os.SameFile(now, s.file) {
		if err := os.Remove(s.path); err != nil {
			return errors.Join(fmt.Errorf("remove socket: %w", err), s.UnixListener.Close())
		}
	}
	return s.UnixListener.Close()
}
