package identity

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/internal/yamlfile"
)

// pollInterval is how often the inventory is looked at. A change counts once the
// file looked the same twice, so that a file being written in place is not taken
// half done.
const pollInterval = 100 * time.Millisecond

// File is the provider that follows an inventory file as it changes, whether it is
// written in place or replaced by a rename. Bad content changes nothing: the last
// good inventory stays. Make one with NewFile.
type File struct {
	path    string
	changed chan struct{}
	ready   chan struct{}

	mu      sync.Mutex
	current *Inventory
	read    time.Time
	problem error
	taken   stamp // of the content that was last read, good or bad
}

// stamp tells two states of a file apart. The change time catches a rename or a
// write that keeps size and modification time.
type stamp struct {
	inode, device  uint64
	size           int64
	modified, ctim unix.Timespec
	exists         bool
}

// NewFile makes the provider for a path.
func NewFile(path string) *File {
	return &File{path: path, changed: make(chan struct{}, 1), ready: make(chan struct{})}
}

// Load reads the file for the first time. Its error is one that the user should
// mend before anything starts.
func (f *File) Load() error {
	now := look(f.path)
	f.take(now)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.current == nil {
		return f.problem
	}
	return nil
}

// Run follows the file until ctx ends.
func (f *File) Run(ctx context.Context) error {
	close(f.ready)
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	var before stamp
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := look(f.path)
		f.mu.Lock()
		news := now != f.taken && now == before
		f.mu.Unlock()
		before = now
		if news {
			f.take(now)
		}
	}
}

// Ready is closed as soon as the file is followed.
func (f *File) Ready() <-chan struct{} { return f.ready }

// Path is where the file is.
func (f *File) Path() string { return f.path }

func (f *File) String() string { return "inventory " + f.path }

// Changed receives after every reading, good or bad. There is one receiver.
func (f *File) Changed() <-chan struct{} { return f.changed }

// Current returns the last good inventory, nil before the first, when it was read,
// and what is wrong with the file now, if anything.
func (f *File) Current() (*Inventory, time.Time, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.current, f.read, f.problem
}

// take reads the file, which looked like at.
func (f *File) take(at stamp) {
	src, err := readFile(f.path)
	var inv *Inventory
	if err == nil {
		inv, err = ParseInventory(f.path, src)
	}
	if look(f.path) != at {
		return // it changed meanwhile; the next look takes it
	}
	f.mu.Lock()
	f.taken, f.problem = at, err
	if err == nil {
		f.current, f.read = inv, time.Now()
	}
	f.mu.Unlock()
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

func look(path string) stamp {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return stamp{}
	}
	return stamp{inode: st.Ino, device: uint64(st.Dev), size: st.Size, modified: st.Mtim, ctim: st.Ctim, exists: true}
}

// readFile reads a regular file that not everybody may write. O_NONBLOCK keeps a
// named pipe in its place from stopping the agent.
func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("read inventory: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("read inventory: %w", err)
	case !info.Mode().IsRegular():
		return nil, &yamlfile.Error{File: path, Msg: "not a regular file"}
	case info.Mode().Perm()&0o002 != 0:
		return nil, &yamlfile.Error{File: path, Msg: "everybody may write this file, and it decides who is who", Hint: "chmod o-w " + path}
	}
	b, err := io.ReadAll(io.LimitReader(f, yamlfile.MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read inventory: %w", err)
	}
	return b, nil
}
