package systemd_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/test/netlab"
)

// worker may reach 7001 and nothing else.
const workerPolicy = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: worker, version: 1}
trustDomain: worker.example
zones: {outside: {trust: 0}, app: {trust: 10}}
networks: {peer: {zone: outside, cidrs: [%s/32]}}
workloads:
  worker: {zone: app, match: [{systemdUnit: "worker*.service"}]}
crossings:
  - {name: worker, from: [workload/worker], to: [network/peer], ports: [tcp/7001]}
unmanaged: {zone: app, outbound: allow, inbound: allow}
`

// talk holds one connection, and tries what is declared and what is not, for as long
// as all of it goes as it should. What went wrong is its exit status.
const talk = `#!/bin/bash
exec 3<>/dev/tcp/$1/7001 || exit 10
while :; do
	echo hello >&3
	read -r -t 30 line <&3 || exit 11
	(exec 4<>/dev/tcp/$1/7001) 2>/dev/null || exit 12
	(exec 4<>/dev/tcp/$1/7002) 2>/dev/null && exit 13
	touch /run/talked
	sleep 0.02
done
`

// talker starts a worker that talks, and returns what says that it still does.
func (h *host) talker() (goesOn func(when string)) {
	h.t.Helper()
	h.Write("/usr/local/bin/talk", talk, 0o755)
	h.unit("worker.service", "[Service]\nExecStart=/usr/local/bin/talk "+h.peer.IP4.String()+"\n")
	h.Run("systemctl", "daemon-reload")
	h.Run("systemctl", "start", "worker")
	return func(when string) {
		h.t.Helper()
		h.Run("rm", "-f", "/run/talked")
		h.Await("has talked "+when, func() error {
			if state := h.Property("worker.service", "ActiveState"); state != "active" {
				h.t.Fatalf("%s: worker is %s, exit status %s\n%s", when, state, h.Property("worker.service", "ExecMainStatus"), h.Journal("worker"))
			}
			if out, status := h.Try("test", "-e", "/run/talked"); status != 0 {
				return fmt.Errorf("it has not yet %s", out)
			}
			return nil
		})
	}
}

// TestDaemons has both daemons hang, be killed, and be restarted in every way that
// systemd has. Connections go on meanwhile, and nothing else gets out.
func TestDaemons(t *testing.T) {
	const watchdog = 8 * time.Second // 30 in the units
	lab := netlab.New(t)
	h := newHost(t, lab)
	for _, unit := range []string{"demarc-core", "demarc-agent"} {
		if !strings.Contains(h.shipped(unit+".service"), "\nWatchdogSec=30\n") {
			t.Errorf("%s has no watchdog", unit)
		}
		h.Write("/etc/systemd/system/"+unit+".service.d/soon.conf", fmt.Sprintf("[Service]\nWatchdogSec=%d\nTimeoutAbortSec=1\n", int(watchdog.Seconds())), 0o644)
	}
	h.Boot()
	h.apply(fmt.Sprintf(workerPolicy, h.peer.IP4))
	wire := h.Wire()
	goesOn := h.talker()
	goesOn("at first")
	// What was found outlives whatever is done to the agent.
	h.unit("worker-thief.service", "[Service]\nType=oneshot\nExecStart=-/bin/bash -c 'exec 3<>/dev/tcp/169.254.169.254/80'\n")
	h.Run("systemctl", "daemon-reload")
	h.Run("systemctl", "start", "worker-thief")
	found := func() string { return h.Run("demarc", "findings", "--technique", "T1552.005", "-o", "json") }
	h.Await("has found the thief", func() error {
		if text := found(); !strings.Contains(text, `"T1552.005"`) {
			return fmt.Errorf("it has not: %s", text)
		}
		return nil
	})
	before := found()
	units := []string{"demarc-core.service", "demarc-agent.service"}
	again := func(how, restarts string) {
		t.Helper()
		for _, unit := range units {
			h.Await("has restarted "+unit, func() error {
				if got, state := h.Property(unit, "NRestarts"), h.Property(unit, "ActiveState"); got != restarts || state != "active" {
					return fmt.Errorf("%s restarts, %s", got, state)
				}
				return nil
			})
		}
		h.awaitState("enforcing")
		goesOn(how)
	}
	for _, unit := range units {
		h.Run("systemctl", "kill", "--kill-whom=main", "-s", "STOP", unit)
	}
	goesOn("while both hang")
	again("after both hung", "1")
	for _, unit := range units {
		if log := h.Run("journalctl", "--no-pager", "-u", unit); !strings.Contains(log, "Watchdog timeout") {
			t.Errorf("%s was restarted, but not by the watchdog:\n%s", unit, log)
		}
		h.Run("systemctl", "kill", "--kill-whom=main", "-s", "KILL", unit)
	}
	again("after both were killed", "2")
	for _, unit := range units {
		h.Run("systemctl", "stop", unit)
		goesOn("while " + unit + " is stopped")
		h.Run("systemctl", "start", unit)
		h.awaitState("enforcing")
		h.Run("systemctl", "restart", unit)
		h.awaitState("enforcing")
		goesOn("after a restart of " + unit)
	}
	if after := found(); after != before {
		t.Errorf("findings before the agent was killed, and stopped:\n%s\nafter:\n%s", before, after)
	}
	// Since then both have fed the watchdog for longer than it waits.
	h.Await("has fed its watchdogs", func() error {
		for _, unit := range units {
			since, err := time.Parse("Mon 2006-01-02 15:04:05 MST", h.Property(unit, "ActiveEnterTimestamp"))
			if err != nil {
				t.Fatal(err)
			}
			if age := time.Since(since); age < watchdog+2*time.Second {
				return fmt.Errorf("%s has run for %s", unit, age)
			}
			if h.Property(unit, "NRestarts") != "0" {
				t.Fatalf("%s was restarted:\n%s", unit, h.Journal(unit))
			}
		}
		return nil
	})
	for _, how := range []string{"daemon-reload", "daemon-reexec"} {
		h.Run("systemctl", how)
		h.awaitState("enforcing")
		goesOn("after " + how)
	}
	if got := reached(wire, h.peer); len(got) != 1 || got[0] != 7001 {
		t.Errorf("ports on the wire: %v, want [7001]", got)
	}
}

// TestCredential: a keyring that systemd hands over, from a file or encrypted, is the
// one that is used; and what docs/install.md says of workloads that must not run
// without a policy.
func TestCredential(t *testing.T) {
	lab := netlab.New(t)
	h := newHost(t, lab)
	h.unit("guarded.service", "[Unit]\nAfter=demarc-core.service\nAssertPathExists=/sys/fs/bpf/demarc/abi\n[Service]\nExecStart=/bin/sleep infinity\n")
	h.Boot()
	if out, status := h.Try("systemctl", "start", "guarded"); status == 0 || !strings.Contains(out, "Assertion failed") {
		t.Errorf("without a policy: %d, %s", status, out)
	}
	h.Run("demarc", "keys", "generate", "tag", "--out", "/root/first")
	h.Run("demarc", "keys", "generate", "tag", "--out", "/root/second")
	h.Run("systemd-creds", "encrypt", "--name=demarc.keyring", "/root/second", "/root/second.cred")
	for file, setting := range map[string]string{"/root/first": "LoadCredential=demarc.keyring:/root/first", "/root/second": "LoadCredentialEncrypted=demarc.keyring:/root/second.cred"} {
		h.Write("/etc/systemd/system/demarc-core.service.d/keyring.conf", "[Service]\nLoadCredential=\n"+setting+"\n", 0o644)
		h.Run("systemctl", "daemon-reload")
		h.Run("systemctl", "restart", "demarc-core")
		h.awaitState("idle")
		var print string
		for line := range strings.Lines(h.Journal("demarc-core")) {
			if _, text, found := strings.Cut(line, "fingerprint="); found {
				print = strings.TrimSpace(text)
			}
		}
		if show := h.Run("demarc", "keys", "show", file); print == "" || !strings.Contains(show, print) {
			t.Errorf("%s: loaded %s, which is not of\n%s", setting, print, show)
		}
		if out := h.Run("stat", "-c", "%a", "/run/credentials/demarc-core.service/demarc.keyring"); out != "400\n" {
			t.Errorf("mode of the credential: %s", out)
		}
	}
	h.apply(fmt.Sprintf(workerPolicy, h.peer.IP4))
	h.Run("systemctl", "start", "guarded")
}
