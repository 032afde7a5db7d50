package core

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"maps"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/core/proto"

	"github.com/cilium/ebpf"
)

// What was previewed lies ready, and is applied as it lies, if nothing came between.
func TestPreviewed(t *testing.T) {
	pod := id(t, shop(t, nil), "pod")
	tests := []struct {
		name    string
		between func(t *testing.T, c *Core, prepared *generation, previewed []byte)
		another bool // image is applied
		again   bool // it is filled again
	}{
		{"OK at once", func(*testing.T, *Core, *generation, []byte) {}, false, false},
		{"OK previewed twice", func(t *testing.T, c *Core, _ *generation, previewed []byte) {
			if _, err := c.Preview(previewed, proto.Own{}); err != nil {
				t.Error(err)
			}
		}, false, false},
		{"OK looked after", func(_ *testing.T, c *Core, _ *generation, _ []byte) { c.upkeep() }, false, false},
		{"OK another one", func(*testing.T, *Core, *generation, []byte) {}, true, true},
		{"OK the present one went back", func(t *testing.T, c *Core, _ *generation, _ []byte) {
			if _, err := c.Rollback(); err != nil {
				t.Error(err)
			}
		}, false, true},
		{"bad a path was bound", func(t *testing.T, c *Core, _ *generation, _ []byte) { must(t, c.Bind("/lab/pod-2", pod)) }, false, true},
		{"bad a path was let go", func(t *testing.T, c *Core, _ *generation, _ []byte) { must(t, c.Unbind("/lab/pod-1")) }, false, true},
		{"bad a table was replaced", func(t *testing.T, c *Core, p *generation, _ []byte) {
			must(t, c.objects.Maps["rules"].Put(p.slot, c.active.tables["rules"]))
		}, false, true},
		{"bad long ago", func(_ *testing.T, _ *Core, p *generation, _ []byte) { p.since = p.since.Add(-preparedFor) }, false, true},
		{"bad long ago, and looked after", func(t *testing.T, c *Core, p *generation, _ []byte) {
			p.since = p.since.Add(-preparedFor)
			c.upkeep()
			var id uint32
			if err := c.objects.Maps["rules"].Lookup(p.slot, &id); !errors.Is(err, ebpf.ErrKeyNotExist) || c.prepared != nil {
				t.Errorf("its slot is not free: %v", err)
			}
		}, false, true},
	}
	m := newMachine(t)
	c := still(m.start())
	next := uint64(1)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in, previewed, other := shop(t, version(next)), shop(t, version(next+1)), shop(t, version(next+2))
			next += 3
			if _, err := c.Apply(in, 0); err != nil {
				t.Fatal(err)
			}
			must(t, c.Bind("/lab/pod-1", pod))
			must(t, c.Unbind("/lab/pod-2"))
			state, err := kernelState(c.objects)
			must(t, err)
			if _, err := c.Preview(previewed, proto.Own{}); err != nil {
				t.Fatal(err)
			}
			if after, err := kernelState(c.objects); err != nil || after != state {
				t.Errorf("the preview changed the state: %+v, before it %+v; %v", after, state, err)
			}
			if missing(c.store.file(nextImage, "a")) || missing(c.store.file(nextImage, "b")) {
				t.Error("it is not staged")
			}
			prepared := c.prepared
			ids := maps.Clone(prepared.ids)
			tt.between(t, c, prepared, previewed)
			late := "/lab/pod-1/" + strconv.Itoa(int(next))
			m.mkdir(late)
			want := identity(t, c, late)

			if tt.another {
				previewed = other
			}
			s, err := c.Apply(previewed, 0)
			if err != nil {
				t.Fatal(err)
			}
			if again := !maps.Equal(ids, c.active.ids); again != tt.again {
				t.Errorf("filled again: %v, want %v", again, tt.again)
			}
			if got := identity(t, c, late); got != want {
				t.Errorf("%s is bound to %d, not %d", late, got, want)
			}
			if len(s.Problems) > 0 || c.prepared != nil || time.Since(s.Active.Since) > time.Minute || len(c.active.misplaced(c.objects)) > 0 {
				t.Errorf("status %+v, %+v", s, s.Active)
			}
			if !missing(c.store.file(nextImage, "a")) || !missing(c.store.file(nextImage, "b")) {
				t.Error("something is staged")
			}
			if g, err := c.stored(activeImage); err != nil || g.digest != c.active.digest {
				t.Errorf("the image in force is not the stored one: %v", err)
			}
			if wrong := c.watchBindings(); len(wrong) > 0 {
				t.Errorf("bindings: %v", wrong)
			}
		})
	}
}

