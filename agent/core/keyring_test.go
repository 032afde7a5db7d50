package core

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/demarc/demarc/bpf/abi"
)

func TestKeyringIsMadeOnce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keyring")
	first, tag, err := loadKeyring(file)
	must(t, err)
	if tag != 1 || first[1].Valid != 1 || first[1].Key == [2]uint64{} {
		t.Errorf("epoch %d, keys %+v", tag, first)
	}
	again, _, err := loadKeyring(file)
	must(t, err)
	if first != again {
		t.Error("the keys changed")
	}
	other, _, err := loadKeyring(filepath.Join(t.TempDir(), "keyring"))
	must(t, err)
	if first == other {
		t.Error("two hosts made the same key")
	}
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestKeyring(t *testing.T) {
	const key = "000102030405060708090a0b0c0d0e0f" // the key of SipHash's own test vectors
	write := func(text string) func(*testing.T, string) {
		return func(t *testing.T, file string) { must(t, os.WriteFile(file, []byte(text), 0o600)) }
	}
	good := `{"keys": [{"epoch": 3, "key": "` + key + `"}, {"epoch": 4, "key": "` + strings.ToUpper(key) + `"}]}`
	tests := []struct {
		name string
		make func(t *testing.T, file string)
		want string // of the error
	}{
		{"OK two keys", write(good), ""},
		{"bad mode", func(t *testing.T, file string) { write(good)(t, file); must(t, os.Chmod(file, 0o640)) }, " has mode 0640 and owner 0"},
		{"bad owner", func(t *testing.T, file string) { write(good)(t, file); must(t, os.Chown(file, 65534, 0)) }, " has mode 0600 and owner 65534"},
		{"bad symlink", func(t *testing.T, file string) {
			write(good)(t, file+"2")
			must(t, os.Symlink(file+"2", file))
		}, "open keyring: "},
		{"bad directory", func(t *testing.T, file string) { must(t, os.Mkdir(file, 0o600)) }, " has mode 0600"},
		{"bad empty", write(""), "read keyring: EOF"},
		{"bad no key", write(`{"keys": []}`), ": no key"},
		{"bad json", write(`{"keys": [`), "decode frame: unexpected EOF"},
		{"bad unknown field", write(`{"keys": [], "more": 1}`), `unknown field "more"`},
		{"bad short key", write(`{"keys": [{"epoch": 1, "key": "0011"}]}`), "epoch 1 is not one of 0..15 with 32 hex digits"},
		{"bad epoch", write(`{"keys": [{"epoch": 16, "key": "` + key + `"}]}`), "epoch 16 is not"},
		{"bad epoch twice", write(`{"keys": [{"epoch": 1, "key": "` + key + `"}, {"epoch": 1, "key": "` + key + `"}]}`), "epoch 1 is not"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "keyring")
			tt.make(t, file)
			keys, tag, err := loadKeyring(file)
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v, want %s", err, tt.want)
				}
				return
			}
			must(t, err)
			want := abi.Key{Key: [2]uint64{0x0706050403020100, 0x0f0e0d0c0b0a0908}, Valid: 1}
			if keys[3] != want || keys[4] != want || keys[0] != (abi.Key{}) || tag != 4 {
				t.Errorf("epoch %d, keys %+v", tag, keys)
			}
		})
	}
}
