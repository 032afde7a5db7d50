package core

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/core/trust"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/envelope"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/image/encode"
	"github.com/demarc/demarc/policy/policytest"
	"github.com/demarc/demarc/policy/signing"
)

func signingKey(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, ed25519.SeedSize))
}

// trusts makes the machine trust these keys, and no others, from its next start on.
func (m *machine) trusts(keys ...ed25519.PrivateKey) {
	m.t.Helper()
	if m.config.TrustDir == "" {
		m.config.TrustDir = m.t.TempDir()
		if err := os.Chmod(m.config.TrustDir, 0o755); err != nil {
			m.t.Fatal(err)
		}
	}
	all, err := filepath.Glob(filepath.Join(m.config.TrustDir, "*"))
	for _, file := range all {
		err = errors.Join(err, os.Remove(file))
	}
	for i, k := range keys {
		err = errors.Join(err, os.WriteFile(filepath.Join(m.config.TrustDir, fmt.Sprintf("%d.pub", i)), signing.FormatPublic(signing.Public(k)), 0o644))
	}
	if err != nil {
		m.t.Fatal(err)
	}
}

func signed(t *testing.T, img []byte, keys ...ed25519.PrivateKey) []byte {
	t.Helper()
	b, err := signing.Sign(img, keys...)
	must(t, err)
	return b
}

func wantRefused(t *testing.T, what string, err error, want string) {
	t.Helper()
	if err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("%s: got %v, want %s", what, err, want)
	}
}

const (
	notSigned = "verify image: it is not signed, and trust_dir holds keys"
	noGoodKey = "verify image: no key of trust_dir signed it"
)

// Where a key is trusted, what it did not sign is refused, when it is applied and
// when it comes from disk. What the kernel enforces goes on meanwhile.
func TestSigned(t *testing.T) {
	m := newMachine(t)
	ops, next, stranger := signingKey(1), signingKey(2), signingKey(3)
	m.trusts(ops)
	c := m.start()
	bare := shop(t, version(7))
	_, err := c.Apply(bare, 0)
	wantRefused(t, "unsigned", err, notSigned)
	_, err = c.Apply(signed(t, bare, stranger), 0)
	wantRefused(t, "signed by a stranger", err, noGoodKey)
	s, err := c.Apply(signed(t, bare, stranger, ops), 0)
	must(t, err)
	if s.State != proto.StateEnforcing || s.Active.Signer != envelope.KeyID(signing.Public(ops)) || s.Active.Version != 7 {
		t.Errorf("signed: %+v", s.Active)
	}
	f, err := c.Image()
	must(t, err)
	defer f.Close()
	if got, err := readImage(f); err != nil || !bytes.Equal(got, bare) {
		t.Errorf("the agent gets %d bytes (%v), want the image's %d", len(got), err, len(bare))
	}
	before := c.Status().Active
	c.Close()

	// The key is replaced: what is on disk is not enforced anew, what is in force goes on.
	m.trusts(next)
	c = m.start()
	s = c.Status()
	if s.State != proto.StateDegraded || s.Active != nil || len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "stored active image: "+noGoodKey) {
		t.Errorf("with another key: %v, %+v, %q", s.State, s.Active, s.Problems)
	}
	state, err := readState(c.objects)
	must(t, err)
	if abi.ActiveEpoch(state.Active) != before.Epoch || abi.ActiveSlot(state.Active) != uint32(before.Slot) || attached(t, m) != len(attachOrder)-namers {
		t.Errorf("what was in force went away: %#x", state.Active)
	}
	// The same image with a signature of the new key is in force again.
	s, err = c.Apply(signed(t, bare, next), 0)
	must(t, err)
	if s.State != proto.StateEnforcing || s.Active.Signer != envelope.KeyID(signing.Public(next)) {
		t.Errorf("signed again: %v, %+v, %q", s.State, s.Active, s.Problems)
	}
	c.Close()
	c = m.start()
	if s := c.Status(); s.State != proto.StateEnforcing || s.Active.Version != 7 {
		t.Errorf("after a restart: %v, %q", s.State, s.Problems)
	}
	c.Close()

	// After a reboot nothing is enforced yet: the start is refused, by name.
	must(t, Detach(m.config))
	m.trusts(stranger, ops)
	spoil(t, c, previousImage, []byte{})
	_, err = m.open(hooks{})
	wantRefused(t, "start after a reboot", err, "stored active image: "+noGoodKey)
	absent(t, m.config.BPFFS)

	// Without keys an envelope is nothing but a wrapping.
	m.trusts()
	c = m.start()
	s, err = c.Apply(signed(t, shop(t, version(8)), stranger), 0)
	must(t, err)
	if s.State != proto.StateEnforcing || s.Active.Version != 8 || s.Active.Signer != "" {
		t.Errorf("nobody is trusted: %+v", s.Active)
	}
}

