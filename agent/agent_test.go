package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/auditlog"
	"github.com/demarc/demarc/agent/core/audit"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/identity"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/image/encode"
)

func TestStatusFollowsTheCore(t *testing.T) {
	core := newStandIn()
	core.stop()
	r := start(t, core, nil)
	s, err := r.client.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := &api.Status{
		Node: "n1", Version: "dev", State: api.StateUnknown, Core: api.Core{Problem: "connect to core: nobody there"},
		Rings: []api.Ring{{Name: "denied"}, {Name: "allowed"}, {Name: "signals"}}, Problems: []string{"core: connect to core: nobody there"},
	}
	if d := cmp.Diff(want, s); d != "" {
		t.Errorf("core away (-want +got):\n%s", d)
	}

	for range 3 {
		core.start()
		eventually(t, "idle", func() bool { s, err = r.client.Status(t.Context()); return err == nil && s.State == proto.StateIdle })
		if !s.Core.Connected || s.Policy != nil || len(s.Problems) > 0 {
			t.Errorf("connected: %+v", s)
		}
		core.stop()
		eventually(t, "unknown", func() bool { s, err = r.client.Status(t.Context()); return err == nil && s.State == api.StateUnknown })
		if s.Core.Connected || s.Core.Problem == "" {
			t.Errorf("away again: %+v", s)
		}
	}
}

// What was previewed is applied without being sent again; what was not is sent.
func TestApplyPreviewed(t *testing.T) {
	r := start(t, newStandIn(), nil)
	for i, previewed := range []bool{true, false} {
		img := compile(t, strings.Replace(source, "version: 1", fmt.Sprintf("version: %d", i+1), 1))
		if previewed {
			if _, err := r.client.Preview(t.Context(), img); err != nil {
				t.Fatal(err)
			}
		}
		s, err := r.client.ApplyPreviewed(t.Context(), img, 0, 0)
		if err != nil || s.Policy == nil || s.Policy.Version != uint64(i+1) {
			t.Fatalf("previewed %v: %+v, %v", previewed, s, err)
		}
	}
}

// The core is told which connections are the caller's own, and only what they can be.
func TestPreviewNamesOwn(t *testing.T) {
	core := newStandIn()
	r := start(t, core, nil)
	img := compile(t, source)
	own := proto.Ends{Local: netip.MustParseAddrPort("[2001:db8::1]:22"), Remote: netip.MustParseAddrPort("[2001:db8::9]:50112")}
	for _, tt := range []struct {
		name string
		own  []proto.Ends
		want string // "" = asked
	}{
		{"OK none", nil, ""},
		{"OK one", []proto.Ends{own}, ""},
		{"OK as many as there may be", slices.Repeat([]proto.Ends{own}, proto.MaxOwn), ""},
		{"bad one more", slices.Repeat([]proto.Ends{own}, proto.MaxOwn+1), "own: 17 connections, at most 16"},
		{"bad half", []proto.Ends{{Local: own.Local}}, `own: "[2001:db8::1]:22,invalid AddrPort" is not two ends of a connection`},
	} {
		var want proto.Own
		copy(want[:], tt.own)
		_, err := r.client.Preview(t.Context(), img, tt.own...)
		if (err == nil) != (tt.want == "") || err != nil && err.Error() != tt.want {
			t.Errorf("%s: %v", tt.name, err)
		}
		core.mu.Lock()
		if err == nil && core.own != want {
			t.Errorf("%s: the core is told %v", tt.name, core.own)
		}
		core.mu.Unlock()
	}
}

