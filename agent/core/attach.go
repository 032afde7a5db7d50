package core

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/demarc/demarc/agent/core/proto"
)

// attachOrder lists the attached programs. Cgroups are named before anything is
// asked of them, sockets are known before packets are judged.
var attachOrder = []string{
	"cgroup_mkdir", "cgroup_rmdir",
	"sock_create", "sock_release", "setsockopt", "post_bind4", "post_bind6", "sock_ops",
	"connect4", "connect6", "sendmsg4", "sendmsg6", "egress", "ingress",
}

// namers are the programs at the start of attachOrder that give cgroups their
// identity. They judge nothing.
const namers = 2

// devicePrograms are attached to the devices of a boundary, guardOrder to the kernel's
// security hooks (bpf/guard.bpf.c).
var (
	devicePrograms = []string{"tc_ingress", "tc_door", "tc_egress"}
	guardOrder     = []string{"guard_links", "guard_maps", "guard_memory", "guard_mount", "guard_place", "guard_pins"}
)

// hook is where one program is: what it is made for says the rest.
type hook struct {
	program string
	device  int // index; 0 = not at a device
}

// String is the name of its pin.
func (h hook) String() string {
	if h.device == 0 {
		return h.program
	}
	return h.program + "_" + strconv.Itoa(h.device)
}

// parseHook takes the name of a device's pin apart.
func parseHook(pin string) (hook, bool) {
	for _, program := range devicePrograms {
		if number, ours := strings.CutPrefix(pin, program+"_"); ours {
			index, err := strconv.Atoi(number)
			h := hook{program, index}
			return h, err == nil && index > 0 && h.String() == pin
		}
	}
	return hook{}, false
}

var (
	errAway    = errors.New("its device is gone") // removed, or moved to another namespace
	errForeign = errors.New("which is not ours")
)

// leadsTo checks that a link is attached where the hook says, and returns which
// program it runs.
func (h hook) leadsTo(l link.Link, spec *ebpf.ProgramSpec, t *tree) (ebpf.ProgramID, error) {
	info, err := l.Info()
	if err != nil {
		return 0, fmt.Errorf("cannot be read: %w", err)
	}
	if spec.Type == ebpf.LSM { // says nothing more
		return info.Program, nil
	}
	if spec.Type == ebpf.Tracing {
		raw := info.RawTracepoint()
		if raw == nil {
			return 0, fmt.Errorf("is a link of type %v, not a tracepoint", info.Type)
		}
		if raw.Name != spec.AttachTo {
			return 0, fmt.Errorf("is a link of tracepoint %s, not %s", raw.Name, spec.AttachTo)
		}
		return info.Program, nil
	}
	var kind uint32
	cgroup, device := info.Cgroup(), info.TCX()
	switch {
	case h.device == 0 && cgroup == nil:
		return 0, fmt.Errorf("is a link of type %v, not of a cgroup", info.Type)
	case h.device == 0 && cgroup.CgroupId == 0:
		return 0, errors.New("was detached")
	case h.device == 0 && cgroup.CgroupId != t.id:
		return 0, fmt.Errorf("leads to cgroup %d, not %d", cgroup.CgroupId, t.id)
	case h.device == 0:
		kind = uint32(cgroup.AttachType)
	case device == nil:
		return 0, fmt.Errorf("is a link of type %v, not of a device", info.Type)
	case int(device.Ifindex) != h.device:
		return 0, errAway
	default:
		kind = uint32(device.AttachType)
	}
	if ebpf.AttachType(kind) != spec.AttachType {
		return 0, fmt.Errorf("is attached as %v, not %v", ebpf.AttachType(kind), spec.AttachType)
	}
	return info.Program, nil
}

// attachment is an open link and the program that it is known to run.
type attachment struct {
	link.Link
	program ebpf.ProgramID
}

// links are attached programs: those of the managed root, of devices, or of the guard.
// Their descriptors stay open for as long as the core runs: a link that the garbage
// collector closes is detached.
type links struct {
	objects *objects
	tree    *tree
	pins    pins
	open    map[hook]attachment
	names   map[int]string // what devices were last called
	// attaching is told of each program before it is attached, and may say no.
	// Tests break the attachment there.
	attaching func(name string) error
}

// newLinks takes over links, which may be none.
func newLinks(o *objects, open map[hook]attachment) *links {
	if open == nil {
		open = map[hook]attachment{}
	}
	return &links{objects: o, open: open, names: map[int]string{}}
}