// The key of another user is no key.
func TestTrustOwner(t *testing.T) {
	m := newMachine(t)
	m.trusts(signingKey(1))
	must(t, os.Chown(filepath.Join(m.config.TrustDir, "0.pub"), 1000, 0))
	if _, err := trust.Read(m.config.TrustDir); err == nil || !strings.Contains(err.Error(), "0.pub: others than root can write it (mode 0644, owner 1000)") {
		t.Errorf("a key of user 1000: %v", err)
	}
	must(t, os.Chown(m.config.TrustDir, 1000, 0))
	if _, err := trust.Read(m.config.TrustDir); err == nil || !strings.Contains(err.Error(), "others than root can write it (mode 0755, owner 1000)") {
		t.Errorf("a directory of user 1000: %v", err)
	}
}

// TestJ01Replay replays an older image that was signed well: after a newer one, after
// the state directory was wiped, and after the pins were. Rollback is not a way
// around it.
func TestJ01Replay(t *testing.T) {
	m := newMachine(t)
	ops := signingKey(1)
	m.trusts(ops)
	c := m.start()
	old, new := signed(t, shop(t, version(7)), ops), signed(t, shop(t, version(8)), ops)
	other := signed(t, shop(t, func(p *policy.Policy) { p.Version, p.Crossings[0].Purpose = 8, "other" }), ops)
	must(t, errors.Join(second(c.Apply(old, 0)), second(c.Apply(new, 0))))
	const older, same = "image has version 7, and version 8 was in force already", "version 8 was in force already with other content"
	replay := func(when string) {
		t.Helper()
		_, err := c.Apply(old, 0)
		wantRefused(t, "older image "+when, err, older)
		_, err = c.Apply(other, 0)
		wantRefused(t, "other image of the same version "+when, err, same)
	}
	replay("at once")

	c.Close()
	c = m.start()
	replay("after a restart")

	// Rollback returns to it, without lowering the floor.
	must(t, second(c.Rollback()))
	_, err := c.Apply(other, 0)
	wantRefused(t, "other image after rollback", err, same)
	must(t, second(c.Apply(old, 0))) // it is in force
	if s, err := c.Apply(new, 0); err != nil || s.Active.Version != 8 || s.Previous.Version != 7 {
		t.Errorf("the image of the floor after rollback: %+v, %v", s, err)
	}

	// The state directory is wiped; the pins remember.
	c.Close()
	wipe := func(names ...string) {
		t.Helper()
		for _, name := range names {
			for _, copy := range copies {
				must(t, os.Remove(filepath.Join(m.config.StateDir, name+"."+copy)))
			}
		}
	}
	wipe(activeImage, previousImage, floorRecord)
	c = m.start()
	replay("after the state directory was wiped")
	must(t, second(c.Apply(new, 0)))

	// The pins are wiped; the state directory remembers, also without the images.
	c.Close()
	must(t, Detach(m.config))
	wipe(activeImage)
	c = m.start()
	if s := c.Status(); s.State != proto.StateIdle {
		t.Errorf("without images: %+v", s)
	}
	replay("after the pins and the images were wiped")
	must(t, second(c.Apply(new, 0)))

	// One copy of the floor is spoilt, and pins and images are wiped.
	c.Close()
	must(t, Detach(m.config))
	wipe(activeImage)
	must(t, os.WriteFile(filepath.Join(m.config.StateDir, "floor.a"), []byte("spoilt"), 0o600))
	c = m.start()
	replay("after a copy of the floor was spoilt")

	// The floor is one for the node: another name does not begin anew.
	_, err = c.Apply(signed(t, shop(t, func(p *policy.Policy) { p.Name, p.Version = "other", 7 }), ops), 0)
	wantRefused(t, "policy of another name", err, older)
}

