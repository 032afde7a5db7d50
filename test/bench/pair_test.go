package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m) }

// Both ends of every pair have the same addresses: the pairs do not meet.
const (
	clientAddress = "10.77.0.1"
	serverAddress = "10.77.0.2"
)

// Ports of the load tool.
const (
	firstPort  = 7000
	lastPort   = 7003
	udpPort    = 7100
	closedPort = 7200 // the server listens, no policy declares it
)

// end is one side of a pair: client or server.
type end struct {
	ns     *netlab.Namespace
	cgroup *netlab.Cgroup
	file   *os.File // the namespace
	device int      // index of its only interface
}

// pair is a client and a server joined by a cable, under one configuration:
//
//	client eth0 ---- eth0 server
type pair struct {
	name           string
	enforces       bool
	client, server end
}

// bench is everything that is set up for a run.
type bench struct {
	t      testing.TB
	lab    *netlab.Lab
	load   string // path of the load tool
	cpus   [2]int // of client and server
	tuples int    // declared by every policy, each way
	pairs  []*pair
	node   *netlab.Node
	empty  map[string]*ebpf.Program // attached to the pair of that name
	pace   float64                  // connections a second, where they are paced
}

// build makes a bench without pairs.
func build(t testing.TB, tuples int) *bench {
	t.Helper()
	b := &bench{t: t, lab: netlab.New(t), tuples: tuples}
	b.load = filepath.Join(b.lab.Dir(), "load")
	b.command("cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", b.load, "load/load.c")
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
	found := 0
	for cpu := 0; cpu < 1024 && found < 2; cpu++ {
		if set.IsSet(cpu) {
			b.cpus[found] = cpu
			found++
		}
	}
	if found < 2 {
		t.Fatal("the benchmark needs two CPUs: client and server have one each")
	}
	return b
}

// command runs a program that has to succeed.
func (b *bench) command(name string, args ...string) string {
	b.t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		b.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// compile compiles a BPF program of bpf/.
func (b *bench) compile(name string) *ebpf.CollectionSpec {
	b.t.Helper()
	object := filepath.Join(b.lab.Dir(), name+".o")
	include := filepath.Join("/usr/include", strings.TrimSpace(b.command("cc", "-print-multiarch")))
	b.command("clang-19", "-O2", "-g", "-mcpu=v3", "-Wall", "-Werror", "-target", "bpf", "-I../../bpf", "-I"+include,
		"-c", filepath.Join("bpf", name+".bpf.c"), "-o", object)
	spec, err := ebpf.LoadCollectionSpec(object)
	if err != nil {
		b.t.Fatal(err)
	}
	return spec
}

// pair joins two fresh namespaces. Both ends are in the cgroups.
func (b *bench) pair(name string, enforces bool, client, server *netlab.Cgroup) *pair {
	b.t.Helper()
	p := &pair{name: name, enforces: enforces}
	p.client, p.server = b.end(name+" client", client), b.end(name+" server", server)
	check(b.t, p.client.ns.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(p.server.file.Fd()),
		})
	}))
	for _, side := range []struct {
		*end
		address string
	}{{&p.client, clientAddress}, {&p.server, serverAddress}} {
		check(b.t, side.ns.Do(func() error {
			eth0, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			side.device = eth0.Attrs().Index
			if err := netlink.LinkSetUp(eth0); err != nil {
				return err
			}
			ip := &net.IPNet{IP: net.ParseIP(side.address), Mask: net.CIDRMask(24, 32)}
			return netlink.AddrAdd(eth0, &netlink.Addr{IPNet: ip})
		}))
		// Closed connections must use up neither ports nor memory.
		side.ns.Sysctl("ipv4/tcp_max_tw_buckets", "2000")
		side.ns.Sysctl("ipv4/ip_local_port_range", "10240 65535")
	}
	b.pairs = append(b.pairs, p)
	return p
}

func (b *bench) end(name string, cgroup *netlab.Cgroup) end {
	b.t.Helper()
	e := end{ns: b.lab.Island(name), cgroup: cgroup}
	check(b.t, e.ns.Do(func() (err error) {
		e.file, err = os.Open("/proc/thread-self/ns/net")
		return err
	}))
	b.t.Cleanup(func() { e.file.Close() })
	return e
}

// run runs the load tool on a pair.
func (b *bench) run(p *pair, mode Mode, seconds float64) Result {
	b.t.Helper()
	return b.runAs(p, mode, seconds, p.client.cgroup)
}

// runAs runs it with the client in another cgroup.
func (b *bench) runAs(p *pair, mode Mode, seconds float64, client *netlab.Cgroup) (r Result) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	argument := string(mode)
	if mode == Paced {
		argument = fmt.Sprintf("%s:%.0f", Connections, b.pace)
	}
	c := exec.CommandContext(ctx, b.load, argument, serverAddress, fmt.Sprint(seconds),
		fmt.Sprintf("/proc/self/fd/3,%s,%d", client.Dir(), b.cpus[0]),
		fmt.Sprintf("/proc/self/fd/4,%s,%d", p.server.cgroup.Dir(), b.cpus[1]))
	c.ExtraFiles = []*os.File{p.client.file, p.server.file}
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	// The thread that starts it must outlive it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	out, err := c.Output()
	if exit, ok := err.(*exec.ExitError); ok {
		b.t.Fatalf("%s, %s: %v\n%s", p.name, mode, err, exit.Stderr)
	}
	check(b.t, err)
	if err := json.Unmarshal(out, &r); err != nil {
		b.t.Fatalf("%s, %s: %v\n%s", p.name, mode, err, out)
	}
	return r
}

// reaches says whether a client in the cgroup gets a connection to a port.
func (b *bench) reaches(p *pair, port int, client *netlab.Cgroup) bool {
	b.t.Helper()
	return b.runAs(p, Mode(fmt.Sprintf("try:%d", port)), 1, client).Operations == 1
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
