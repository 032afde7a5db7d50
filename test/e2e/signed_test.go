package e2e_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/demarc/demarc/test/netlab"
)

// An older image that opens a port was signed well, and is replayed against a newer
// one that closes it: by the command line, after a crash, after the state directory
// was wiped. The port stays closed on the wire. (J01)
func TestJ01ReplayStaysClosed(t *testing.T) {
	e := newEnds(t, changeBefore, netlab.NodeOptions{})
	e.server.serve(7000)
	e.server.serve(7001)
	wire := e.db.Wire()
	file := func(name string) string { return filepath.Join(e.node.Dir(), name) }
	demarc := func(want int, args ...string) (said string) {
		t.Helper()
		out, problems, status := e.node.Demarc(args...)
		if status != want {
			t.Fatalf("demarc %q: %d, want %d\n%s%s", args, status, want, out, problems)
		}
		return out + problems
	}
	build := func(name, policy string, more ...string) string {
		t.Helper()
		if err := os.WriteFile(file("built.yaml"), []byte(policy), 0o644); err != nil {
			t.Fatal(err)
		}
		demarc(0, append([]string{"policy", "build", file("built.yaml"), "-o", file(name)}, more...)...)
		return file(name)
	}
	demarc(0, "keys", "generate", "signing", "-o", file("ops.key"))
	old := build("old.img", document(1, webAndDB+changeBefore), "--sign", file("ops.key"))
	newer := build("new.img", document(2, webAndDB+changeAfter), "--sign", file("ops.key"))
	unsigned := build("unsigned.img", document(3, webAndDB+changeBefore))

	// Trust begins while something unsigned is in force: that goes on, and is told.
	if err := os.Rename(file("ops.key.pub"), file("trust/ops.pub")); err != nil {
		t.Fatal(err)
	}
	e.node.RestartCore()
	e.node.AwaitAgent()
	if !e.client.reaches(e.at4(7000)) || !e.client.reaches(e.at6(7001)) {
		t.Error("what was in force does not go on")
	}
	demarc(0, "status", "--wait", "degraded", "--timeout", "20s")
	if said := demarc(1, "status"); !strings.Contains(said, "stored active image: verify image: it is not signed, and trust_dir holds keys") {
		t.Errorf("status says:\n%s", said)
	}

	call[bool](e.client, "StartTraffic", TrafficArgs{Streams: []string{e.at4(7000).String()}})
	if said := demarc(0, "apply", newer); !strings.Contains(said, "  web, ") || !strings.Contains(said, e.at4(7000).String()+" (db): ") {
		t.Errorf("apply does not name the connection that it cuts:\n%s", said)
	}
	call[TrafficReply](e.client, "StopTraffic", true)
	if said := demarc(0, "status"); !strings.Contains(said, "signed by ") {
		t.Errorf("status says:\n%s", said)
	}
	closed := func(when string) {
		t.Helper()
		if said := demarc(1, "apply", old); !strings.Contains(said, "image has version 1, and version 2 was in force already") {
			t.Errorf("%s, the older image: %s", when, said)
		}
		if said := demarc(1, "apply", unsigned); !strings.Contains(said, "it is not signed") || !strings.Contains(said, "hint: demarc policy build --sign") {
			t.Errorf("%s, the unsigned image: %s", when, said)
		}
		wire.Forget()
		if e.client.reaches(e.at4(7000)) || e.client.reaches(e.at6(7000)) {
			t.Errorf("%s: the port is open", when)
		}
		if !e.client.reaches(e.at4(7001)) {
			t.Errorf("%s: the other port is not", when)
		}
		wire.Settle()
		for _, p := range wire.Packets(on(7000)) {
			t.Errorf("%s: on the wire: %s", when, p)
		}
	}
	closed("at once")
	e.node.KillCore()
	e.node.StartCore()
	e.node.AwaitAgent()
	closed("after a crash")
	e.node.StopCore()
	stored, err := filepath.Glob(file("state/*.[ab]"))
	if err != nil || len(stored) < 6 {
		t.Fatalf("stored: %q, %v", stored, err)
	}
	for _, f := range stored {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
	e.node.StartCore()
	e.node.AwaitAgent()
	closed("after the state directory was wiped")
	demarc(0, "apply", newer)
	demarc(0, "status", "--wait", "enforcing", "--timeout", "20s")
}
