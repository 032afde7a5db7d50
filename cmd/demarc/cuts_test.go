package main

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/demarc/demarc/agent/core/proto"
)

// What docs/operate.md shows of a dry run is what one prints.
func TestCutsInTheDocuments(t *testing.T) {
	end := netip.MustParseAddrPort
	c := cuts{Total: 2, Connections: []cut{
		{Cut: proto.Cut{Ends: proto.Ends{Local: end("192.0.2.1:22"), Remote: end("192.0.2.9:50112")}, PID: 811, Process: "sshd", Inbound: true, Reason: "no-crossing"}, Workload: "bastion", Own: true},
		{Cut: proto.Cut{Ends: proto.Ends{Local: end("192.0.2.1:41822"), Remote: end("192.0.2.7:9090")}, PID: 934, Process: "nginx", Reason: "no-crossing"}, Workload: "web", PeerName: "api"},
	}}
	var shown strings.Builder
	shown.WriteString("$ demarc apply shop.yaml --dry-run\n")
	c.printText(&shown)
	text, err := os.ReadFile("../../docs/operate.md")
	if err != nil {
		t.Fatal(err)
	}
	var block strings.Builder
	for line := range strings.Lines(shown.String()) {
		block.WriteString("    " + line)
	}
	if !strings.Contains(string(text), block.String()) {
		t.Errorf("docs/operate.md does not show:\n%s", block.String())
	}
}
