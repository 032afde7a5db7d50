package core

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/core/keyring"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/internal/keyfile"
)

func TestFirstKeyringIsMadeOnce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keyring")
	var prints [][32]byte
	for _, f := range []string{file, file, filepath.Join(t.TempDir(), "keyring")} {
		ring, err := firstKeyring(f, time.Now())
		must(t, err)
		if k := ring.Sending(time.Now()); len(ring.Keys) != 1 || k == nil || k.Epoch != 1 || !k.Until.IsZero() {
			t.Errorf("keys %v", ring.Keys)
		}
		prints = append(prints, ring.Keys[0].Print)
		ring.Wipe()
	}
	if prints[0] != prints[1] || prints[0] == prints[2] {
		t.Error("a key changed, or two hosts made the same one")
	}
}

// ringCase is a keyring in a test: times in seconds from its clock's start.
type ringCase struct {
	epoch               int
	key                 byte // its every byte
	accept, send, until int  // 0 = not given
}

// keyBench is a core whose keyring and clock a test holds.
type keyBench struct {
	*Core
	t     *testing.T
	file  string
	start time.Time
	clock bootClock
	log   *bytes.Buffer
}

func newKeyBench(t *testing.T, first ...ringCase) *keyBench {
	t.Helper()
	m := newMachine(t)
	b := &keyBench{t: t, file: m.config.Keyring, start: time.Now().Truncate(time.Second), log: &bytes.Buffer{}}
	must(t, os.MkdirAll(m.config.StateDir, 0o700))
	b.write(first...)
	// The test is the upkeep.
	c, err := open(m.config, slog.New(slog.NewJSONHandler(b.log, &slog.HandlerOptions{Level: slog.LevelDebug})), hooks{})
	must(t, err)
	t.Cleanup(func() { c.Close() })
	b.Core = c
	b.clock, err = readBootClock()
	must(t, err)
	return b
}

func (b *keyBench) write(keys ...ringCase) {
	b.t.Helper()
	var all []string
	for _, k := range keys {
		one := fmt.Sprintf(`{"epoch": %d, "key": %q`, k.epoch, hex.EncodeToString(bytes.Repeat([]byte{k.key}, 16)))
		for i, at := range []int{k.accept, k.send, k.until} {
			if at != 0 {
				at := b.start.Add(time.Duration(at) * time.Second).UTC().Format(time.RFC3339)
				one += fmt.Sprintf(`, %q: %q`, []string{"accept", "send", "until"}[i], at)
			}
		}
		all = append(all, one+"}")
	}
	b.writeText(`{"keys": [` + strings.Join(all, ", ") + `]}`)
}

func (b *keyBench) writeText(text string) {
	b.t.Helper()
	must(b.t, os.WriteFile(b.file, []byte(text), 0o600))
}

// at is one upkeep so many seconds after the start, by the wall clock.
func (b *keyBench) at(seconds int) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	clock := bootClock{offset: b.clock.offset + b.start.Add(time.Duration(seconds)*time.Second).UnixNano() - b.clock.wall().UnixNano()}
	err := b.followKeys(clock)
	b.attend("keyring", err)
	return err
}

// kernelKey is a kernel entry as tests compare it.
type kernelKey struct {
	Key          byte
	Since, Until bool // bounded
}

// kernel is what the kernel holds, by epoch, and the sending one.
func (b *keyBench) kernel() (map[int]kernelKey, int) {
	b.t.Helper()
	all := map[int]kernelKey{}
	for epoch := range abi.Epochs {
		k := b.entry(epoch)
		if k.Valid == 0 {
			if k != (abi.Key{}) {
				b.t.Errorf("epoch %d is not valid and holds something", epoch)
			}
			continue
		}
		low := byte(k.Key[0])
		if word := binary.LittleEndian.Uint64(bytes.Repeat([]byte{low}, 8)); k.Key != [2]uint64{word, word} {
			b.t.Errorf("epoch %d holds another key", epoch)
		}
		all[epoch] = kernelKey{low, k.Since != 0, k.Until != 0}
	}
	state, err := readState(b.objects)
	must(b.t, err)
	return all, int(state.TagEpoch)
}

func (b *keyBench) entry(epoch int) (k abi.Key) {
	b.t.Helper()
	must(b.t, b.objects.Maps["keys"].Lookup(uint32(epoch), &k))
	return k
}