// label is what people call a hook.
func (l *links) label(h hook) string {
	switch {
	case h.device == 0:
		return h.program
	case l.names[h.device] != "":
		return h.program + " " + l.names[h.device]
	}
	return fmt.Sprintf("%s device %d", h.program, h.device)
}

// sorted are the hooks of open links: in the order of attachOrder, then by device.
func (l *links) sorted() []hook {
	return slices.SortedFunc(maps.Keys(l.open), func(a, b hook) int {
		return cmp.Or(slices.Index(attachOrder, a.program)-slices.Index(attachOrder, b.program), a.device-b.device, strings.Compare(a.program, b.program))
	})
}

// attach attaches and pins programs of the managed root, all or none.
func (l *links) attach(names []string) error {
	for i, name := range names {
		if err := l.attachOne(hook{program: name}, l.pins.links(name)); err != nil {
			l.detach(names[:i+1])
			return err
		}
	}
	return nil
}

func (l *links) attachOne(h hook, pin string) error {
	name := l.label(h)
	if l.attaching != nil {
		if err := l.attaching(name); err != nil {
			return fmt.Errorf("attach %s: %w", name, err)
		}
	}
	fresh, err := attachProgram(l.objects.Programs[h.program], l.objects.spec.Programs[h.program], l.tree.dir, h.device)
	if err != nil {
		return fmt.Errorf("attach %s: %w", name, err)
	}
	if err := fresh.Pin(pin); err != nil {
		fresh.Close()
		return fmt.Errorf("pin link %s: %w", name, err)
	}
	return l.note(h, fresh)
}

// note keeps a link, and which program it runs.
func (l *links) note(h hook, open link.Link) error {
	l.open[h] = attachment{Link: open}
	info, err := open.Info()
	if err != nil {
		return fmt.Errorf("read link %s: %w", l.label(h), err)
	}
	l.open[h] = attachment{Link: open, program: info.Program}
	l.pins.saw(l.pins.links(h.String()))
	return nil
}

// attachProgram attaches a program where it is made for: to a cgroup, unless a device is
// given. There it comes before those that are there already, so that none of them can
// take a packet past it.
func attachProgram(p *ebpf.Program, spec *ebpf.ProgramSpec, dir string, device int) (link.Link, error) {
	switch {
	case spec.Type == ebpf.Tracing:
		return link.AttachTracing(link.TracingOptions{Program: p, AttachType: spec.AttachType})
	case spec.Type == ebpf.LSM:
		return link.AttachLSM(link.LSMOptions{Program: p})
	case device != 0:
		return link.AttachTCX(link.TCXOptions{Interface: device, Program: p, Attach: spec.AttachType, Anchor: link.Head()})
	}
	return link.AttachCgroup(link.CgroupOptions{Path: dir, Attach: spec.AttachType, Program: p})
}

// detach takes programs off the managed root again, the last one first.
func (l *links) detach(names []string) {
	for _, name := range slices.Backward(names) {
		l.detachOne(hook{program: name})
	}
}

func (l *links) detachOne(h hook) {
	if open, found := l.open[h]; found {
		os.Remove(l.pins.links(h.String()))
		open.Close()
		delete(l.open, h)
	}
}

// update puts this core's programs in the place of those that a former core
// attached. Where the code is the same, nothing is touched.
func (l *links) update() error {
	for _, h := range l.sorted() {
		os.Remove(l.pins.aside(h.String())) // of an interrupted start, of whatever version
		same, err := runs(l.open[h], l.objects.Programs[h.program])
		switch {
		case err != nil:
		case same:
			err = l.note(h, l.open[h].Link)
		case l.objects.spec.Programs[h.program].Type == ebpf.Tracing:
			err = l.replace(h)
		default:
			err = l.put(h)
		}
		if err != nil {
			return fmt.Errorf("update link %s: %w", l.label(h), err)
		}
	}
	return nil
}

// put gives a link this core's program.
func (l *links) put(h hook) error {
	if err := l.open[h].Update(l.objects.Programs[h.program]); err != nil {
		return err
	}
	return l.note(h, l.open[h].Link)
}

// replace is for links whose program cannot be changed. Both programs run for a
// moment, which is harmless: naming a cgroup twice names it the same, and two that
// forbid forbid no more.
func (l *links) replace(h hook) error {
	old, had := l.open[h]
	pin, aside := l.pins.links(h.String()), l.pins.aside(h.String())
	os.Remove(aside) // of an interrupted start
	if err := l.attachOne(h, aside); err != nil {
		return err
	}
	if err := os.Rename(aside, pin); err != nil {
		return fmt.Errorf("pin link %s: %w", l.label(h), err)
	}
	l.pins.saw(pin)
	if had {
		return old.Close()
	}
	return nil
}

