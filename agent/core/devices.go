package core

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
)

// Devices says which network devices are a boundary, in the network namespace
// that the core runs in. The zero value is none.
type Devices struct {
	// Auto takes Ethernet devices with a global address that no bridge or bond
	// carries, and the host's ends of veths, as they come and go.
	Auto bool
	// Names are devices that must exist. They come back under a new index.
	Names []string
}

func (d Devices) none() bool { return !d.Auto && len(d.Names) == 0 }

// programs that are attached to a boundary. What arrives is proven before anything
// can answer it.
func (d netdev) programs() []string {
	if d.door() {
		return []string{"tc_door", "tc_egress"}
	}
	return []string{"tc_ingress", "tc_egress"}
}

var devicePrograms = []string{"tc_ingress", "tc_door", "tc_egress"}

// hook is one program at one device.
type hook struct {
	program string
	device  int // index
}

// String is the name of its pin.
func (h hook) String() string { return h.program + "_" + strconv.Itoa(h.device) }

// parseHook takes the name of a pin apart.
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

// errAway is that a link's device was removed, or moved to another namespace.
var errAway = errors.New("its device is gone")

// leadsTo checks that a link is attached where the hook says.
func (h hook) leadsTo(l link.Link, spec *ebpf.ProgramSpec) error {
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("cannot be read: %w", err)
	}
	switch at := info.TCX(); {
	case at == nil:
		return fmt.Errorf("is a link of type %v, not of a device", info.Type)
	case ebpf.AttachType(at.AttachType) != spec.AttachType:
		return fmt.Errorf("is attached as %v, not %v", ebpf.AttachType(at.AttachType), spec.AttachType)
	case int(at.Ifindex) != h.device:
		return errAway
	}
	return nil
}

// boundary keeps the device programs attached to the devices that were chosen,
// while enforcement is on. It goes on while a policy is applied.
type boundary struct {
	choice    Devices
	programs  map[string]*ebpf.Program // of the kernel, by name
	specs     map[string]*ebpf.ProgramSpec
	doors     *ebpf.Map
	pins      pins
	log       *slog.Logger
	attaching func(name string) error // as that of links
	watch     *deviceWatch            // nil = there is nothing to follow

	mu      sync.Mutex
	on      bool // there is a policy
	open    map[hook]attachment
	names   map[int]string // what devices were last called
	problem string         // of the last time
	taken   []string       // links that somebody detached, since they were last asked for
	deaf    error          // why the watch ended
}

// attachment is an open link and the program that it is known to run.
type attachment struct {
	link.Link
	program ebpf.ProgramID
}

// newBoundary takes over links, which may be none.
func newBoundary(choice Devices, o *objects, p pins, links map[hook]link.Link, log *slog.Logger) (*boundary, error) {
	b := &boundary{choice: choice, programs: o.Programs, specs: o.spec.Programs, doors: o.Maps["doors"], pins: p, log: log,
		open: map[hook]attachment{}, names: map[int]string{}}
	for h, l := range links {
		b.open[h] = attachment{Link: l}
	}
	if b.programs["tc_ingress"] == nil { // the kernel has no place for them
		b.choice = Devices{}
	}
	if b.choice.none() {
		return b, nil
	}
	var err error
	b.watch, err = watchDevices()
	return b, err
}

// run follows the devices until the context ends.
func (b *boundary) run(ctx context.Context) {
	if b.watch == nil {
		return
	}
	var listener sync.WaitGroup
	defer listener.Wait()
	defer b.watch.close()
	listener.Go(func() {
		if err := b.watch.run(); err != nil {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.deaf = err
		}
	})
	ticker := time.NewTicker(upkeepInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C: // also finds what somebody else detached
		case <-b.watch.rings:
		}
		b.mu.Lock()
		if b.on {
			_ = b.follow() // kept as the problem
		}
		b.mu.Unlock()
	}
}

// begin attaches to the devices there are, all or none.
func (b *boundary) begin() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.follow(); err != nil {
		b.release()
		return err
	}
	b.on = true
	return nil
}

// end detaches everything.
func (b *boundary) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.on = false
	b.release()
}

func (b *boundary) release() {
	for h := range b.open {
		b.detach(h)
	}
	b.problem = ""
}

// adopt puts this core's programs into the links taken over and then follows the
// devices. Where the code is the same, nothing is touched.
func (b *boundary) adopt() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.on = true
	_ = b.follow() // first of all lets go of devices that are gone
	for h, a := range b.open {
		same, err := runs(a, b.programs[h.program])
		if err == nil && !same {
			err = a.Update(b.programs[h.program])
		}
		if err == nil {
			err = b.note(h, a.Link)
		}
		if err != nil {
			return fmt.Errorf("update link %v: %w", h, err)
		}
	}
	return nil
}