func (b *keyBench) want(when string, want map[int]kernelKey, sending int) {
	b.t.Helper()
	got, epoch := b.kernel()
	if diff := cmp.Diff(want, got); diff != "" || epoch != sending {
		b.t.Errorf("%s: sending %d, want %d; keys (-want +got):\n%s", when, epoch, sending, diff)
	}
	// Nothing of it stays in this process, except in the test.
	for i := range b.keys.ring.Keys {
		if b.keys.ring.Keys[i].Secret() != nil {
			b.t.Errorf("%s: the core keeps the key of epoch %d", when, b.keys.ring.Keys[i].Epoch)
		}
	}
}

// One rotation as an operator does it: the next key is accepted first, then sent
// with, then the old one ends and is gone.
func TestKeysRotate(t *testing.T) {
	b := newKeyBench(t, ringCase{epoch: 1, key: 0xa1})
	b.want("at the start", map[int]kernelKey{1: {Key: 0xa1}}, 1)

	next := ringCase{epoch: 2, key: 0xa2, accept: 10, send: 20, until: 100}
	b.write(ringCase{epoch: 1, key: 0xa1, until: 30}, next)
	both := map[int]kernelKey{1: {0xa1, false, true}, 2: {0xa2, true, true}}
	for _, step := range []struct {
		at      int
		keys    map[int]kernelKey
		sending int
	}{
		{1, both, 1},
		{15, both, 1},
		{19, both, 1},
		{20, both, 2},
		{29, both, 2},
		{30, map[int]kernelKey{2: {0xa2, true, true}}, 2},
	} {
		must(t, b.at(step.at))
		b.want(fmt.Sprint("at ", step.at), step.keys, step.sending)
	}
	// The kernel refuses by itself at the very moments, not at the next look.
	now, second := b.clock.now(), uint64(time.Second)
	if k := b.entry(2); k.Since > now || k.Until < now+60*second || k.Until > now+71*second {
		t.Errorf("at 30 of 10 to 100 the kernel's bounds are %d, %d; it is %d", k.Since, k.Until, now)
	}

	// Everything replaced at once, also the key of an epoch: the old one goes.
	b.write(ringCase{epoch: 2, key: 0xb2}, ringCase{epoch: 9, key: 0xb9, send: 40})
	must(t, b.at(31))
	b.want("replaced", map[int]kernelKey{2: {Key: 0xb2}, 9: {Key: 0xb9}}, 2)
	must(t, b.at(40))
	b.write(ringCase{epoch: 9, key: 0xb9, send: 40})
	must(t, b.at(41))
	b.want("old one taken out", map[int]kernelKey{9: {Key: 0xb9}}, 9)
}

// A keyring that cannot be used changes nothing, is told, and does not keep the
// loaded keys from holding and ending as they were to.
func TestKeysBadFileChangesNothing(t *testing.T) {
	first := []ringCase{{epoch: 1, key: 0xa1, until: 50}, {epoch: 2, key: 0xa2, send: 20}}
	loaded := map[int]kernelKey{1: {0xa1, false, true}, 2: {Key: 0xa2}}
	tests := []struct {
		name  string
		spoil func(b *keyBench)
		want  string
	}{
		{"bad cut off", func(b *keyBench) { b.writeText(`{"keys": [{"epoch": 1, "key": "a1a1a1a1a1a1a1a1a1a1a1`) }, ":1:31: a key is 32 hex digits"},
		{"bad empty", func(b *keyBench) { b.writeText("") }, "the file ends too early"},
		{"bad mode", func(b *keyBench) { must(t, os.Chmod(b.file, 0o644)) }, "has mode 0644"},
		{"bad removed", func(b *keyBench) { must(t, os.Remove(b.file)) }, "open keyring: "},
		{"bad all in the future", func(b *keyBench) { b.write(ringCase{epoch: 3, key: 0xa3, accept: 500}) }, "no key may be sent with now"},
		{"bad all over", func(b *keyBench) { b.write(ringCase{epoch: 3, key: 0xa3, until: 5}) }, "no key may be sent with now"},
		{"bad tie", func(b *keyBench) { b.write(ringCase{epoch: 1, key: 0xa3}, ringCase{epoch: 2, key: 0xa4}) }, "epochs 1 and 2 are sent with from the same moment"},
	}
	b := newKeyBench(t, first...)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			must(t, os.RemoveAll(b.file))
			b.write(first...)
			must(t, b.at(6))
			tt.spoil(b)
			err := b.at(7)
			problems := b.Status().Problems
			if err == nil || len(problems) != 1 || !strings.Contains(problems[0], tt.want) ||
				!strings.HasPrefix(problems[0], "keyring: ") || !strings.HasSuffix(problems[0], "; the keys loaded before stay in use") {
				t.Fatalf("problems %q, %v; want %s", problems, err, tt.want)
			}
			b.want("spoilt", loaded, 1)
			_ = b.at(20)
			b.want("spoilt, at 20", loaded, 2)
			_ = b.at(50)
			b.want("spoilt, at 50", map[int]kernelKey{2: {Key: 0xa2}}, 2)
		})
	}
	must(t, os.RemoveAll(b.file))
	b.write(first...)
	must(t, b.at(6))
	if s := b.Status(); s.State != proto.StateIdle || len(s.Problems) != 0 {
		t.Errorf("the file is well again: %+v", s)
	}
	b.want("well again", loaded, 1)
}