// What is tried is no floor before it is confirmed.
func TestFloorOfTrial(t *testing.T) {
	m := newMachine(t)
	c := trying(t, m, time.Hour)
	if c.floor.Version != 7 {
		t.Errorf("on trial: floor %d", c.floor.Version)
	}
	must(t, second(c.Confirm()))
	_, err := c.Apply(shop(t, func(p *policy.Policy) { p.Version, p.Crossings[0].Purpose = 8, "other" }), 0)
	wantRefused(t, "after confirmation", err, "version 8 was in force already with other content")
	var kernel abi.Floor
	must(t, c.objects.Maps["version_floor"].Lookup(uint32(0), &kernel))
	if kernel != c.floor.Floor || c.floor.onDisk != c.floor.Floor || kernel.Version != 8 {
		t.Errorf("floor %+v, in the kernel %+v", c.floor, kernel)
	}
}

func second[T any](_ T, err error) error { return err }

// An image on disk that is newer than the floor on disk raises it: the power may have
// gone between the two.
func TestFloorFollowsImages(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	for v := uint64(7); v <= 9; v++ {
		must(t, second(c.Apply(shop(t, version(v)), 0)))
	}
	must(t, second(c.Rollback()))
	c.Close()
	must(t, Detach(m.config))
	spoil(t, c, floorRecord, []byte{})
	c = m.start()
	_, err := c.Apply(shop(t, func(p *policy.Policy) { p.Version, p.Crossings[0].Purpose = 9, "other" }), 0)
	wantRefused(t, "the previous image has version 9", err, "version 9 was in force already with other content")
	spoil(t, c, floorRecord, []byte{})
	c.Close()

	// Both copies of the floor are spoilt: the images and the kernel know.
	spoil(t, c, floorRecord, []byte("spoilt"))
	c = m.start()
	if s := c.Status(); s.State != proto.StateDegraded || !strings.HasPrefix(s.Problems[0], "the floor under versions: ") {
		t.Errorf("a spoilt floor: %v, %q", s.State, s.Problems)
	}
	_, err = c.Apply(shop(t, version(8)), 0)
	wantRefused(t, "with a spoilt floor", err, "image has version 8, and version 9 was in force already")
	s, err := c.Apply(shop(t, version(10)), 0)
	if err != nil || s.State != proto.StateEnforcing {
		t.Errorf("a newer image mends the floor: %+v, %v", s, err)
	}
	b, err := c.store.load(floorRecord)
	if err != nil || len(b) != 40 || b[0] != 10 {
		t.Errorf("floor on disk: % x, %v", b, err)
	}
}

