package trust

import (
	"crypto/ed25519"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/policy/envelope"
	"github.com/demarc/demarc/policy/signing"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// key is a public key in PEM that is always the same.
func key(n byte) (text []byte, id string) {
	seed := make([]byte, ed25519.SeedSize)
	seed[0] = n
	public := signing.Public(ed25519.NewKeyFromSeed(seed))
	return signing.FormatPublic(public), envelope.KeyID(public)
}

func ids(keys []envelope.Key) (all []string) {
	for _, k := range keys {
		all = append(all, k.ID)
	}
	return all
}

func TestRead(t *testing.T) {
	one, oneID := key(1)
	two, twoID := key(2)
	write := func(name string, text []byte, mode os.FileMode) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			must(t, os.WriteFile(filepath.Join(dir, name), text, mode))
			must(t, os.Chmod(filepath.Join(dir, name), mode)) // past the umask
		}
	}
	tests := []struct {
		name string
		do   func(t *testing.T, dir string)
		want []string // ids
		err  string
	}{
		{"OK empty", func(*testing.T, string) {}, nil, ""},
		{"OK one", write("ops.pub", one, 0o644), []string{oneID}, ""},
		{"OK two, by name", func(t *testing.T, dir string) {
			write("b", one, 0o600)(t, dir)
			write("a", two, 0o444)(t, dir)
		}, []string{twoID, oneID}, ""},
		{"bad text", write("README", []byte("keys of ops"), 0o644), nil, "README: not one PEM block and nothing else"},
		{"bad hidden file", write(".ops.pub.swp", []byte("x"), 0o644), nil, ".ops.pub.swp: not one PEM block"},
		{"bad empty file", write("ops.pub", nil, 0o644), nil, "ops.pub: not one PEM block"},
		{"bad one of two", func(t *testing.T, dir string) {
			write("a", one, 0o644)(t, dir)
			write("b", two[:50], 0o644)(t, dir)
		}, nil, "b: not one PEM block"},
		{"bad group may write", write("ops.pub", one, 0o664), nil, "ops.pub: others than root can write it (mode 0664"},
		{"bad everyone may write", write("ops.pub", one, 0o646), nil, "ops.pub: others than root can write it (mode 0646"},
		{"bad large", write("ops.pub", append(one, make([]byte, maxFile)...), 0o644), nil, "ops.pub: larger than 4096 bytes"},
		{"bad directory in it", func(t *testing.T, dir string) { must(t, os.Mkdir(filepath.Join(dir, "more"), 0o755)) }, nil, "more: not a regular file"},
		{"bad pipe", func(t *testing.T, dir string) { must(t, unix.Mkfifo(filepath.Join(dir, "p"), 0o644)) }, nil, "p: not a regular file"},
		{"bad link", func(t *testing.T, dir string) {
			write("../ops.pub", one, 0o644)(t, dir)
			must(t, os.Symlink("../ops.pub", filepath.Join(dir, "ops.pub")))
		}, nil, "ops.pub: a symbolic link is in the path"},
		{"bad directory of others", func(t *testing.T, dir string) { must(t, os.Chmod(dir, 0o777)) }, nil, "others than root can write it (mode 0777"},
		{"bad missing", func(t *testing.T, dir string) { must(t, os.Remove(dir)) }, nil, "no such file"},
		{"bad link to it", func(t *testing.T, dir string) {
			must(t, os.Rename(dir, dir+".d"))
			must(t, os.Symlink(dir+".d", dir))
		}, nil, "a symbolic link is in the path"},
		{"bad file in its place", func(t *testing.T, dir string) {
			must(t, os.Remove(dir))
			write("", one, 0o644)(t, dir)
		}, nil, "not a directory"},
		{"bad seventeen", func(t *testing.T, dir string) {
			for i := range 17 {
				write(fmt.Sprint(i), one, 0o644)(t, dir)
			}
		}, nil, "holds more than 16 files"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "trust")
			must(t, os.Mkdir(dir, 0o755))
			tt.do(t, dir)
			keys, err := Read(dir)
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Fatalf("got %v, want %q", err, tt.err)
			}
			if diff := cmp.Diff(tt.want, ids(keys)); diff != "" {
				t.Errorf("keys (-want +got):\n%s", diff)
			}
		})
	}
}

// TestJ03TrustRace changes a key under the reader: by another honest one, by links to
// a stranger's, by files that anybody may write, by pipes. Whatever Read says, it is
// never the stranger's key.
func TestJ03TrustRace(t *testing.T) {
	outside := t.TempDir()
	dir := filepath.Join(t.TempDir(), "trust")
	must(t, os.Mkdir(dir, 0o755))
	one, oneID := key(1)
	two, twoID := key(2)
	evil, _ := key(66)
	must(t, os.WriteFile(filepath.Join(outside, "evil"), evil, 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "ops.pub"), one, 0o644))

	stop := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		next := filepath.Join(outside, "next")
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			var err error
			switch i % 5 {
			case 0:
				err = os.WriteFile(next, one, 0o644)
			case 1:
				err = os.Symlink(filepath.Join(outside, "evil"), next)
			case 2:
				err = os.WriteFile(next, two, 0o644)
			case 3:
				if err = os.WriteFile(next, evil, 0o644); err == nil {
					err = os.Chmod(next, 0o666)
				}
			case 4:
				err = unix.Mkfifo(next, 0o644)
			}
			if err == nil {
				err = os.Rename(next, filepath.Join(dir, "ops.pub"))
			}
			if err != nil {
				t.Errorf("change the key: %v", err)
				return
			}
		}
	})
	good, refused := 0, 0
	for good+refused < 100_000 {
		keys, err := Read(dir)
		switch {
		case err != nil:
			refused++
		case len(keys) == 1 && (keys[0].ID == oneID || keys[0].ID == twoID):
			good++
		default:
			t.Fatalf("read %v", ids(keys))
		}
	}
	close(stop)
	all.Wait()
	if good == 0 || refused == 0 {
		t.Errorf("the race was not run: %d times a key, %d times refused", good, refused)
	}
}
