package core

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/auditlog"
	"github.com/demarc/demarc/agent/core/audit"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/image/encode"
	"github.com/demarc/demarc/policy/policytest"
)

// still ends the upkeep of a core, so that a test can look step by step.
func still(c *Core) *Core {
	c.stop()
	c.stop = func() {}
	return c
}

// enforcing is a core that enforces the shop's policy and looks when it is told to.
func enforcing(t testing.TB, m *machine, b []byte) *Core {
	t.Helper()
	c := still(m.start())
	if s, err := c.Apply(b, 0); err != nil || s.State != proto.StateEnforcing {
		t.Fatalf("apply: %+v, %v", s, err)
	}
	c.upkeep()
	if s := c.Status(); s.State != proto.StateEnforcing {
		t.Fatalf("before anything was done: %v", s.Problems)
	}
	return c
}

// journalOf reads the audit log, which must be unbroken.
func journalOf(t testing.TB, c *Core) []audit.Record {
	t.Helper()
	records, _, err := readJournal(t, c)
	if err != nil {
		t.Errorf("audit log: %v", err)
	}
	return records
}

func readJournal(t testing.TB, c *Core) ([]audit.Record, auditlog.Summary, error) {
	t.Helper()
	_, files, err := c.Audit()
	if err != nil {
		t.Fatal(err)
	}
	defer proto.CloseFiles(files)
	var pieces []auditlog.File
	for _, f := range files {
		pieces = append(pieces, auditlog.File{Name: filepath.Base(f.Name()), Reader: f})
	}
	var records []audit.Record
	head := c.journal.head
	sum, err := auditlog.Read(pieces, &head, func(r audit.Record) { records = append(records, r) })
	return records, sum, err
}

// foreignProgram lets everything pass.
func foreignProgram(t testing.TB, spec *ebpf.ProgramSpec, code ...asm.Instruction) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: spec.Type, AttachType: spec.AttachType, License: "GPL",
		Instructions: append(code, asm.Mov.Imm(asm.R0, 1), asm.Return()),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// Who undoes the same again and again is told of in the audit log once a minute: neither
// once for all, nor so often that the log is his.
func TestTamperingThatGoesOn(t *testing.T) {
	c := enforcing(t, newMachine(t), shop(t, nil))
	told := func(after time.Duration) (n int) {
		t.Helper()
		c.told = c.told.Add(-after)
		must(t, c.links.open[hook{program: "egress"}].Detach())
		c.upkeep()
		for _, r := range journalOf(t, c) {
			if r.What == auditDrift {
				n++
			}
		}
		return n
	}
	if a, b, later := told(0), told(0), told(time.Minute); a != 1 || b != 1 || later != 2 {
		t.Errorf("told %d times, then %d, and %d a minute later", a, b, later)
	}
}

