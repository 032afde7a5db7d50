package core

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
)

func newStore(dir string) *store { return &store{dir: dir, log: slog.New(slog.DiscardHandler)} }

// content is what stands for an image in these tests.
func content(version int) []byte {
	return append([]byte(fmt.Sprintf("image %d ", version)), bytes.Repeat([]byte{byte(version)}, 1500)...)
}

// put applies a version to a store.
func put(s *store, version int) error {
	if err := s.stage(content(version)); err != nil {
		return err
	}
	return s.commit()
}

// inStore is what a core that starts finds: the versions of the active and the
// previous image.
func inStore(dir string) string {
	s := newStore(dir)
	var found []string
	for _, name := range []string{activeImage, previousImage} {
		b, err := s.load(name)
		version := 0
		switch {
		case err != nil:
			found = append(found, "bad")
			continue
		case b != nil:
			if _, err := fmt.Sscanf(string(b), "image %d ", &version); err != nil || !bytes.Equal(b, content(version)) {
				found = append(found, "wrong")
				continue
			}
		}
		found = append(found, fmt.Sprint(version))
	}
	return strings.Join(found, "/")
}

// seeded is a state directory in which versions 1 and 2 were applied.
func seeded(t *testing.T) (dir string, again func() *store) {
	t.Helper()
	dir = t.TempDir()
	s := newStore(dir)
	must(t, errors.Join(put(s, 1), put(s, 2)))
	files := snapshot(t, dir)
	return dir, func() *store {
		all, err := filepath.Glob(filepath.Join(dir, "*"))
		must(t, err)
		for _, file := range all {
			must(t, os.RemoveAll(file))
		}
		for name, b := range files {
			must(t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
		}
		s := newStore(dir)
		for _, name := range []string{activeImage, previousImage} {
			_, err := s.load(name)
			must(t, err)
		}
		return s
	}
}

// snapshot reads all files of a directory.
func snapshot(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		all[e.Name()], err = os.ReadFile(filepath.Join(dir, e.Name()))
		must(t, err)
	}
	return all
}

func TestStore(t *testing.T) {
	dir := t.TempDir()
	if got := inStore(dir); got != "0/0" {
		t.Errorf("nothing stored: %s", got)
	}
	s := newStore(dir)
	for version, want := range []string{"", "1/0", "2/1", "3/2"} {
		if version == 0 {
			continue
		}
		must(t, put(s, version))
		if got := inStore(dir); got != want {
			t.Errorf("after version %d: %s, want %s", version, got, want)
		}
	}
	must(t, s.stage(content(4))) // never committed
	if got := inStore(dir); got != "3/2" {
		t.Errorf("after staging: %s", got)
	}
	var names []string
	for name := range snapshot(t, dir) {
		names = append(names, name)
	}
	slices.Sort(names)
	if diff := cmp.Diff([]string{"active.a", "active.b", "next.a", "next.b", "previous.a", "previous.b"}, names); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	for _, name := range names {
		info, err := os.Stat(filepath.Join(dir, name))
		must(t, err)
		if info.Mode() != 0o600 {
			t.Errorf("%s has mode %v", name, info.Mode())
		}
	}
}