// The wall clock is stepped: at the next look each key holds as it says, in the
// kernel too, and one that was wiped by mistake is back. Between two looks nothing
// is written.
func TestI12KeysClockStep(t *testing.T) {
	b := newKeyBench(t, ringCase{epoch: 1, key: 0xa1, accept: -100, until: 3600}, ringCase{epoch: 2, key: 0xa2, accept: 1000, until: 7200})
	started := time.Now()
	must(t, b.at(0))
	before := b.entry(1)
	for _, step := range []struct {
		at      int
		valid   [2]bool // accepted by the kernel: epochs 1 and 2
		sending int
	}{
		{-50, [2]bool{true, false}, 1},
		{1000, [2]bool{true, true}, 2},
		{4000, [2]bool{false, true}, 2}, // and 1 is wiped
		{0, [2]bool{true, false}, 1},
		{3599, [2]bool{true, true}, 2},
		{0, [2]bool{true, false}, 1},
	} {
		must(t, b.at(step.at))
		now := b.clock.now()
		var got [2]bool
		for i := range got {
			k := b.entry(i + 1)
			got[i] = k.Valid != 0 && k.Since <= now && now < k.Until
		}
		if _, sending := b.kernel(); got != step.valid || sending != step.sending {
			t.Errorf("at %d: kernel accepts %v and sends %d; want %v, %d", step.at, got, sending, step.valid, step.sending)
		}
	}
	after := b.entry(1)
	// It is 0 again later, by as long as this took.
	later := time.Since(started) + wallTolerance
	if time.Duration(after.Since-before.Since).Abs() > later || time.Duration(after.Until-before.Until).Abs() > later {
		t.Errorf("back at 0 the bounds are %d, %d; were %d, %d", after.Since, after.Until, before.Since, before.Until)
	}

	// A step while the file is unusable: the kernel's own copy goes on.
	must(t, os.Rename(b.file, b.file+".aside"))
	if err := b.at(500); err == nil {
		t.Fatal("no file, and no problem")
	}
	if k := b.entry(1); k.Key != after.Key || k.Valid != 1 || near(k.Until, after.Until) {
		t.Errorf("stepped without file: until %d, was %d", k.Until, after.Until)
	}
	// What was wiped is not in the kernel any more: it is refused, not made up.
	_ = b.at(3700)
	if err := b.at(500); err == nil || !strings.Contains(err.Error(), "epoch 1 holds again and was wiped") {
		t.Errorf("got %v", err)
	}
	if k := b.entry(1); k != (abi.Key{}) {
		t.Error("epoch 1 holds something")
	}
	must(t, os.Rename(b.file+".aside", b.file))
	must(t, b.at(500))
	if k := b.entry(1); k.Key != after.Key || k.Valid != 1 {
		t.Error("epoch 1 did not come back with the file")
	}
}

func TestKeysWriteOnlyWhatChanged(t *testing.T) {
	b := newKeyBench(t, ringCase{epoch: 1, key: 0xa1, until: 3600})
	must(t, b.at(0))
	mark := b.entry(1)
	mark.Since = 1 // seen by nobody: the core does not read what it wrote
	must(t, b.objects.Maps["keys"].Put(uint32(1), &mark))
	for range 3 {
		must(t, b.at(0))
	}
	if got := b.entry(1); got != mark {
		t.Error("an entry was written again without need")
	}
}