// The core has an image ready while the agent looks at it. One that is not good is not
// applied: neither then, nor by its digest.
func TestNotGoodIsNotApplied(t *testing.T) {
	core := newStandIn()
	r := start(t, core, nil)
	img, err := image.Decode(compile(t, source))
	if err != nil {
		t.Fatal(err)
	}
	img.Rules = img.Rules[1:]
	bad, err := encode.Image(img)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name     string
		verified error // what the core says of it
		apply    func(context.Context, []byte, time.Duration, time.Duration) (*api.Status, error)
		want     string
	}{
		{"bad though the core verified it", nil, r.client.ApplySparing, "image and policy differ: subject web"},
		{"bad, and the core has it ready", nil, r.client.ApplyPreviewed, "image and policy differ: subject web"},
		{"bad, and the core says so", proto.Refuse("", "no"), r.client.ApplySparing, "verify image: rule for "},
	} {
		core.mu.Lock()
		core.unverified = tt.verified
		core.mu.Unlock()
		if _, err := tt.apply(t.Context(), bad, 0, 0); err == nil || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	core.mu.Lock()
	defer core.mu.Unlock()
	if !bytes.Equal(core.previewed, bad) || len(core.images) != 0 {
		t.Errorf("ready %v, %d in force", bytes.Equal(core.previewed, bad), len(core.images))
	}
}

func TestApplyAndRollback(t *testing.T) {
	core := newStandIn()
	r := start(t, core, nil)
	first := compile(t, source)
	s, err := r.client.Apply(t.Context(), first, 0)
	if err != nil {
		t.Fatal(err)
	}
	if p := s.Policy; s.State != proto.StateEnforcing || p == nil || p.Name != "shop" || p.Version != 1 || p.Workloads != 2 || p.Crossings != 1 {
		t.Errorf("after apply: %+v", s)
	}
	if _, err := r.client.Apply(t.Context(), compile(t, strings.Replace(source, "version: 1", "version: 2", 1)), 0); err != nil {
		t.Fatal(err)
	}
	if s, err = r.client.Rollback(t.Context()); err != nil || s.Policy.Version != 1 {
		t.Errorf("after rollback: %+v, %v", s, err)
	}
	if got, err := r.client.Image(t.Context()); err != nil || string(got) != string(first) {
		t.Errorf("image differs: %d bytes, %v", len(got), err)
	}

	for _, c := range []struct {
		name string
		do   func() error
		want api.Error
	}{
		{"bad rollback", func() error { _, err := r.client.Rollback(t.Context()); return err },
			api.Error{Message: "there is no previous policy", Hint: "apply another one first", Code: http.StatusUnprocessableEntity}},
		{"bad image", func() error { _, err := r.client.Apply(t.Context(), []byte("x"), 0); return err },
			api.Error{Message: "not an image: envelope:1:1: a JSON object is needed", Hint: "build the image again with: demarc policy build FILE -o IMAGE", Code: http.StatusUnprocessableEntity}},
		{"bad core away", func() error {
			core.stop()
			eventually(t, "core left", func() bool { return !r.link.view().Connected })
			_, err := r.client.Rollback(t.Context())
			return err
		},
			api.Error{Message: "the core is not connected", Hint: "start demarc-core; what it enforced before goes on meanwhile", Code: http.StatusServiceUnavailable}},
	} {
		var got *api.Error
		if err := c.do(); !errors.As(err, &got) {
			t.Errorf("%s: %v", c.name, err)
		} else if d := cmp.Diff(c.want, *got); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
	}
}

// collect asks for flows and says each line in short.
func collect(t *testing.T, r *running, query string) []string {
	t.Helper()
	v, err := url.ParseQuery(query)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line, err := range r.client.Flows(t.Context(), v) {
		if err != nil {
			return append(out, "error: "+err.Error())
		}
		if line.Flow == nil {
			out = append(out, fmt.Sprintf("lost %d", line.Lost))
			continue
		}
		out = append(out, fmt.Sprintf("%s %s %s -> %s %s", line.Verdict, line.Reason, line.Source.Label(), line.Destination.Label(), line.Crossing))
	}
	return out
}

// The audit log comes through as it is, with where it ends.
func TestAuditLog(t *testing.T) {
	r := start(t, newStandIn(), nil)
	log, head, err := r.client.Audit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	s, err := auditlog.Read([]auditlog.File{{Name: "log", Reader: log}}, head, func(audit.Record) {})
	if err != nil || s.Records != 1 || !s.EndIsProven {
		t.Errorf("read %+v, %v", s, err)
	}
}

