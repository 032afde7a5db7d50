package systemd_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/test/netlab"
)

// Each workload may reach one port of the peer, so that the ports on the wire say who
// a process was taken for. 7009 is for whoever is no workload.
const unitsPolicy = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: units, version: 1}
trustDomain: units.example
zones: {outside: {trust: 0}, app: {trust: 10}}
networks: {peer: {zone: outside, cidrs: [%s/32]}}
workloads:
  plain:    {zone: app, match: [{systemdUnit: worker.service}]}
  template: {zone: app, match: [{systemdUnit: "job@*.service"}]}
  escaped:  {zone: app, match: [{systemdUnit: 'report@a\x2db.service'}]}
  scope:    {zone: app, match: [{systemdUnit: shell.scope}]}
  batch:    {zone: app, match: [{systemdUnit: "batch-*.service"}]}
  session:  {zone: app, match: [{systemdUnit: "session-*.scope"}]}
crossings:
  - {name: plain,    from: [workload/plain],    to: [network/peer], ports: [tcp/7001]}
  - {name: template, from: [workload/template], to: [network/peer], ports: [tcp/7002]}
  - {name: escaped,  from: [workload/escaped],  to: [network/peer], ports: [tcp/7003]}
  - {name: scope,    from: [workload/scope],    to: [network/peer], ports: [tcp/7004]}
  - {name: batch,    from: [workload/batch],    to: [network/peer], ports: [tcp/7005]}
  - {name: session,  from: [workload/session],  to: [network/peer], ports: [tcp/7007]}
  - {name: others,   from: [unmanaged],         to: [network/peer], ports: [tcp/7009]}
unmanaged: {zone: app, outbound: deny, inbound: allow}
`

// Slices are found by their paths. A unit anywhere in one could be of both, so a policy
// that names both is refused.
const slicesPolicy = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: units, version: 2}
trustDomain: units.example
zones: {outside: {trust: 0}, app: {trust: 10}}
networks: {peer: {zone: outside, cidrs: [%s/32]}}
workloads:
  tenant: {zone: app, match: [{cgroup: /tenant.slice}]}
  inner:  {zone: app, match: [{cgroup: /some.slice/some-other.slice}]}
crossings:
  - {name: tenant, from: [workload/tenant], to: [network/peer], ports: [tcp/7006]}
  - {name: inner,  from: [workload/inner],  to: [network/peer], ports: [tcp/7008]}
  - {name: others, from: [unmanaged],       to: [network/peer], ports: [tcp/7009]}
unmanaged: {zone: app, outbound: deny, inbound: allow}
`

