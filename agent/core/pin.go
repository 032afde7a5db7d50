package core

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
)

// pins are where programs and maps stay while no core runs:
//
//	DIR/maps/NAME    every map but the compiler's own
//	DIR/links/NAME   every attached program
//	DIR/links/NAME_N the same, of the device with index N
//	DIR/audit        where the audit log ends
//	DIR/abi          identityCard; pinned last, so that pins without it are what
//	                 an interrupted start left behind
//
// Whoever can write here decides what is enforced, so the directory must be
// root's alone, and anything unexpected in it is refused, never mended.
type pins struct {
	dir  string
	seen *sync.Map // path: the inode that was last known to be right; nil = nobody looks
}

func (p pins) maps(name string) string  { return filepath.Join(p.dir, "maps", name) }
func (p pins) links(name string) string { return filepath.Join(p.dir, "links", name) }
func (p pins) abi() string              { return filepath.Join(p.dir, "abi") }

// aside is where a link waits to take the place of its predecessor. BPF file
// systems allow no dot in a name.
func (p pins) aside(name string) string { return p.links(name) + "_new" }

// all are the paths of whatever could be ours, in the order in which it is taken away:
// what judges packets goes first, and the directories last. Programs that nobody else
// holds are detached by it. `abi` goes before all else: what an interruption leaves is
// then known to be unfinished.
func (p pins) all(spec *ebpf.CollectionSpec) []string {
	paths := []string{p.abi(), p.audit()}
	for _, h := range p.hooks() {
		paths = append(paths, p.links(h.String()))
	}
	for _, name := range slices.Backward(slices.Concat(attachOrder, guardOrder)) {
		paths = append(paths, p.links(name), p.aside(name))
	}
	for _, name := range keptMaps(spec) {
		paths = append(paths, p.maps(name))
	}
	return append(paths, p.links(""), p.maps(""), p.dir)
}

