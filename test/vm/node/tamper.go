package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/vm/talk"
)

// pins is where demarc pins what enforces.
const pins = "/sys/fs/bpf/demarc"

// Tamper does what root could do to what enforces, one after the other, and says how
// the kernel took each. What would leave nothing to tamper with comes last, and only
// if everything is asked for.
func (n *Node) Tamper(everything bool, reply *[]talk.Tampering) error {
	try := func(what string, do func() error) {
		t := talk.Tampering{What: what}
		var errno unix.Errno
		switch err := do(); {
		case errors.As(err, &errno):
			t.Errno = unix.ErrnoName(errno)
		case err != nil:
			t.Errno = err.Error()
		}
		*reply = append(*reply, t)
	}
	try("open a pinned map", func() error {
		m, err := ebpf.LoadPinnedMap(filepath.Join(pins, "maps", "keys"), nil)
		if err == nil {
			m.Close()
		}
		return err
	})
	try("write a map by its id", func() error { return writeMap("state") })
	try("detach a link by its id", detachCgroupLink)
	try("remove a pin", func() error { return os.Remove(filepath.Join(pins, "links", "egress")) })
	try("trace the core", func() error { return n.trace("/bin/demarc-core") })
	if !everything {
		return nil
	}
	try("rename the pins", func() error { return os.Rename(pins, pins+"-away") })
	try("unmount the pins", func() error { return unix.Unmount(filepath.Dir(pins), unix.MNT_DETACH) })
	return nil
}

// writeMap writes to the first map of a name what is in it already.
func writeMap(name string) error {
	for id := ebpf.MapID(0); ; {
		next, err := ebpf.MapGetNextID(id)
		if err != nil {
			return fmt.Errorf("find map %s: %w", name, err)
		}
		id = next
		if !named(id, name) {
			continue
		}
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return err
		}
		defer m.Close()
		value, err := m.LookupBytes(uint32(0))
		if err != nil {
			return err
		}
		return m.Put(uint32(0), value)
	}
}

// named asks for the name of a map as who only wants to read it.
func named(id ebpf.MapID, name string) bool {
	attr := struct{ id, next, flags uint32 }{id: uint32(id), flags: unix.BPF_F_RDONLY}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_GET_FD_BY_ID, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return false
	}
	m, err := ebpf.NewMapFromFD(int(fd))
	if err != nil {
		return false
	}
	defer m.Close()
	info, err := m.Info()
	return err == nil && info.Name == name
}

func detachCgroupLink() error {
	var links link.Iterator
	defer links.Close()
	for links.Next() {
		if d, ok := links.Link.(interface{ Detach() error }); ok {
			if info, err := links.Link.Info(); err == nil && info.Type == link.CgroupType {
				return d.Detach()
			}
		}
	}
	return links.Err()
}

// trace attaches to a daemon as a debugger does, and lets it go.
func (n *Node) trace(path string) error {
	n.mu.Lock()
	cmd := n.daemons[path]
	n.mu.Unlock()
	if cmd == nil {
		return fmt.Errorf("%s was not started", path)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.PtraceAttach(cmd.Process.Pid); err != nil {
		return err
	}
	for range 1000 {
		if unix.PtraceDetach(cmd.Process.Pid) == nil {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return errors.New("cannot let go")
}
