//go:build kernels

package vm_test

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/rpc"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
	"github.com/demarc/demarc/test/vm/talk"
)

// machine is a virtual machine that has the place of a namespace: its device is
// joined to the namespace's cable, and the namespace's addresses are its own.
//
//	machine eth0 = tap0 --bridge-- eth0 ==cable== switch
//	                     (namespace)      ^ wire
type machine struct {
	t      *testing.T
	series string
	lsm    string // security modules of the kernel's command line; "" = its own choice
	ns     *netlab.Namespace
	wire   *netlab.Wire
	qemu   *netlab.Process
	calls  *rpc.Client
	hello  talk.Machine
	frames uint16        // sentinels so far
	ahead  time.Duration // its wall clock, of this host's
	well   string        // what its log says when it has ended well
}

// patience is for what an emulated machine does on a busy host. It only says when
// to give up: no outcome depends on it.
const patience = 3 * time.Minute

// boot starts machines side by side and sets their clocks to the same time.
func boot(t *testing.T, programs string, lab *netlab.Lab, series ...string) []*machine {
	t.Helper()
	return bootLanes(t, programs, lab, lanesOf(series)...)
}

// lane is a kernel and how it is started.
type lane struct {
	series  string
	lsm     string // security modules of its command line; "" = its own choice
	name    string // of the machine; "" = that of the kernel
	options string // more of the command line
	memory  int    // in MB; 0 = 640
}

func (l lane) String() string {
	if l.lsm == "" {
		return l.series
	}
	return l.series + " lsm=" + l.lsm
}

func lanesOf(series []string) (all []lane) {
	for _, s := range series {
		all = append(all, lane{series: s})
	}
	return all
}

func bootLanes(t *testing.T, programs string, lab *netlab.Lab, lanes ...lane) []*machine {
	t.Helper()
	key := keyring(t, programs, lab)
	var all []*machine
	for _, l := range lanes {
		all = append(all, start(t, lab, l, func(m *machine) []byte { return rootFiles(m, programs, key) }))
	}
	for _, m := range all {
		m.hello = call[talk.Machine](m, "Hello", struct{}{})
	}
	// A machine refuses tags of the time slot in which it started: it cannot know
	// what it admitted before. The next slot begins now.
	now := time.Now()
	clock := time.Unix(0, (now.UnixNano()>>abi.TagSlotShift+1)<<abi.TagSlotShift)
	for _, m := range all {
		m.ahead = clock.Sub(now)
		m.step(0)
	}
	return all
}

// step sets the machine's wall clock forward or back.
func (m *machine) step(by time.Duration) {
	m.t.Helper()
	m.ahead += by
	call[bool](m, "SetClock", time.Now().Add(m.ahead))
}

func start(t *testing.T, lab *netlab.Lab, l lane, content func(*machine) []byte) *machine {
	t.Helper()
	m := &machine{t: t, series: l.series, lsm: l.lsm, ns: lab.Namespace(cmp.Or(l.name, "linux-"+l.series)), well: "\n" + talk.Marker + "0\n"}
	options := "console=ttyS0 panic=-1 quiet " + l.options
	if l.lsm != "" {
		options += " lsm=" + l.lsm
	}
	m.wire = m.ns.Wire()
	files, err := os.MkdirTemp(lab.Dir(), "machine")
	check(t, err, "make directory")
	root := filepath.Join(files, "root.cpio")
	check(t, os.WriteFile(root, content(m), 0o600), "write root file system")
	check(t, m.ns.Do(m.bridge), "bridge to the machine")
	listener, err := net.Listen("unix", filepath.Join(files, "port"))
	check(t, err, "make channel")
	defer listener.Close()
	m.qemu = m.ns.Start(lab.Cgroup("machines"), netlab.Command{Path: "qemu-system-x86_64", Args: []string{
		// One thread emulates both CPUs: with one each, kernels that patch their own
		// code crash now and then at their start.
		"-M", "pc", "-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2", "-m", fmt.Sprint(cmp.Or(l.memory, 640)),
		"-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio",
		"-kernel", filepath.Join(kernel(t, l.series), "vmlinuz"), "-initrd", root,
		"-append", options,
		"-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no",
		"-device", "virtio-net-pci,netdev=net,romfile=,mac=" + m.address(),
		"-chardev", "socket,id=channel,path=" + filepath.Join(files, "port"),
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=channel,nr=1",
	}})
	check(t, listener.(*net.UnixListener).SetDeadline(time.Now().Add(patience)), "await QEMU")
	channel, err := listener.Accept()
	if err != nil {
		t.Fatalf("QEMU did not start: %v\n%s", err, m.qemu.Output())
	}
	m.calls = rpc.NewClient(channel)
	t.Cleanup(func() {
		m.calls.Close()
		if t.Failed() {
			t.Logf("log of %s:\n%s", m.ns.Name, m.log())
		}
	})
	return m
}