// Whatever root takes away or writes over is seen at the next look, put back, told by
// the status until a look finds nothing, and kept in the audit log. What decides is
// as it was then: the canary proves it. (I06, I07, X21)
func TestX21Tamper(t *testing.T) {
	m := newMachine(t)
	m.mkdir("/lab/postgres")
	b := shop(t, nil)
	c := enforcing(t, m, b)
	g := c.active
	spare := func(name string) *ebpf.Map {
		spec := c.objects.spec.Maps[name].InnerMap.Copy()
		other, err := ebpf.NewMap(spec)
		must(t, err)
		t.Cleanup(func() { other.Close() })
		return other
	}
	lab, err := cgroupID(m.config.CgroupRoot + "/lab/postgres")
	must(t, err)
	tests := []struct {
		name  string
		do    func(t *testing.T)
		want  string // of the incident
		blind bool   // packets go on being judged, so that only the next look sees it
	}{
		{"state cleared", func(t *testing.T) { must(t, c.objects.Maps["state"].Put(uint32(0), &abi.State{})) }, "somebody else wrote the state", false},
		{"state observes", func(t *testing.T) {
			s, err := kernelState(c.objects)
			must(t, err)
			s.Active = abi.MakeActive(g.slot, g.flags|abi.ActiveObserve, g.epoch+7)
			must(t, c.objects.Maps["state"].Put(uint32(0), &s))
		}, "somebody else wrote the state", false},
		{"another key is sent with", func(t *testing.T) {
			s, err := kernelState(c.objects)
			must(t, err)
			s.TagEpoch++
			must(t, c.objects.Maps["state"].Put(uint32(0), &s))
		}, "somebody else wrote the state", true},
		{"rules replaced", func(t *testing.T) { must(t, c.objects.Maps["rules"].Put(g.slot, spare("rules"))) }, "table rules of slot", false},
		{"crossings taken out", func(t *testing.T) { must(t, c.objects.Maps["crossings"].Delete(g.slot)) }, "table crossings of slot", false},
		{"link detached", func(t *testing.T) { must(t, c.links.open[hook{program: "egress"}].Detach()) }, "link egress was detached", false},
		{"another program in a link", func(t *testing.T) {
			must(t, c.links.open[hook{program: "egress"}].Update(foreignProgram(t, c.objects.spec.Programs["egress"])))
		}, "link egress runs program", false},
		{"all links detached", func(t *testing.T) {
			for _, name := range attachOrder[namers:] {
				must(t, c.links.open[hook{program: name}].Detach())
			}
		}, "link sock_ops was detached", false},
		{"pin of a link removed", func(t *testing.T) { must(t, os.Remove(c.pins.links("ingress"))) }, "links/ingress was gone, or led elsewhere", false},
		{"pin of a map removed", func(t *testing.T) { must(t, os.Remove(c.pins.maps("state"))) }, "maps/state was gone, or led elsewhere", true},
		{"pin of another map", func(t *testing.T) {
			must(t, os.Remove(c.pins.maps("keys")))
			must(t, twin(t, c.objects.Maps["state"]).Pin(c.pins.maps("keys")))
		}, "maps/keys was gone, or led elsewhere", true},
		{"abi removed", func(t *testing.T) { must(t, os.Remove(c.pins.abi())) }, "demarc/abi was gone", true},
		{"all pins removed", func(t *testing.T) { must(t, os.RemoveAll(c.pins.dir)) }, "pins were gone, or led elsewhere, the first ", false},
		{"tag key changed", func(t *testing.T) {
			must(t, c.objects.Maps["keys"].Put(uint32(1), &abi.Key{Key: [2]uint64{1, 2}, Valid: 1}))
		}, "the tag key of epoch 1 was changed", true},
		{"tag key added", func(t *testing.T) {
			must(t, c.objects.Maps["keys"].Put(uint32(9), &abi.Key{Key: [2]uint64{1, 2}, Valid: 1}))
		}, "the tag key of epoch 9 was changed", true},
		{"identity changed", func(t *testing.T) {
			c.swept = time.Time{}
			var binding abi.Binding
			must(t, c.objects.Maps["bindings"].Lookup(lab, &binding))
			binding.Identity[c.active.slot] = uint32(image.Unmanaged)
			must(t, c.objects.Maps["bindings"].Put(lab, &binding))
		}, "1 cgroups had another identity, the first /lab/postgres", true},
		{"canary let out", func(t *testing.T) {
			c.swept = time.Time{}
			var binding abi.Binding
			id, err := cgroupID(c.canary.dir)
			must(t, err)
			must(t, c.objects.Maps["bindings"].Lookup(id, &binding))
			binding.Identity[c.active.slot] = uint32(image.Unmanaged)
			must(t, c.objects.Maps["bindings"].Put(id, &binding))
		}, "1 cgroups had another identity, the first /demarc-canary", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			seen := len(journalOf(t, c))
			before, err := kernelState(c.objects)
			must(t, err)
			tt.do(t)
			if s := c.Status(); !tt.blind && s.State != proto.StateDegraded {
				t.Errorf("status right after: %v", s.State)
			}
			c.upkeep()
			s := c.Status()
			told := strings.Join(s.Problems, "; ")
			if s.State != proto.StateDegraded || !strings.Contains(told, tt.want) || strings.Contains(told, "could not be mended") {
				t.Errorf("status %v, %q\nwant %s", s.State, told, tt.want)
			}
			c.upkeep()
			if s := c.Status(); s.State != proto.StateEnforcing {
				t.Errorf("after the next look: %v, %v", s.State, s.Problems)
			}
			after, err := kernelState(c.objects)
			must(t, err)
			if changed := strings.Contains(tt.want, "wrote the state"); changed && abi.ActiveEpoch(after.Active) <= abi.ActiveEpoch(before.Active) {
				t.Errorf("verdicts of the meantime are good again: epoch %d, then %d", abi.ActiveEpoch(before.Active), abi.ActiveEpoch(after.Active))
			}
			if n := attached(t, m); n != len(attachOrder)-namers {
				t.Errorf("%d programs are attached", n)
			}
			told = ""
			for _, r := range journalOf(t, c)[seen:] {
				if r.What == auditDrift {
					told += r.Detail + "\n"
				}
			}
			if !strings.Contains(told, tt.want) || !strings.Contains(told, "; for at most ") {
				t.Errorf("the audit log says %q", told)
			}
		})
	}
	if got := identity(t, c, "/lab/postgres"); got != id(t, b, "postgres") {
		t.Errorf("/lab/postgres is %d", got)
	}
	// Everything is pinned again: a core that starts takes it over.
	before := linkIDs(t, c)
	c.Close()
	c = still(m.start())
	c.upkeep()
	if s := c.Status(); s.State != proto.StateEnforcing {
		t.Errorf("after another start: %v, %v", s.State, s.Problems)
	}
	for name, link := range linkIDs(t, c) {
		if before[name] != link {
			t.Errorf("link %s is another one", name)
		}
	}
}

