package core

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/image/encode"
	"github.com/demarc/demarc/policy/policytest"
)

// Tables that do not mean what the image says are found before they decide
// anything, whichever table it is.
func TestSelftestFindsWrongTables(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	b := shop(t, func(p *policy.Policy) { // something for each table
		p.Crossings[2].Since = time.Now().Add(2 * time.Hour).Truncate(time.Second)
		p.Crossings = append(p.Crossings, policy.Crossing{Name: "resolver", Need: image.NoProof, From: []policy.Term{{Kind: image.TermWorkload, Name: "web"}},
			To: []policy.Term{{Kind: image.TermNetwork, Name: "office"}}, Ports: []image.Span{{Proto: image.UDP, Low: 53, High: 53}}})
	})
	g, err := openImage(b, nil)
	must(t, err)
	must(t, g.fill(c.objects))
	defer g.close()
	must(t, testAll(c, g))

	// The packets bring real tags: were those of this boot's first minute taken for
	// good, or later ones not, it would be seen.
	other, err := newSelftest(c.objects, g, nil, false)
	must(t, err)
	other.stale = !other.stale
	if err := other.before(); err == nil || !strings.Contains(err.Error(), "the packet ") {
		t.Errorf("tags are not looked at: %v", err)
	}

	first := func(m *ebpf.Map, key, value any) {
		t.Helper()
		if !m.Iterate().Next(key, value) {
			t.Fatal("empty table")
		}
	}
	crossing := func(name string, change func(*abi.Crossing)) func() func() {
		return func() func() {
			var v abi.Crossing
			n := uint32(slices.IndexFunc(g.image.Crossings, func(c image.Crossing) bool { return c.Name == name }))
			must(t, g.tables["crossings"].Lookup(n, &v))
			other := v
			if change(&other); other == v {
				t.Fatalf("crossing %s is the same: %+v", name, v)
			}
			must(t, g.tables["crossings"].Put(n, &other))
			return func() { must(t, g.tables["crossings"].Put(n, &v)) }
		}
	}
	port := func(at, as uint16) func() func() {
		return func() func() {
			var v, other abi.PortClasses
			must(t, g.tables["ports"].Lookup(uint32(abi.RowTCP), &v))
			if other = v; v.Class[at] == v.Class[as] {
				t.Fatalf("port %d is of the class of %d", at, as)
			}
			other.Class[at] = v.Class[as]
			must(t, g.tables["ports"].Put(uint32(abi.RowTCP), &other))
			return func() { must(t, g.tables["ports"].Put(uint32(abi.RowTCP), &v)) }
		}
	}
	const asked, written = ": expected {Verdict:", " is not what was written"
	tests := []struct {
		name string
		says string
		do   func() (undo func())
	}{
		{"bad rule missing", asked, func() func() {
			var k abi.RuleKey
			var v abi.Rule
			first(g.tables["rules"], &k, &v)
			must(t, g.tables["rules"].Delete(&k))
			return func() { must(t, g.tables["rules"].Put(&k, &v)) }
		}},
		{"bad rule for another crossing", asked, func() func() {
			var k abi.RuleKey
			var v abi.Rule
			for rules := g.tables["rules"].Iterate(); image.Peer(k.Peer).Kind() != image.PeerIdentity; {
				if !rules.Next(&k, &v) {
					t.Fatal("no rule names an identity")
				}
			}
			other := v
			other.Crossing[0]++
			must(t, g.tables["rules"].Put(&k, &other))
			return func() { must(t, g.tables["rules"].Put(&k, &v)) }
		}},
		{"bad subject missing", asked, func() func() {
			k := id(t, b, "web")
			var v abi.Subject
			must(t, g.tables["subjects"].Lookup(k, &v))
			must(t, g.tables["subjects"].Delete(k))
			return func() { must(t, g.tables["subjects"].Put(k, &v)) }
		}},
		{"bad unmanaged may not open", asked, func() func() {
			var v abi.Subject
			must(t, g.tables["subjects"].Lookup(uint32(image.Unmanaged), &v))
			other := v
			other.Flags = 0
			must(t, g.tables["subjects"].Put(uint32(image.Unmanaged), &other))
			return func() { must(t, g.tables["subjects"].Put(uint32(image.Unmanaged), &v)) }
		}},
		{"bad window closed", asked, crossing("break-glass", func(c *abi.Crossing) { c.Until = 1 })},
		{"bad window that ends never", asked, crossing("break-glass", func(c *abi.Crossing) { c.Until = 0 })},
		{"bad window that begins now", asked, crossing("api-db", func(c *abi.Crossing) { c.Since = 0 })},
		{"bad window that begins a second later", asked, crossing("api-db", func(c *abi.Crossing) { c.Since += uint64(time.Second) })},
		{"bad crossing without its limit", written, crossing("web-api", func(c *abi.Crossing) { c.Interval, c.Slack = 0, 0 })},
		{"bad crossing behind a translation", written, crossing("web-api", func(c *abi.Crossing) { c.NAT ^= 1 })},
		{"bad crossing for forensics", written, crossing("web-api", func(c *abi.Crossing) { c.Flags ^= abi.CrossingForensic })},
		{"bad port below a range", asked, port(8079, 8080)},
		{"bad port above a range", asked, port(8081, 8080)},
		{"bad port far from a range", written, port(21, 8080)},
		{"bad port classes", asked, func() func() {
			var v abi.PortClasses
			must(t, g.tables["ports"].Lookup(uint32(abi.RowTCP), &v))
			must(t, g.tables["ports"].Put(uint32(abi.RowTCP), &abi.PortClasses{}))
			return func() { must(t, g.tables["ports"].Put(uint32(abi.RowTCP), &v)) }
		}},
		{"bad networks missing", asked, func() func() {
			var k abi.PrefixKey
			var v uint32
			first(g.tables["prefixes"], &k, &v)
			must(t, g.tables["prefixes"].Delete(&k))
			return func() { must(t, g.tables["prefixes"].Put(&k, &v)) }
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			undo := tt.do()
			err := testAll(c, g)
			if err == nil || !strings.HasPrefix(err.Error(), "self-test: ") || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v", err)
			}
			undo()
			must(t, testAll(c, g))
		})
	}
	must(t, emptySlot(c.objects, g.slot))
}

