package systemd_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/netlab"
)

// host is a machine with demarc's units, and a peer without demarc that it talks to.
//
//	host: systemd, demarc, workloads ---- switch ---- peer: echo on 7001 ... 7009
type host struct {
	*netlab.Machine
	t    *testing.T
	lab  *netlab.Lab
	peer *netlab.Namespace
}

// ports that the peer serves.
var ports = []uint16{7001, 7002, 7003, 7004, 7005, 7006, 7007, 7008, 7009}

// newHost installs what the package installs, and boots nothing yet.
func newHost(t *testing.T, lab *netlab.Lab) *host {
	t.Helper()
	h := &host{t: t, lab: lab, Machine: lab.Machine("host"), peer: lab.Namespace("peer")}
	for _, port := range ports {
		h.peer.Echo(port)
	}
	for _, program := range []string{"demarc-core", "demarc-agent", "demarc"} {
		h.Install(program, "/usr/bin/"+program)
	}
	for from, to := range map[string]string{
		"demarc-core.service":  "/usr/lib/systemd/system/demarc-core.service",
		"demarc-agent.service": "/usr/lib/systemd/system/demarc-agent.service",
		"80-demarc.preset":     "/usr/lib/systemd/system-preset/80-demarc.preset",
		"demarc.sysusers":      "/usr/lib/sysusers.d/demarc.conf",
		"demarc.tmpfiles":      "/usr/lib/tmpfiles.d/demarc.conf",
	} {
		h.Write(to, h.shipped(from), 0o644)
	}
	h.enable("demarc-core.service", "sysinit.target")
	h.enable("demarc-agent.service", "multi-user.target")
	h.configure()
	h.Write("/usr/local/bin/dial", dial, 0o755)
	return h
}

// configure says what differs from a host's own root: its tree is a part of this
// machine's, and its network is guarded like any.
func (h *host) configure() {
	h.t.Helper()
	core, err := json.Marshal(map[string]any{"cgroup_root": h.tree(), "agent_user": "demarc"})
	if err != nil {
		h.t.Fatal(err)
	}
	h.Write("/etc/demarc/core.json", string(core), 0o644)
	h.Write("/etc/demarc/agent.yaml", "metrics: {listen: \"127.0.0.1:9477\"}\nstate: /var/lib/demarc-agent\njournal: {dir: /var/lib/demarc-agent/journal}\n", 0o644)
}

// tree is the path of the host's own cgroup below the mount.
func (h *host) tree() string {
	h.t.Helper()
	lab := filepath.Dir(h.Root.Dir())
	return filepath.Join(filepath.Base(filepath.Dir(lab)), filepath.Base(lab), filepath.Base(h.Root.Dir()))
}

// shipped reads one of the files in deploy/systemd.
func (h *host) shipped(name string) string {
	h.t.Helper()
	b, err := os.ReadFile(filepath.Join("../../deploy/systemd", name))
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b)
}

// enable has a unit started by a target, without a systemd that could be asked.
func (h *host) enable(unit, target string) {
	h.t.Helper()
	wants := h.Path("/etc/systemd/system/" + target + ".wants")
	if err := os.MkdirAll(wants, 0o755); err != nil {
		h.t.Fatal(err)
	}
	for _, dir := range []string{"/etc/systemd/system/", "/usr/lib/systemd/system/", "/lib/systemd/system/"} {
		if _, err := os.Lstat(h.Path(dir + unit)); err != nil {
			if _, err := os.Lstat(dir + unit); err != nil || dir == "/etc/systemd/system/" {
				continue
			}
		}
		if err := os.Symlink(dir+unit, filepath.Join(wants, unit)); err != nil && !errors.Is(err, os.ErrExist) {
			h.t.Fatal(err)
		}
		return
	}
	h.t.Fatalf("enable %s: there is no such unit", unit)
}

// ip changes a device of the host's, from outside.
func (h *host) ip(args ...string) {
	h.t.Helper()
	p := h.Start(h.lab.Cgroup("daemons"), netlab.Command{Path: "/usr/sbin/ip", Args: args})
	if status := p.Wait(time.Minute); status != 0 {
		h.t.Fatalf("ip %v: %d: %s", args, status, p.Output())
	}
}

// unit writes a unit of the host's administrator.
func (h *host) unit(name, text string) {
	h.t.Helper()
	h.Write("/etc/systemd/system/"+name, text, 0o644)
}

// dial tries ports of an address one after the other and says which answered. It
// works with what every Debian has.
const dial = `#!/bin/bash
# dial ADDRESS PORT...: a line "ADDRESS PORT open" or "... refused" for each
to=$1; shift
for port in "$@"; do
	if timeout 5 bash -c "exec 3<>/dev/tcp/$to/$port && echo hello >&3 && read -r -t 5 line <&3" 2>/dev/null; then echo "$to $port open"; else echo "$to $port refused"; fi
done
`

// apply puts a policy in force and waits until it is enforced.
func (h *host) apply(policy string) {
	h.t.Helper()
	h.Write("/root/policy.yaml", policy, 0o644)
	h.Run("demarc", "apply", "/root/policy.yaml", "--now")
	h.awaitState("enforcing")
}

// awaitState waits until demarc says so, with everything as it should be.
func (h *host) awaitState(state string) {
	h.t.Helper()
	if out, status := h.Try("demarc", "status", "--wait", state, "--timeout", "60s"); status != 0 {
		h.t.Fatalf("demarc status: %d\n%s\ncore:\n%s\nagent:\n%s", status, out, h.Journal("demarc-core"), h.Journal("demarc-agent"))
	}
}

// reached are the ports of the peer that were sent a SYN, in order.
func reached(w *netlab.Wire, peer *netlab.Namespace) (ports []uint16) {
	for _, p := range w.Packets(netlab.To(unix.IPPROTO_TCP, peer.IP4, 0)) {
		if port := p.Dst.Port(); !slices.Contains(ports, port) {
			ports = append(ports, port)
		}
	}
	slices.Sort(ports)
	return ports
}

func dialArgs(h *host) string {
	all := []string{h.peer.IP4.String()}
	for _, p := range ports {
		all = append(all, fmt.Sprint(p))
	}
	return strings.Join(all, " ")
}

// written is a file of the host's.
func (h *host) written(name string) string {
	h.t.Helper()
	b, err := os.ReadFile(h.Path(name))
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b)
}
