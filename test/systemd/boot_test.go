package systemd_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/netlab"
)

// eager dials what is not declared from its first moment on, and goes on.
const eager = `#!/bin/bash
while :; do
	(exec 3<>/dev/tcp/$1/7002) 2>/dev/null
	(exec 3<>/dev/tcp/$1/7001) 2>/dev/null && touch /run/declared
	sleep 0.001
done
`

// TestBoot is G06: a host that was enforcing boots again, and a workload that dials at
// once gets nothing out that is not declared, counted on the wire.
func TestBoot(t *testing.T) {
	lab := netlab.New(t)
	h := newHost(t, lab)
	h.Write("/usr/local/bin/eager", eager, 0o755)
	service := "[Service]\nExecStart=/usr/local/bin/eager " + h.peer.IP4.String() + "\n"
	// As early as anything can be: it waits for nothing.
	h.unit("worker-early.service", "[Unit]\nDefaultDependencies=no\n"+service)
	// As any unit of a package.
	h.unit("worker-usual.service", service)
	h.Write("/etc/systemd/network/eth0.network", fmt.Sprintf("[Match]\nName=eth0\n[Network]\nAddress=%s/16\nLinkLocalAddressing=no\n", h.IP4), 0o644)
	h.Boot()
	h.apply(fmt.Sprintf(workerPolicy, h.peer.IP4))
	wire := h.Wire()
	settle := func() {
		t.Helper()
		h.Await("has sent what is declared", func() error {
			if out, status := h.Try("test", "-e", "/run/declared"); status != 0 {
				return fmt.Errorf("not yet %s", out)
			}
			return nil
		})
		h.awaitState("enforcing")
	}
	boot := func(unit string) {
		t.Helper()
		h.Run("systemctl", "disable", "--quiet", "worker-early", "worker-usual")
		h.Halt()
		if unit != "" {
			target := "sysinit.target"
			if unit == "worker-usual.service" {
				target = "multi-user.target"
			}
			h.enable(unit, target)
		}
		h.Boot()
	}

	t.Run("network by networkd, unit that waits for nothing", func(t *testing.T) {
		h.enable("systemd-networkd.service", "multi-user.target")
		h.Run("systemctl", "stop", "worker-early", "worker-usual")
		wire.Forget()
		h.ip("address", "flush", "dev", "eth0")
		h.ip("link", "set", "eth0", "down")
		boot("worker-early.service")
		settle()
		if got := reached(wire, h.peer); len(got) != 1 || got[0] != 7001 {
			t.Errorf("ports on the wire: %v, want [7001]", got)
		}
		order := strings.Fields(h.Property("network-pre.target", "After"))
		if !slices.Contains(order, "demarc-core.service") || !slices.Contains(strings.Fields(h.Property("systemd-networkd.service", "After")), "network-pre.target") {
			t.Errorf("network-pre.target is after %v", order)
		}
	})

	t.Run("network is there already, unit of the usual kind", func(t *testing.T) {
		wire.Forget()
		boot("worker-usual.service")
		settle()
		if got := reached(wire, h.peer); len(got) != 1 || got[0] != 7001 {
			t.Errorf("ports on the wire: %v, want [7001]", got)
		}
	})

	// What is not promised, and how much it is: SECURITY.md has the row.
	t.Run("network is there already, unit that waits for nothing", func(t *testing.T) {
		wire.Forget()
		boot("worker-early.service")
		settle()
		core := h.Property("demarc-core.service", "ExecMainStartTimestampMonotonic")
		ready := h.Property("demarc-core.service", "ActiveEnterTimestampMonotonic")
		t.Logf("%d packets that are not declared; the core was started at %s us and was ready at %s us",
			wire.Count(netlab.To(unix.IPPROTO_TCP, h.peer.IP4, 7002)), core, ready)
		// It ends with enforcement.
		wire.Forget()
		h.Run("rm", "/run/declared")
		settle()
		if n := wire.Count(netlab.To(unix.IPPROTO_TCP, h.peer.IP4, 7002)); n > 0 {
			t.Errorf("%d packets that are not declared, long after the start", n)
		}
	})
}
