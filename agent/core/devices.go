package core

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"slices"
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

// boundary keeps the device programs attached to the devices that were chosen,
// while enforcement is on. It goes on while a policy is applied.
type boundary struct {
	*links // at devices
	choice Devices
	doors  *ebpf.Map
	log    *slog.Logger
	watch  *deviceWatch // nil = there is nothing to follow

	mu      sync.Mutex // guards the links, too
	on      bool       // there is a policy
	problem string     // of the last time
	taken   []string   // links that somebody detached, since they were last asked for
	deaf    error      // why the watch ended
}

// newBoundary takes over links, which may be none.
func newBoundary(choice Devices, l *links, log *slog.Logger) (*boundary, error) {
	b := &boundary{links: l, choice: choice, doors: l.objects.Maps["doors"], log: log}
	if l.objects.Programs["tc_ingress"] == nil { // the kernel has no place for them
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
		b.letGo(h)
	}
	b.problem = ""
}

// adopt puts this core's programs into the links taken over, once those of devices that
// are gone are let go of.
func (b *boundary) adopt() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.on = true
	_ = b.follow()
	return b.update()
}

// follow attaches to devices that should be a boundary and lets go of the others.
// A device that cannot be had is the problem until it can.
func (b *boundary) follow() error {
	all, err := b.list()
	if err == nil {
		wanted, missing := b.choose(all)
		for h, a := range b.open {
			_, keep := wanted[h.device]
			_, err := h.leadsTo(a, b.objects.spec.Programs[h.program], b.tree)
			if !keep || errors.Is(err, errAway) {
				if keep { // its device is here
					b.taken = append(b.taken, b.label(h))
				}
				b.letGo(h)
			}
		}
		err = b.attachAll(wanted, missing)
		for h := range b.open { // what was an uplink may be a door now
			if err == nil && !slices.Contains(wanted[h.device].programs(), h.program) {
				b.letGo(h)
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
			switch err := b.attachOne(h, b.pins.links(h.String())); {
			case err == nil:
				b.log.Info("device is a boundary", "link", b.label(h))
			case !errors.Is(err, unix.ENODEV): // gone already; the watch will ring
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

// makeDoor writes what the kernel must know of a door, and leaves what it learned. A bridge
// that leads to doors has an entry, too.
func (b *boundary) makeDoor(d netdev) error {
	via := uint32(d.via())
	for _, index := range []uint32{via, uint32(d.index)} {
		var entry abi.Door
		if err := b.doors.Lookup(index, &entry); err == nil && entry.Via == via {
			continue
		}
		if entry.Via = via; index != uint32(d.index) {
			entry.Lodger = abi.LodgerBridge
		}
		if err := b.doors.Put(index, entry); err != nil {
			return fmt.Errorf("write door %s: %w", d.name, err)
		}
	}
	return nil
}

// endDoor forgets a door, and its bridge with the last one: whoever gets its index next is
// somebody else.
func (b *boundary) endDoor(index uint32) error {
	var gone, other abi.Door
	if err := b.doors.Lookup(index, &gone); err != nil {
		return err
	}
	err := b.doors.Delete(index)
	for h := range b.open {
		if h.program == "tc_door" && b.doors.Lookup(uint32(h.device), &other) == nil && other.Via == gone.Via {
			return err
		}
	}
	if gone.Via != index {
		err = errors.Join(err, b.doors.Delete(gone.Via))
	}
	return err
}

func (b *boundary) letGo(h hook) {
	b.log.Info("device is no boundary any more", "link", b.label(h))
	b.detachOne(h)
	if h.program == "tc_door" {
		if err := b.endDoor(uint32(h.device)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			b.log.Error("degraded", "problem", fmt.Sprintf("delete door %d: %v", h.device, err))
		}
	}
}

// state is the status of every link, and says what is missing.
func (b *boundary) state() (all []proto.Link, problems []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.problem != "" {
		problems = append(problems, b.problem)
	}
	if b.deaf != nil {
		problems = append(problems, b.deaf.Error()+": new devices are noticed late")
	}
	return b.status(), problems
}

// changed is what was not as it should be. Links that were detached are attached again by
// follow, which looks at the same time; here it is told.
func (b *boundary) changed() (all []incident) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.on {
		return nil
	}
	err := b.follow()
	for _, name := range b.taken {
		all = append(all, incident{fmt.Sprintf("link %s was detached", name), err})
	}
	b.taken = nil
	what := pinning{pins: b.pins}
	all = append(all, b.drift(&what)...)
	return append(all, what.incidents()...)
}

// strangers are programs of others at guarded devices.
func (b *boundary) strangers(seen *observers) ([]string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.others(seen)
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
