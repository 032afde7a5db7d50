//go:build kernels

package vm_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/vm/talk"
)

const bootPolicy = `
networks:
  outside: {zone: app, cidrs: [%s/32]}
workloads:
  worker: {zone: app, match: [{systemdUnit: "worker*.service"}]}
crossings:
  - {name: out, from: [workload/worker], to: [network/outside], ports: [tcp/7001], identity: none}
unmanaged: {zone: app, outbound: allow, inbound: allow}
`

// eager dials what is not declared from its first moment on, and goes on.
const eager = `#!/bin/bash
while :; do
	(exec 3<>/dev/tcp/$1/7002) 2>/dev/null
	(exec 3<>/dev/tcp/$1/7001) 2>/dev/null && touch /run/declared-$2
	sleep 0.01
done
`

// Units of the machines. The network's is of the kind of ifupdown's: it waits for
// network-pre.target, and for nothing else of demarc's.
var bootUnits = map[string]string{
	"node.service":         "[Unit]\nDefaultDependencies=no\nSuccessAction=poweroff-force\nFailureAction=reboot-force\n[Service]\nExecStart=/usr/bin/node\n",
	"network.service":      "[Unit]\nDefaultDependencies=no\nAfter=local-fs.target network-pre.target\nBefore=network.target\nWants=network.target\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/sbin/ip address add %[1]s dev eth0\nExecStart=/usr/sbin/ip link set eth0 up\n",
	"worker-early.service": "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=/bin/bash /usr/bin/eager %[2]s early\n",
	"worker-usual.service": "[Service]\nExecStart=/bin/bash /usr/bin/eager %[2]s usual\n",
}

// host is a machine that systemd boots, with demarc from its package.
type host struct {
	name    string
	workers []string // that are enabled
	options string   // of its command line
	state   string   // directory with what demarc had on its disk
}

func (h host) start(t *testing.T, lab *netlab.Lab, programs, deb, series string, outside *netlab.Namespace) *machine {
	t.Helper()
	return start(t, lab, lane{
		series: series, name: h.name, memory: 1024,
		options: "systemd.firstboot=no systemd.mask=getty.target " + h.options,
	}, func(m *machine) []byte {
		var a archive
		addUserland(t, &a)
		addPackage(t, &a, deb)
		check(t, a.copy("/init", filepath.Join(programs, "init")), "copy program")
		check(t, a.copy("/usr/bin/node", filepath.Join(programs, "node")), "copy program")
		m.addModules(&a)
		text, err := json.Marshal(talk.Config{}) // its network is systemd's affair
		check(t, err, "write configuration")
		a.add(talk.ConfigFile, 0o644, text)
		a.add("/usr/bin/eager", 0o755, []byte(eager))
		a.add("/root/policy.yaml", 0o644, []byte(document(fmt.Sprintf(bootPolicy, outside.IP4))))
		for name, text := range bootUnits {
			if strings.Contains(text, "%[") {
				text = strings.NewReplacer("%[1]s", netip.PrefixFrom(m.ns.IP4, 16).String(), "%[2]s", outside.IP4.String()).Replace(text)
			}
			a.add("/usr/lib/systemd/system/"+name, 0o644, []byte(text))
		}
		enable := func(unit, target string) {
			a.link("/etc/systemd/system/"+target+".wants/"+unit, "/usr/lib/systemd/system/"+unit)
		}
		enable("node.service", "sysinit.target")
		enable("network.service", "multi-user.target")
		for _, w := range h.workers {
			enable("worker-"+w+".service", map[string]string{"early": "sysinit.target", "usual": "multi-user.target"}[w])
		}
		// Nobody else's are: behind the package's preset, and before the distribution's.
		a.add("/usr/lib/systemd/system-preset/85-rest.preset", 0o644, []byte("disable *\n"))
		// An emulated machine on a busy one is slower than any: nothing depends on it.
		a.add("/etc/systemd/system.conf.d/emulated.conf", 0o644, []byte("[Manager]\nDefaultTimeoutStartSec=15min\n"))
		a.directory("/var/lib/demarc", 0o700)
		check(t, filepath.Walk(h.state, func(path string, info os.FileInfo, err error) error {
			if err == nil && path != h.state {
				addAs(t, &a, "/var/lib/demarc"+strings.TrimPrefix(path, h.state), path, info)
			}
			return err
		}), "copy state")
		return a.bytes()
	})
}

// try runs a program of a booted machine.
func (m *machine) try(program string, args ...string) talk.Outcome {
	m.t.Helper()
	return call[talk.Outcome](m, "Run", talk.Command{Path: program, Args: args})
}