// Without its BPF file system a core goes on enforcing and says what it means; when
// one is mounted again, everything is pinned there. (I06)
func TestI06Unmounted(t *testing.T) {
	m := newMachine(t)
	c := enforcing(t, m, shop(t, nil))
	mount := filepath.Dir(c.pins.dir)
	must(t, unix.Unmount(mount, 0))
	for range 2 {
		c.upkeep()
	}
	s := c.Status()
	told := strings.Join(s.Problems, "; ")
	if s.State != proto.StateDegraded || !strings.Contains(told, "pins were gone") || !strings.Contains(told, "is not in a BPF file system") {
		t.Errorf("unmounted: %v, %v", s.State, told)
	}
	if err := c.prove(); err != nil {
		t.Errorf("unmounted, the canary: %v", err)
	}
	must(t, unix.Mount("bpf", mount, "bpf", 0, "mode=0700"))
	c.upkeep()
	c.upkeep()
	if s := c.Status(); s.State != proto.StateEnforcing {
		t.Errorf("mounted again: %v, %v", s.State, s.Problems)
	}
	n := 0
	for _, r := range journalOf(t, c) {
		if r.What == auditDrift {
			n++
		}
	}
	if n != 2 { // that they were gone once, not at each look, and that they are back
		t.Errorf("%d records tell of it", n)
	}
	c.Close()
	if s := m.start().Status(); s.State != proto.StateEnforcing {
		t.Errorf("after another start: %v, %v", s.State, s.Problems)
	}
}

// The garbage collector closes what nobody refers to. Nothing that enforces depends on
// a reference. (I05)
func TestI05Collected(t *testing.T) {
	m := newMachine(t)
	c := enforcing(t, m, shop(t, nil))
	before := linkIDs(t, c)
	other, err := link.LoadPinnedLink(c.pins.links("egress"), nil)
	must(t, err)
	c.links.open = map[hook]attachment{{program: "egress"}: {Link: other}} // all of them are forgotten, and this one is another
	for range 3 {
		runtime.GC()
	}
	if n := attached(t, m); n != len(attachOrder)-namers {
		t.Errorf("%d programs are attached", n)
	}
	c.Close()
	if after := linkIDs(t, m.start()); fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("links before %v, after %v", before, after)
	}
}

// What nobody but the kernel programs has to write, or nobody at all any more, cannot
// be written, not even by root. (I07)
func TestI07Frozen(t *testing.T) {
	m := newMachine(t)
	c := enforcing(t, m, shop(t, nil))
	c.Close()
	c = still(m.start()) // and another core can work with that
	if _, err := c.Apply(shop(t, version(8)), 0); err != nil {
		t.Fatal(err)
	}
	maps := map[string]*ebpf.Map{}
	for _, name := range programsOnly {
		maps[name] = c.objects.Maps[name]
	}
	for _, name := range tableNames {
		if name != "paths" {
			maps["table "+name] = c.active.tables[name]
		}
	}
	for name, m := range maps {
		var value any = make([]byte, m.ValueSize())
		if m.Type() == ebpf.PerCPUArray || m.Type() == ebpf.PerCPUHash {
			cpus := make([][]byte, ebpf.MustPossibleCPU())
			for i := range cpus {
				cpus[i] = make([]byte, m.ValueSize())
			}
			value = cpus
		}
		if err := m.Put(make([]byte, m.KeySize()), value); !errors.Is(err, unix.EPERM) {
			t.Errorf("write %s: %v", name, err)
		}
	}
}