// TestJ02Mixed puts together parts of two images that were both signed well.
func TestJ02Mixed(t *testing.T) {
	ops := signingKey(1)
	keys := []envelope.Key{{ID: envelope.KeyID(signing.Public(ops)), Public: signing.Public(ops)}}
	one, two := shop(t, version(7)), shop(t, func(p *policy.Policy) { p.Version, p.Mode = 8, image.Observe })
	if len(one) != len(two) {
		t.Fatalf("%d and %d bytes: the parts do not line up", len(one), len(two))
	}
	type part struct {
		Payload     []byte           `json:"payload"`
		PayloadType string           `json:"payloadType"`
		Signatures  []map[string]any `json:"signatures"`
	}
	read := func(img []byte) (p part) {
		must(t, json.Unmarshal(signed(t, img, ops), &p))
		return p
	}
	open := func(p part) error {
		b, err := json.Marshal(p)
		must(t, err)
		_, err = openImage(b, keys)
		return err
	}
	first, other := read(one), read(two)
	must(t, errors.Join(open(first), open(other)))
	swapped := part{first.Payload, first.PayloadType, other.Signatures}
	wantRefused(t, "signature of the other image", open(swapped), noGoodKey)
	both := part{first.Payload, first.PayloadType, []map[string]any{other.Signatures[0], other.Signatures[0]}}
	wantRefused(t, "signature of the other image twice", open(both), noGoodKey)
	for at := 0; at < len(one); at += 7 {
		spliced := append(bytes.Clone(one[:at]), two[at:]...)
		if bytes.Equal(spliced, one) || bytes.Equal(spliced, two) {
			continue
		}
		for i, signatures := range [][]map[string]any{first.Signatures, other.Signatures, {first.Signatures[0], other.Signatures[0]}} {
			wantRefused(t, fmt.Sprintf("spliced at %d, signatures %d", at, i), open(part{spliced, first.PayloadType, signatures}), noGoodKey)
		}
	}
	// One member of one object from each.
	wantRefused(t, "two envelopes in one", second(openImage(append(signed(t, one, ops), signed(t, two, ops)...), keys)), "verify image: not an image: envelope:2:1: ")
}

// TestX5Signed flips bits of a signed image and cuts it at sampled places. It is
// refused, or it is the same image still: what nobody signed may say anything.
func TestX5Signed(t *testing.T) {
	ops := signingKey(1)
	keys := []envelope.Key{{ID: envelope.KeyID(signing.Public(ops)), Public: signing.Public(ops)}}
	img := shop(t, nil)
	whole := signed(t, img, ops)
	payloadEnd := len(`{"payload":"`) + base64.StdEncoding.EncodedLen(len(img))
	same := 0
	for at := range whole {
		if at > 200 && at < payloadEnd-200 && at%23 != 0 {
			continue
		}
		for bit := range 8 {
			flipped := bytes.Clone(whole)
			flipped[at] ^= 1 << bit
			g, err := openImage(flipped, keys)
			if err != nil {
				continue
			}
			if same++; !bytes.Equal(g.bytes, img) || at < payloadEnd {
				t.Errorf("bit %d of byte %d flipped is accepted", bit, at)
			}
		}
		if g, err := openImage(whole[:at], keys); err == nil && at < len(whole)-1 { // the last byte is a newline
			t.Errorf("cut at %d is accepted: %d bytes", at, len(g.bytes))
		}
	}
	if same == 0 {
		t.Error("no flip in a key's id was seen: the test does not reach the end")
	}
	// The bare image has nothing that means nothing.
	for at := 0; at < len(img); at += 5 {
		flipped := bytes.Clone(img)
		flipped[at] ^= 1 << (at % 8)
		if _, err := openImage(flipped, nil); err == nil {
			t.Errorf("bare image: byte %d flipped is accepted", at)
		}
		if _, err := openImage(img[:at], nil); err == nil {
			t.Errorf("bare image: cut at %d is accepted", at)
		}
	}
}

