package core

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
)

func TestPreflightPasses(t *testing.T) {
	m := newMachine(t)
	results := Preflight(m.config)
	if !Passed(results) {
		t.Errorf("\n%s", shown(results))
	}
	absent(t, m.config.BPFFS)
	absent(t, m.config.StateDir)
	// Beside an enforcing core too, which it must not disturb.
	c := m.start()
	if _, err := c.Apply(shop(t, nil), 0); err != nil {
		t.Fatal(err)
	}
	before := c.Status()
	if results := Preflight(m.config); !Passed(results) {
		t.Errorf("\n%s", shown(results))
	}
	if diff := cmp.Diff(steady(before), steady(c.Status())); diff != "" {
		t.Errorf("status (-before +after):\n%s", diff)
	}
}

// Programs of others are named where ours are to be, before ours are there and after.
func TestPreflightNamesOthers(t *testing.T) {
	m := newMachine(t)
	spec := &ebpf.ProgramSpec{Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: m.config.CgroupRoot, Attach: spec.AttachType, Program: foreignProgram(t, spec)})
	must(t, err)
	defer l.Close()
	named := func(when string, want bool) {
		t.Helper()
		results := Preflight(m.config)
		i := slices.IndexFunc(results, func(c Check) bool { return c.Name == "other programs" })
		if !Passed(results) || strings.Contains(results[i].Limit, "at connect4 is not ours") != want {
			t.Errorf("%s:\n%s", when, shown(results))
		}
	}
	named("before a start", true)
	c := m.start()
	_, err = c.Apply(shop(t, nil), 0)
	must(t, err)
	named("beside a core", true)
	must(t, l.Close())
	named("without", false)
}

// What is missing is named, what needs it is not tried, and nothing is attached.
func TestPreflightNames(t *testing.T) {
	tests := []struct {
		name   string
		break_ func(t *testing.T, m *machine)
		failed []string
		text   string
	}{
		{"bad no BPF file system", func(t *testing.T, m *machine) { m.config.BPFFS = filepath.Join(t.TempDir(), "demarc") },
			[]string{"pins", "programs", "memory", "attach", "other programs", "walks", "refusals", "ring buffer", "self-test"}, "is not in a BPF file system"},
		{"bad no cgroup2", func(t *testing.T, m *machine) { m.config.CgroupRoot = t.TempDir() },
			[]string{"cgroup2", "cgroup namespace", "pins", "programs", "memory", "attach", "other programs", "walks", "refusals", "ring buffer", "self-test"}, "is not in a cgroup2 file system"},
		{"bad cgroup_root missing", func(t *testing.T, m *machine) { m.config.CgroupRoot += "/absent" },
			[]string{"cgroup2", "cgroup namespace", "pins", "programs", "memory", "attach", "other programs", "walks", "refusals", "ring buffer", "self-test"}, "no such file"},
		{"bad state_dir of others", func(t *testing.T, m *machine) {
			must(t, os.Mkdir(m.config.StateDir, 0o700))
			must(t, os.Chmod(m.config.StateDir, 0o777))
		}, []string{"state", "keyring"}, "can be written by others than root"},
		{"bad keyring", func(t *testing.T, m *machine) {
			must(t, os.Mkdir(m.config.StateDir, 0o700))
			must(t, os.WriteFile(m.config.Keyring, nil, 0o644))
		}, []string{"keyring"}, "has mode 0644"},
		{"bad trust_dir missing", func(t *testing.T, m *machine) { m.config.TrustDir = m.config.StateDir + "/trust" },
			[]string{"trust"}, "no such file"},
		{"bad trust key", func(t *testing.T, m *machine) {
			m.config.TrustDir = t.TempDir()
			must(t, os.WriteFile(filepath.Join(m.config.TrustDir, "a.pub"), nil, 0o600))
		}, []string{"trust"}, "a.pub: not one PEM block and nothing else"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			root := m.config.CgroupRoot
			tt.break_(t, m)
			results := Preflight(m.config)
			var failed []string
			for _, r := range results {
				if !r.OK {
					failed = append(failed, r.Name)
				}
			}
			if diff := cmp.Diff(tt.failed, failed); diff != "" {
				t.Errorf("failed checks (-want +got):\n%s", diff)
			}
			if text := shown(results); !strings.Contains(text, tt.text) {
				t.Errorf("want %q in:\n%s", tt.text, text)
			}
			if _, err := m.open(hooks{}); err == nil || !strings.HasPrefix(err.Error(), "preflight: "+tt.failed[0]+": ") {
				t.Errorf("start: %v", err)
			}
			m.config.CgroupRoot = root
			if n := attached(t, m); n != 0 {
				t.Errorf("%d programs are attached", n)
			}
			absent(t, m.config.BPFFS)
		})
	}
}