// testAll asks everything that there is to ask about a filled generation.
func testAll(c *Core, g *generation) error {
	test, err := newSelftest(c.objects, g, nil, false)
	if err != nil {
		return err
	}
	return errors.Join(test.before(), test.after())
}

// many is a policy of which the self-test asks only a part before the flip.
func many(t *testing.T, version uint64, change func(*policy.Policy)) []byte {
	t.Helper()
	p := policytest.Large(200, 3072)
	p.Version = version
	if change != nil {
		change(p)
	}
	img, err := policy.Compile(p)
	must(t, err)
	b, err := encode.Image(img)
	must(t, err)
	return b
}

// Before the flip come the questions about all that is not as it was; after it those
// about everything else.
func TestSelftestAsksWhatChangedFirst(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	former, err := openImage(many(t, 1, nil), nil)
	must(t, err)
	g, err := openImage(many(t, 2, func(p *policy.Policy) {
		p.Crossings[5] = policy.Crossing{Name: "more", Ports: []image.Span{policytest.TCP(7300)},
			From: []policy.Term{policytest.Workload("w000000")}, To: []policy.Term{policytest.Workload("w000001")}}
	}), nil)
	must(t, err)
	must(t, g.fill(c.objects))
	defer g.close()

	asked := func(s *selftest, before bool) map[image.Query]bool {
		all := map[image.Query]bool{}
		for _, q := range s.askRules(nil, before) {
			all[q] = true
		}
		return all
	}
	whole, err := newSelftest(c.objects, g, nil, false)
	must(t, err)
	part, err := newSelftest(c.objects, g, former, false)
	must(t, err)
	boot, err := newSelftest(c.objects, g, nil, true)
	must(t, err)
	part.now, boot.now = whole.now, whole.now
	all, first, then := asked(whole, true), asked(part, true), asked(part, false)
	soon, late := asked(boot, true), asked(boot, false)
	for q := range all {
		if !first[q] && !then[q] || !soon[q] && !late[q] {
			t.Fatalf("nobody asks %+v", q)
		}
	}
	if len(soon) == 0 || len(soon) > 2*2*bootSample {
		t.Errorf("after a boot %d of %d questions come first", len(soon), len(all))
	}
	must(t, boot.before())
	must(t, boot.after())
	for _, s := range [...]*selftest{whole, part, boot} {
		if before, after := len(s.askSubjects(nil, true)), len(s.askSubjects(nil, false)); before+after != 11*(200+5) || s == whole && after != 0 {
			t.Errorf("of the subjects %d questions come before, and %d after", before, after)
		}
	}
	if len(asked(whole, false)) != 0 || len(first) == 0 || len(first) > len(all)/2 || len(part.former.gone) == 0 {
		t.Errorf("%d of %d questions come first, and %d about rules that are no more", len(first), len(all), len(part.former.gone))
	}
	for i := range g.image.Rules {
		if r := &g.image.Rules[i]; part.fresh[i] && !first[part.about(r, part.sites)] {
			t.Errorf("the rule for %s is new and not asked about first", r.RuleKey)
		}
	}
	must(t, part.before())
	must(t, part.after())

	// A rule that is gone and still there is found before the flip, one that should be
	// there and is not, after it at the latest.
	key := func(r *image.Rule) *abi.RuleKey {
		return &abi.RuleKey{Subject: uint32(r.Subject), Peer: uint32(r.Peer), Class: r.Class, Direction: abi.Direction(r.Direction)}
	}
	later := 0
	for part.fresh[later] || later%part.stride == part.offset {
		later++
	}
	must(t, g.tables["rules"].Delete(key(&g.image.Rules[later])))
	for _, s := range [...]*selftest{part, boot} {
		if err := errors.Join(s.before(), s.after()); err == nil {
			t.Errorf("a rule that is missing is not found, after a boot: %v", s == boot)
		}
	}
	must(t, g.tables["rules"].Put(key(part.former.gone[0]), &abi.Rule{Crossing: [abi.Alternatives]uint32{0, abi.NoCrossing, abi.NoCrossing, abi.NoCrossing}}))
	if err := part.before(); err == nil {
		t.Error("a rule that should be gone is not found before the flip")
	}
	must(t, emptySlot(c.objects, g.slot))
}