// TestJ13Names puts paths where names belong, past the compiler. None is a name, and
// whatever is applied, the files have the names that they always have.
func TestJ13Names(t *testing.T) {
	corpus := []string{"../evil", "..", ".", "/", "/etc/passwd", "a/b", "a/../../b", "..\\evil", "%2e%2e%2fevil", "..%00", "a\x00b", "a\nb", "~root", "$HOME", "`x`", "-rf", "",
		"active.a", "next.b", "\u2025/evil", "\uff0e\uff0e/evil", strings.Repeat("../", 20) + "evil", strings.Repeat("a", 300)}
	set := map[string]func(img *image.Image, name string){
		"policy":   func(img *image.Image, name string) { img.Name = name },
		"zone":     func(img *image.Image, name string) { img.Zones[0].Name = name },
		"workload": func(img *image.Image, name string) { img.Workloads[0].Name = name },
		"network":  func(img *image.Image, name string) { img.Networks[0].Name = name },
		"crossing": func(img *image.Image, name string) { img.Crossings[0].Name = name },
		"domain":   func(img *image.Image, name string) { img.TrustDomain = name },
	}
	for what, change := range set {
		for _, name := range corpus {
			img, err := policy.Compile(policytest.Shop())
			must(t, err)
			change(img, name)
			b, err := encode.Image(img)
			if err != nil {
				continue
			}
			if g, err := openImage(b, nil); err == nil {
				t.Errorf("%s %q is accepted: %q", what, name, g.image.Name)
			}
		}
	}
	m := newMachine(t)
	c := m.start()
	for v := uint64(7); v <= 9; v++ {
		must(t, second(c.Apply(shop(t, func(p *policy.Policy) { p.Name, p.Version = fmt.Sprintf("n%d", v), v }), 0)))
	}
	var names []string
	must(t, filepath.WalkDir(m.config.StateDir, func(path string, _ fs.DirEntry, err error) error {
		names = append(names, strings.TrimPrefix(path, m.config.StateDir))
		return err
	}))
	want := []string{"", "/active.a", "/active.b", "/audit.log", "/floor.a", "/floor.b", "/keyring", "/lock", "/previous.a", "/previous.b"}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("state_dir (-want +got):\n%s", diff)
	}
	spec, err := loadDemarc()
	must(t, err)
	must(t, filepath.WalkDir(m.config.BPFFS, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && d.Name() != "abi" && d.Name() != "audit" && !slices.Contains(keptMaps(spec), d.Name()) && !slices.Contains(attachOrder[:], d.Name()) {
			t.Errorf("%s is pinned", path)
		}
		return err
	}))
}