// TestX4StateFaults fails each system call of a change in turn, once, and with all
// after it, as disks do. What is refused has not changed what a start finds, and
// what is not refused is found. (X4, I14)
func TestX4StateFaults(t *testing.T) {
	dir, again := seeded(t)
	tests := []struct {
		name          string
		start         func() *store
		before, after string
	}{
		{"the first", func() *store {
			again()
			for _, name := range []string{activeImage, previousImage} {
				for _, copy := range copies {
					must(t, os.Remove(filepath.Join(dir, name+"."+copy)))
				}
			}
			return newStore(dir)
		}, "0/0", "3/0"},
		{"the third", again, "2/1", "3/2"},
	}
	for _, tt := range tests {
		for _, errno := range []unix.Errno{unix.ENOSPC, unix.EIO, unix.EROFS, unix.EDQUOT} {
			for _, forGood := range []bool{false, true} {
				refused, accepted := 0, 0
				for n, done := 1, false; !done; n++ {
					s := tt.start()
					var err error
					failed := ""
					calls := watched(t, dir, func() { err = put(s, 3) }, func(i int, call string) unix.Errno {
						if i == n || forGood && i > n {
							if failed == "" {
								failed = call
							}
							return errno
						}
						return 0
					})
					done = calls < n
					at := fmt.Sprintf("%s, %v at call %d, %s (for good: %v)", tt.name, errno, n, failed, forGood)
					got, want := inStore(dir), tt.after
					if err == nil {
						accepted++
					} else {
						refused++
						want = tt.before
						if !strings.HasPrefix(err.Error(), "store image: ") || !strings.Contains(err.Error(), errno.Error()) {
							t.Errorf("%s: said as %q", at, err)
						}
					}
					// A disk that takes the rename and then nothing, not even its undoing, has
					// taken the image.
					if got != want && !(forGood && got == tt.after && calls > 20) {
						t.Errorf("%s: apply says %v, a start finds %s", at, err, got)
					}
					if err != nil && !forGood {
						if err := put(s, 3); err != nil || inStore(dir) != tt.after {
							t.Errorf("%s: afterwards %v, %s", at, err, inStore(dir))
						}
					}
				}
				if refused < 15 || accepted < 2 {
					t.Errorf("%s, %v: only %d calls refused, %d accepted", tt.name, errno, refused, accepted)
				}
			}
		}
	}
}

// A start finds what is there when one call fails, also when nothing can be written.
func TestX4LoadFaults(t *testing.T) {
	dir, again := seeded(t)
	for n, done := 1, false; !done; n++ {
		again()
		got := ""
		calls := watched(t, dir, func() { got = inStore(dir) }, func(i int, _ string) unix.Errno {
			if i == n {
				return unix.EIO
			}
			return 0
		})
		if done = calls < n; got != "2/1" {
			t.Errorf("call %d fails: a start finds %s", n, got)
		}
	}
	again()
	spoilt := filepath.Join(dir, "active.a")
	must(t, os.WriteFile(spoilt, []byte("spoilt"), 0o600))
	got := ""
	watched(t, dir, func() { got = inStore(dir) }, func(_ int, call string) unix.Errno {
		if call == "write" || call == "rename" {
			return unix.EROFS
		}
		return 0
	})
	if got != "2/1" {
		t.Errorf("one copy spoilt on a read-only disk: a start finds %s", got)
	}
}

// TestI13PowerCut cuts the power before each system call of two changes: all that
// was not flushed is lost. What was acknowledged is there, and nothing is torn.
func TestI13PowerCut(t *testing.T) {
	top := t.TempDir()
	disk, cut := filepath.Join(top, "disk"), filepath.Join(top, "cut")
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %q: %v\n%s", name, args, err, out)
		}
	}
	must(t, os.WriteFile(disk, nil, 0o600))
	must(t, os.Truncate(disk, 4<<20))
	run("/sbin/mkfs.ext4", "-q", disk)
	live, after := filepath.Join(top, "live"), filepath.Join(top, "after")
	must(t, errors.Join(os.Mkdir(live, 0o700), os.Mkdir(after, 0o700)))
	run("mount", "-o", "loop,commit=300", disk, live)
	t.Cleanup(func() { must(t, unix.Unmount(live, 0)) })
	dir := filepath.Join(live, "state")
	must(t, os.Mkdir(dir, 0o700))
	s := newStore(dir)
	must(t, errors.Join(put(s, 1), put(s, 2)))
	unix.Sync()

	var told atomic.Int64 // by another goroutine: the kernel alone keeps the two apart
	told.Store(2)
	look := func(at string) {
		t.Helper()
		acknowledged := told.Load()
		b, err := os.ReadFile(disk)
		must(t, err)
		must(t, os.WriteFile(cut, b, 0o600))
		run("mount", "-o", "loop", cut, after)
		defer func() { must(t, unix.Unmount(after, 0)) }()
		got := inStore(filepath.Join(after, "state"))
		if got != fmt.Sprintf("%d/%d", acknowledged, acknowledged-1) && got != fmt.Sprintf("%d/%d", acknowledged+1, acknowledged) {
			t.Errorf("power cut before %s: version %d was acknowledged, a start finds %s", at, acknowledged, got)
		}
	}
	var err error
	calls := watched(t, dir, func() {
		for version := 3; version <= 4 && err == nil; version++ {
			if err = put(s, version); err == nil {
				told.Store(int64(version))
			}
		}
	}, func(n int, call string) unix.Errno {
		look(fmt.Sprintf("call %d, %s", n, call))
		return 0
	})
	must(t, err)
	look("the end")
	if calls < 40 || told.Load() != 4 {
		t.Errorf("%d calls, version %d", calls, told.Load())
	}
}