// again attaches a program beside a link that leads nowhere. The new link is pinned
// by whoever looks at the pins: it must hold even where that is impossible.
func (l *links) again(h hook) error {
	fresh, err := attachProgram(l.objects.Programs[h.program], l.objects.spec.Programs[h.program], l.tree.dir, h.device)
	if err != nil {
		return err
	}
	l.open[h].Close()
	if err := l.note(h, fresh); err != nil {
		return err
	}
	l.pins.seen.Store(l.pins.links(h.String()), uint64(0)) // what is there leads to the old one
	return nil
}

// runs says whether a link runs the code that this core would attach.
func runs(l link.Link, p *ebpf.Program) (bool, error) {
	info, err := l.Info()
	if err != nil {
		return false, err
	}
	attached, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return false, err
	}
	defer attached.Close()
	theirs, err := attached.Info()
	if err != nil {
		return false, err
	}
	ours, err := p.Info()
	if err != nil {
		return false, err
	}
	return theirs.Tag == ours.Tag, nil
}

// look asks the kernel where a link leads, and whether to our program.
func (l *links) look(h hook) error {
	program, err := h.leadsTo(l.open[h], l.objects.spec.Programs[h.program], l.tree)
	if err == nil && program != l.open[h].program {
		err = fmt.Errorf("runs program %d, %w", program, errForeign)
	}
	return err
}

// status asks the kernel about every link, and looks whether its pin is still
// there: without it, the program would end with the core.
func (l *links) status() (all []proto.Link) {
	for _, h := range l.sorted() {
		s := proto.Link{Name: l.label(h)}
		err := l.look(h)
		s.Attached = err == nil
		if err == nil {
			_, err = os.Lstat(l.pins.links(h.String()))
		}
		if err != nil {
			s.Problem = fmt.Sprintf("link %s: %v", s.Name, err)
		}
		if info, err := l.objects.Programs[h.program].Info(); err == nil {
			s.Program = info.Tag
		}
		all = append(all, s)
	}
	return all
}

// drift attaches again what was detached, gives links their program back, and pins
// what is not pinned any more.
func (l *links) drift(what *pinning) (all []incident) {
	for _, h := range l.sorted() {
		mend, err := l.again, l.look(h)
		if errors.Is(err, errForeign) {
			mend = l.put
		}
		if err != nil && !errors.Is(err, errAway) { // just now, then: the boundary lets go of it
			all = append(all, incident{fmt.Sprintf("link %s %v", l.label(h), err), mend(h)})
		}
		what.look(l.pins.links(h.String()), l.open[h].Link)
	}
	return all
}

// others lists programs of others at our hooks. They cannot let pass what ours refuse,
// but may refuse more or rewrite addresses. At a device one that runs first decides
// alone, which is an error.
func (l *links) others(seen *observers) (all []string, first error) {
	root, err := os.Open(l.tree.dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	for _, h := range l.sorted() {
		spec, name := l.objects.spec.Programs[h.program], l.label(h)
		if spec.Type == ebpf.Tracing {
			continue
		}
		where := link.QueryOptions{Target: h.device, Attach: spec.AttachType}
		if h.device == 0 {
			where.Target, where.QueryFlags = int(root.Fd()), queryEffective
		}
		found, err := link.QueryPrograms(where)
		if err != nil && h.device == 0 {
			return nil, fmt.Errorf("look for programs at %s: %w", name, err)
		}
		if err != nil { // the device may have gone just now
			continue
		}
		ours := h.device == 0 // whoever runs first there, all are asked
		for _, p := range found.Programs {
			if p.ID == l.open[h].program {
				ours = true
				continue
			}
			if seen.owns(p.ID) {
				continue
			}
			all = append(all, foreign(p.ID, name))
			if !ours {
				first = fmt.Errorf("program %d runs before ours at %s, and may let pass what it likes", p.ID, name)
			}
		}
	}
	return all, first
}

// queryEffective asks for what runs at a cgroup, and not only for what is attached to
// it (BPF_F_QUERY_EFFECTIVE).
const queryEffective = 1

func foreign(id ebpf.ProgramID, place string) string {
	return fmt.Sprintf("program %d at %s is not ours (bpftool prog show id %d)", id, place, id)
}