// The core does not start without a key to send with, and leaves what is enforced
// as it is.
func TestKeysRefuseStart(t *testing.T) {
	m := newMachine(t)
	must(t, os.MkdirAll(m.config.StateDir, 0o700))
	must(t, os.WriteFile(m.config.Keyring, []byte(`{"keys": [{"epoch": 1, "key": "`+strings.Repeat("c3", 16)+`", "until": "2026-01-31T12:00:00Z"}]}`), 0o600))
	_, err := m.open(hooks{})
	if want := "preflight: keyring: " + m.config.Keyring + ": no key may be sent with now"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	absent(t, m.config.BPFFS)
}

// A core that starts takes out keys that a former one left in the kernel.
func TestKeysAreRenewedAtStart(t *testing.T) {
	b := newKeyBench(t, ringCase{epoch: 1, key: 0xa1}, ringCase{epoch: 5, key: 0xa5, send: 3600})
	_, err := b.Apply(shop(t, nil), 0)
	must(t, err)
	config := b.config
	b.Close()
	b.write(ringCase{epoch: 7, key: 0xa7})
	c, err := open(config, slog.New(slog.NewJSONHandler(b.log, nil)), hooks{})
	must(t, err)
	t.Cleanup(func() { c.Close() })
	b.Core = c
	b.want("after the restart", map[int]kernelKey{7: {Key: 0xa7}}, 7)
}

// The upkeep follows the file without being asked.
func TestKeysAreFollowed(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	ring, err := keyring.Read(m.config.Keyring)
	must(t, err)
	next, err := keyring.New(2)
	must(t, err)
	next.Send = time.Now().Truncate(time.Second)
	must(t, keyfile.Replace(m.config.Keyring, &keyring.Ring{Keys: append(ring.Keys, next)}))
	b := &keyBench{Core: c, t: t}
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		state, err := readState(c.objects)
		must(t, err)
		if state.TagEpoch == 2 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("sending epoch %d", state.TagEpoch)
		}
	}
	if b.entry(1).Valid != 1 || b.entry(2).Valid != 1 {
		t.Error("a key is missing")
	}
}

// Keys are in no log line, no status and no error, whatever happens to them.
func TestKeysAreNeverTold(t *testing.T) {
	b := newKeyBench(t, ringCase{epoch: 1, key: 0xd7})
	var told strings.Builder
	note := func(err error) {
		text, encodeErr := json.Marshal(b.Status())
		must(t, encodeErr)
		fmt.Fprintf(&told, "%v\n%+v\n%#v\n%s\n", err, err, b.keys, text)
	}
	note(b.at(1))
	b.write(ringCase{epoch: 1, key: 0xd7, until: 20}, ringCase{epoch: 2, key: 0xe8, send: 5, until: 30})
	for _, s := range []int{4, 5, 20, 6, 40} {
		note(b.at(s))
	}
	d7, e8 := strings.Repeat("d7", 16), strings.Repeat("e8", 16)
	for _, text := range []string{
		`{"keys": [{"epoch": 1, "key": "` + d7 + e8 + `"}]}`, `{"keys": [{"epoch": 1, "key": "` + d7[1:] + `"}]}`,
		`{"keys": [{"epoch": 1, "` + d7 + `": "key"}]}`, `{"keys": [{"epoch": "` + d7 + `"}]}`, `{"` + e8 + `": 1}`, d7,
		`{"keys": [{"epoch": 1, "key": "` + d7 + `", "until": "` + e8 + `"}]}`, `{"keys": [{"epoch": 1, "key": ` + d7 + `}]}`,
	} {
		b.writeText(text)
		err := b.at(6)
		if err == nil {
			t.Errorf("%s is accepted", text)
		}
		note(err)
	}
	told.WriteString(b.log.String())
	if !strings.Contains(told.String(), "tag key loaded") || !strings.Contains(told.String(), "tag key wiped") {
		t.Errorf("the log does not tell of the rotation:\n%s", b.log)
	}
	for _, secret := range []string{"d7d7d7d7", "e8e8e8e8", fmt.Sprint(uint64(0xd7d7d7d7d7d7d7d7)), fmt.Sprint(uint64(0xe8e8e8e8e8e8e8e8)), "215, 215", "215 215", "0xd7, 0xd7"} {
		if at := strings.Index(strings.ToLower(told.String()), secret); at >= 0 {
			t.Errorf("a key is told: ...%s...", told.String()[max(at-80, 0):at+40])
		}
	}
}
