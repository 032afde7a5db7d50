package core

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/image/encode"
	"github.com/demarc/demarc/policy/policytest"
)

func version(n uint64) func(*policy.Policy) { return func(p *policy.Policy) { p.Version = n } }

func TestApply(t *testing.T) {
	m := newMachine(t)
	m.mkdir("/lab/postgres/inner")
	m.mkdir("/system.slice/nginx.service/worker")
	m.mkdir("/system.slice/api@1.service")
	m.mkdir("/lab/nginx.service") // not below slices only: no unit
	c := m.start()
	if got := c.Status(); got.State != proto.StateIdle || len(got.Links) != 0 {
		t.Fatalf("before any policy: %+v", got)
	}

	b := shop(t, nil)
	status, err := c.Apply(b, 0)
	if err != nil {
		t.Fatal(err)
	}
	if status.State != proto.StateEnforcing || len(status.Links) != len(attachOrder) || status.Active.Bindings != 5 {
		t.Errorf("after apply: %+v", status)
	}
	m.mkdir("/lab/postgres/late") // named by the program, not by the scan
	m.mkdir("/system.slice/nginx.service/late")
	m.mkdir("/user.slice/api@2.service")
	m.mkdir("/lab/postgresql")
	web, api, postgres := id(t, b, "web"), id(t, b, "api"), id(t, b, "postgres")
	want := map[string]uint32{
		"/": 1, "/lab": 1, "/lab/postgresql": 1, "/lab/nginx.service": 1, "/system.slice": 1,
		"/lab/postgres": postgres, "/lab/postgres/inner": postgres, "/lab/postgres/late": postgres,
		"/system.slice/nginx.service": web, "/system.slice/nginx.service/worker": web, "/system.slice/nginx.service/late": web,
		"/system.slice/api@1.service": api, "/user.slice/api@2.service": api,
	}
	got := map[string]uint32{}
	for path := range want {
		got[path] = identity(t, c, path)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("identities (-want +got):\n%s", diff)
	}
}

// What is refused changes nothing, and says why.
func TestApplyRefuses(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	if _, err := c.Apply(shop(t, version(7)), 0); err != nil {
		t.Fatal(err)
	}
	cut := shop(t, version(8))
	flipped := append([]byte(nil), cut...)
	flipped[len(flipped)/2] ^= 1
	tests := []struct {
		name  string
		image []byte
		want  string
	}{
		{"bad older version", shop(t, version(6)), "image has version 6, and version 7 was in force already"},
		{"bad same version, other content", shop(t, func(p *policy.Policy) { p.Crossings[0].Purpose = "other" }),
			"version 7 was in force already with other content"},
		{"bad empty", nil, "verify image: "},
		{"bad cut off", cut[:len(cut)-1], "verify image: "},
		{"bad one bit", flipped, "verify image: "},
	}
	before := c.Status()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := c.Apply(tt.image, 0)
			if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
			if diff := cmp.Diff(steady(before), steady(c.Status())); diff != "" {
				t.Errorf("status (-before +after):\n%s", diff)
			}
		})
	}
}

