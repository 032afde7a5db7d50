package core

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// guard is the programs that keep others from what enforces, loaded. Where the kernel
// refuses BPF LSM there is none: what root undoes is then seen and put back, not
// prevented.
type guard struct {
	*objects
	links *links
	ids   [2]map[uint32]bool // of the maps and links that it covers
}

// newGuard loads the programs, and leaves none attached. A kernel whose list of
// security modules lacks bpf takes them all the same, and asks them nothing: so one is
// tried.
func newGuard() (_ *guard, err error) {
	spec, err := loadGuard()
	if err != nil {
		return nil, fmt.Errorf("read guard: %w", err)
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("name the core to its guard: %w", err)
	}
	var name [16]byte
	copy(name[:15], filepath.Base(exe))
	if err := spec.Variables["core_name"].Set(name); err != nil {
		return nil, fmt.Errorf("name the core to its guard: %w", err)
	}
	c, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, err
	}
	o := &objects{Collection: c, spec: spec}
	g := &guard{objects: o, links: newLinks(o, nil)}
	if err := g.try(exe); err != nil {
		g.close()
		return nil, err
	}
	return g, nil
}

// try attaches a program that the walk to a file asks, and looks for whether it was.
func (g *guard) try(file string) error {
	l, err := link.AttachLSM(link.LSMOptions{Program: g.Programs["guard_pins"]})
	if err != nil {
		return err
	}
	defer l.Close()
	if _, err := os.Stat(file); err != nil {
		return err
	}
	var asked bool
	if err := g.Variables["asked"].Get(&asked); err != nil {
		return err
	}
	if !asked {
		return errors.New("they load, and are not asked")
	}
	return nil
}

// close gives up the descriptors; what is pinned goes on.
func (g *guard) close() {
	if g != nil {
		closeAll(g.links.open)
		g.Close()
	}
}

// raise attaches the programs and pins them in the place of a former core's, which
// keep watch until then.
func (g *guard) raise(t *tree, p pins) error {
	g.links.tree, g.links.pins = t, p
	var stat unix.Stat_t
	if err := unix.Stat(p.dir, &stat); err != nil {
		return fmt.Errorf("guard pins: %w", err)
	}
	device := uint64(unix.Major(stat.Dev))<<20 | uint64(unix.Minor(stat.Dev)) // as the kernel has it
	if err := g.Maps["pins"].Put(uint32(0), [2]uint64{stat.Ino, device}); err != nil {
		return fmt.Errorf("guard pins: %w", err)
	}
	for _, name := range guardOrder {
		if err := g.links.replace(hook{program: name}); err != nil {
			return err
		}
	}
	return nil
}

// cover makes it guard these maps and links, and no others.
func (g *guard) cover(guarded [2]map[uint32]bool) error {
	for i, table := range []string{"guarded_maps", "guarded_links"} {
		if maps.Equal(g.ids[i], guarded[i]) {
			continue
		}
		for id := range guarded[i] {
			if err := g.Maps[table].Put(id, uint8(1)); err != nil {
				return fmt.Errorf("guard %s: %w", table, err)
			}
		}
		for id := range g.ids[i] {
			if !guarded[i][id] {
				_ = g.Maps[table].Delete(id) // it does not exist any more
			}
		}
		g.ids[i] = guarded[i]
	}
	return nil
}

// guarded are the ids of every map and link that enforces, and of the observers' links.
func (c *Core) guarded() (ids [2]map[uint32]bool) {
	ids = [2]map[uint32]bool{{}, {}}
	all := slices.Concat(slices.Collect(maps.Values(c.objects.Maps)), slices.Collect(maps.Values(c.guard.Maps)))
	if c.journal != nil {
		all = append(all, c.journal.kernel)
	}
	for _, m := range all {
		if info, err := m.Info(); err == nil {
			if id, known := info.ID(); known {
				ids[0][uint32(id)] = true
			}
		}
	}
	for _, g := range append(c.decisive(), c.prepared) {
		if g != nil {
			for _, id := range g.ids {
				ids[0][uint32(id)] = true
			}
		}
	}
	see := func(l link.Link) {
		if info, err := l.Info(); err == nil {
			ids[1][uint32(info.ID)] = true
		}
	}
	c.devices.mu.Lock()
	defer c.devices.mu.Unlock()
	for _, all := range []*links{c.links, c.guard.links, c.devices.links} {
		for _, l := range all.open {
			see(l)
		}
	}
	if c.observers != nil {
		for _, l := range c.observers.links {
			see(l)
		}
	}
	return ids
}

// watchGuard keeps the guard over what enforces now.
func (c *Core) watchGuard() []incident {
	if c.guard == nil {
		return nil
	}
	if err := c.guard.cover(c.guarded()); err != nil {
		return []incident{{"the guard does not know what to guard", err}}
	}
	return nil
}

// shield finds what keeps root from what enforces.
func (t *trial) shield() error {
	lsm := `the configuration says "guard": false`
	if !t.config.Unguarded {
		var err error
		if t.guard, err = newGuard(); err == nil {
			return nil
		}
		why, _, _ := strings.Cut(err.Error(), "\n")
		lsm = fmt.Sprintf("no BPF LSM here (%s)", why)
	}
	lockdown := "unknown"
	if b, err := os.ReadFile(filepath.Join(securityFS, "lockdown")); err == nil {
		_, rest, _ := strings.Cut(string(b), "[") // none [integrity] confidentiality
		lockdown, _, _ = strings.Cut(rest, "]")
	}
	t.limits = append(t.limits, fmt.Sprintf("root is not kept from what enforces, but seen within a second and undone: %s; kernel lockdown: %s", lsm, lockdown))
	return nil
}

// securityFS is where the kernel says what guards it.
const securityFS = "/sys/kernel/security"
