package core

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/demarc/demarc/agent/core/proto"
)

var errInjected = errors.New("injected")

// failing says no to the n-th program, counted from 0.
func failing(n int) hooks {
	return hooks{attaching: func(string) error {
		if n--; n < 0 {
			return errInjected
		}
		return nil
	}}
}

// Whichever program cannot be attached: none stays, nothing is pinned beside the
// maps, nothing is on disk, and the next try works. (I15)
func TestI15AttachAllOrNothing(t *testing.T) {
	m := newMachine(t)
	b := shop(t, nil)
	for n, name := range attachOrder {
		t.Run(name, func(t *testing.T) {
			c, err := m.open(failing(n))
			if err != nil {
				t.Fatal(err)
			}
			_, err = c.Apply(b, 0)
			if !errors.Is(err, errInjected) || !strings.HasPrefix(err.Error(), "attach "+name+": ") {
				t.Errorf("got %v", err)
			}
			if n := attached(t, m); n != 0 {
				t.Errorf("%d programs stayed", n)
			}
			if left, err := os.ReadDir(c.pins.links("")); err != nil || len(left) != 0 {
				t.Errorf("links stayed: %v, %v", left, err)
			}
			absent(t, c.pins.abi())
			absent(t, c.store.file(activeImage, "a"))
			if s := c.Status(); s.State != proto.StateIdle {
				t.Errorf("status %+v", s)
			}
			c.links.attaching = nil
			if s, err := c.Apply(b, 0); err != nil || s.State != proto.StateEnforcing {
				t.Errorf("apply without the fault: %+v, %v", s, err)
			}
			c.Close()
			if err := Detach(m.config); err != nil {
				t.Fatal(err)
			}
			spoil(t, c, activeImage, []byte{})
		})
	}
}

// A start that was killed before everything was pinned left something that no
// status ever called enforcing. The next start removes it and begins anew.
func TestInterruptedStart(t *testing.T) {
	m := newMachine(t)
	b := shop(t, nil)
	c := m.start()
	if _, err := c.Apply(b, 0); err != nil {
		t.Fatal(err)
	}
	c.Close()
	for _, path := range []string{c.pins.abi(), c.pins.links("egress"), c.pins.links("cgroup_rmdir"), c.pins.maps("rules")} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	c = m.start()
	if s := c.Status(); s.State != proto.StateEnforcing || s.Active.Epoch != 1 {
		t.Errorf("after an interrupted start: %+v", s)
	}
	if n := attached(t, m); n != len(attachOrder)-namers {
		t.Errorf("%d programs are attached", n)
	}
}

// A core of another build puts its programs into the links it adopts, without
// detaching them; tracepoints, whose program cannot change, overlap.
func TestAdoptOtherPrograms(t *testing.T) {
	m := newMachine(t)
	b := shop(t, nil)
	c := still(m.start()) // which would mend it
	if _, err := c.Apply(b, 0); err != nil {
		t.Fatal(err)
	}
	// As if another build had attached these.
	if err := c.links.open[hook{program: "egress"}].Update(c.objects.Programs["selftest_egress"]); err != nil {
		t.Fatal(err)
	}
	other, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "cgroup_mkdir", License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	must(t, err)
	defer other.Close()
	naming := c.objects.Programs["cgroup_mkdir"]
	c.objects.Programs["cgroup_mkdir"] = other
	err = c.links.replace(hook{program: "cgroup_mkdir"})
	c.objects.Programs["cgroup_mkdir"] = naming
	must(t, err)
	before := linkIDs(t, c)
	c.Close()

	c = m.start()
	if s := c.Status(); s.State != proto.StateEnforcing {
		t.Errorf("after adoption: %+v", s)
	}
	after := linkIDs(t, c)
	if before["egress"] != after["egress"] || before["cgroup_mkdir"] == after["cgroup_mkdir"] {
		t.Errorf("links before %v, after %v", before, after)
	}
	for _, name := range []string{"egress", "cgroup_mkdir"} {
		if same, err := runs(c.links.open[hook{program: name}], c.objects.Programs[name]); !same || err != nil {
			t.Errorf("%s runs other code: %v", name, err)
		}
	}
	absent(t, c.pins.aside("cgroup_mkdir"))
	m.mkdir("/lab/postgres")
	if got := identity(t, c, "/lab/postgres"); got != id(t, b, "postgres") {
		t.Errorf("a new cgroup is %d", got)
	}
}
