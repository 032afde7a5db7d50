package core

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
)

// plug adds a device, which is removed when the test ends.
func plug(t *testing.T, d netlink.Link) {
	t.Helper()
	must(t, netlink.LinkAdd(d))
	t.Cleanup(func() { unplug(t, d.Attrs().Name) })
}

// unplug removes a device if it is there.
func unplug(t *testing.T, name string) {
	t.Helper()
	d, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return
	}
	must(t, err)
	must(t, netlink.LinkDel(d))
}

// cable is a plain Ethernet device: a veth whose other end is here too.
func cable(name string) netlink.Link {
	return &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + ".end"}
}

// hostSide is a veth whose other end is in a namespace of its own.
func hostSide(t *testing.T, name string) netlink.Link {
	t.Helper()
	return &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(namespace(t))}
}

// namespace makes a network namespace that lives as long as the test.
func namespace(t *testing.T) int {
	t.Helper()
	made, failed := make(chan *os.File, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			failed <- err
			return
		}
		f, err := os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
		if err != nil {
			failed <- err
			return
		}
		made <- f
	}()
	select {
	case err := <-failed:
		t.Fatal(err)
	case f := <-made:
		t.Cleanup(func() { f.Close() })
		return int(f.Fd())
	}
	return -1
}

func address(t *testing.T, name, prefix string) {
	t.Helper()
	must(t, netlink.AddrAdd(device(t, name), addressOf(t, prefix)))
}

func addressOf(t *testing.T, prefix string) *netlink.Addr {
	t.Helper()
	a, err := netlink.ParseAddr(prefix)
	must(t, err)
	return a
}

func device(t *testing.T, name string) netlink.Link {
	t.Helper()
	d, err := netlink.LinkByName(name)
	must(t, err)
	return d
}

func enslave(t *testing.T, name, master string) {
	t.Helper()
	must(t, netlink.LinkSetMaster(device(t, name), device(t, master)))
}

// taps is what the kernel has attached to each device: "ingress egress" where
// both are there.
func taps(t *testing.T) map[string]string {
	t.Helper()
	all, err := netlink.LinkList()
	must(t, err)
	found := map[string]string{}
	for _, d := range all {
		var hooks []string
		for _, a := range []struct {
			name string
			at   ebpf.AttachType
		}{{"ingress", ebpf.AttachTCXIngress}, {"egress", ebpf.AttachTCXEgress}} {
			r, err := link.QueryPrograms(link.QueryOptions{Target: d.Attrs().Index, Attach: a.at})
			if errors.Is(err, unix.ENODEV) {
				continue // just gone
			}
			must(t, err)
			for range r.Programs {
				hooks = append(hooks, a.name)
			}
		}
		if len(hooks) > 0 {
			found[d.Attrs().Name] = strings.Join(hooks, " ")
		}
	}
	return found
}

// at wants the programs at exactly these devices before the time is over, and says
// when they were.
func at(t *testing.T, within time.Duration, names ...string) time.Duration {
	t.Helper()
	want := map[string]string{}
	for _, name := range names {
		want[name] = "ingress egress"
	}
	start := time.Now()
	for {
		asked := time.Since(start)
		got := taps(t)
		if maps.Equal(want, got) {
			t.Logf("%v: after %v", names, asked)
			return asked
		}
		if asked > within {
			t.Fatalf("after %v (-want +got):\n%s", within, cmp.Diff(want, got))
		}
		time.Sleep(time.Millisecond)
	}
}

// linksOf lists the links of devices as status has them, with their problems.
func linksOf(s *proto.Status) []string {
	var names []string
	for _, l := range s.Links {
		if strings.HasPrefix(l.Name, "tc_") {
			names = append(names, strings.TrimSuffix(l.Name+": "+l.Problem, ": "))
		}
	}
	return names
}