// TestX5State flips bits in stored records and cuts them at sampled places. One
// spoilt copy costs nothing and is written again; two are an error, never a panic and
// never something else.
func TestX5State(t *testing.T) {
	dir, again := seeded(t)
	whole, err := os.ReadFile(filepath.Join(dir, "active.a"))
	must(t, err)
	type damage struct {
		name string
		b    []byte
	}
	var all []damage
	for at := 0; at < len(whole); at++ {
		if at > recordStart+16 && at%61 != 0 && at < len(whole)-4 {
			continue
		}
		flipped := bytes.Clone(whole)
		flipped[at] ^= 1 << (at % 8)
		all = append(all, damage{fmt.Sprintf("byte %d flipped", at), flipped}, damage{fmt.Sprintf("cut at %d", at), whole[:at]})
	}
	all = append(all, damage{"longer", append(bytes.Clone(whole), 0)}, damage{"zeroes", make([]byte, len(whole))})
	for _, d := range all {
		for _, copy := range copies {
			again()
			file := filepath.Join(dir, "active."+copy)
			must(t, os.WriteFile(file, d.b, 0o600))
			if got := inStore(dir); got != "2/1" {
				t.Errorf("%s in %s: a start finds %s", d.name, copy, got)
			}
			if b, err := os.ReadFile(file); err != nil || !bytes.Equal(b, whole) {
				t.Errorf("%s in %s: the copy is not written again: %v", d.name, copy, err)
			}
		}
		again()
		for _, copy := range copies {
			must(t, os.WriteFile(filepath.Join(dir, "active."+copy), d.b, 0o600))
		}
		if got := inStore(dir); !strings.HasPrefix(got, "bad/") {
			t.Errorf("%s in both: a start finds %s", d.name, got)
		}
	}
	// An old copy with a checksum of its own is no better than none beside a new one.
	again()
	must(t, os.WriteFile(filepath.Join(dir, "active.a"), append(recordHead(1, content(1)), content(1)...), 0o600))
	if got := inStore(dir); got != "2/1" {
		t.Errorf("old copy: a start finds %s", got)
	}
	// A file as large as it may be pretends to be a record.
	again()
	must(t, os.Truncate(filepath.Join(dir, "active.b"), 1<<40))
	if got := inStore(dir); got != "2/1" {
		t.Errorf("huge copy: a start finds %s", got)
	}
}

func TestFloorRecord(t *testing.T) {
	f := abi.Floor{Version: 7, Digest: [32]byte{1, 31: 9}}
	b, err := binary.Append(nil, binary.LittleEndian, f)
	must(t, err)
	if len(b) != 40 || b[0] != 7 || b[8] != 1 || b[39] != 9 {
		t.Errorf("% x", b)
	}
}