// TestI14Disk fills the disk below the state directory, and makes it read-only. A new
// policy is refused and says why, what is in force goes on, and a core that starts
// enforces what is stored. (I14, X4)
func TestI14Disk(t *testing.T) {
	m := newMachine(t)
	must(t, os.Mkdir(m.config.StateDir, 0o700))
	must(t, unix.Mount("state", m.config.StateDir, "tmpfs", 0, "mode=0700,size=512k"))
	t.Cleanup(func() { must(t, unix.Unmount(m.config.StateDir, 0)) })
	c := m.start()
	t.Cleanup(func() { c.Close() })
	present := shop(t, version(8))
	must(t, errors.Join(second(c.Apply(shop(t, version(7)), 0)), second(c.Apply(present, 0))))
	ballast := filepath.Join(m.config.StateDir, "ballast")
	fill := func() error {
		f, err := os.Create(ballast)
		must(t, err)
		defer f.Close()
		for chunk := make([]byte, 4096); err == nil; {
			_, err = f.Write(chunk)
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		return nil
	}
	remount := func(flags uintptr) func() error {
		return func() error { return unix.Mount("", m.config.StateDir, "", unix.MS_REMOUNT|flags, "") }
	}
	for _, tt := range []struct {
		name     string
		do, undo func() error
		want     string
	}{
		{"full", fill, func() error { return os.Remove(ballast) }, "no space left on device"},
		{"read-only", remount(unix.MS_RDONLY), remount(0), "read-only file system"},
	} {
		// The log is open for writing while a core runs: a disk that turns read-only
		// under it is one that fails, which TestX4StateFaults does to each call.
		running := tt.name == "full"
		if !running {
			c.Close()
		}
		must(t, tt.do())
		refused := func(when string) {
			t.Helper()
			_, err := c.Apply(shop(t, version(9)), 0)
			// Whether there is room for the record of a change that has none itself.
			recorded := err == nil || !strings.HasPrefix(err.Error(), "nothing is changed without a record of it: ")
			if err == nil || recorded && !strings.HasPrefix(err.Error(), "store image: ") || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s, %s: apply says %v", tt.name, when, err)
			}
			var r *proto.Refused
			if !errors.As(err, &r) || !strings.HasPrefix(r.Hint, "make room ") {
				t.Errorf("%s, %s: no hint: %#v", tt.name, when, err)
			}
			// A dry run says what the change would say, and leaves as little behind.
			_, err = c.Preview(shop(t, version(9)), proto.Own{})
			if err == nil || !strings.HasPrefix(err.Error(), "store image: ") || !strings.Contains(err.Error(), tt.want) || !errors.As(err, &r) || !strings.HasPrefix(r.Hint, "make room ") {
				t.Errorf("%s, %s: preview says %v", tt.name, when, err)
			}
			if c.prepared != nil || !missing(c.store.file(nextImage, "a")) || !missing(c.store.file(nextImage, "b")) {
				t.Errorf("%s, %s: a preview that was refused lies ready", tt.name, when)
			}
			if _, err := c.Rollback(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s, %s: rollback says %v", tt.name, when, err)
			}
			s := c.Status()
			proved := s.State == proto.StateEnforcing
			if s.State == proto.StateDegraded { // for want of a log, and of nothing else
				proved = !slices.ContainsFunc(s.Problems, func(p string) bool { return !strings.HasPrefix(p, "audit log: ") })
			}
			if !proved || s.Active.Version != 8 || attached(t, m) != len(attachOrder)-namers {
				t.Errorf("%s, %s: %v, %+v, %q", tt.name, when, s.State, s.Active, s.Problems)
			}
		}
		if running {
			refused("at once")
			c.Close()
		}
		for _, booted := range []bool{false, true} {
			if booted {
				// It ends all the same, and says that there is no record of it.
				if err := Detach(m.config); err != nil && !strings.HasPrefix(err.Error(), "write audit log: ") {
					t.Fatal(err)
				}
			}
			var err error
			c, err = m.open(hooks{})
			must(t, err)
			if limits := c.Status().Limits; !slices.ContainsFunc(limits, func(l string) bool { return strings.Contains(l, tt.want) }) {
				t.Errorf("%s: limits %q", tt.name, limits)
			}
			refused(fmt.Sprintf("after a start, booted: %v", booted))
			if !booted {
				c.Close()
			}
		}
		must(t, tt.undo())
		c.upkeep()
		if _, err := c.Preview(shop(t, version(9)), proto.Own{}); err != nil || c.prepared == nil {
			t.Errorf("%s, and well again: preview says %v", tt.name, err)
		}
		if s, err := c.Apply(present, 0); err != nil || s.State != proto.StateEnforcing {
			t.Errorf("%s, and well again: %+v, %v", tt.name, s, err)
		}
	}
	if s, err := c.Apply(shop(t, version(9)), 0); err != nil || s.State != proto.StateEnforcing || s.Active.Version != 9 {
		t.Errorf("the disk is well again: %+v, %v", s, err)
	}
}

// An image that expires while it is in force stays in force, and status says so.
func TestExpiresInForce(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	end := time.Now().Add(time.Hour)
	must(t, second(c.Apply(shop(t, func(p *policy.Policy) { p.NotAfter = end.Truncate(time.Second) }), 0)))
	if s := c.Status(); s.State != proto.StateEnforcing {
		t.Fatalf("before its end: %v, %q", s.State, s.Problems)
	}
	c.mu.Lock()
	c.active.image.NotAfter = time.Now().Add(-time.Minute).Unix()
	c.mu.Unlock()
	c.upkeep()
	s := c.Status()
	if s.State != proto.StateDegraded || len(s.Problems) != 1 || !strings.HasPrefix(s.Problems[0], "image: it expired at ") {
		t.Errorf("after its end: %v, %q", s.State, s.Problems)
	}
	if n := attached(t, m); s.Active.Version != 7 || n != len(attachOrder)-namers {
		t.Errorf("it is not in force any more: %+v, %d programs", s.Active, n)
	}
	// A newer one mends it at once.
	if s, err := c.Apply(shop(t, version(8)), 0); err != nil || s.State != proto.StateEnforcing {
		t.Errorf("a newer image: %+v, %v", s, err)
	}
}