func TestApplyRefusesExpired(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	img, err := image.Decode(shop(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	img.NotAfter = time.Now().Add(-time.Second).Unix()
	b, err := encode.Image(img)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Apply(b, 0); err == nil || !strings.HasPrefix(err.Error(), "image expired at ") {
		t.Errorf("got %v", err)
	}
	if got := c.Status().State; got != proto.StateIdle {
		t.Errorf("state %v", got)
	}
}

func TestApplyTwiceChangesNothing(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	b := shop(t, nil)
	first, err := c.Apply(b, 0)
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.Apply(b, 0)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(steady(first), steady(again)); diff != "" {
		t.Errorf("status (-first +again):\n%s", diff)
	}
}

// Rollback goes back and forth. A version that was in force keeps older ones out
// for good.
func TestRollback(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	if _, err := c.Rollback(); err == nil || err.Error() != "there is no previous image" {
		t.Errorf("rollback of nothing: %v", err)
	}
	for _, v := range []uint64{7, 8} {
		if _, err := c.Apply(shop(t, version(v)), 0); err != nil {
			t.Fatal(err)
		}
	}
	for i, want := range []struct{ active, previous uint64 }{{7, 8}, {8, 7}, {7, 8}} {
		s, err := c.Rollback()
		if err != nil {
			t.Fatal(err)
		}
		if s.Active.Version != want.active || s.Previous.Version != want.previous || int(s.Active.Epoch) != i+3 {
			t.Errorf("rollback %d: active %+v, previous %+v", i, s.Active, s.Previous)
		}
	}
	if _, err := c.Apply(shop(t, func(p *policy.Policy) { p.Crossings[0].Purpose = "x" }), 0); err == nil {
		t.Error("version 7 was accepted with other content")
	}
	if s, err := c.Apply(shop(t, version(9)), 0); err != nil || s.Active.Version != 9 || s.Previous.Version != 7 {
		t.Errorf("apply after rollback: %+v, %v", s, err)
	}
}

// A core that starts takes over what the last one attached, without detaching
// anything, and counts on.
func TestRestartAdopts(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	b := shop(t, nil)
	if _, err := c.Apply(b, 0); err != nil {
		t.Fatal(err)
	}
	before := linkIDs(t, c)
	for i := range 5 {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		m.mkdir("/lab/postgres/while-away")
		c = m.start()
		s := c.Status()
		if s.State != proto.StateEnforcing || s.Active.Version != 7 || int(s.Active.Epoch) != i+2 {
			t.Fatalf("restart %d: %+v", i, s)
		}
		if got := identity(t, c, "/lab/postgres/while-away"); got != id(t, b, "postgres") {
			t.Errorf("restart %d: a cgroup made meanwhile is %d", i, got)
		}
	}
	if diff := cmp.Diff(before, linkIDs(t, c)); diff != "" {
		t.Errorf("links (-before +after):\n%s", diff)
	}
}

func linkIDs(t *testing.T, c *Core) map[string]uint32 {
	t.Helper()
	ids := map[string]uint32{}
	for h, l := range c.links.open {
		info, err := l.Info()
		if err != nil {
			t.Fatal(err)
		}
		ids[h.program] = uint32(info.ID)
	}
	return ids
}

func TestOneCoreOnly(t *testing.T) {
	m := newMachine(t)
	m.start()
	if _, err := m.open(hooks{}); err == nil || !strings.HasPrefix(err.Error(), "another demarc-core uses ") {
		t.Errorf("second core: %v", err)
	}
	if err := Detach(m.config); err == nil || !strings.HasPrefix(err.Error(), "another demarc-core uses ") {
		t.Errorf("detach beside a core: %v", err)
	}
}

// Without a policy a core leaves nothing; with one it leaves enforcement, and
// detach ends it.
func TestCloseAndDetach(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	c.Close()
	absent(t, m.config.BPFFS)

	c = m.start()
	if _, err := c.Apply(shop(t, nil), 0); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if n := attached(t, m); n != len(attachOrder)-namers {
		t.Errorf("%d programs are attached without a core", n)
	}
	if err := Detach(m.config); err != nil {
		t.Fatal(err)
	}
	absent(t, m.config.BPFFS)
	if n := attached(t, m); n != 0 {
		t.Errorf("%d programs are attached after detach", n)
	}
}

func absent(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is there: %v", path, err)
	}
}

// A disk that lost or broke the image must not open what is enforced.
func TestStoredImageBroken(t *testing.T) {
	broken := []byte("DEMARCIM, once")
	tests := []struct {
		name             string
		active, previous []byte // nil = leave, empty = remove
		reboot           bool   // nothing is pinned
		state            proto.State
		version          uint64
		err              string
	}{
		{name: "OK whole", state: proto.StateEnforcing, version: 8},
		{name: "OK whole after reboot", reboot: true, state: proto.StateEnforcing, version: 8},
		{name: "bad active", active: broken, state: proto.StateDegraded}, // the kernel goes on with version 8
		{name: "bad active after reboot", active: broken, reboot: true, state: proto.StateDegraded, version: 7},
		{name: "bad previous", previous: broken, state: proto.StateEnforcing, version: 8},
		{name: "bad both", active: broken, previous: broken, state: proto.StateDegraded},
		{name: "bad both after reboot", active: broken, previous: broken, reboot: true, err: "stored active image: "},
		{name: "bad active lost", active: []byte{}, previous: []byte{}, state: proto.StateDegraded},
		{name: "OK lost after reboot", active: []byte{}, previous: []byte{}, reboot: true, state: proto.StateIdle},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			c := m.start()
			for _, v := range []uint64{7, 8} {
				if _, err := c.Apply(shop(t, version(v)), 0); err != nil {
					t.Fatal(err)
				}
			}
			c.Close()
			if tt.reboot {
				if err := Detach(m.config); err != nil {
					t.Fatal(err)
				}
			}
			spoil(t, c, activeImage, tt.active)
			spoil(t, c, previousImage, tt.previous)
			c, err := m.open(hooks{})
			if tt.err != "" {
				if err == nil || !strings.HasPrefix(err.Error(), tt.err) {
					t.Fatalf("got %v, want %s", err, tt.err)
				}
				absent(t, m.config.BPFFS)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			s := c.Status()
			var got uint64
			if s.Active != nil {
				got = s.Active.Version
			}
			if s.State != tt.state || got != tt.version {
				t.Errorf("state %v, version %d; want %v, %d (%v)", s.State, got, tt.state, tt.version, s.Problems)
			}
			if want := len(attachOrder) - namers; s.State != proto.StateIdle && attached(t, m) != want {
				t.Errorf("%d programs are attached, want %d", attached(t, m), want)
			}
		})
	}
}

