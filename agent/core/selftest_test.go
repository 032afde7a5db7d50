package core

import (
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

// Tables that do not mean what the image says are found before they decide
// anything, whichever table it is.
func TestSelftestFindsWrongTables(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	b := shop(t, func(p *policy.Policy) { // something for each table
		p.Crossings = append(p.Crossings, policy.Crossing{Name: "resolver", Need: image.NoProof, From: []policy.Term{{Kind: image.TermWorkload, Name: "web"}},
			To: []policy.Term{{Kind: image.TermNetwork, Name: "office"}}, Ports: []image.Span{{Proto: image.UDP, Low: 53, High: 53}}})
	})
	g, err := openImage(b)
	must(t, err)
	must(t, g.fill(c.objects))
	defer g.close()
	must(t, runSelftest(c.objects, g))

	// The packets bring real tags: were those of this boot's first minute taken for
	// good, or later ones not, it would be seen.
	other, err := newSelftest(c.objects, g)
	must(t, err)
	other.stale = !other.stale
	if err := other.run(); err == nil || !strings.Contains(err.Error(), "the packet ") {
		t.Errorf("tags are not looked at: %v", err)
	}

	first := func(m *ebpf.Map, key, value any) {
		t.Helper()
		if !m.Iterate().Next(key, value) {
			t.Fatal("empty table")
		}
	}
	tests := []struct {
		name string
		do   func() (undo func())
	}{
		{"bad rule missing", func() func() {
			var k abi.RuleKey
			var v abi.Rule
			first(g.tables["rules"], &k, &v)
			must(t, g.tables["rules"].Delete(&k))
			return func() { must(t, g.tables["rules"].Put(&k, &v)) }
		}},
		{"bad rule for another crossing", func() func() {
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
		{"bad subject missing", func() func() {
			k := id(t, b, "web")
			var v abi.Subject
			must(t, g.tables["subjects"].Lookup(k, &v))
			must(t, g.tables["subjects"].Delete(k))
			return func() { must(t, g.tables["subjects"].Put(k, &v)) }
		}},
		{"bad unmanaged may not open", func() func() {
			var v abi.Subject
			must(t, g.tables["subjects"].Lookup(uint32(image.Unmanaged), &v))
			other := v
			other.Flags = 0
			must(t, g.tables["subjects"].Put(uint32(image.Unmanaged), &other))
			return func() { must(t, g.tables["subjects"].Put(uint32(image.Unmanaged), &v)) }
		}},
		{"bad window closed", func() func() {
			var v abi.Crossing
			must(t, g.tables["crossings"].Lookup(uint32(1), &v))
			other := v
			other.Until = 1
			must(t, g.tables["crossings"].Put(uint32(1), &other))
			return func() { must(t, g.tables["crossings"].Put(uint32(1), &v)) }
		}},
		{"bad port classes", func() func() {
			var v abi.PortClasses
			must(t, g.tables["ports"].Lookup(uint32(abi.RowTCP), &v))
			must(t, g.tables["ports"].Put(uint32(abi.RowTCP), &abi.PortClasses{}))
			return func() { must(t, g.tables["ports"].Put(uint32(abi.RowTCP), &v)) }
		}},
		{"bad networks missing", func() func() {
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
			err := runSelftest(c.objects, g)
			if err == nil || !strings.HasPrefix(err.Error(), "self-test: ") || !strings.Contains(err.Error(), ": expected {Verdict:") {
				t.Errorf("got %v", err)
			}
			undo()
			must(t, runSelftest(c.objects, g))
		})
	}
	must(t, emptySlot(c.objects, g.slot))
}
