package fault

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Call is one system call, seen before it happens.
type Call struct {
	Index int    // among the calls since the supervisor began to count, from 1
	Name  string // "bpf", "openat", ...
	Args  [6]uint64
	Path  string // of openat and its like; "" = it has none, or it cannot be read
	BPF   *BPF   // of bpf
	pid   int
}

// BPF is what a bpf call asks for. What does not belong to its command is zero.
type BPF struct {
	Command uint32
	Type    uint32   // of a program or map
	Attach  uint32   // attach type
	Object  string   // name of a program, map or tracepoint
	Helpers []uint32 // that a program calls
	Kfuncs  bool     // a program calls functions of the kernel's
}

// commands are those of bpf(2) that the core uses.
var commands = map[uint32]string{
	unix.BPF_MAP_CREATE: "MAP_CREATE", unix.BPF_MAP_LOOKUP_ELEM: "MAP_LOOKUP", unix.BPF_MAP_UPDATE_ELEM: "MAP_UPDATE",
	unix.BPF_MAP_DELETE_ELEM: "MAP_DELETE", unix.BPF_MAP_GET_NEXT_KEY: "MAP_NEXT", unix.BPF_PROG_LOAD: "PROG_LOAD",
	unix.BPF_OBJ_PIN: "OBJ_PIN", unix.BPF_OBJ_GET: "OBJ_GET", unix.BPF_PROG_TEST_RUN: "PROG_RUN",
	unix.BPF_PROG_GET_FD_BY_ID: "PROG_BY_ID", unix.BPF_MAP_GET_FD_BY_ID: "MAP_BY_ID", unix.BPF_OBJ_GET_INFO_BY_FD: "INFO",
	unix.BPF_PROG_QUERY: "PROG_QUERY", unix.BPF_RAW_TRACEPOINT_OPEN: "TRACEPOINT_OPEN", unix.BPF_BTF_LOAD: "BTF_LOAD",
	unix.BPF_MAP_FREEZE: "MAP_FREEZE", unix.BPF_BTF_GET_FD_BY_ID: "BTF_BY_ID", unix.BPF_BTF_GET_NEXT_ID: "BTF_NEXT_ID",
	unix.BPF_MAP_LOOKUP_BATCH: "MAP_LOOKUP_BATCH", unix.BPF_MAP_UPDATE_BATCH: "MAP_UPDATE_BATCH", unix.BPF_MAP_DELETE_BATCH: "MAP_DELETE_BATCH",
	unix.BPF_LINK_CREATE: "LINK_CREATE", unix.BPF_LINK_UPDATE: "LINK_UPDATE", unix.BPF_ITER_CREATE: "ITER_CREATE", unix.BPF_PROG_BIND_MAP: "PROG_BIND_MAP",
}

// String says what is called, the same for every call of a kind.
func (c *Call) String() string {
	switch {
	case strings.HasPrefix(c.Path, "/proc/self/fdinfo/"): // numbers differ
		return c.Name + " fdinfo"
	case c.BPF == nil && c.Path != "":
		return c.Name + " " + c.Path
	case c.BPF == nil:
		return c.Name
	}
	name, known := commands[c.BPF.Command]
	if !known {
		name = fmt.Sprint(c.BPF.Command)
	}
	s := "bpf " + name
	if c.BPF.Object != "" {
		s += " " + c.BPF.Object
	}
	if c.BPF.Command == unix.BPF_LINK_CREATE {
		s += fmt.Sprintf(" type %d", c.BPF.Attach)
	}
	return s
}

// newCall reads what the arguments point to.
func newCall(index, pid int, n uint32, args [6]uint64) *Call {
	c := &Call{Index: index, Name: watched[n], Args: args, pid: pid}
	switch c.Name {
	case "bpf":
		c.BPF = readBPF(pid, uint32(args[0]), readMemory(pid, args[1], min(args[2], 128)))
	case "openat", "openat2", "unlink", "mkdir":
		c.Path = readText(pid, args[1], 256)
	case "rename", "link":
		c.Path = readText(pid, args[3], 256)
	case "fsync", "write":
		c.Path, _ = os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, int32(args[0])))
	}
	return c
}

// readBPF takes union bpf_attr apart.
func readBPF(pid int, command uint32, attr []byte) *BPF {
	attr = append(attr, make([]byte, 128-len(attr))...)
	word := func(offset int) uint32 { return binary.NativeEndian.Uint32(attr[offset:]) }
	long := func(offset int) uint64 { return binary.NativeEndian.Uint64(attr[offset:]) }
	b := &BPF{Command: command}
	switch command {
	case unix.BPF_PROG_LOAD:
		b.Type, b.Attach, b.Object = word(0), word(68), text(attr[48:64])
		b.instructions(readMemory(pid, long(8), 8*uint64(word(4))))
	case unix.BPF_MAP_CREATE:
		b.Type, b.Object = word(0), text(attr[28:44])
	case unix.BPF_LINK_CREATE:
		b.Attach = word(8)
	case unix.BPF_PROG_QUERY:
		b.Attach = word(4)
	case unix.BPF_OBJ_PIN, unix.BPF_OBJ_GET:
		b.Object = readText(pid, long(0), 256)
	case unix.BPF_RAW_TRACEPOINT_OPEN:
		b.Object = readText(pid, long(0), 64)
	}
	return b
}

// instructions notes what a program calls: BPF_JMP|BPF_CALL with a helper's number,
// or with a function's of the kernel (BPF_PSEUDO_KFUNC_CALL).
func (b *BPF) instructions(code []byte) {
	for ; len(code) >= 8; code = code[8:] {
		if code[0] != 0x85 {
			continue
		}
		switch source := code[1] >> 4; source {
		case 0:
			b.Helpers = append(b.Helpers, binary.NativeEndian.Uint32(code[4:]))
		case unix.BPF_PSEUDO_KFUNC_CALL:
			b.Kfuncs = true
		}
	}
}

func readMemory(pid int, at, size uint64) []byte {
	if at == 0 || size == 0 || size > 8<<20 {
		return nil
	}
	b := make([]byte, size)
	n, err := unix.ProcessVMReadv(pid, []unix.Iovec{{Base: &b[0], Len: size}}, []unix.RemoteIovec{{Base: uintptr(at), Len: int(size)}}, 0)
	if err != nil {
		return nil
	}
	return b[:n]
}

// readText reads up to a zero. The rest of the page may be missing.
func readText(pid int, at uint64, most int) string {
	page := uint64(os.Getpagesize())
	b := readMemory(pid, at, min(uint64(most), page-at%page))
	if bytes.IndexByte(b, 0) < 0 {
		b = append(b, readMemory(pid, at+uint64(len(b)), uint64(most-len(b)))...)
	}
	return text(b)
}

func text(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return string(b)
}