// must is for what has to end well.
func (m *machine) must(program string, args ...string) string {
	m.t.Helper()
	out := m.try(program, args...)
	if out.Status != 0 {
		m.t.Fatalf("%s: %s %v: %d\n%s%s\n%s", m.ns.Name, program, args, out.Status, out.Stdout, out.Stderr,
			m.try("/usr/bin/journalctl", "--no-pager", "-b", "-n", "200").Stdout)
	}
	return strings.TrimSpace(out.Stdout)
}

// await is for what ends well after a while: a core that starts is minutes of an emulated
// machine.
func (m *machine) await(program string, args ...string) {
	m.t.Helper()
	begin := time.Now()
	for m.try(program, args...).Status != 0 {
		if time.Since(begin) > 5*patience {
			m.must(program, args...)
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	m.t.Logf("%s: %s after %s", m.ns.Name, strings.Join(args, " "), time.Since(begin).Round(time.Second))
}

// enforced is what a host has on its disk that enforced the policy before.
func enforced(t *testing.T, lab *netlab.Lab, outside *netlab.Namespace) string {
	t.Helper()
	n := lab.Node(document(fmt.Sprintf(bootPolicy, outside.IP4)), netlab.NodeOptions{})
	return filepath.Join(n.Dir(), "state")
}

// TestBoot is G06 on a machine of its own: a kernel, the distribution's systemd as its
// first process, and demarc's package, whose units are enabled by its preset. A policy was
// enforced, and units that dial from their first moment on get nothing out that is not
// declared: on the wire, from before the machine starts. The control is the same machine
// without the core.
func TestBoot(t *testing.T) {
	programs, all := build(t), series(t)
	newest := all[len(all)-1]
	packages := t.TempDir()
	c := exec.Command("../../deploy/packages/build", "amd64", packages)
	c.Env = append(os.Environ(), "PACKAGE_VERSION=0.1.0")
	out, err := c.CombinedOutput()
	check(t, err, "build package: "+string(out))
	debs, err := filepath.Glob(packages + "/*.deb")
	if check(t, err, "find package"); len(debs) != 1 {
		t.Fatalf("packages %v", debs)
	}
	for _, h := range []host{
		{name: "enforced", workers: []string{"early", "usual"}},
		{name: "control", workers: []string{"usual"}, options: "systemd.mask=demarc-core.service"},
	} {
		t.Run(h.name, func(t *testing.T) {
			lab := netlab.New(t)
			outside := lab.Namespace("outside")
			outside.Echo(7001)
			outside.Echo(7002)
			h.state = enforced(t, lab, outside)
			m := h.start(t, lab, programs, debs[0], newest, outside)
			// Only a node that has ended well has the power switched off.
			m.well = "reboot: Power down\n"
			m.hello = call[talk.Machine](m, "Hello", struct{}{})
			for _, w := range h.workers {
				m.await("/usr/bin/test", "-e", "/run/declared-"+w)
			}
			promised := h.options == ""
			if promised {
				m.await("/usr/bin/demarc", "status", "--wait", "enforcing", "--timeout", "5s")
				for _, unit := range []string{"demarc-core", "demarc-agent"} {
					if got := m.must("/usr/bin/systemctl", "is-enabled", unit); got != "enabled" {
						t.Errorf("%s is %s", unit, got)
					}
				}
				if failed := m.must("/usr/bin/systemctl", "--failed", "--no-legend", "--plain"); failed != "" {
					t.Errorf("failed units:\n%s", failed)
				}
			}
			m.settle()
			undeclared := m.wire.Count(netlab.To(unix.IPPROTO_TCP, outside.IP4, 7002))
			if promised != (undeclared == 0) {
				t.Errorf("%d packets on the wire that are not declared", undeclared)
			}
			if n := m.wire.Count(netlab.To(unix.IPPROTO_TCP, outside.IP4, 7001)); n == 0 {
				t.Error("nothing that is declared on the wire")
			}
			at := func(unit, property string) string {
				return m.must("/usr/bin/systemctl", "show", "-P", property+"Monotonic", unit)
			}
			t.Logf("Linux %s, %d undeclared packets; in us since its start: core started %s and ready %s, network-pre %s, network up %s",
				m.hello.Release, undeclared, at("demarc-core", "ExecMainStartTimestamp"), at("demarc-core", "ActiveEnterTimestamp"),
				at("network-pre.target", "ActiveEnterTimestamp"), at("network.service", "ActiveEnterTimestamp"))
			for _, w := range h.workers {
				t.Logf("worker-%s started %s", w, at("worker-"+w, "ExecMainStartTimestamp"))
			}
			m.stop()
		})
	}
}