// settle waits until status is as wanted.
func settle(t *testing.T, c *Core, state proto.State, problems ...string) {
	t.Helper()
	var s *proto.Status
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if s = c.Status(); s.State == state && slices.Equal(s.Problems, problems) {
			return
		}
	}
	t.Fatalf("state %v, problems %q; want %v, %q", s.State, s.Problems, state, problems)
}

func (m *machine) enforce(devices Devices) *Core {
	m.t.Helper()
	m.config.Devices = devices
	c := m.start()
	if _, err := c.Apply(shop(m.t.(*testing.T), nil), 0); err != nil {
		m.t.Fatal(err)
	}
	return c
}

// hotPlug is how soon a new device is a boundary; patience is how long a loaded
// machine may take for it.
const (
	hotPlug  = 100 * time.Millisecond
	patience = 20 * time.Second
)

// Which devices are a boundary by themselves.
func TestDevicesAuto(t *testing.T) {
	m := newMachine(t)
	for _, name := range []string{"bare", "up4", "up6", "local", "port"} {
		plug(t, cable(name))
	}
	plug(t, &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "bridge"}})
	plug(t, hostSide(t, "host"))
	plug(t, hostSide(t, "hostport"))
	enslave(t, "port", "bridge")
	enslave(t, "hostport", "bridge")
	address(t, "up4", "10.1.0.1/24")
	address(t, "up6", "fd01::1/64")
	address(t, "local", "169.254.3.4/16")
	address(t, "local", "fe80::7/64")
	address(t, "port", "10.2.0.1/24")
	address(t, "bridge", "10.3.0.1/24")
	address(t, "lo", "10.4.0.1/32")
	t.Cleanup(func() { must(t, netlink.AddrDel(device(t, "lo"), addressOf(t, "10.4.0.1/32"))) })

	m.config.Devices = Devices{Auto: true}
	c := m.start()
	at(t, 0)
	s, err := c.Apply(shop(t, nil), 0)
	must(t, err)
	at(t, 0, "up4", "up6", "bridge", "host", "hostport")
	want := []string{"tc_egress up4", "tc_ingress up4", "tc_egress up6", "tc_ingress up6", "tc_egress bridge", "tc_ingress bridge",
		"tc_door host", "tc_egress host", "tc_door hostport", "tc_egress hostport"}
	if diff := cmp.Diff(want, linksOf(s)); diff != "" || s.State != proto.StateEnforcing || len(s.Links) != len(attachOrder)+10 {
		t.Errorf("state %v, problems %q, links (-want +got):\n%s", s.State, s.Problems, diff)
	}
	c.Close()
	at(t, 0, "up4", "up6", "bridge", "host", "hostport")
	must(t, Detach(m.config))
	at(t, patience) // the kernel takes its time to free links
	absent(t, m.config.BPFFS)
}

func TestDevicesNone(t *testing.T) {
	m := newMachine(t)
	plug(t, cable("up"))
	address(t, "up", "10.1.0.1/24")
	c := m.enforce(Devices{Names: []string{}})
	settle(t, c, proto.StateEnforcing)
	plug(t, hostSide(t, "late"))
	time.Sleep(hotPlug)
	at(t, 0)
}

// A boundary that cannot be had at the first policy leaves nothing behind.
func TestDevicesAllOrNothing(t *testing.T) {
	m := newMachine(t)
	m.config.Devices = Devices{Auto: true}
	for i, name := range []string{"up", "down"} {
		plug(t, cable(name))
		address(t, name, fmt.Sprintf("10.%d.0.1/24", i))
	}
	b := shop(t, nil)
	for _, name := range []string{"tc_ingress up", "tc_egress up", "tc_ingress down", "tc_egress down", "ingress"} {
		t.Run(name, func(t *testing.T) {
			c, err := m.open(hooks{attaching: func(n string) error {
				if n == name {
					return errInjected
				}
				return nil
			}})
			must(t, err)
			defer c.Close()
			if _, err := c.Apply(b, 0); !errors.Is(err, errInjected) || err.Error() != "attach "+name+": injected" {
				t.Errorf("got %v", err)
			}
			at(t, 0)
			if left, err := os.ReadDir(c.pins.links("")); err != nil || len(left) != 0 {
				t.Errorf("links stayed: %v, %v", left, err)
			}
			if n := attached(t, m); n != 0 {
				t.Errorf("%d programs stayed", n)
			}
			settle(t, c, proto.StateIdle)
			plug(t, hostSide(t, "meanwhile"))
			time.Sleep(hotPlug / 2)
			at(t, 0)
		})
	}
}