// address is the machine's own hardware address, and tells machines apart.
func (m *machine) address() string {
	b := m.ns.IP4.As4()
	return fmt.Sprintf("02:de:aa:%02x:%02x:%02x", b[1], b[2], b[3])
}

// bridge gives the namespace's end of the cable to the machine.
func (m *machine) bridge() error {
	cable, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	addresses, err := netlink.AddrList(cable, netlink.FAMILY_ALL)
	for _, a := range addresses {
		err = errors.Join(err, netlink.AddrDel(cable, &a))
	}
	// The bridge is no host: without an address of its own it says nothing.
	err = errors.Join(err, os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0),
		os.WriteFile("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", []byte("1"), 0))
	if err != nil {
		return err
	}
	off := false
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "bridge"}, MulticastSnooping: &off}
	tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tap0"}, Mode: netlink.TUNTAP_MODE_TAP}
	if err := errors.Join(netlink.LinkAdd(bridge), netlink.LinkAdd(tap)); err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetMaster(cable, bridge), netlink.LinkSetMaster(tap, bridge),
		netlink.LinkSetUp(bridge), netlink.LinkSetUp(tap))
}

// rootFiles is what the machine starts from.
func rootFiles(m *machine, programs string, key []byte) []byte {
	m.t.Helper()
	var a archive
	check(m.t, a.copy("/init", filepath.Join(programs, "init")), "copy program")
	for _, p := range []string{"node", "demarc", "demarc-core", "demarc-agent", rootTests} {
		check(m.t, a.copy("/bin/"+p, filepath.Join(programs, p)), "copy program")
	}
	m.addModules(&a)
	config, err := json.Marshal(talk.Config{Addresses: []netip.Prefix{netip.PrefixFrom(m.ns.IP4, 16), netip.PrefixFrom(m.ns.IP6, 64)}})
	check(m.t, err, "write configuration")
	a.add(talk.ConfigFile, 0o644, config)
	a.add(coreFile, 0o644, fmt.Appendf(nil, `{"agent_user": %d, "log_level": "debug"}`, agentUser))
	a.add(agentFile, 0o644, fmt.Appendf(nil, "node: %s\nserver: unix://%s\n", m.ns.Name, agentSocket))
	a.directory("/var/lib/demarc", 0o700)
	a.add("/var/lib/demarc/keyring", 0o600, key)
	return a.bytes()
}

func (m *machine) addModules(a *archive) {
	m.t.Helper()
	modules, err := filepath.Glob(filepath.Join(kernel(m.t, m.series), "modules", "*.ko"))
	check(m.t, err, "list modules")
	for _, ko := range modules {
		check(m.t, a.copy("/modules/"+filepath.Base(ko), ko), "copy module")
	}
}

// The files of demarc in a machine; what is not said here is in its usual place.
const (
	corePath    = "/bin/demarc-core"
	coreFile    = "/etc/demarc/core.json"
	agentFile   = "/etc/demarc/agent.yaml"
	policyFile  = "/etc/demarc/policy.yaml"
	agentSocket = "/tmp/agent.sock"
	agentUser   = 65534
)

// keyring makes the keys that the machines of a lab share.
func keyring(t *testing.T, programs string, lab *netlab.Lab) []byte {
	t.Helper()
	file := filepath.Join(lab.Dir(), "machines.keyring")
	p := lab.Island("keys").Start(lab.Cgroup("keys"), netlab.Command{
		Path: filepath.Join(programs, "demarc"), Args: []string{"keys", "generate", "tag", "--out", file},
	})
	if status := p.Wait(time.Minute); status != 0 {
		t.Fatalf("generate keys: %d\n%s", status, p.Output())
	}
	key, err := os.ReadFile(file)
	check(t, err, "read keyring")
	return key
}