// follow attaches to devices that should be a boundary and lets go of the others.
// A device that cannot be had is the problem until it can.
func (b *boundary) follow() error {
	all, err := b.list()
	if err == nil {
		wanted, missing := b.choose(all)
		for h, a := range b.open {
			if _, keep := wanted[h.device]; !keep || errors.Is(h.leadsTo(a, b.specs[h.program]), errAway) {
				if keep { // its device is here
					b.taken = append(b.taken, b.label(h))
				}
				b.detach(h)
			}
		}
		err = b.attachAll(wanted, missing)
		for h := range b.open { // what was an uplink may be a door now
			if err == nil && !slices.Contains(wanted[h.device].programs(), h.program) {
				b.detach(h)
			}
		}
	}
	problem := ""
	if err != nil {
		problem = err.Error()
	}
	if problem != "" && problem != b.problem && b.on {
		b.log.Error("degraded", "problem", problem)
	}
	b.problem = problem
	return err
}

// list is empty without a look where there is nothing to choose.
func (b *boundary) list() ([]netdev, error) {
	if b.choice.none() {
		return nil, nil
	}
	return listDevices()
}

// choose picks the boundaries, and says what was asked for in vain.
func (b *boundary) choose(all []netdev) (wanted map[int]netdev, missing []error) {
	wanted = map[int]netdev{}
	for _, d := range all {
		// A device that loses its address stays: it may be about to get another one.
		_, before := b.open[hook{"tc_egress", d.index}]
		if b.choice.Auto && d.ethernet && (d.hostSide || !d.enslaved && (d.routed || before)) {
			wanted[d.index] = d
		}
	}
	for _, name := range b.choice.Names {
		d, err := deviceByName(all, name)
		if err != nil {
			missing = append(missing, err)
			continue
		}
		wanted[d.index] = d
	}
	return wanted, missing
}

func deviceByName(all []netdev, name string) (netdev, error) {
	i := slices.IndexFunc(all, func(d netdev) bool { return d.name == name })
	if i < 0 {
		return netdev{}, fmt.Errorf("device %s is not there", name)
	}
	if !all[i].ethernet {
		return netdev{}, fmt.Errorf("device %s carries no Ethernet frames", name)
	}
	return all[i], nil
}

// attachAll attaches what is not attached yet. One failure does not keep the
// others from being attached.
func (b *boundary) attachAll(wanted map[int]netdev, failed []error) error {
	b.names = map[int]string{}
	for _, index := range slices.Sorted(maps.Keys(wanted)) {
		b.names[index] = wanted[index].name
		if wanted[index].door() {
			if err := b.makeDoor(wanted[index]); err != nil {
				failed = append(failed, err)
				continue
			}
		}
		for _, program := range wanted[index].programs() {
			h := hook{program, index}
			if _, attached := b.open[h]; attached {
				continue
			}
			err := b.attach(h)
			if err != nil && !errors.Is(err, unix.ENODEV) { // gone already; the watch will ring
				failed = append(failed, err)
			}
		}
	}
	switch len(failed) {
	case 0:
		return nil
	case 1:
		return failed[0]
	}
	return fmt.Errorf("%w, and %d more", failed[0], len(failed)-1)
}

// label is what people call a hook.
func (b *boundary) label(h hook) string {
	if name := b.names[h.device]; name != "" {
		return h.program + " " + name
	}
	return fmt.Sprintf("%s device %d", h.program, h.device)
}

// attach puts a program before those that are there already, so that none of them
// can take a packet past it.
func (b *boundary) attach(h hook) error {
	name := b.label(h)
	if b.attaching != nil {
		if err := b.attaching(name); err != nil {
			return fmt.Errorf("attach %s: %w", name, err)
		}
	}
	fresh, err := link.AttachTCX(link.TCXOptions{
		Interface: h.device, Program: b.programs[h.program], Attach: b.specs[h.program].AttachType, Anchor: link.Head(),
	})
	if err != nil {
		return fmt.Errorf("attach %s: %w", name, err)
	}
	if err := fresh.Pin(b.pins.links(h.String())); err != nil {
		fresh.Close()
		return fmt.Errorf("pin link %s: %w", name, err)
	}
	b.log.Info("device is a boundary", "link", name)
	return b.note(h, fresh)
}

// note keeps a link, and which program it runs.
func (b *boundary) note(h hook, l link.Link) error {
	b.open[h] = attachment{Link: l}
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("read link %s: %w", b.label(h), err)
	}
	b.open[h] = attachment{Link: l, program: info.Program}
	b.pins.saw(b.pins.links(h.String()))
	return nil
}

