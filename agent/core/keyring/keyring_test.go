package keyring

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/core/proto"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func at(seconds int64) time.Time { return time.Unix(seconds, 0).UTC() }

// hexKey is the key of SipHash's own test vectors.
const hexKey = "000102030405060708090a0b0c0d0e0f"

var vectorKey = [KeySize]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}

// plain is a key as tests compare it.
type plain struct {
	Epoch               uint8
	Secret              [KeySize]byte
	Accept, Send, Until time.Time
}

func plainKeys(r *Ring) (all []plain) {
	for i := range r.Keys {
		k := &r.Keys[i]
		all = append(all, plain{k.Epoch, *k.Secret(), k.Accept, k.Send, k.Until})
	}
	return all
}

func TestParse(t *testing.T) {
	day := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	tests := []struct {
		name, text string
		want       []plain
	}{
		{"OK one", `{"keys": [{"epoch": 1, "key": "` + hexKey + `"}]}`, []plain{{1, vectorKey, time.Time{}, time.Time{}, time.Time{}}}},
		{"OK by epoch, upper case, other zone", `{"keys":[
			{"key": "000102030405060708090A0B0C0D0E0F", "send": "2026-01-31T14:00:00+02:00", "until": "2026-02-01T12:00:00Z", "epoch": 9},
			{"epoch": 0, "key": "ffffffffffffffffffffffffffffffff", "accept": "2026-01-30T12:00:00Z"}]}`,
			[]plain{
				{0, [KeySize]byte{255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255}, day.Add(-24 * time.Hour), time.Time{}, time.Time{}},
				{9, vectorKey, time.Time{}, day, day.Add(24 * time.Hour)},
			}},
		{"OK key that looks like a number of ours", `{"keys": [{"epoch": 1, "key": "00000000000000000000000000000002"}]}`,
			[]plain{{1, [KeySize]byte{15: 2}, time.Time{}, time.Time{}, time.Time{}}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			text := []byte(tt.text)
			r, err := Parse("keys", text)
			must(t, err)
			if diff := cmp.Diff(tt.want, plainKeys(r)); diff != "" {
				t.Errorf("keys (-want +got):\n%s", diff)
			}
			for _, secret := range []string{hexKey, strings.ToUpper(hexKey), strings.Repeat("f", 32)} {
				if strings.Contains(string(text), secret) {
					t.Errorf("the text still holds %s", secret)
				}
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	one := func(rest string) string { return `{"keys": [{"epoch": 1, "key": "` + hexKey + `"` + rest + `}]}` }
	two := func(first, second string) string {
		return `{"keys": [{"epoch": 1, "key": "` + hexKey + `"` + first + "},\n" + ` {"epoch": 2, "key": "` + hexKey + `"` + second + `}]}`
	}
	var seventeen []string
	for i := range 17 {
		seventeen = append(seventeen, fmt.Sprintf(`{"epoch": %d, "key": %q, "send": "2026-01-31T12:00:%02dZ"}`, i%16, hexKey, i))
	}
	tests := []struct{ name, text, want string }{
		{"bad empty", "", "keys:1:1: the file ends too early"},
		{"bad cut off", `{"keys": [`, "keys:1:11: the file ends too early"},
		{"bad no object", `[]`, "keys:1:1: a JSON object is needed"},
		{"bad empty object", `{}`, `keys:1:2: the object holds no "keys"`},
		{"bad no keys", `{"keys": []}`, "keys:1:12: there is no key"},
		{"bad keys is no list", `{"keys": {}}`, "keys:1:10: a JSON list is needed"},
		{"bad other member", `{"more": 1}`, `keys:1:2: unknown key "more": use keys`},
		{"bad keys twice", `{"keys": [{"epoch": 1, "key": "` + hexKey + `"}], "keys": []}`, `keys:1:69: "keys" is given twice`},
		{"bad trailing", one("") + "{}", "something follows the object"},
		{"bad syntax", `{"keys": [{"epoch": 1 "key": 1}]}`, "keys:1:23: a comma or the end of the object is needed here"},
		{"bad field", one(`, "more": 1`), `keys:1:67: unknown key "more": use accept, epoch, key, send, until`},
		{"bad case", one(`, "Until": "2026-01-31T12:00:00Z"`), `unknown key "Until"`},
		{"bad field twice", one(`, "epoch": 2`), `keys:1:67: "epoch" is given twice`},
		{"bad no epoch", `{"keys": [{"key": "` + hexKey + `"}]}`, `keys:1:53: the object holds no "epoch"`},
		{"bad no secret", `{"keys": [{"epoch": 1}]}`, `keys:1:22: the object holds no "key"`},
		{"bad epoch", `{"keys": [{"epoch": 16, "key": "` + hexKey + `"}]}`, "keys:1:21: an epoch is a number from 0 to 15"},
		{"bad negative epoch", `{"keys": [{"epoch": -1}]}`, "keys:1:21: an epoch is a number from 0 to 15"},
		{"bad epoch as text", `{"keys": [{"epoch": "1"}]}`, "an epoch is a number from 0 to 15"},
		{"bad short key", `{"keys": [{"epoch": 1, "key": "` + hexKey[:30] + `"}]}`, "keys:1:31: a key is 32 hex digits"},
		{"bad very short key", `{"keys": [{"epoch": 1, "key": "` + hexKey[:8] + `"}]}`, "keys:1:31: a key is 32 hex digits"},
		{"bad long key", `{"keys": [{"epoch": 1, "key": "` + hexKey + `00"}]}`, "keys:1:31: a key is 32 hex digits"},
		{"bad key of no hex", `{"keys": [{"epoch": 1, "key": "` + strings.Repeat("g", 32) + `"}]}`, "keys:1:31: a key is 32 hex digits"},
		{"bad signed key", `{"keys": [{"epoch": 1, "key": "+` + strings.Repeat("0", 31) + `"}]}`, "keys:1:31: a key is 32 hex digits"},
		{"bad key in escapes", `{"keys": [{"epoch": 1, "key": "` + hexKey + `"}, {"epoch": 2, "key": "` + strings.Repeat(`\u0030`, 31) + `\u0031"}]}`,
			"keys:1:88: a key is 32 hex digits"},
		{"bad key as name", `{"keys": [{"` + hexKey + `": 1}]}`, `keys:1:12: unknown key "...": use accept, epoch, key, send, until`},
		{"bad key where a number is", `{"keys": [{"epoch": ` + strings.Repeat("1", 32) + `}]}`, "keys:1:21: an epoch is a number from 0 to 15"},
		{"bad key where a time is", one(`, "until": "` + hexKey + `"`), "keys:1:76: a time is like"},
		{"bad half a key as name", `{"keys": [{"` + hexKey[:16] + `": 1}]}`, `unknown key "..."`},
		{"bad time", one(`, "send": "tomorrow"`), "keys:1:75: a time is like 2026-01-31T12:00:00Z, in whole seconds"},
		{"bad fraction", one(`, "send": "2026-01-31T12:00:00.5Z"`), "a time is like"},
		{"bad time before 1970", one(`, "send": "0001-01-01T00:00:00Z"`), "a time is like"},
		{"bad send before accept", one(`, "accept": "2026-01-31T12:00:01Z", "send": "2026-01-31T12:00:00Z"`), "keys:1:11: epoch 1 would be sent with before it is accepted"},
		{"bad send at until", one(`, "send": "2026-01-31T12:00:00Z", "until": "2026-01-31T12:00:00Z"`), "keys:1:11: epoch 1 ends before it is sent with"},
		{"bad until before accept", one(`, "accept": "2026-01-31T12:00:00Z", "until": "2026-01-31T11:00:00Z"`), "keys:1:11: epoch 1 ends before it is sent with"},
		{"bad epoch twice", strings.Replace(two("", ""), `"epoch": 2`, `"epoch": 1`, 1), "keys:2:2: epoch 1 is given twice"},
		{"bad two without send", two("", ""), `keys:2:2: epochs 1 and 2 are sent with from the same moment: give each its own "send"`},
		{"bad tie", two(`, "send": "2026-01-31T12:00:00Z"`, `, "accept": "2026-01-31T13:00:00+01:00"`), "epochs 1 and 2 are sent with from the same moment"},
		{"bad seventeen", `{"keys": [` + strings.Join(seventeen, ",") + `]}`, "epoch 0 is given twice"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			text := []byte(tt.text)
			_, err := Parse("keys", text)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want %s", err, tt.want)
			}
			if !strings.HasPrefix(err.Error(), "keys:") {
				t.Errorf("%q does not say where", err)
			}
			if strings.Contains(err.Error(), hexKey[:16]) || strings.Contains(string(text), hexKey[:16]) {
				t.Errorf("a key is left: %v, %s", err, text)
			}
		})
	}
}

func TestSending(t *testing.T) {
	r := &Ring{Keys: []Key{
		{Epoch: 1, Until: at(300)},
		{Epoch: 2, Accept: at(100), Send: at(200), Until: at(500)},
		{Epoch: 3, Accept: at(250), Until: at(400)}, // sent with from 250 on
		{Epoch: 4, Send: at(1000)},
	}}
	tests := []struct {
		now      int64
		sending  int // epoch; 0 = none
		accepted []int
	}{
		{1, 1, []int{1, 4}},
		{100, 1, []int{1, 2, 4}},
		{199, 1, []int{1, 2, 4}},
		{200, 2, []int{1, 2, 4}},
		{250, 3, []int{1, 2, 3, 4}},
		{300, 3, []int{2, 3, 4}},
		{400, 2, []int{2, 4}}, // back to the one before: it still holds
		{500, 0, []int{4}},
		{999, 0, []int{4}},
		{1000, 4, []int{4}},
		{1 << 40, 4, []int{4}},
	}
	for _, tt := range tests {
		sending, accepted := 0, []int(nil)
		if k := r.Sending(at(tt.now)); k != nil {
			sending = int(k.Epoch)
		}
		for i := range r.Keys {
			if r.Keys[i].Accepted(at(tt.now)) {
				accepted = append(accepted, int(r.Keys[i].Epoch))
			}
		}
		if sending != tt.sending || !cmp.Equal(accepted, tt.accepted) {
			t.Errorf("at %d: sending %d, accepted %v; want %d, %v", tt.now, sending, accepted, tt.sending, tt.accepted)
		}
	}
}

func TestCreate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keyring")
	must(t, Create(file))
	ring, err := Read(file)
	must(t, err)
	if len(ring.Keys) != 1 || ring.Keys[0].Epoch != 1 || *ring.Keys[0].Secret() == [KeySize]byte{} || ring.Sending(at(1)) == nil {
		t.Errorf("made %v", ring)
	}
	if err := Create(file); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a keyring was overwritten: %v", err)
	}
	entries, err := os.ReadDir(filepath.Dir(file))
	must(t, err)
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o600 || len(entries) != 1 {
		t.Errorf("mode %v, %v; %d files", info.Mode(), err, len(entries))
	}
}