// call is a call that must be answered.
func call[R any](m *machine, method string, args any) R {
	m.t.Helper()
	var reply R
	pending := m.calls.Go(talk.Service+"."+method, args, &reply, nil)
	select {
	case <-pending.Done:
	case <-m.qemu.Ended():
		m.t.Fatalf("%s: %s: the machine ended", m.ns.Name, method)
	case <-time.After(patience):
		m.t.Fatalf("%s: %s: no answer within %s", m.ns.Name, method, patience)
	}
	if pending.Error != nil {
		m.t.Fatalf("%s: %s: %v", m.ns.Name, method, pending.Error)
	}
	return reply
}

// run runs a program of the machine, which has to end well.
func (m *machine) run(program string, args ...string) string {
	m.t.Helper()
	out := call[talk.Outcome](m, "Run", talk.Command{
		Path: "/bin/" + program, Args: args, Env: []string{"DEMARC_SERVER=unix://" + agentSocket},
	})
	if out.Status != 0 {
		m.t.Fatalf("%s: %s %v: status %d\n%s%s", m.ns.Name, program, args, out.Status, out.Stdout, out.Stderr)
	}
	return out.Stdout
}

// test runs a test of the trusted core in the machine, and returns what it prints.
func (m *machine) test(name string) (out string, passed bool) {
	m.t.Helper()
	o := call[talk.Outcome](m, "Run", talk.Command{Path: "/bin/" + rootTests, Args: []string{"-test.v", "-test.run", "^" + name + "$"}})
	return o.Stdout + o.Stderr, o.Status == 0 && strings.Contains(o.Stdout, "--- PASS: "+name+" ")
}

// start starts the core.
func (m *machine) start() {
	m.t.Helper()
	call[bool](m, "Start", talk.Command{Path: corePath, Args: []string{"run", "--config", coreFile}})
}

// startAgain starts a core in the place of one that was killed. The agent may not have heard
// of that yet, so it is the core's own word that is waited for.
func (m *machine) startAgain() {
	m.t.Helper()
	const ready = "msg=ready"
	before := strings.Count(m.log(), ready)
	m.start()
	for end := time.Now().Add(patience); strings.Count(m.log(), ready) == before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			m.t.Fatalf("%s: the core does not start again:\n%s", m.ns.Name, m.log())
		}
	}
	m.run("demarc", "status", "--wait", "enforcing", "--timeout", patience.String())
}

// enforce starts demarc and puts a policy in force.
func (m *machine) enforce(policy string) {
	m.t.Helper()
	m.start()
	call[bool](m, "Start", talk.Command{Path: "/bin/demarc-agent", Args: []string{"--config", agentFile}, User: agentUser})
	m.set(policyFile, policy)
	m.run("demarc", "status", "--wait", "idle", "--timeout", patience.String())
	m.run("demarc", "apply", policyFile)
	m.run("demarc", "status", "--wait", "enforcing", "--timeout", patience.String())
}

func (m *machine) set(file, value string) {
	m.t.Helper()
	call[bool](m, "Set", talk.Setting{Path: file, Value: value})
}

// settle waits until everything that the machine has sent was seen on its wire.
func (m *machine) settle() {
	m.t.Helper()
	first := 0xf000 + m.frames // types that nobody uses
	n := call[int](m, "Sentinels", first)
	m.frames += uint16(n)
	for i := range n {
		m.wire.Await(func(p netlab.Packet) bool { return p.EtherType == first+uint16(i) })
	}
}

// stop ends the machine, which has to say that all was well with it.
func (m *machine) stop() {
	m.t.Helper()
	m.calls.Go(talk.Service+".Stop", struct{}{}, new(bool), nil) // the machine's end is the answer
	m.qemu.Wait(patience)
	if !strings.Contains(m.log(), m.well) {
		m.t.Errorf("%s did not end well", m.ns.Name)
	}
}

func (m *machine) log() string { return strings.ReplaceAll(m.qemu.Output(), "\r", "") }

// workload makes the calls of a workload of the machine.
func (m *machine) workload(name string) caller {
	return func(c probe.Call) probe.Result {
		m.t.Helper()
		return call[probe.Result](m, "Probe", talk.ProbeCall{Cgroup: "lab/" + name, Call: c})
	}
}

func check(t *testing.T, err error, doing string) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", doing, err)
	}
}
