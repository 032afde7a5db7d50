package posture_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/keyring"
	"github.com/demarc/demarc/internal/keyfile"
	"github.com/demarc/demarc/test/netlab"
)

// Keys are in the core's memory only on their way from the file to the kernel: when
// there is nothing to carry, no page of it holds one, nor half of one, in any of the
// forms that it had; not those in use, not those that have ended, not those of files that
// could not be used. (The agent and the command line never see one.)
func TestKeysLeaveMemory(t *testing.T) {
	lab := netlab.New(t)
	file := filepath.Join(lab.Dir(), "own.keyring")
	first, err := keyring.New(1)
	if err != nil {
		t.Fatal(err)
	}
	if err := keyfile.Create(file, &keyring.Ring{Keys: []keyring.Key{first}}); err != nil {
		t.Fatal(err)
	}
	ever := map[string][keyring.KeySize]byte{}
	remember := func() (prints []string) {
		t.Helper()
		ring, err := keyring.Read(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range ring.Keys {
			ever[k.Fingerprint()] = *k.Secret()
			prints = append(prints, k.Fingerprint())
		}
		return prints
	}
	remember()
	n := lab.Node(policy, netlab.NodeOptions{Keyring: file})
	await := func(what string, done func() bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); !done(); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s does not come: %s", what, n.Core.Output())
			}
		}
	}
	loaded := func() {
		t.Helper()
		for _, print := range remember() {
			await("key "+print, func() bool { return strings.Contains(n.Core.Output(), "fingerprint="+print) })
		}
	}
	const rotations = 3
	for i := range rotations {
		if _, problem, status := n.Demarc("keys", "generate", "tag", "--add", file, "--overlap", "1s"); status != 0 {
			t.Fatalf("add key: %s", problem)
		}
		loaded()
		await("the next key", func() bool { return strings.Contains(n.Core.Output(), fmt.Sprintf("sending=%d\n", 2+i)) })
	}
	// One that is replaced at once, and a file that is of no use.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	last, err := keyring.New(9)
	if err != nil {
		t.Fatal(err)
	}
	if err := keyfile.Create(file, &keyring.Ring{Keys: []keyring.Key{last}}); err != nil {
		t.Fatal(err)
	}
	loaded()
	ever["cut off"] = [keyring.KeySize]byte([]byte("\xd7\x01\xd7\x02\xd7\x03\xd7\x04\xd7\x05\xd7\x06\xd7\x07\xd7\x08"))
	cut := ever["cut off"]
	if err := os.WriteFile(file, []byte(`{"keys": [{"epoch": 1, "key": "`+hex.EncodeToString(cut[:])+`"`), 0o600); err != nil {
		t.Fatal(err)
	}
	problem := func(text string) func() bool {
		return func() bool { return strings.Contains(strings.Join(n.Status().Problems, "\n"), text) }
	}
	await("a problem with the file", problem("keyring: "))
	// Nothing to carry any more.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	await("the file is missed", problem("open keyring: "))

	if len(ever) != rotations+3 {
		t.Fatalf("%d keys", len(ever))
	}
	for daemon, pid := range map[string]int{"core": n.Core.PID(), "agent": n.Agent.PID()} {
		memory := memoryOf(t, pid)
		if daemon == "core" { // control: what it is to remember of a key is found
			for print, key := range ever {
				if print == hex.EncodeToString(last.Print[:4]) && !holds(memory, last.Print[:]) {
					t.Errorf("the fingerprint of %x is not found in %d MiB: this test shows nothing", key, size(memory)>>20)
				}
			}
		}
		for print, key := range ever {
			for form, b := range forms(key) {
				for place, region := range memory {
					if at := bytes.Index(region, b); at >= 0 {
						t.Errorf("the %s's memory holds key %s as %s in %s: % x", daemon, print, form, strings.Fields(place)[0], region[max(at-96, 0):min(at+96, len(region))])
					}
				}
			}
		}
	}
}

// forms are what a key may look like in memory, or half of it.
func forms(key [keyring.KeySize]byte) map[string][]byte {
	all := map[string][]byte{}
	for i, half := range [][]byte{key[:8], key[8:]} {
		turned := binary.BigEndian.AppendUint64(nil, binary.LittleEndian.Uint64(half))
		all[fmt.Sprintf("half %d as bytes", i)] = half
		all[fmt.Sprintf("half %d as bytes, turned", i)] = turned
		all[fmt.Sprintf("half %d in hex", i)] = []byte(hex.EncodeToString(half))
		all[fmt.Sprintf("half %d in capital hex", i)] = bytes.ToUpper([]byte(hex.EncodeToString(half)))
	}
	return all
}

func holds(memory map[string][]byte, b []byte) bool {
	for _, region := range memory {
		if bytes.Contains(region, b) {
			return true
		}
	}
	return false
}

func size(memory map[string][]byte) (n int) {
	for _, region := range memory {
		n += len(region)
	}
	return n
}

// memoryOf is what a process can have written, by mapping: heap, stacks, data. It is
// stopped meanwhile.
func memoryOf(t *testing.T, pid int) map[string][]byte {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Kill(pid, unix.SIGCONT) }()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	pages, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer pages.Close()
	all := map[string][]byte{}
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var rights string
		if n, _ := fmt.Sscanf(line, "%x-%x %s", &from, &to, &rights); n != 3 || !strings.HasPrefix(rights, "rw") {
			continue
		}
		all[line] = resident(t, f, pages, from, to)
	}
	if size(all) < 1<<20 {
		t.Fatalf("only %d bytes of process %d can be read", size(all), pid)
	}
	return all
}

// resident is what of a mapping has ever been touched: Go reserves gigabytes.
func resident(t *testing.T, memory, pages io.ReaderAt, from, to int64) (b []byte) {
	t.Helper()
	page := int64(os.Getpagesize())
	entries := make([]byte, (to-from)/page*8)
	if n, err := pages.ReadAt(entries, from/page*8); err != nil && !(errors.Is(err, io.EOF) && n == 0) {
		t.Fatalf("read pagemap: %v", err)
	}
	const present = 3 << 62 // in memory, or swapped out
	one := make([]byte, page)
	for i := int64(0); i*8 < int64(len(entries)); i++ {
		if binary.NativeEndian.Uint64(entries[i*8:])&present == 0 {
			continue
		}
		if _, err := memory.ReadAt(one, from+i*page); err != nil {
			continue // a device's, or the kernel's
		}
		b = append(b, one...)
	}
	return b
}