// A kernel that lacks a program type: the start fails, says which, and leaves
// nothing; an enforcing kernel goes on enforcing.
func TestKernelLacksFeature(t *testing.T) {
	m := newMachine(t)
	lacks := hooks{load: func() error { return fmt.Errorf("program sock_ops: %w", ebpf.ErrNotSupported) }}
	_, err := m.open(lacks)
	if err == nil || !strings.HasPrefix(err.Error(), "preflight: programs: program sock_ops: not supported") {
		t.Errorf("got %v", err)
	}
	absent(t, m.config.BPFFS)
	if n := attached(t, m); n != 0 {
		t.Errorf("%d programs are attached", n)
	}
	c := m.start()
	if _, err := c.Apply(shop(t, nil), 0); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := m.open(lacks); err == nil {
		t.Error("the start worked")
	}
	if n := attached(t, m); n != len(attachOrder)-namers {
		t.Errorf("%d programs are attached", n)
	}
}

// The kernel's own verifier refuses a program: the message names it.
func TestLoadNamesProgram(t *testing.T) {
	m := newMachine(t)
	tree, err := openTree(m.config.CgroupRoot)
	must(t, err)
	spec, err := readSpec(tree)
	must(t, err)
	spec.Programs["judge"].Instructions = spec.Programs["judge"].Instructions[:1]
	if o, err := loadObjects(spec, nil, btf.NewCache()); err == nil {
		o.Close()
		t.Error("loaded")
	} else if !strings.Contains(err.Error(), "program judge") {
		t.Errorf("got %v", err)
	}
}

// beside are the limits of a machine beside the one that every machine has.
func beside(limits []string) (others []string) {
	for _, l := range limits {
		if !strings.HasPrefix(l, "root is not kept from what enforces") {
			others = append(others, l)
		}
	}
	return others
}

// That root is not kept from anything is no secret, nor how far the kernel is locked
// down. (I09)
func TestI09RootIsALimit(t *testing.T) {
	m := newMachine(t)
	for _, c := range Preflight(m.config) {
		if c.Name == "guard" && (!c.OK || !strings.Contains(c.Limit, "kernel lockdown: ")) {
			t.Errorf("%+v", c)
		}
	}
	if limits := m.start().Status().Limits; len(beside(limits)) != len(limits)-1 {
		t.Errorf("limits %q", limits)
	}
}

// A machine whose clock stands at its epoch is guarded all the same, and says what
// that is worth.
func TestWallLimit(t *testing.T) {
	for _, tt := range []struct {
		now  string
		want string
	}{
		{"2026-11-24T00:00:00Z", ""},
		{"2038-01-19T03:14:08Z", ""},
		{"1970-01-01T00:00:05Z", "the wall clock says 1970-01-01: "},
		{"2025-12-31T23:59:59Z", "the wall clock says 2025-12-31: "},
	} {
		now, err := time.Parse(time.RFC3339, tt.now)
		must(t, err)
		if got := wallLimit(now); !strings.HasPrefix(got, tt.want) || (got == "") != (tt.want == "") {
			t.Errorf("%s: %q, want %q", tt.now, got, tt.want)
		}
	}
}

// shown is what checks say, one a line.
func shown(results []Check) string {
	var out strings.Builder
	for _, c := range results {
		fmt.Fprintf(&out, "%s: ok %v: %s: %s%s; fix: %s\n", c.Name, c.OK, c.Tried, c.Problem, c.Limit, c.Fix)
	}
	return out.String()
}