// Devices come and go, and their programs with them.
func TestHotPlug(t *testing.T) {
	m := newMachine(t)
	c := m.enforce(Devices{Auto: true})
	at(t, 0)
	var after []time.Duration
	plug(t, hostSide(t, "pod"))
	after = append(after, at(t, patience, "pod"))

	// As most container runtimes do: made as a pair, then one end moves out.
	plug(t, &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pod2"}, PeerName: "inside"})
	must(t, netlink.LinkSetNsFd(device(t, "inside"), namespace(t)))
	must(t, netlink.LinkSetUp(device(t, "pod2")))
	after = append(after, at(t, patience, "pod", "pod2"))

	plug(t, cable("eth7"))
	address(t, "eth7", "10.7.0.1/24")
	after = append(after, at(t, patience, "pod", "pod2", "eth7"))
	// It may be about to get another address.
	must(t, netlink.AddrDel(device(t, "eth7"), addressOf(t, "10.7.0.1/24")))
	time.Sleep(hotPlug)
	at(t, 0, "pod", "pod2", "eth7")
	// A bridge carries its packets now.
	plug(t, &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "bridge"}})
	enslave(t, "eth7", "bridge")
	address(t, "bridge", "10.7.0.1/24")
	after = append(after, at(t, patience, "pod", "pod2", "bridge"))
	// Another name is the same device.
	must(t, netlink.LinkSetName(device(t, "bridge"), "br0"))
	t.Cleanup(func() { unplug(t, "br0") })
	time.Sleep(hotPlug)

	unplug(t, "pod")
	must(t, netlink.LinkSetNsFd(device(t, "pod2"), namespace(t)))
	after = append(after, at(t, patience, "br0"))
	if slices.Sort(after); after[len(after)/2] > hotPlug {
		t.Errorf("boundaries after %v, want half of them within %v", after, hotPlug)
	}
	settle(t, c, proto.StateEnforcing)
	if diff := cmp.Diff([]string{"tc_egress br0", "tc_ingress br0"}, linksOf(c.Status())); diff != "" {
		t.Errorf("links (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(hooksAt("br0", t), pinned(t, c)); diff != "" {
		t.Errorf("pins (-want +got):\n%s", diff)
	}
}

// hooksAt are the pins that a device has.
func hooksAt(name string, t *testing.T) []string {
	index := device(t, name).Attrs().Index
	return []string{hook{"tc_egress", index}.String(), hook{"tc_ingress", index}.String()}
}

// pinned lists the pins of devices.
func pinned(t *testing.T, c *Core) []string {
	t.Helper()
	var names []string
	for _, h := range c.pins.hooks() {
		names = append(names, h.String())
	}
	slices.Sort(names)
	return names
}

// Devices are followed while a policy is being applied.
func TestHotPlugDuringApply(t *testing.T) {
	m := newMachine(t)
	c := m.enforce(Devices{Auto: true})
	c.mu.Lock()
	defer c.mu.Unlock()
	plug(t, hostSide(t, "pod"))
	at(t, patience, "pod")
}

// A device that was asked for by name and went away is a problem until it is back.
func TestNamedDeviceGoes(t *testing.T) {
	m := newMachine(t)
	plug(t, cable("up"))
	plug(t, hostSide(t, "pod"))
	c := m.enforce(Devices{Names: []string{"up"}})
	at(t, 0, "up")
	settle(t, c, proto.StateEnforcing)
	unplug(t, "up")
	settle(t, c, proto.StateDegraded, "device up is not there")
	// Going on without it is better than not going on.
	c.Close()
	c = m.start()
	settle(t, c, proto.StateDegraded, "device up is not there")
	plug(t, cable("up"))
	at(t, patience, "up")
	settle(t, c, proto.StateEnforcing)
}

