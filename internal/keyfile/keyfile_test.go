package keyfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/core/keyring"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func at(seconds int64) time.Time { return time.Unix(seconds, 0).UTC() }

// plain is a key as tests compare it.
type plain struct {
	Epoch               uint8
	Secret              [keyring.KeySize]byte
	Accept, Send, Until time.Time
}

func plainKeys(r *keyring.Ring) (all []plain) {
	for i := range r.Keys {
		k := &r.Keys[i]
		all = append(all, plain{k.Epoch, *k.Secret(), k.Accept, k.Send, k.Until})
	}
	return all
}

func TestFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keyring")
	first, err := keyring.New(3)
	must(t, err)
	second, err := keyring.New(4)
	must(t, err)
	second.Accept, second.Send, second.Until = at(100), at(200), at(300)
	ring := &keyring.Ring{Keys: []keyring.Key{first, second}}
	must(t, Create(file, ring))
	got, err := keyring.Read(file)
	must(t, err)
	if diff := cmp.Diff(plainKeys(ring), plainKeys(got)); diff != "" {
		t.Errorf("keys (-written +read):\n%s", diff)
	}
	if *first.Secret() == *second.Secret() || first.Print == second.Print {
		t.Error("two keys are alike")
	}
	other := &keyring.Ring{Keys: []keyring.Key{second}}
	if err := Create(file, other); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a keyring was overwritten: %v", err)
	}
	must(t, Replace(file, other))
	if got, err = keyring.Read(file); err != nil || len(got.Keys) != 1 {
		t.Errorf("replaced: %v, %v", got, err)
	}
	if err := Replace(file, &keyring.Ring{}); err == nil {
		t.Error("an empty ring was written")
	}
	entries, err := os.ReadDir(filepath.Dir(file))
	must(t, err)
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o600 || len(entries) != 1 {
		t.Errorf("mode %v, %v; %d files", info.Mode(), err, len(entries))
	}
	must(t, os.Chmod(file, 0o400)) // as a service manager hands it over
	if got, err = keyring.Read(file); err != nil {
		t.Errorf("read-only: %v", err)
	}
}

func FuzzEncode(f *testing.F) {
	f.Add([]byte(`{"keys": [{"epoch": 1, "key": "` + "000102030405060708090a0b0c0d0e0f" + `", "accept": "2026-01-31T12:00:00Z", "until": "2027-01-31T12:00:00Z"}]}`))
	f.Add([]byte(`{"keys": [{"epoch": 1, "key": "` + "000102030405060708090a0b0c0d0e0f" + `"}, {"epoch": 2, "key": "` + "000102030405060708090a0b0c0d0e0f" + `", "send": "2026-01-31T12:00:00Z"}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		r, err := keyring.Parse("keys", text)
		if err != nil {
			return
		}
		again, err := keyring.Parse("keys", encode(r))
		must(t, err)
		if diff := cmp.Diff(plainKeys(r), plainKeys(again)); diff != "" {
			t.Errorf("keys (-read +written and read again):\n%s", diff)
		}
	})
}
