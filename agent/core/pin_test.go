package core

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Pins that this core would not have made are refused, each with the one thing
// that is wrong, and left as they are; the kernel goes on enforcing. (I16)
func TestI16BadPins(t *testing.T) {
	other := func(t *testing.T, path string, spec *ebpf.MapSpec) {
		t.Helper()
		m, err := ebpf.NewMap(spec)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		must(t, os.Remove(path))
		must(t, m.Pin(path))
	}
	relink := func(t *testing.T, c *Core, name, dir, program string) {
		t.Helper()
		l, err := link.AttachCgroup(link.CgroupOptions{
			Path: dir, Attach: c.objects.spec.Programs[program].AttachType, Program: c.objects.Programs[program]})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		must(t, os.Remove(c.pins.links(name)))
		must(t, l.Pin(c.pins.links(name)))
	}
	tests := []struct {
		name string
		do   func(t *testing.T, c *Core)
		want string
	}{
		{"bad directory mode", func(t *testing.T, c *Core) { must(t, os.Chmod(c.pins.dir, 0o755)) }, "demarc belongs to user 0 with mode drwxr-xr-x"},
		{"bad directory owner", func(t *testing.T, c *Core) { must(t, os.Chown(c.pins.dir, 65534, 0)) }, "demarc belongs to user 65534"},
		{"bad links owner", func(t *testing.T, c *Core) { must(t, os.Chown(c.pins.links(""), 65534, 0)) }, "links belongs to user 65534"},
		{"bad pin mode", func(t *testing.T, c *Core) { must(t, os.Chmod(c.pins.maps("rules"), 0o666)) }, "rules belongs to user 0 with mode -rw-rw-rw-"},
		{"bad pin owner", func(t *testing.T, c *Core) { must(t, os.Chown(c.pins.links("egress"), 65534, 0)) }, "egress belongs to user 65534"},
		{"bad strange entry", func(t *testing.T, c *Core) { must(t, os.Mkdir(filepath.Join(c.pins.dir, "more"), 0o700)) }, "more is not ours"},
		{"bad strange map", func(t *testing.T, c *Core) { must(t, twin(t, c.objects.Maps["rules"]).Pin(c.pins.maps("more"))) }, "maps/more is not ours"},
		{"bad map missing", func(t *testing.T, c *Core) { must(t, os.Remove(c.pins.maps("counts"))) }, "maps/counts: "},
		{"bad link missing", func(t *testing.T, c *Core) { must(t, os.Remove(c.pins.links("sock_ops"))) }, "links/sock_ops: "},
		{"bad abi of another version", func(t *testing.T, c *Core) {
			card := card(c.objects.spec, c.tree)
			card.Version++
			abi, err := ebpf.LoadPinnedMap(c.pins.abi(), nil)
			must(t, err)
			defer abi.Close()
			must(t, abi.Put(uint32(0), card))
		}, "was made by another version or for another cgroup_root"},
		{"bad abi layout", func(t *testing.T, c *Core) {
			other(t, c.pins.abi(), &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
		}, "abi: ValueSize: 8 changed to 24"},
		{"bad map value size", func(t *testing.T, c *Core) {
			spec := c.objects.spec.Maps["state"].Copy()
			spec.ValueSize, spec.Value = 8, nil
			other(t, c.pins.maps("state"), spec)
		}, "maps/state: ValueSize: 8 changed to "},
		{"bad map flags", func(t *testing.T, c *Core) {
			spec := c.objects.spec.Maps["bindings"].Copy()
			spec.Flags ^= unix.BPF_F_NO_PREALLOC
			other(t, c.pins.maps("bindings"), spec)
		}, "maps/bindings: Flags: "},
		{"bad map type", func(t *testing.T, c *Core) {
			other(t, c.pins.maps("graveyard"), c.objects.spec.Maps["bindings"].Copy())
		}, "maps/graveyard: Type: "},
		{"bad program where a map belongs", func(t *testing.T, c *Core) {
			must(t, os.Remove(c.pins.maps("keys")))
			must(t, c.objects.Programs["judge"].Pin(c.pins.maps("keys")))
		}, "maps/keys: "},
		{"bad map where a link belongs", func(t *testing.T, c *Core) {
			must(t, os.Remove(c.pins.links("ingress")))
			must(t, twin(t, c.objects.Maps["keys"]).Pin(c.pins.links("ingress")))
		}, "links/ingress: "},
		{"bad link of another hook", func(t *testing.T, c *Core) {
			relink(t, c, "ingress", c.tree.dir, "egress")
		}, "links/ingress is attached as CGroupInetEgress, not "},
		{"bad link of another cgroup", func(t *testing.T, c *Core) {
			dir := filepath.Join(c.tree.dir, "elsewhere")
			must(t, os.MkdirAll(dir, 0o755))
			relink(t, c, "ingress", dir, "ingress")
		}, "links/ingress leads to cgroup "},
		{"bad link of a cgroup for a tracepoint", func(t *testing.T, c *Core) {
			relink(t, c, "cgroup_mkdir", c.tree.dir, "egress")
		}, "links/cgroup_mkdir is a link of type 3, not a tracepoint"},
		{"bad other tracepoint", func(t *testing.T, c *Core) {
			l, err := link.AttachTracing(link.TracingOptions{Program: c.objects.Programs["cgroup_rmdir"]})
			must(t, err)
			defer l.Close()
			must(t, os.Remove(c.pins.links("cgroup_mkdir")))
			must(t, l.Pin(c.pins.links("cgroup_mkdir")))
		}, "links/cgroup_mkdir is a link of tracepoint cgroup_rmdir"},
		{"bad detached link", func(t *testing.T, c *Core) { must(t, c.links.open[hook{program: "egress"}].Detach()) }, "links/egress was detached"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			c := still(m.start()) // which would mend it
			if _, err := c.Apply(shop(t, nil), 0); err != nil {
				t.Fatal(err)
			}
			tt.do(t, c)
			c.Close()
			before, programs := listing(t, m.config.BPFFS), attached(t, m)
			again, err := m.open(hooks{})
			if err == nil {
				again.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "preflight: pins: ") {
				t.Errorf("got %v\nwant %s", err, tt.want)
			}
			if after := listing(t, m.config.BPFFS); after != before {
				t.Errorf("pins before:\n%s\nafter:\n%s", before, after)
			}
			if n := attached(t, m); n != programs {
				t.Errorf("%d programs are attached, %d were", n, programs)
			}
		})
	}
}