// Somebody else's programs at our hooks are named, from the moment they come until
// they go. They make nothing pass. (I08, I18, X20)
func TestX20ForeignPrograms(t *testing.T) {
	m := newMachine(t)
	c := enforcing(t, m, shop(t, nil))
	root := m.config.CgroupRoot
	spec := c.objects.spec.Programs["connect4"]
	// It changes the address that is connected to, and says that all is well.
	rewriter := foreignProgram(t, spec,
		asm.StoreImm(asm.R1, 4, 0x0100007f, asm.Word), // user_ip4 = 127.0.0.1
		asm.Mov.Imm(asm.R1, 0), asm.FnSetRetval.Call())
	l, err := link.AttachCgroup(link.CgroupOptions{Path: root, Attach: spec.AttachType, Program: rewriter})
	must(t, err)
	defer l.Close()
	info, err := rewriter.Info()
	must(t, err)
	number, _ := info.ID()
	want := foreign(number, "connect4")
	c.upkeep()
	if s := c.Status(); s.State != proto.StateEnforcing || !slices.Contains(s.Limits, want) {
		t.Errorf("with a foreign program: %v, %v, limits %v", s.State, s.Problems, s.Limits)
	}
	must(t, l.Close())
	c.upkeep()
	if s := c.Status(); s.State != proto.StateEnforcing || slices.Contains(s.Limits, want) {
		t.Errorf("without it: %v, %v, limits %v", s.State, s.Problems, s.Limits)
	}
	var told []string
	for _, r := range journalOf(t, c) {
		if r.What == auditDrift {
			told = append(told, r.Detail)
		}
	}
	if got := strings.Join(told, "|"); got != want+" came|"+want+" went" {
		t.Errorf("the audit log says %q", got)
	}
}

// A hook takes 64 programs. Whoever takes all places before a start makes it fail
// loudly, and whoever takes them later keeps nothing of ours out. (I18)
func TestI18HookFull(t *testing.T) {
	m := newMachine(t)
	c := enforcing(t, m, shop(t, nil))
	spec := c.objects.spec.Programs["egress"]
	fill := func() (links []link.Link) {
		for {
			l, err := link.AttachCgroup(link.CgroupOptions{Path: m.config.CgroupRoot, Attach: spec.AttachType, Program: foreignProgram(t, spec)})
			if err != nil {
				return links
			}
			links = append(links, l)
		}
	}
	others := fill()
	if len(others) != 63 { // and egress
		t.Fatalf("%d programs beside ours", len(others))
	}
	c.upkeep()
	if s := c.Status(); s.State != proto.StateEnforcing {
		t.Errorf("with the hook full: %v, %v", s.State, s.Problems)
	}
	// Detached, and no place to come back to: that is said, until there is one.
	must(t, c.links.open[hook{program: "egress"}].Detach())
	others = append(others, fill()...)
	c.upkeep()
	s := c.Status()
	told := strings.Join(s.Problems, "; ")
	if s.State != proto.StateDegraded || !strings.Contains(told, "link egress was detached, and could not be mended") || !strings.Contains(told, "canary: ") {
		t.Errorf("detached with the hook full: %v, %v", s.State, told)
	}
	must(t, others[0].Close())
	c.upkeep()
	c.upkeep()
	if s := c.Status(); s.State != proto.StateEnforcing {
		t.Errorf("with a free place: %v, %v", s.State, s.Problems)
	}
	others = append(others[1:], fill()...)
	c.Close()
	must(t, Detach(m.config))
	// The kernel lets go of a link that nobody holds any more when it gets to it.
	for start := time.Now(); attached(t, m) > len(others); time.Sleep(time.Millisecond) {
		if time.Since(start) > 20*time.Second {
			t.Fatalf("%d programs are attached, %d of them not ours", attached(t, m), len(others))
		}
	}
	others = append(others, fill()...)
	if again, err := m.open(hooks{}); err == nil {
		t.Errorf("a start with the hook full: %v", again.Status().State)
		again.Close()
	} else if !strings.Contains(err.Error(), "egress") {
		t.Errorf("a start with the hook full: %v", err)
	}
	for _, l := range others {
		l.Close()
	}
}

// A look costs the same whatever the size of the policy.
func BenchmarkLook(b *testing.B) {
	for _, n := range []int{10, 100_000} {
		b.Run(fmt.Sprintf("%d crossings", n), func(b *testing.B) {
			m := newMachine(b)
			img, err := policy.Compile(policytest.Large(max(n/50, 2), n))
			if err != nil {
				b.Fatal(err)
			}
			encoded, err := encode.Image(img)
			if err != nil {
				b.Fatal(err)
			}
			c := enforcing(b, m, encoded)
			for b.Loop() {
				c.mu.Lock()
				c.watch()
				c.mu.Unlock()
			}
			if len(c.troubles) > 0 {
				b.Errorf("problems %v", c.troubles)
			}
		})
	}
}