func TestFlowsHaveNames(t *testing.T) {
	core := newStandIn()
	r := start(t, core, nil)
	img := compile(t, source)
	if _, err := r.client.Apply(t.Context(), img, 0); err != nil {
		t.Fatal(err)
	}
	id := ids(t, img)
	number := r.link.view().Names.Image.Crossings[0].Number
	tuple := abi.Tuple{Proto: 6, SourcePort: 4000, DestinationPort: 8080}
	copy(tuple.Source[:], []byte{10: 0xff, 11: 0xff, 12: 10, 15: 1})
	copy(tuple.Destination[:], []byte{10: 0xff, 11: 0xff, 12: 10, 15: 2})
	allowed := record.Event{Kind: record.EventVerdict, Hook: record.HookEgress, Time: 1, Seq: 1, Epoch: 1, Subject: id["web"], Peer: id["api"], Proof: abi.ProofIdentity, Verdict: abi.Allow, Reason: abi.ByCrossing, Crossing: number, Tuple: tuple}
	denied := record.Event{Kind: record.EventVerdict, Hook: record.HookEgress, Time: 2, Seq: 1, Epoch: 1, Subject: id["web"], Proof: abi.ProofUnknown, Verdict: abi.Deny, Reason: abi.NoCrossingFor, Tuple: tuple}
	core.emit(t, record.RingAllowed, allowed)
	core.emit(t, record.RingDenied, denied)
	denied.Time, denied.Seq = 3, 5 // 2, 3 and 4 found no room
	core.emit(t, record.RingDenied, denied)
	eventually(t, "three flows", func() bool {
		c := r.link.store.Counts()
		return c[record.RingDenied].Received == 2 && c[record.RingAllowed].Received == 1
	})
	const yes, no = "allow crossing edge/web -> app/api web-api", "deny no-crossing edge/web -> network/lan "
	for _, c := range []struct {
		query string
		want  []string
	}{
		{"", []string{yes, no, no}},
		{"last=2", []string{no, no}},
		{"last=0", nil},
		{"first=1", []string{yes}},
		{"verdict=deny", []string{no, no}},
		{"to=app/api", []string{yes}},
		{"follow=true&first=2", []string{yes, no}},
		{"since=1ms", nil},
		{"until=2000-01-01T00:00:00Z", nil},
		{"follow=true&until=2000-01-01T00:00:00Z", nil},
		{"verdict=perhaps", []string{`error: unknown verdict "perhaps"`}},
		{"verdct=deny", []string{`error: unknown parameter "verdct"`}},
		{"last=x", []string{`error: last: "x" is no count`}},
		{"since=x", []string{`error: since: "x" is no time (RFC 3339) or duration`}},
		{"last=1&first=1", []string{"error: last and first exclude each other"}},
	} {
		if d := cmp.Diff(c.want, collect(t, r, c.query)); d != "" {
			t.Errorf("%q (-want +got):\n%s", c.query, d)
		}
	}

	// A reader that follows is told of losses, and sees what comes later.
	got := make(chan []string)
	go func() { got <- collect(t, r, "last=0&follow=true&first=1&verdict=deny") }()
	denied.Seq = 9
	for done := false; !done; {
		core.emit(t, record.RingDenied, denied) // again and again, since the reader may not be there yet
		denied.Seq += 2
		select {
		case lines := <-got:
			done = true
			if len(lines) < 2 || !strings.HasPrefix(lines[0], "lost ") || lines[len(lines)-1] != no {
				t.Errorf("followed: %q", lines)
			}
		default:
		}
	}
}