func TestReadRefuses(t *testing.T) {
	good := `{"keys": [{"epoch": 3, "key": "` + hexKey + `"}]}`
	write := func(t *testing.T, file, text string) { must(t, os.WriteFile(file, []byte(text), 0o600)) }
	tests := []struct {
		name string
		make func(t *testing.T, file string)
		want string
	}{
		{"bad mode", func(t *testing.T, file string) { write(t, file, good); must(t, os.Chmod(file, 0o640)) }, " has mode 0640 and owner "},
		{"bad mode, read-only", func(t *testing.T, file string) { write(t, file, good); must(t, os.Chmod(file, 0o440)) }, " has mode 0440 and owner "},
		{"bad set-user", func(t *testing.T, file string) { write(t, file, good); must(t, os.Chmod(file, 0o600|fs.ModeSetuid)) }, " has mode 04600"},
		{"bad symlink", func(t *testing.T, file string) { write(t, file+"2", good); must(t, os.Symlink(file+"2", file)) }, "open keyring: "},
		{"bad directory", func(t *testing.T, file string) { must(t, os.Mkdir(file, 0o600)) }, " has mode 0600"},
		{"bad missing", func(*testing.T, string) {}, "open keyring: "},
		{"bad empty", func(t *testing.T, file string) { write(t, file, "") }, ":1:1: the file ends too early"},
		{"bad large", func(t *testing.T, file string) { write(t, file, good+strings.Repeat(" ", maxFile)) }, "is larger than 8192 bytes"},
	}
	if os.Geteuid() == 0 { // only root can give files away
		tests = append(tests, tests[0])
		tests[len(tests)-1].name, tests[len(tests)-1].want = "bad owner", " has mode 0600 and owner 65534"
		tests[len(tests)-1].make = func(t *testing.T, file string) { write(t, file, good); must(t, os.Chown(file, 65534, 0)) }
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "keyring")
			tt.make(t, file)
			_, err := Read(file)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
}