// Names that cannot be a boundary are refused before anything is attached.
func TestNamedDeviceRefused(t *testing.T) {
	plug(t, cable("up"))
	tests := []struct {
		name, device, want string
	}{
		{"bad absent", "eth9", "device eth9 is not there"},
		{"bad without Ethernet", "lo", "device lo carries no Ethernet frames"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			m.config.Devices = Devices{Names: []string{"up", tt.device}}
			_, err := m.open(hooks{})
			var refused *proto.Refused
			if !errors.As(err, &refused) {
				t.Fatalf("got %v", err)
			}
			want := proto.Refused{Message: "preflight: devices: " + tt.want, Hint: `mend "devices" in the configuration; there are: up, up.end`}
			if diff := cmp.Diff(want, *refused); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			absent(t, m.config.BPFFS)
		})
	}
}

// A device whose programs cannot be attached later on is a problem, and tried
// again.
func TestHotPlugFails(t *testing.T) {
	m := newMachine(t)
	c := m.enforce(Devices{Auto: true})
	c.devices.mu.Lock()
	c.devices.attaching = func(name string) error {
		if name == "tc_egress pod" {
			return errInjected
		}
		return nil
	}
	c.devices.mu.Unlock()
	plug(t, hostSide(t, "pod"))
	plug(t, hostSide(t, "pod2"))
	settle(t, c, proto.StateDegraded, "attach tc_egress pod: injected")
	if got := taps(t)["pod2"]; got != "ingress egress" {
		t.Errorf("the other device has %q", got)
	}
	c.devices.mu.Lock()
	c.devices.attaching = nil
	c.devices.mu.Unlock()
	at(t, patience, "pod", "pod2")
	settle(t, c, proto.StateEnforcing)
}

// tapIDs are the kernel's numbers of the links of devices.
func tapIDs(t *testing.T, c *Core) map[string]link.ID {
	t.Helper()
	c.devices.mu.Lock()
	defer c.devices.mu.Unlock()
	ids := map[string]link.ID{}
	for h, a := range c.devices.open {
		info, err := a.Info()
		must(t, err)
		ids[c.devices.label(h)] = info.ID
	}
	return ids
}

// A core that starts takes the boundaries over as they are, whatever happened to
// the devices meanwhile.
func TestDevicesRestart(t *testing.T) {
	m := newMachine(t)
	for _, name := range []string{"stays", "goes", "again"} {
		plug(t, hostSide(t, name))
	}
	c := still(m.enforce(Devices{Auto: true})) // which would mend it
	before := tapIDs(t, c)
	old := hooksAt("goes", t)
	// As if another build had attached this one.
	other, err := ebpf.NewProgram(probeSpec)
	must(t, err)
	defer other.Close()
	stays := hook{"tc_egress", device(t, "stays").Attrs().Index}
	must(t, c.devices.open[stays].Update(other))
	c.Close()

	unplug(t, "goes")
	index := device(t, "again").Attrs().Index
	unplug(t, "again")
	again := hostSide(t, "again")
	again.Attrs().Index = index // the same number, and not the same device
	plug(t, again)
	plug(t, hostSide(t, "comes"))
	at(t, 0, "stays")
	c = m.start()
	at(t, 0, "stays", "again", "comes")
	settle(t, c, proto.StateEnforcing)
	after := tapIDs(t, c)
	for name, id := range after {
		if kept := id == before[name]; kept != strings.HasSuffix(name, " stays") {
			t.Errorf("link %s is %d, was %d", name, id, before[name])
		}
	}
	if same, err := runs(c.devices.open[stays], c.objects.Programs["tc_egress"]); !same || err != nil {
		t.Errorf("tc_egress stays runs other code: %v", err)
	}
	for _, pin := range old {
		absent(t, c.pins.links(pin))
	}
	for range 3 {
		c.Close()
		c = m.start()
		if diff := cmp.Diff(after, tapIDs(t, c)); diff != "" {
			t.Errorf("links (-before +after):\n%s", diff)
		}
	}
	c.Close()

	m.config.Devices = Devices{}
	c = m.start()
	at(t, 0)
	settle(t, c, proto.StateEnforcing)
	if got := pinned(t, c); len(got) != 0 {
		t.Errorf("pins stayed: %v", got)
	}
}

