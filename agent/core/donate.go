package core

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/policy/envelope"
)

// donate opens the maps that the agent may have, in the order of the wire. A ring must
// be opened for writing to be read, because its reader keeps its place in it; nothing
// else can be done with that descriptor.
func (c *Core) donate() error {
	var d proto.Descriptors
	names := []string{"denied_events", "allowed_events", "signals", "counts", "ring_state", "faults", "bindings", "state"}
	for i, place := range d.Places() {
		m, err := ebpf.LoadPinnedMap(c.pins.maps(names[i]), &ebpf.LoadPinOptions{ReadOnly: c.objects.Maps[names[i]].Type() != ebpf.RingBuf})
		if err == nil {
			*place, err = duplicate(m.FD(), names[i])
			m.Close()
		}
		if err != nil {
			d.Close()
			return fmt.Errorf("open map %s for the agent: %w", names[i], err)
		}
	}
	c.donated = &d
	return nil
}

func duplicate(fd int, name string) (*os.File, error) {
	copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(copied), name), nil
}

// hand copies the descriptors for one peer. The caller closes the copies; the
// originals may end with the core while they are being sent.
func (c *Core) hand() (files []*os.File, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.donated.Files() {
		copied, err := duplicate(int(f.Fd()), f.Name())
		if err != nil {
			proto.CloseFiles(files)
			return nil, fmt.Errorf("copy descriptor of %s: %w", f.Name(), err)
		}
		files = append(files, copied)
	}
	return files, nil
}

// donation looks for a way to write the maps that are handed out: the kernel lets
// whoever pins a map, which takes no right to write it, open it again for writing.
func (t *trial) donation() error {
	all, err := mountsOf("/proc/self/mountinfo", "bpf")
	for _, m := range all {
		var stat unix.Stat_t
		if unix.Lstat(m.point, &stat) == nil && stat.Mode&0o022 != 0 {
			t.limits = append(t.limits, fmt.Sprintf("others than root may write to the BPF file system %s: a process of the agent's user could make its maps writable there", m.point))
		}
	}
	return err
}

// imageOf returns the image in force, or the one in shadow, in a file that nobody can
// change. The caller closes it.
func (c *Core) imageOf(shadow bool) ([]*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	g := c.active
	if shadow {
		g = c.shadow
	}
	if g == nil {
		return nil, proto.Refuse("apply a policy", "no policy is in %s", map[bool]string{false: "force", true: "shadow"}[shadow])
	}
	fd, err := unix.MemfdCreate("image", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make image file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "image")
	if _, err = f.Write(g.bytes); err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("make image file: %w", err)
	}
	return []*os.File{f}, nil
}

// readImage takes the bytes of a received image once, so that what is verified is
// what is used, whatever its sender does to the file.
func readImage(f *os.File) ([]byte, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &stat); err != nil {
		return nil, fmt.Errorf("read image: %w", err)
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, proto.Refuse("send a memfd", "read image: the descriptor is not a regular file")
	}
	// Who made a file system may keep its readers waiting; memory answers.
	if _, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0); err != nil {
		return nil, proto.Refuse("send a memfd", "read image: the descriptor is not of a file in memory")
	}
	if stat.Size > envelope.MaxSize {
		return nil, proto.Refuse("", "read image: %d bytes, at most %d", stat.Size, envelope.MaxSize)
	}
	b := make([]byte, stat.Size)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) { // it may be shorter by now
		return nil, fmt.Errorf("read image: %w", err)
	}
	return b[:n], nil
}