// A key shows in nothing that prints it, and is gone once it is wiped.
func TestSecretIsKept(t *testing.T) {
	r, err := Parse("keys", []byte(`{"keys": [{"epoch": 1, "key": "`+hexKey+`"}]}`))
	must(t, err)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d", "%q"} {
		text := fmt.Sprintf(verb+verb+verb, r.Keys[0], r, &r.Keys[0])
		for _, secret := range []string{hexKey, "0 1 2 3 4", "0x0, 0x1, 0x2", `\x00\x01\x02`} {
			if strings.Contains(text, secret) {
				t.Errorf("%s shows the key: %s", verb, text)
			}
		}
	}
	if got := r.Keys[0].Fingerprint(); got != "be45cb26" { // of sha256sum
		t.Errorf("fingerprint %s", got)
	}
	secret := r.Keys[0].Secret()
	r.Wipe()
	if *secret != ([KeySize]byte{}) || r.Keys[0].Secret() != nil {
		t.Errorf("after wiping: %x", *secret)
	}
}

func TestRefusalHasHint(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keyring")
	must(t, os.WriteFile(file, nil, 0o644))
	_, err := Read(file)
	var refused *proto.Refused
	if !errors.As(err, &refused) || refused.Hint == "" {
		t.Errorf("got %v", err)
	}
}