// What somebody else does to a boundary is seen, and mended where it can be. (X20, X21)
func TestDevicesDrift(t *testing.T) {
	m := newMachine(t)
	plug(t, hostSide(t, "pod"))
	c := m.enforce(Devices{Auto: true})
	egress := hook{"tc_egress", device(t, "pod").Attrs().Index}
	open := func() attachment {
		c.devices.mu.Lock()
		defer c.devices.mu.Unlock()
		return c.devices.open[egress]
	}
	number := func(p *ebpf.Program) ebpf.ProgramID {
		info, err := p.Info()
		must(t, err)
		id, _ := info.ID()
		return id
	}
	other, err := ebpf.NewProgram(probeSpec)
	must(t, err)
	defer other.Close()
	pin := c.pins.links(egress.String())
	still(c)
	for _, tt := range []struct {
		name string
		do   func()
		want string
	}{
		{"detached", func() { must(t, open().Detach()) }, "drift: link tc_egress pod was detached: mended"},
		{"another program", func() { must(t, open().Update(other)) },
			fmt.Sprintf("drift: link tc_egress pod runs program %d, which is not ours: mended", number(other))},
		{"pin removed", func() { must(t, os.Remove(pin)) }, "drift: pin " + pin + " was gone, or led elsewhere: mended"},
	} {
		tt.do()
		c.upkeep()
		if s := c.Status(); !slices.Equal(s.Problems, []string{tt.want}) {
			t.Errorf("%s: %q, want %s", tt.name, s.Problems, tt.want)
		}
		c.upkeep()
		if s := c.Status(); s.State != proto.StateEnforcing {
			t.Errorf("%s, a look later: %v, %v", tt.name, s.State, s.Problems)
		}
		at(t, 0, "pod")
	}

	// Behind ours a program may be; before ours it would decide alone.
	spec := c.objects.spec.Programs["tc_egress"].AttachType
	behind, err := link.AttachTCX(link.TCXOptions{Interface: egress.device, Program: other, Attach: spec})
	must(t, err)
	defer behind.Close()
	c.upkeep()
	if s := c.Status(); s.State != proto.StateEnforcing || !slices.Contains(s.Limits, foreign(number(other), "tc_egress pod")) {
		t.Errorf("with a program behind ours: %v, %v, limits %v", s.State, s.Problems, s.Limits)
	}
	must(t, behind.Close())
	before, err := link.AttachTCX(link.TCXOptions{Interface: egress.device, Program: other, Attach: spec, Anchor: link.Head()})
	must(t, err)
	defer before.Close()
	c.upkeep()
	want := fmt.Sprintf("hooks: program %d runs before ours at tc_egress pod, and may let pass what it likes", number(other))
	if s := c.Status(); !slices.Equal(s.Problems, []string{want}) {
		t.Errorf("with a program before ours: %v, %v", s.State, s.Problems)
	}
	must(t, before.Close())
	c.upkeep()
	if s := c.Status(); s.State != proto.StateEnforcing {
		t.Errorf("without it: %v, %v", s.State, s.Problems)
	}
}

