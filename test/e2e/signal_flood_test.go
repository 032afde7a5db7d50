package e2e_test

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// A neighbour that opens more connections than are told apart hides nothing of another
// workload: who relays there is found. (H02)
func TestH02ConnectionsOfANeighbour(t *testing.T) {
	w := newWorld(t)
	w.node.Apply(policyText(1, webDecoy,
		"  - {name: back, from: [workload/decoy], to: [workload/web], ports: [tcp/7003], log: denied, purpose: test}\n",
		"  - {name: flood, from: [workload/other], to: [workload/decoy], ports: [tcp/7009], log: denied, purpose: test}\n"))
	w.serveDecoy(w.decoy)
	socat, err := exec.LookPath("socat")
	if err != nil {
		t.Fatalf("find socat: %v; scripts/install test installs it", err)
	}
	relay := w.web.Start(w.node.Cgroup("/lab/web"), netlab.Command{Path: socat, Args: []string{"TCP-LISTEN:7003,reuseaddr", "TCP:" + w.decoy.At4(7000).String()}})
	caller := w.decoy.Probe(w.node.Cgroup("/lab/decoy"))
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) { // until socat listens
		caller.Socket("c", "tcp4")
		r := caller.Do(connect("c", w.web.At4(7003)))
		if r.Error == "" {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("socat: %s\n%s", r.Error, relay.Output())
		}
		caller.Must(probe.Call{Op: "close", Socket: "c"})
	}
	caller.Echoed("c", "what it relays is known from now on")
	w.node.AwaitSignal("socat goes on", is(detect.Contact, "web", w.decoy.At4(7000)))

	const each = 8000 // descriptors of a process
	crowd := netip.MustParsePrefix("10.128.0.0/9")
	w.decoy.Lead(crowd, w.peer) // which takes nothing of that
	at := crowd.Addr()
	for range 4 { // 16,384 are told apart
		flood := w.decoy.Probe(w.node.Cgroup("/lab/other"))
		if r := flood.Must(probe.Call{Op: "knock", Address: netlab.Place{Address: at, Port: 7009}.String(), Size: each}); r.N != each {
			t.Fatalf("%d of %d connections were opened", r.N, each)
		}
	}
	for i := range 10 {
		caller.Echoed("c", fmt.Sprint(i, strings.Repeat("x", 500)))
	}
	s := w.node.AwaitSignal("the relay", is(detect.Relay, "web", w.decoy.At4(7000)))
	if s.PID != uint32(relay.PID()) || s.Comm != "socat" {
		t.Errorf("relay: %s", netlab.DescribeSignal(s))
	}
	relay.Kill()
}