func TestUnits(t *testing.T) {
	lab := netlab.New(t)
	h := newHost(t, lab)
	oneshot := "[Service]\nType=oneshot\nExecStart=/usr/local/bin/dial " + dialArgs(h) + "\n"
	for unit, more := range map[string]string{
		"worker.service": "", "job@.service": "", "report@.service": "", "other.service": "",
		"sliced.service":       "Slice=tenant-a.slice\n",
		"moved-worker.service": "",
	} {
		h.unit(unit, oneshot+more)
	}
	h.Write("/etc/systemd/system/moved-worker.service.d/slice.conf", "[Service]\nSlice=some-other.slice\n", 0o644)
	// A service that makes cgroups of its own, and gives them names of others.
	h.unit("engine.service", "[Service]\nType=oneshot\nDelegate=yes\nExecStart=/usr/local/bin/engine\n")
	h.Write("/usr/local/bin/engine", `#!/bin/bash
set -e
own=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)
for name in worker.service system.slice/worker.service; do
	mkdir -p "$own/$name"
	echo $$ >"$own/$name/cgroup.procs"
	/usr/local/bin/dial `+dialArgs(h)+`
done
`, 0o755)
	// A user's own manager, with a unit of the same name (C18).
	h.Write("/etc/systemd/user/worker.service", oneshot, 0o644)
	h.Boot()
	h.apply(fmt.Sprintf(unitsPolicy, h.peer.IP4))
	h.Run("useradd", "--create-home", "mallory")
	h.Run("loginctl", "enable-linger", "mallory")
	uid := strings.TrimSpace(h.Run("id", "-u", "mallory"))
	if out, status := h.Try("systemctl", "start", "user@"+uid+".service"); status != 0 {
		t.Fatalf("start mallory's manager: %s\n%s", out, h.Journal("user@"+uid))
	}
	wire := h.Wire()
	unmanaged := []uint16{7009}
	type test struct {
		name string
		run  string
		want []uint16
	}
	try := func(tests []test) {
		t.Helper()
		for _, tt := range tests {
			wire.Forget()
			h.Run("sh", "-c", tt.run)
			if diff := cmp.Diff(tt.want, reached(wire, h.peer)); diff != "" {
				t.Errorf("%s: ports on the wire (-want +got):\n%s", tt.name, diff)
			}
		}
	}
	try([]test{
		{"plain unit", "systemctl start worker.service", []uint16{7001}},
		{"unit that no selector names", "systemctl start other.service", unmanaged},
		{"template unit", "systemctl start job@one.service", []uint16{7002}},
		{"template unit, another instance", `systemctl start 'job@two\x2dthree.service'`, []uint16{7002}},
		{"escaped instance", `systemctl start 'report@a\x2db.service'`, []uint16{7003}},
		{"another escaped instance", `systemctl start 'report@a-b.service'`, unmanaged},
		{"unit in a slice of another name", "systemctl start moved-worker.service", unmanaged},
		{"transient service", "systemd-run --wait --unit=batch-1 dial " + dialArgs(h), []uint16{7005}},
		{"transient service in a slice", "systemd-run --wait --slice=deep-er-est.slice --unit=batch-2 dial " + dialArgs(h), []uint16{7005}},
		{"transient service of no such name", "systemd-run --wait --unit=unbatch-1 dial " + dialArgs(h), unmanaged},
		{"transient scope", "systemd-run --scope --unit=shell dial " + dialArgs(h), []uint16{7004}},
		{"cgroups below a delegated unit, with others' names", "systemctl start engine.service", unmanaged},
		{"unit of a user's manager, with another's name", "runuser -u mallory -- env XDG_RUNTIME_DIR=/run/user/" + uid +
			" systemctl --user start worker.service", unmanaged},
		{"transient unit of a user's manager, with another's name", "runuser -u mallory -- env XDG_RUNTIME_DIR=/run/user/" + uid +
			" systemd-run --user --wait --unit=batch-3 dial " + dialArgs(h), unmanaged},
		{"after daemon-reload", "systemctl daemon-reload && systemctl start worker.service", []uint16{7001}},
		{"after daemon-reexec", "systemctl daemon-reexec && systemctl start job@one.service", []uint16{7002}},
		{"after a restart of the core", "systemctl restart demarc-core && systemctl start worker.service", []uint16{7001}},
		{"after a restart of the agent", "systemctl restart demarc-agent && systemctl start worker.service", []uint16{7001}},
	})
	h.apply(fmt.Sprintf(slicesPolicy, h.peer.IP4))
	try([]test{
		{"unit in a slice below", "systemctl start sliced.service", []uint16{7006}},
		{"scope in another slice below", "systemd-run --scope --slice=tenant-b.slice dial " + dialArgs(h), []uint16{7006}},
		{"slice by a drop-in", "systemctl start moved-worker.service", []uint16{7008}},
		{"slice of the outer name", "systemd-run --scope --slice=some.slice dial " + dialArgs(h), unmanaged},
		{"slice that only begins like it", "systemd-run --scope --slice=tenantx.slice dial " + dialArgs(h), unmanaged},
		{"unit that the former policy named", "systemctl start worker.service", unmanaged},
	})
	h.awaitState("enforcing")
}
