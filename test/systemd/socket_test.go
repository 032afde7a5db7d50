package systemd_test

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/netlab"
)

// front is a proxy, each a service that is started anew for every connection; both
// take their sockets from systemd. lone's socket was forgotten.
const socketPolicy = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: sockets, version: 1}
trustDomain: sockets.example
zones: {outside: {trust: 0}, app: {trust: 10}}
networks: {peer: {zone: outside, cidrs: [%s/32]}}
workloads:
  front:  {zone: app, match: [{systemdUnit: front.service}, {systemdUnit: front.socket}]}
  each:   {zone: app, match: [{systemdUnit: "each@*.service"}, {systemdUnit: each.socket}]}
  lone:   {zone: app, match: [{systemdUnit: lone.service}]}
  caller: {zone: app, match: [{systemdUnit: caller.service}]}
crossings:
  - {name: to-front,   from: [network/peer],    to: [workload/front], ports: [tcp/8080], limit: {connections: 100/s}, log: all}
  - {name: front-back, from: [workload/front],  to: [network/peer],   ports: [tcp/7001]}
  - {name: to-each,    from: [network/peer],    to: [workload/each],  ports: [tcp/8081], limit: {connections: 100/s}, log: all}
  - {name: proven,     from: [workload/caller], to: [workload/front, workload/each], ports: [tcp/8080, tcp/8081]}
  - {name: lone-back,  from: [workload/lone],   to: [network/peer],   ports: [tcp/7002]}
unmanaged: {zone: app, outbound: allow, inbound: deny}
`

// TestC05SocketActivation: systemd makes an activated socket in the cgroup of its
// .socket unit, so that a selector names it as it names the service. Then it proves
// itself, answers who is declared, and nobody else; without the selector it is nobody's.
func TestC05SocketActivation(t *testing.T) {
	lab := netlab.New(t)
	h := newHost(t, lab)
	proxy := "/lib/systemd/systemd-socket-proxyd " + h.peer.IP4.String()
	h.unit("front.socket", "[Socket]\nListenStream=0.0.0.0:8080\nListenStream=0.0.0.0:8090\n")
	h.unit("front.service", "[Service]\nExecStart="+proxy+":7001\n")
	h.unit("each.socket", "[Socket]\nListenStream=0.0.0.0:8081\nAccept=yes\n")
	h.unit("each@.service", "[Service]\nExecStart=/bin/cat\nStandardInput=socket\n")
	h.unit("lone.socket", "[Socket]\nListenStream=0.0.0.0:8082\n")
	h.unit("lone.service", "[Service]\nExecStart="+proxy+":7002\n")
	h.unit("caller.service", fmt.Sprintf("[Service]\nType=oneshot\nExecStart=/usr/local/bin/dial %s 8080 8081 8082 8090\n", h.IP4))
	h.Boot()
	h.apply(fmt.Sprintf(socketPolicy, h.peer.IP4))
	h.Run("systemctl", "start", "front.socket", "each.socket", "lone.socket")

	// From outside: 8090 is the same socket unit, and not declared.
	wire := h.Wire()
	got := map[uint16]bool{}
	for _, port := range []uint16{8080, 8081, 8082, 8090} {
		got[port] = h.echoes(port)
	}
	want := map[uint16]bool{8080: true, 8081: true, 8082: false, 8090: false}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ports that answer the peer (-want +got):\n%s\n%s", diff, h.Run("ss", "-tlnp", "--cgroup"))
	}
	for _, port := range []uint16{8082, 8090} {
		if n := wire.Count(func(p netlab.Packet) bool { return p.Sent && p.Proto == unix.IPPROTO_TCP && p.Src.Port() == port }); n > 0 {
			t.Errorf("%d packets left from port %d", n, port)
		}
	}
	if state := h.Property("lone.service", "ActiveState"); state != "inactive" {
		t.Errorf("lone.service is %s: somebody reached it", state)
	}

	// From a workload that wants proof: the activated socket has it.
	h.Run("systemctl", "start", "caller")
	var lines []string
	for line := range strings.Lines(h.Journal("caller")) {
		if _, result, found := strings.Cut(strings.TrimSpace(line), h.IP4.String()+" "); found {
			lines = append(lines, result)
		}
	}
	if diff := cmp.Diff([]string{"8080 open", "8081 open", "8082 refused", "8090 refused"}, lines); diff != "" {
		t.Errorf("what caller reaches (-want +got):\n%s", diff)
	}

	// What systemd hands on stays the socket's: a restart of the service, or of systemd
	// itself, changes nothing.
	h.Run("systemctl", "restart", "front.service")
	h.Run("systemctl", "daemon-reexec")
	if !h.echoes(8080) || h.echoes(8090) {
		t.Error("after a restart the sockets are others")
	}
	h.awaitState("enforcing")
}

// echoes says whether a port of the host's sends back what the peer sends there.
func (h *host) echoes(port uint16) bool {
	h.t.Helper()
	echoed := false
	if err := h.peer.Do(func() error {
		c, err := net.DialTimeout("tcp", fmt.Sprintf("%s:%d", h.IP4, port), 2*time.Second)
		if err != nil {
			return nil // refused is an answer, too
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			return err
		}
		b := make([]byte, 5)
		if _, err := c.Write([]byte("hello")); err == nil {
			_, err = io.ReadFull(c, b)
			echoed = err == nil && string(b) == "hello"
		}
		return nil
	}); err != nil {
		h.t.Fatal(err)
	}
	return echoed
}
