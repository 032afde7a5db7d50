//go:build kernels

package vm_test

import (
	"bytes"
	"fmt"
	"os"
	"path"
	"strings"
)

// archive is a file system for a kernel to start from, in the "newc" form of cpio.
// See Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.
type archive struct {
	out  bytes.Buffer
	made map[string]bool // directories
	last int             // inode
}

const (
	directoryMode = 0o040000
	fileMode      = 0o100000
	linkMode      = 0o120000
)

// add puts a file into the archive, and the directories that it is in. What holds
// secrets is root's alone, directory and file.
func (a *archive) add(name string, perm uint32, content []byte) {
	a.directory(path.Dir(name), 0o755)
	a.entry(name, fileMode|perm, content)
}

func (a *archive) directory(name string, perm uint32) {
	if a.made == nil {
		a.made = map[string]bool{"/": true, ".": true}
	}
	if a.made[name] {
		return
	}
	a.directory(path.Dir(name), 0o755)
	a.made[name] = true
	a.entry(name, directoryMode|perm, nil)
}

// link puts a symbolic link there, unless something is.
func (a *archive) link(name, to string) {
	a.directory(path.Dir(name), 0o755)
	if !a.made[name] {
		a.made[name] = true
		a.entry(name, linkMode|0o777, []byte(to))
	}
}

func (a *archive) copy(name, from string) error {
	content, err := os.ReadFile(from)
	if err == nil {
		a.add(name, 0o755, content)
	}
	return err
}

func (a *archive) entry(name string, mode uint32, content []byte) {
	a.last++
	name = strings.TrimPrefix(name, "/") + "\x00"
	fmt.Fprintf(&a.out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.last, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
	a.out.WriteString(name)
	a.pad()
	a.out.Write(content)
	a.pad()
}

func (a *archive) pad() {
	for a.out.Len()%4 != 0 {
		a.out.WriteByte(0)
	}
}

// bytes ends the archive.
func (a *archive) bytes() []byte {
	a.entry("TRAILER!!!", 0, nil)
	return a.out.Bytes()
}