func TestListsNameWhatIsBound(t *testing.T) {
	core := newStandIn()
	core.root = t.TempDir()
	if err := os.MkdirAll(filepath.Join(core.root, "lab/api-1/child"), 0o755); err != nil {
		t.Fatal(err)
	}
	r := start(t, core, nil)
	for _, ask := range []func() error{
		func() error { _, err := r.client.Identities(t.Context()); return err },
		func() error { _, err := r.client.Zones(t.Context()); return err },
	} {
		var refused *api.Error
		if err := ask(); !errors.As(err, &refused) || refused.Message != "no policy is in force" {
			t.Errorf("without a policy: %v", err)
		}
	}
	img := compile(t, source)
	if _, err := r.client.Apply(t.Context(), img, 0); err != nil {
		t.Fatal(err)
	}
	id := ids(t, img)
	core.mu.Lock()
	for _, dir := range []string{"lab/api-1", "lab/api-1/child"} {
		core.bindings[inode(t, filepath.Join(core.root, dir))] = id["api"]
	}
	core.bindings[1<<40] = 1
	core.mu.Unlock()
	identities, err := r.client.Identities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []api.Identity{
		{Identity: id["api"], Workload: "api", Zone: "app", SPIFFE: "spiffe://shop.example/app/api", Selectors: []string{"kubernetes namespace=shop, label app=api"}, Bindings: 2, Cgroups: []string{"/lab/api-1"}},
		{Identity: id["web"], Workload: "web", Zone: "edge", SPIFFE: "spiffe://shop.example/edge/web", Selectors: []string{"systemdUnit nginx.service"}},
		{Identity: 1, Reserved: "unmanaged", Zone: "edge", Bindings: 1},
		{Identity: 3, Reserved: "pending"},
	}
	if d := cmp.Diff(want, identities); d != "" {
		t.Errorf("identities (-want +got):\n%s", d)
	}
	zones, err := r.client.Zones(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	wantZones := []api.Zone{
		{Name: "edge", Trust: 10, Unmanaged: true, Workloads: []string{"web"}, Networks: []string{"lan"}},
		{Name: "app", Trust: 20, Workloads: []string{"api"}, Bindings: 2},
	}
	if d := cmp.Diff(wantZones, zones); d != "" {
		t.Errorf("zones (-want +got):\n%s", d)
	}
}

func TestBinderFollowsInventoryImageAndCore(t *testing.T) {
	core := newStandIn()
	inventory := filepath.Join(t.TempDir(), "inventory.yaml")
	put := func(content string) {
		t.Helper()
		if err := os.WriteFile(inventory+".new", []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(inventory+".new", inventory); err != nil {
			t.Fatal(err)
		}
	}
	put("workloads: [{namespace: shop, name: api-1, labels: {app: api}, cgroup: /lab/api-1}]")
	r := start(t, core, func(c *Config) { c.Inventory = inventory })
	claims := func(what string, want map[string]uint32) {
		t.Helper()
		eventually(t, what, func() bool { return cmp.Equal(want, core.claimed()) })
	}
	img := compile(t, source)
	api := ids(t, img)["api"]
	if _, err := r.client.Apply(t.Context(), img, 0); err != nil {
		t.Fatal(err)
	}
	claims("image came", map[string]uint32{"/lab/api-1": api})

	put("workloads: [{namespace: shop, name: api-2, labels: {app: api}, cgroup: /lab/api-2}, {namespace: shop, name: db, cgroup: /lab/db}]")
	claims("inventory changed", map[string]uint32{"/lab/api-2": api})

	core.stop()
	eventually(t, "core left", func() bool { return !r.link.view().Connected })
	core.start()
	claims("core restarted", map[string]uint32{"/lab/api-2": api})

	put("workloads: [{namespace: shop, name: api-2, label: {app: api}, cgroup: /lab/api-2}]")
	eventually(t, "problem shows", func() bool {
		status, err := r.client.Status(t.Context())
		return err == nil && status.Inventory.Bound == 1 && len(status.Problems) == 1 && strings.HasPrefix(status.Problems[0], inventory+":1:")
	})
	claims("bad inventory changes nothing", map[string]uint32{"/lab/api-2": api})

	put("workloads: [{namespace: shop, name: api-2, labels: {app: api}, cgroup: /lab/api-2}]")
	renamed := strings.NewReplacer("version: 1", "version: 2", "api:", "backend:", "workload/api", "workload/backend").Replace(source)
	next := compile(t, renamed)
	if _, err := r.client.Apply(t.Context(), next, 0); err != nil {
		t.Fatal(err)
	}
	claims("identity changed", map[string]uint32{"/lab/api-2": ids(t, next)["backend"]})
}

// partial names one cgroup, and says that others may run.
type partial struct{ inv *identity.Inventory }

func (p *partial) Current() (*identity.Inventory, time.Time, error) {
	return p.inv, time.Unix(1000, 0), nil
}
func (*partial) Changed() <-chan struct{} { return nil }
func (*partial) Path() string             { return "" }

// What does not claim to name everybody takes nobody's name away: neither what an agent
// before claimed, nor what was claimed since.
func TestPartialInventoryForgetsNobody(t *testing.T) {
	core := newStandIn()
	core.images, core.epoch = [][]byte{compile(t, source)}, 1
	core.claims = map[string]uint32{"/lab/earlier": 1}
	r := start(t, core, nil)
	eventually(t, "image came", func() bool { v := r.link.view(); return v.Connected && v.Names != nil })
	api := func(name string) identity.Workload {
		return identity.Workload{Namespace: "shop", Name: name, Labels: map[string]string{"app": "api"}, Cgroup: "/lab/" + name}
	}
	from := &partial{&identity.Inventory{Workloads: []identity.Workload{api("a")}, Partial: true}}
	b := newBinder(r.link, from, zap.NewNop())
	for _, step := range []struct {
		inv  *identity.Inventory
		want []string
	}{
		{from.inv, []string{"/lab/a", "/lab/earlier"}},
		{&identity.Inventory{Workloads: []identity.Workload{api("b")}, Partial: true}, []string{"/lab/a", "/lab/b", "/lab/earlier"}},
		{&identity.Inventory{Workloads: []identity.Workload{api("b")}}, []string{"/lab/b"}},
	} {
		from.inv = step.inv
		b.reconcile()
		if got := slices.Sorted(maps.Keys(core.claimed())); !slices.Equal(got, step.want) {
			t.Errorf("claimed %q, want %q", got, step.want)
		}
	}
}

func TestRefusedClaimIsTriedAgain(t *testing.T) {
	core := newStandIn()
	core.refuse = proto.Refuse("make it first", "there is no cgroup /lab/api-1")
	core.images, core.epoch = [][]byte{compile(t, source)}, 1
	inventory := filepath.Join(t.TempDir(), "inventory.yaml")
	if err := os.WriteFile(inventory, []byte("workloads: [{namespace: shop, name: api-1, labels: {app: api}, cgroup: /lab/api-1}]"), 0o644); err != nil {
		t.Fatal(err)
	}
	r := start(t, core, func(c *Config) { c.Inventory = inventory })
	const problem = "bind /lab/api-1: there is no cgroup /lab/api-1 (make it first)"
	eventually(t, "refusal shows", func() bool {
		s, err := r.client.Status(t.Context())
		return err == nil && cmp.Equal(s.Problems, []string{problem})
	})
	core.mu.Lock()
	core.refuse = nil
	core.mu.Unlock()
	eventually(t, "bound", func() bool { return len(core.claimed()) == 1 })
	eventually(t, "problem is gone", func() bool { s, err := r.client.Status(t.Context()); return err == nil && len(s.Problems) == 0 })
}

func TestBadInventoryStartsNothing(t *testing.T) {
	file := filepath.Join(t.TempDir(), "inventory.yaml")
	if err := os.WriteFile(file, []byte("workloads:\n- {nam: x}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	core := newStandIn()
	_, err := build(&Config{Inventory: file}, nil, newLink(core.dial, core.open, nil))
	if err == nil || !strings.HasPrefix(err.Error(), file+":2:4: ") {
		t.Errorf("error %v does not say where", err)
	}
}

// remote is a source that asks over a network.
type remote struct {
	partial
	renewed int
}

func (r *remote) Renew() { r.renewed++ }

// A source that asks over a network does so by another connection under each policy, and
// by one for as long as there is no other.
func TestPolicyRenewsConnections(t *testing.T) {
	r := start(t, newStandIn(), nil)
	eventually(t, "core is there", func() bool { return r.link.view().Connected })
	from := &remote{}
	b := newBinder(r.link, from, zap.NewNop())
	for i, version := range []string{"", "version: 1", "version: 2"} {
		if version != "" {
			next := compile(t, strings.Replace(source, "version: 1", version, 1))
			before := r.link.view().Names
			if _, err := r.client.Apply(t.Context(), next, 0); err != nil {
				t.Fatal(err)
			}
			eventually(t, "image came", func() bool { n := r.link.view().Names; return n != nil && n != before })
		}
		b.reconcile()
		b.reconcile()
		if from.renewed != i {
			t.Errorf("policy %q: renewed %d times, want %d", version, from.renewed, i)
		}
	}
}