// What was previewed is applied by its digest alone, as it lies, and nothing else is.
func TestAppliedByDigest(t *testing.T) {
	c := still(newMachine(t).start())
	present, previewed, other := shop(t, version(1)), shop(t, version(2)), shop(t, version(3))
	must(t, second(c.Apply(present, 0)))
	apply := func(b []byte) error {
		sum := sha256.Sum256(b)
		return second(c.apply(nil, change{previewed: hex.EncodeToString(sum[:])}, "core"))
	}
	refused := func(when string, b []byte) {
		t.Helper()
		before := c.active
		if err := apply(b); err == nil || !strings.Contains(err.Error(), "was just previewed") || c.active != before {
			t.Errorf("%s: %v", when, err)
		}
	}
	refused("nothing is previewed", present)
	must(t, second(c.Preview(previewed, proto.Own{})))
	refused("another one is", other)
	refused("nor is no digest one", nil)
	ids := maps.Clone(c.prepared.ids)
	must(t, apply(previewed))
	if c.active.image.Version != 2 || !maps.Equal(ids, c.active.ids) {
		t.Errorf("version %d is in force, filled again: %v", c.active.image.Version, !maps.Equal(ids, c.active.ids))
	}
	refused("it is in force", other)
	must(t, second(c.Preview(other, proto.Own{})))
	c.prepared.since = c.prepared.since.Add(-preparedFor)
	c.upkeep()
	refused("it lay for too long", other)
}

// What is prepared is not in force, and is applied as it lies, with the questions that are
// left; a preview in between asks them.
func TestPrepared(t *testing.T) {
	c := still(newMachine(t).start())
	must(t, second(c.Apply(many(t, 1, nil), 0)))
	for i, tt := range []struct {
		name    string
		between func(b []byte) error
		left    bool
	}{
		{"OK at once", func([]byte) error { return nil }, true},
		{"OK twice", func(b []byte) error { return prepare(c, b) }, true},
		{"OK previewed", func(b []byte) error { return second(c.Preview(b, proto.Own{})) }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := many(t, uint64(i+2), nil)
			state, err := kernelState(c.objects)
			must(t, err)
			must(t, prepare(c, b))
			if after, err := kernelState(c.objects); err != nil || after != state || c.active.image.Version != uint64(i+1) {
				t.Errorf("something changed: %+v, before %+v; %v", after, state, err)
			}
			ids := maps.Clone(c.prepared.ids)
			must(t, tt.between(b))
			if left := c.prepared.left != nil; left != tt.left {
				t.Errorf("questions are left: %v, want %v", left, tt.left)
			}
			must(t, second(c.Apply(b, 0)))
			if !maps.Equal(ids, c.active.ids) || c.active.image.Version != uint64(i+2) || c.active.left != nil || c.prepared != nil {
				t.Errorf("version %d in force, filled again: %v", c.active.image.Version, !maps.Equal(ids, c.active.ids))
			}
			if s := c.Status(); len(s.Problems) > 0 {
				t.Errorf("%+v", s)
			}
			must(t, prepare(c, b))
			if c.prepared != nil {
				t.Error("what is in force is prepared")
			}
		})
	}
	if err := prepare(c, many(t, 1, nil)); err == nil || c.prepared != nil {
		t.Errorf("an older version is prepared: %v", err)
	}
}

func prepare(c *Core, b []byte) error {
	g, err := c.offered(b, "")
	if err != nil {
		return err
	}
	return c.prepare(g, change{ahead: true})
}