// A directory that somebody made before the first start is no better.
func TestI16HostileDirectory(t *testing.T) {
	tests := []struct {
		name string
		do   func(t *testing.T, dir string)
		want string
	}{
		{"bad symlink", func(t *testing.T, dir string) { must(t, os.Symlink(filepath.Dir(dir), dir)) }, "demarc belongs to user 0 with mode L"},
		{"bad owner", func(t *testing.T, dir string) {
			must(t, os.Mkdir(dir, 0o700))
			must(t, os.Chown(dir, 65534, 65534))
		}, "demarc belongs to user 65534"},
		{"bad world-writable", func(t *testing.T, dir string) {
			must(t, os.Mkdir(dir, 0o700))
			must(t, os.Chmod(dir, 0o777))
		}, "with mode drwxrwxrwx"},
		{"bad content", func(t *testing.T, dir string) { must(t, os.MkdirAll(filepath.Join(dir, "maps", "rules2"), 0o700)) }, "rules2 is not ours"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			tt.do(t, m.config.BPFFS)
			_, err := m.open(hooks{})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v\nwant %s", err, tt.want)
			}
		})
	}
}

func TestPinsNeedBPFFS(t *testing.T) {
	m := newMachine(t)
	m.config.BPFFS = filepath.Join(t.TempDir(), "demarc")
	_, err := m.open(hooks{})
	if err == nil || !strings.Contains(err.Error(), "is not in a BPF file system") {
		t.Errorf("got %v", err)
	}
	absent(t, m.config.BPFFS)
}

// twin is the same map, and does not know where it is pinned.
func twin(t *testing.T, m *ebpf.Map) *ebpf.Map {
	t.Helper()
	other, err := m.Clone()
	must(t, err)
	t.Cleanup(func() { other.Close() })
	return other
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// listing says what is in a directory, with owners and modes.
func listing(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	must(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		out.WriteString(path + " " + info.Mode().String() + "\n")
		return err
	}))
	return out.String()
}