// A program that was there before cannot take packets past the boundary.
func TestDevicesFirst(t *testing.T) {
	m := newMachine(t)
	plug(t, cable("up"))
	other, err := ebpf.NewProgram(probeSpec)
	must(t, err)
	defer other.Close()
	index := device(t, "up").Attrs().Index
	for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: other, Attach: at})
		must(t, err)
		defer l.Close()
	}
	c := m.enforce(Devices{Names: []string{"up"}})
	for _, name := range (netdev{}).programs() {
		r, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: c.objects.spec.Programs[name].AttachType})
		must(t, err)
		ours, err := c.objects.Programs[name].Info()
		must(t, err)
		if id, _ := ours.ID(); len(r.Programs) != 2 || r.Programs[0].ID != id {
			t.Errorf("%s is %d, not the first of %v", name, id, r.Programs)
		}
	}
}

// Where programs have no place at devices, only those who ask for some by name are
// refused; the others are told what they do without.
func TestKernelLacksTCX(t *testing.T) {
	lacks := hooks{tcx: func() error { return fmt.Errorf("tcx: %w", ebpf.ErrNotSupported) }}
	plug(t, cable("up"))
	address(t, "up", "10.1.0.1/24")
	tests := []struct {
		name    string
		devices Devices
		limits  []string
		err     string
	}{
		{name: "OK none", devices: Devices{Names: []string{}}},
		{name: "OK auto", devices: Devices{Auto: true},
			limits: []string{"no device boundary: this kernel has no tcx; UDP proofs do not cross hosts"}},
		{name: "bad names", devices: Devices{Names: []string{"up"}},
			err: "preflight: devices: this kernel has no tcx, so that no program can be attached to a device"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			m.config.Devices = tt.devices
			c, err := m.open(lacks)
			if tt.err != "" {
				if err == nil || err.Error() != tt.err {
					t.Errorf("got %v, want %s", err, tt.err)
				}
				return
			}
			must(t, err)
			defer c.Close()
			s, err := c.Apply(shop(t, nil), 0)
			must(t, err)
			if diff := cmp.Diff(tt.limits, beside(s.Limits)); diff != "" || s.State != proto.StateEnforcing {
				t.Errorf("state %v, limits (-want +got):\n%s", s.State, diff)
			}
			if len(s.Links) != len(attachOrder) || c.objects.Programs["tc_egress"] != nil {
				t.Errorf("links %v", s.Links)
			}
			at(t, 0)
		})
	}
}

// The check says what is missing in all three forms.
func TestPreflightDevices(t *testing.T) {
	lacks := hooks{tcx: func() error { return ebpf.ErrNotSupported }}
	fix := `use a kernel with tcx (6.6 or later), or set "devices" to []`
	tests := []struct {
		name    string
		devices Devices
		hooks   hooks
		want    Check
	}{
		{"OK tcx", Devices{Auto: true}, hooks{}, Check{OK: true}},
		{"OK none", Devices{}, lacks, Check{OK: true}},
		{"OK auto", Devices{Auto: true}, lacks, Check{OK: true, Limit: noBoundary, Fix: fix}},
		{"bad names", Devices{Names: []string{"up"}}, lacks,
			Check{Problem: "this kernel has no tcx, so that no program can be attached to a device", Fix: fix}},
		{"bad probe", Devices{}, hooks{tcx: func() error { return errInjected }}, Check{Problem: "injected", Fix: fix}},
		{"bad absent", Devices{Names: []string{"up"}}, hooks{},
			Check{Problem: "device up is not there", Fix: `mend "devices" in the configuration; there are: `}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			m.config.Devices = tt.devices
			trial := &trial{config: m.config, hooks: tt.hooks}
			defer trial.close()
			results := trial.run()
			i := slices.IndexFunc(results, func(c Check) bool { return c.Name == "devices" })
			tt.want.Name, tt.want.Tried = "devices", results[i].Tried
			if diff := cmp.Diff(tt.want, results[i]); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if others := slices.Delete(results, i, i+1); !Passed(others) {
				t.Errorf("\n%s", shown(others))
			}
		})
	}
}