// makeDoor writes what the kernel must know of a door, and leaves what it learned.
func (b *boundary) makeDoor(d netdev) error {
	var entry abi.Door
	index, via := uint32(d.index), uint32(d.via())
	if err := b.doors.Lookup(index, &entry); err == nil && entry.Via == via {
		return nil
	}
	entry.Via = via
	if err := b.doors.Put(index, entry); err != nil {
		return fmt.Errorf("write door %s: %w", d.name, err)
	}
	return nil
}

func (b *boundary) detach(h hook) {
	b.log.Info("device is no boundary any more", "link", b.label(h))
	os.Remove(b.pins.links(h.String()))
	b.open[h].Close()
	delete(b.open, h)
	if h.program == "tc_door" { // whoever gets its index next is somebody else
		if err := b.doors.Delete(uint32(h.device)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			b.log.Error("degraded", "problem", fmt.Sprintf("delete door %d: %v", h.device, err))
		}
	}
}

// status asks the kernel about every link, and says what is missing.
func (b *boundary) status() (all []proto.Link, problems []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for h, a := range b.open {
		s := proto.Link{Name: b.label(h)}
		err := h.leadsTo(a, b.specs[h.program])
		if info, bad := a.Info(); err == nil && bad == nil && info.Program != a.program {
			err = fmt.Errorf("runs program %d, which is not ours", info.Program)
		}
		s.Attached = err == nil
		if err == nil {
			_, err = os.Lstat(b.pins.links(h.String()))
		}
		if err != nil {
			s.Problem = fmt.Sprintf("link %s: %v", s.Name, err)
		}
		if info, err := b.programs[h.program].Info(); err == nil {
			s.Program = info.Tag
		}
		all = append(all, s)
	}
	slices.SortFunc(all, func(x, y proto.Link) int { return strings.Compare(x.Name, y.Name) })
	if b.problem != "" {
		problems = append(problems, b.problem)
	}
	if b.deaf != nil {
		problems = append(problems, b.deaf.Error()+": new devices are noticed late")
	}
	return all, problems
}

// close gives up the descriptors. What is attached stays attached.
func (b *boundary) close() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.watch.close()
	closeAll(b.open)
}

// probeSpec is a program for devices that does nothing.
var probeSpec = &ebpf.ProgramSpec{
	Name: "probe", Type: ebpf.SchedCLS, License: "GPL",
	Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}, // TCX_NEXT
}

// probeTCX asks the kernel for a place at a device that cannot exist: where there
// are such places, it is the device that is missing.
func probeTCX() error {
	nothing, err := ebpf.NewProgram(probeSpec)
	if err != nil {
		return fmt.Errorf("load a program for devices: %w", err)
	}
	defer nothing.Close()
	l, err := link.AttachTCX(link.TCXOptions{Interface: math.MaxInt32, Program: nothing, Attach: ebpf.AttachTCXIngress})
	switch {
	case err == nil:
		l.Close()
		return fmt.Errorf("device %d exists", math.MaxInt32)
	case errors.Is(err, unix.ENODEV):
		return nil
	}
	return err
}

// noBoundary is what is not enforced without the device programs.
const noBoundary = "no device boundary: this kernel has no tcx; UDP proofs do not cross hosts"

// devices looks whether the chosen devices can be a boundary. Where the kernel has
// no place for programs at devices, only those who named some are refused.
func (t *trial) devices() error {
	probe := probeTCX
	if t.hooks.tcx != nil {
		probe = t.hooks.tcx
	}
	if err := probe(); errors.Is(err, ebpf.ErrNotSupported) {
		t.noTCX = true
		if len(t.config.Devices.Names) > 0 {
			return errors.New("this kernel has no tcx, so that no program can be attached to a device")
		}
		if t.config.Devices.Auto {
			t.limits = append(t.limits, noBoundary)
		}
		return nil
	} else if err != nil {
		return err
	}
	if t.config.Devices.none() {
		return nil
	}
	all, err := listDevices()
	if err != nil || t.committed { // what an adopted boundary lacks is a problem, not a refusal
		return err
	}
	for _, name := range t.config.Devices.Names {
		if _, err := deviceByName(all, name); err != nil {
			return proto.Refuse(`mend "devices" in the configuration; there are: `+strings.Join(deviceNames(all), ", "), "%w", err)
		}
	}
	return nil
}

// deviceNames lists the devices that can be a boundary.
func deviceNames(all []netdev) []string {
	names := []string{}
	for _, d := range all {
		if d.ethernet {
			names = append(names, d.name)
		}
	}
	slices.Sort(names)
	return names
}

// links are the open ones.
func (b *boundary) links() (all []link.Link) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, a := range b.open {
		all = append(all, a.Link)
	}
	return all
}
