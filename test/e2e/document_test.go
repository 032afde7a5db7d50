package e2e_test

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/test/netlab"
)

// document is a whole policy around its own part: one zone, which is what most
// rows need, and no trust rule in the way.
func document(version int, body string) string {
	return fmt.Sprintf(`apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: lab, version: %d}
trustDomain: lab.example
zones:
  app: {trust: 10}
%s`, version, body)
}

// ends are the two workloads and two namespaces of most tests here:
//
//	web (/lab/web)  ----switch----  db (/lab/db)
type ends struct {
	lab      *netlab.Lab
	node     *netlab.Node
	web, db  *netlab.Namespace
	client   *actor // in web, of workload web
	server   *actor // in db, of workload db
	versions int
}

const webAndDB = `workloads:
  web: {zone: app, match: [{cgroup: /lab/web}]}
  db: {zone: app, match: [{cgroup: /lab/db}]}
`

// newEnds starts a node with the policy's own part behind webAndDB.
func newEnds(t testing.TB, body string, o netlab.NodeOptions) *ends {
	t.Helper()
	e := &ends{lab: netlab.New(t), versions: 1}
	e.web, e.db = e.lab.Namespace("web"), e.lab.Namespace("db")
	e.node = e.lab.Node(document(1, webAndDB+body), o)
	// Cgroups can be listed by anybody, as on a real host: the agent is nobody.
	if err := os.Chmod(filepath.Dir(e.node.Root().Dir()), 0o755); err != nil {
		t.Fatal(err)
	}
	e.client = startActor(t, e.web, e.node.Cgroup("/lab/web"))
	e.server = startActor(t, e.db, e.node.Cgroup("/lab/db"))
	return e
}

// apply puts another own part in force.
func (e *ends) apply(body string) {
	e.versions++
	e.node.Apply(document(e.versions, webAndDB+body))
}

// at4 and at6 are ports of the server.
func (e *ends) at4(port uint16) netip.AddrPort { return netip.AddrPortFrom(e.db.IP4, port) }
func (e *ends) at6(port uint16) netip.AddrPort { return netip.AddrPortFrom(e.db.IP6, port) }

// both are a port of the server on both families.
func (e *ends) both(port uint16) []netip.AddrPort { return []netip.AddrPort{e.at4(port), e.at6(port)} }

// pinned opens a map of the node as the kernel has it.
func pinned(t testing.TB, node *netlab.Node, name string) *ebpf.Map {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(node.Dir()+"/bpf/demarc/maps/"+name, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// editor changes entries of maps that are frozen: only programs can. It writes what a
// run is given, or deletes the key where there is no value.
func editor(t testing.TB, m *ebpf.Map, deletes bool) func(entry ...any) {
	t.Helper()
	room := func(size uint32) int16 { return int16(size+7) / 8 * 8 }
	key, value := room(m.KeySize()), room(m.ValueSize())
	var code asm.Instructions
	copied := func(from, to, size int16) {
		for i := int16(0); i < size; i += 8 {
			code = append(code, asm.LoadMem(asm.R0, asm.R1, from+i, asm.DWord), asm.StoreMem(asm.RFP, to+i, asm.R0, asm.DWord))
		}
	}
	copied(0, -key, key)
	call := asm.FnMapDeleteElem
	if !deletes {
		call = asm.FnMapUpdateElem
		copied(key, -key-value, value)
	}
	code = append(code,
		asm.LoadMapPtr(asm.R1, m.FD()), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, int32(-key)),
		asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, int32(-key-value)), asm.Mov.Imm(asm.R4, 0),
		call.Call(), asm.Return())
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.Syscall, Flags: unix.BPF_F_SLEEPABLE, License: "GPL", Instructions: code})
	if err != nil {
		t.Fatalf("load editor: %v", err)
	}
	t.Cleanup(func() { p.Close() })
	return func(entry ...any) {
		var b []byte
		for i, part := range entry {
			var err error
			if b, err = binary.Append(b, binary.NativeEndian, part); err != nil {
				t.Fatal(err)
			}
			b = append(b, make([]byte, []int16{key, key + value}[i]-int16(len(b)))...)
		}
		if failed, err := p.Run(&ebpf.RunOptions{Context: b}); err != nil || failed != 0 {
			t.Fatalf("edit map: %d, %v", int32(failed), err)
		}
	}
}

// decoded is the image of a policy.
func decoded(t testing.TB, node *netlab.Node, text string) *image.Image {
	t.Helper()
	img, err := image.Decode(node.Image(text))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// statusOf is what the agent says of itself.
func statusOf(t testing.TB, node *netlab.Node) (s api.Status) {
	t.Helper()
	out, problems, code := node.Demarc("status", "-o", "json")
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatalf("demarc status: %d, %v\n%s%s", code, err, out, problems)
	}
	return s
}

// eventually waits until something holds, and returns how long that took.
func eventually(t testing.TB, within time.Duration, what string, holds func() bool) time.Duration {
	t.Helper()
	for start := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		if holds() {
			return time.Since(start)
		}
		if time.Since(start) > within {
			t.Fatalf("not within %s: %s", within, what)
		}
	}
}