// spoil writes both copies of a record, or removes them if there is no content; nil
// leaves them.
func spoil(t *testing.T, c *Core, name string, content []byte) {
	t.Helper()
	for _, copy := range copies {
		var err error
		switch file := c.store.file(name, copy); {
		case content == nil:
		case len(content) == 0:
			err = os.Remove(file)
		default:
			err = os.WriteFile(file, content, 0o600)
		}
		must(t, err)
	}
}

// When the disk refuses the image, the kernel keeps what it had.
func TestApplyDiskRefuses(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	if _, err := c.Apply(shop(t, version(7)), 0); err != nil {
		t.Fatal(err)
	}
	before := c.Status()
	for _, file := range []string{c.store.file(nextImage, "a"), c.store.file(nextImage, "b"), c.store.file(previousImage, "a")} {
		if err := os.MkdirAll(filepath.Join(file, "in the way"), 0o700); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Apply(shop(t, version(8)), 0); err == nil {
			t.Errorf("%s is a directory and apply worked", file)
		}
		after := c.Status()
		if after.State != proto.StateEnforcing || after.Active.Version != 7 || after.Active.Slot != before.Active.Slot {
			t.Errorf("after a refusal by %s: %+v", file, after)
		}
		if err := os.RemoveAll(file); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Apply(shop(t, version(8)), 0); err != nil {
		t.Errorf("the disk is well again: %v", err)
	}
}

// Enforcing is said only of what the kernel shows at that moment: a link that
// somebody detached, a pin that somebody removed, a program or a state that
// somebody replaced. (I05)
func TestI05StatusIsProved(t *testing.T) {
	m := newMachine(t)
	c := still(m.start()) // which would mend it
	if _, err := c.Apply(shop(t, nil), 0); err != nil {
		t.Fatal(err)
	}
	// Links that nothing refers to would be closed now.
	for range 3 {
		runtime.GC()
	}
	if s := c.Status(); s.State != proto.StateEnforcing || attached(t, m) != len(attachOrder)-namers {
		t.Fatalf("after garbage collection: %+v", s)
	}
	state, err := readState(c.objects)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name    string
		do      func() error
		problem string
	}{
		{"other state", func() error { return writeState(c.objects, abi.State{}) }, "the kernel's state is 0x0"},
		{"pin removed", func() error { return os.Remove(c.pins.links("egress")) }, "link egress: lstat"},
		{"program replaced", func() error {
			return c.links.open[hook{program: "ingress"}].Update(c.objects.Programs["selftest_ingress"])
		}, "link ingress: runs program"},
		{"link detached", func() error { return c.links.open[hook{program: "connect4"}].Detach() }, "link connect4: was detached"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.do(); err != nil {
				t.Fatal(err)
			}
			s := c.Status()
			found := false
			for _, p := range s.Problems {
				found = found || strings.HasPrefix(p, tt.problem)
			}
			if s.State != proto.StateDegraded || !found {
				t.Errorf("state %v, problems %q; want %q", s.State, s.Problems, tt.problem)
			}
			if err := writeState(c.objects, state); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// BenchmarkApply10kx100k is from the encoded image to in force.
func BenchmarkApply10kx100k(b *testing.B) {
	c := newMachine(b).start()
	img, err := policy.Compile(policytest.Large(10_000, 100_000))
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		img.Version++
		encoded, err := encode.Image(img)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.Apply(encoded, 0); err != nil {
			b.Fatal(err)
		}
	}
}