// check looks at the directory and changes nothing. It reports whether a core
// finished its start here.
func (p pins) check(spec *ebpf.CollectionSpec) (committed bool, err error) {
	if _, err := os.Lstat(p.dir); errors.Is(err, fs.ErrNotExist) {
		return false, checkBPFFS(filepath.Dir(p.dir))
	}
	if err := checkBPFFS(p.dir); err != nil {
		return false, err
	}
	for _, dir := range []string{p.dir, p.maps(""), p.links("")} {
		if err := checkDirectory(dir, p.all(spec)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
	}
	_, err = os.Lstat(p.abi())
	return err == nil, nil
}

func checkBPFFS(dir string) error {
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err != nil {
		return proto.Refuse("mount -t bpf bpf "+dir, "open bpffs %s: %w", dir, err)
	}
	if stat.Type != unix.BPF_FS_MAGIC {
		return proto.Refuse("mount -t bpf bpf "+dir, "bpffs: %s is not in a BPF file system", dir)
	}
	return nil
}

// checkDirectory wants root's own directory with nothing in it but known paths.
func checkDirectory(dir string, known []string) error {
	if err := checkOwner(dir, fs.ModeDir|0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("read pins: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if !slices.Contains(known, path) {
			return proto.Refuse("find out who made it, and remove it", "adopt pins: %s is not ours", path)
		}
		if !e.IsDir() {
			if err := checkOwner(path, 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

func checkOwner(path string, mode fs.FileMode) error {
	info, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("check owner of %s: %w", path, err)
	}
	if stat := info.Sys().(*syscall.Stat_t); stat.Uid != 0 || info.Mode() != mode {
		return proto.Refuse("find out who changed it; chown root and chmod it if nobody did",
			"adopt pins: %s belongs to user %d with mode %v, not to root with %v", path, stat.Uid, info.Mode(), mode)
	}
	return nil
}

// mend tells what to do about pins that cannot be adopted.
const mend = "stop demarc-core and run `demarc-core detach --yes`; nothing is enforced until it is started again"

// adopt opens the pinned maps, and the links at the managed root, of a finished start,
// if they are exactly what this core would pin. The caller closes them.
func (p pins) adopt(spec *ebpf.CollectionSpec, t *tree) (maps map[string]*ebpf.Map, links map[hook]attachment, err error) {
	maps = map[string]*ebpf.Map{}
	defer func() {
		if err != nil {
			closeAll(maps)
		}
	}()
	about, err := openPinnedMap(p.abi(), &cardSpec)
	if err != nil {
		return nil, nil, err
	}
	defer about.Close()
	var found identityCard
	if err := about.Lookup(uint32(0), &found); err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", p.abi(), err)
	}
	if want := card(spec, t); found != want {
		return nil, nil, proto.Refuse(mend, "adopt pins: %s was made by another version or for another cgroup_root: %+v, not %+v",
			p.dir, found, want)
	}
	for _, name := range keptMaps(spec) {
		if maps[name], err = openPinnedMap(p.maps(name), spec.Maps[name]); err != nil {
			return nil, nil, err
		}
	}
	hooks := make([]hook, len(attachOrder))
	for i, name := range attachOrder {
		hooks[i].program = name
	}
	links, err = p.openLinks(hooks, spec, t)
	return maps, links, err
}

// openLinks opens pinned links. Those whose device is gone are among them, so that they
// can be removed once it is certain that this core starts. The caller closes them.
func (p pins) openLinks(hooks []hook, spec *ebpf.CollectionSpec, t *tree) (all map[hook]attachment, err error) {
	all = map[hook]attachment{}
	for _, h := range hooks {
		path := p.links(h.String())
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			closeAll(all)
			return nil, proto.Refuse(mend, "adopt pins: open %s: %w", path, err)
		}
		program, err := h.leadsTo(l, spec.Programs[h.program], t)
		all[h] = attachment{l, program}
		if err != nil && !errors.Is(err, errAway) {
			closeAll(all)
			return nil, proto.Refuse(mend, "adopt pins: %s %w", path, err)
		}
	}
	return all, nil
}

func openPinnedMap(path string, spec *ebpf.MapSpec) (*ebpf.Map, error) {
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		return nil, proto.Refuse(mend, "adopt pins: open %s: %w", path, err)
	}
	if err := spec.Compatible(m); err != nil {
		m.Close()
		return nil, proto.Refuse(mend, "adopt pins: %s: %w", path, err)
	}
	return m, nil
}

// hooks lists the pins of devices. A directory that cannot be read has none.
func (p pins) hooks() []hook {
	var all []hook
	entries, _ := os.ReadDir(p.links(""))
	for _, e := range entries {
		if h, ours := parseHook(e.Name()); ours {
			all = append(all, h)
		}
	}
	return all
}

// pinMaps makes the directory and pins the maps.
func (p pins) pinMaps(o *objects) error {
	if err := p.makeDirectories(); err != nil {
		return fmt.Errorf("pin maps: %w", err)
	}
	for _, name := range keptMaps(o.spec) {
		if err := o.Maps[name].Pin(p.maps(name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	return nil
}

func (p pins) makeDirectories() error {
	for _, dir := range []string{p.dir, p.maps(""), p.links("")} {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// commit says that everything is pinned, in the place of what may be there.
func (p pins) commit(spec *ebpf.CollectionSpec, t *tree) error {
	if err := remove(p.abi()); err != nil {
		return err
	}
	m, err := pinMap(p.abi(), &cardSpec, card(spec, t))
	if err != nil {
		return err
	}
	p.saw(p.abi())
	return m.Close()
}

// pinMap makes a map of one entry, fills it, and pins it. The caller closes it.
func pinMap(path string, spec *ebpf.MapSpec, value any) (*ebpf.Map, error) {
	m, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("make %s map: %w", spec.Name, err)
	}
	if err = m.Put(uint32(0), value); err == nil {
		err = m.Pin(path)
	}
	if err != nil {
		m.Close()
		return nil, fmt.Errorf("fill and pin %s map: %w", spec.Name, err)
	}
	return m, nil
}

// remove is happy where there is nothing.
func remove(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// clear removes every pin that could be ours, and the directory.
func (p pins) clear(spec *ebpf.CollectionSpec) error {
	for _, path := range p.all(spec) {
		if err := remove(path); err != nil {
			return fmt.Errorf("remove pin: %w", err)
		}
	}
	return nil
}

// closeAll closes all of them.
func closeAll[K comparable, C interface{ Close() error }](all map[K]C) {
	for _, c := range all {
		_ = c.Close()
	}
}