// Pins of devices that this core would not have made are refused like all others.
func TestI16BadDevicePins(t *testing.T) {
	replace := func(t *testing.T, pin string, l link.Link, err error) {
		t.Helper()
		must(t, err)
		defer l.Close()
		must(t, os.Remove(pin))
		must(t, l.Pin(pin))
	}
	tests := []struct {
		name string
		do   func(t *testing.T, c *Core, index int, pin string)
		want string
	}{
		{"bad link of a cgroup", func(t *testing.T, c *Core, _ int, pin string) {
			must(t, os.MkdirAll(filepath.Join(c.tree.dir, "other"), 0o755))
			l, err := link.AttachCgroup(link.CgroupOptions{Path: filepath.Join(c.tree.dir, "other"),
				Attach: ebpf.AttachCGroupInetEgress, Program: c.objects.Programs["egress"]})
			replace(t, pin, l, err)
		}, " is a link of type 3, not of a device"},
		{"bad link of the other direction", func(t *testing.T, c *Core, index int, pin string) {
			other, err := ebpf.NewProgram(probeSpec)
			must(t, err)
			defer other.Close()
			l, err := link.AttachTCX(link.TCXOptions{Interface: index, Attach: ebpf.AttachTCXIngress, Program: other})
			replace(t, pin, l, err)
		}, " is attached as TCXIngress, not TCXEgress"},
		{"bad map where a link belongs", func(t *testing.T, c *Core, _ int, pin string) {
			must(t, os.Remove(pin))
			must(t, twin(t, c.objects.Maps["keys"]).Pin(pin))
		}, ": "},
		{"bad owner", func(t *testing.T, c *Core, _ int, pin string) { must(t, os.Chown(pin, 65534, 0)) }, " belongs to user 65534"},
		{"bad number", func(t *testing.T, c *Core, _ int, pin string) {
			must(t, os.Rename(pin, c.pins.links("tc_egress_007")))
		}, "tc_egress_007 is not ours"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			plug(t, hostSide(t, "pod"))
			c := still(m.enforce(Devices{Auto: true})) // which would mend it
			h := hook{"tc_egress", device(t, "pod").Attrs().Index}
			tt.do(t, c, h.device, c.pins.links(h.String()))
			c.Close()
			before, there := listing(t, m.config.BPFFS), taps(t)
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
			if diff := cmp.Diff(there, taps(t)); diff != "" {
				t.Errorf("attached (-before +after):\n%s", diff)
			}
		})
	}
}

func TestParseHook(t *testing.T) {
	for _, h := range []hook{{"tc_egress", 1}, {"tc_ingress", 2147483647}} {
		if got, ok := parseHook(h.String()); !ok || got != h {
			t.Errorf("%v is %v, %v", h, got, ok)
		}
	}
	for _, pin := range []string{"tc_egress", "tc_egress_", "tc_egress_0", "tc_egress_-1", "tc_egress_+1", "tc_egress_01", "tc_egress_1_new", "egress_1"} {
		if h, ok := parseHook(pin); ok {
			t.Errorf("%s is %v", pin, h)
		}
	}
}

// More changes than the watch has room for are found all the same.
func TestWatchOverflows(t *testing.T) {
	m := newMachine(t)
	m.config.Devices = Devices{Auto: true}
	w, err := watchDevices()
	must(t, err)
	defer w.close()
	raw, err := w.file.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1) }))
	must(t, err)
	for i := range 20 {
		plug(t, cable(fmt.Sprintf("d%d", i)))
	}
	ended := make(chan error)
	go func() { ended <- w.run() }()
	ring := func(what string) {
		t.Helper()
		select {
		case <-w.rings:
		case err := <-ended:
			t.Fatalf("%s: the watch ended: %v", what, err)
		case <-time.After(patience):
			t.Fatalf("%s: no ring", what)
		}
	}
	ring("lost messages")
	for len(w.rings) > 0 {
		<-w.rings
	}
	plug(t, cable("late"))
	ring("after lost messages")
	w.close()
	if err := <-ended; err != nil {
		t.Errorf("closed: %v", err)
	}
}