// pinnedMap opens a map for the rest of the test.
func pinnedMap(t *testing.T, path string) *ebpf.Map {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(path, nil)
	must(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

// A wrong answer after the flip takes it back: what was in force is again, and on disk.
// After a boot that is nothing, and the start fails.
func TestSelftestAfterTheFlip(t *testing.T) {
	m := newMachine(t)
	spoil := false
	spoiling := hooks{flipped: func() {
		if spoil { // the table is frozen, so there is none in its place
			var state abi.State
			at := pins{dir: m.config.BPFFS}
			must(t, pinnedMap(t, at.maps("state")).Lookup(uint32(0), &state))
			must(t, pinnedMap(t, at.maps("rules")).Delete(abi.ActiveSlot(state.Active)))
		}
	}}
	c, err := m.open(spoiling)
	must(t, err)
	defer func() { c.Close() }()
	_, err = c.Apply(many(t, 1, nil), 0)
	must(t, err)
	for _, ready := range []bool{false, true} {
		if ready { // all but the questions behind the flip
			must(t, prepare(c, many(t, 2, nil)))
		}
		spoil = true
		if _, err = c.Apply(many(t, 2, nil), 0); err == nil || !strings.HasPrefix(err.Error(), "self-test: ") {
			t.Fatalf("ready %v: got %v", ready, err)
		}
		spoil = false
		status := c.Status()
		if status.Active.Version != 1 || status.State != proto.StateEnforcing || c.prepared != nil {
			t.Errorf("ready %v: %+v", ready, status)
		}
	}
	if _, err = c.Apply(many(t, 2, nil), 0); err != nil {
		t.Error(err)
	}
	must(t, c.Close())
	must(t, Detach(m.config))
	spoil = true
	if broken, err := m.open(spoiling); err == nil || !strings.HasPrefix(err.Error(), "self-test: ") {
		t.Errorf("a start on wrong tables: %v", err)
		broken.Close()
	}
	if n := attached(t, m); n != 0 || !missing(m.config.BPFFS) {
		t.Errorf("%d programs stay attached, or pins", n)
	}
	spoil = false
	c, err = m.open(hooks{})
	must(t, err)
	if s := c.Status(); s.State != proto.StateEnforcing || s.Active.Version != 2 {
		t.Errorf("a start on good ones: %+v", s)
	}
}
