package core

import (
	"fmt"
	"os"

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

// links are the attached programs. Their descriptors stay open for as long as the
// core runs: a link that the garbage collector closes is detached.
type links struct {
	objects *objects
	tree    *tree
	pins    pins
	open    map[string]link.Link
	running map[string]ebpf.ProgramID // what each is known to run
	// attaching is told of each program before it is attached, and may say no.
	// Tests break the attachment there.
	attaching func(name string) error
}

// attach attaches and pins programs, all or none.
func (l *links) attach(names []string) error {
	for i, name := range names {
		if err := l.attachOne(name, l.pins.links(name)); err != nil {
			l.detach(names[:i+1])
			return err
		}
	}
	return nil
}

func (l *links) attachOne(name, pin string) error {
	if l.attaching != nil {
		if err := l.attaching(name); err != nil {
			return fmt.Errorf("attach %s: %w", name, err)
		}
	}
	fresh, err := attachProgram(l.objects.Programs[name], l.objects.spec.Programs[name], l.tree.dir)
	if err != nil {
		return fmt.Errorf("attach %s: %w", name, err)
	}
	if err := fresh.Pin(pin); err != nil {
		fresh.Close()
		return fmt.Errorf("pin link %s: %w", name, err)
	}
	l.open[name] = fresh
	return l.note(name)
}

// note remembers which program a link runs.
func (l *links) note(name string) error {
	info, err := l.open[name].Info()
	if err != nil {
		return fmt.Errorf("read link %s: %w", name, err)
	}
	l.running[name] = info.Program
	l.pins.saw(l.pins.links(name))
	return nil
}

func attachProgram(p *ebpf.Program, spec *ebpf.ProgramSpec, dir string) (link.Link, error) {
	if spec.Type == ebpf.Tracing {
		return link.AttachTracing(link.TracingOptions{Program: p, AttachType: spec.AttachType})
	}
	return link.AttachCgroup(link.CgroupOptions{Path: dir, Attach: spec.AttachType, Program: p})
}

// detach takes programs off again, the last one first.
func (l *links) detach(names []string) {
	for i := len(names) - 1; i >= 0; i-- {
		if open := l.open[names[i]]; open != nil {
			os.Remove(l.pins.links(names[i]))
			open.Close()
			delete(l.open, names[i])
		}
	}
}

// update puts this core's programs in the place of those that a former core
// attached. Where the code is the same, nothing is touched.
func (l *links) update() error {
	for _, name := range attachOrder {
		os.Remove(l.pins.aside(name)) // of an interrupted start, of whatever version
		same, err := l.current(name)
		if err == nil && !same {
			if l.objects.spec.Programs[name].Type == ebpf.Tracing {
				err = l.replace(name)
			} else {
				err = l.open[name].Update(l.objects.Programs[name])
			}
		}
		if err == nil {
			err = l.note(name)
		}
		if err != nil {
			return fmt.Errorf("update link %s: %w", name, err)
		}
	}
	return nil
}

// replace is for links whose program cannot be changed. Both programs run for a
// moment, which is harmless: naming a cgroup twice names it the same.
func (l *links) replace(name string) error {
	old := l.open[name]
	if err := l.attachOne(name, l.pins.aside(name)); err != nil {
		return err
	}
	if err := os.Rename(l.pins.aside(name), l.pins.links(name)); err != nil {
		return err
	}
	l.pins.saw(l.pins.links(name))
	return old.Close()
}

// current says whether a link runs the code that this core would attach.
func (l *links) current(name string) (bool, error) {
	return runs(l.open[name], l.objects.Programs[name])
}

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

// status asks the kernel about every link, and looks whether its pin is still
// there: without it, the program would end with the core.
func (l *links) status() []proto.Link {
	var all []proto.Link
	for _, name := range attachOrder {
		open := l.open[name]
		if open == nil {
			continue
		}
		s := proto.Link{Name: name}
		err := leadsTo(open, l.objects.spec.Programs[name], l.tree)
		if info, bad := open.Info(); err == nil && bad == nil && info.Program != l.running[name] {
			err = fmt.Errorf("runs program %d, which is not ours", info.Program)
		}
		s.Attached = err == nil
		if err == nil {
			_, err = os.Lstat(l.pins.links(name))
		}
		if err != nil {
			s.Problem = fmt.Sprintf("link %s: %v", name, err)
		}
		if info, err := l.objects.Programs[name].Info(); err == nil {
			s.Program = info.Tag
		}
		all = append(all, s)
	}
	return all
}
