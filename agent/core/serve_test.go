package core

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/coreclient"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// helloText is what every conversation begins with.
var helloText = fmt.Sprintf(`{"op":"hello","version":%d}`, proto.Version)

// serve runs the socket of a core until the test ends.
func serve(t *testing.T, c *Core) {
	t.Helper()
	l, err := c.Listen()
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- c.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		absent(t, c.config.Socket())
	})
}

func dial(t *testing.T, c *Core) *coreclient.Client {
	t.Helper()
	client, err := coreclient.Dial(t.Context(), c.config.Socket())
	must(t, err)
	t.Cleanup(func() { client.Close() })
	return client
}

func memfd(t *testing.T, b []byte) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	must(t, err)
	f := os.NewFile(uintptr(fd), "test")
	t.Cleanup(func() { f.Close() })
	_, err = f.Write(b)
	must(t, err)
	return f
}

// One conversation, as the agent has it.
func TestConversation(t *testing.T) {
	m := newMachine(t)
	m.mkdir("/lab/pod")
	c := m.start()
	serve(t, c)
	client := dial(t, c)

	hello, d, err := client.Hello()
	must(t, err)
	defer d.Close()
	if diff := cmp.Diff(&proto.Hello{Version: proto.Version, ABI: abi.Version, CgroupRoot: m.config.CgroupRoot}, hello); diff != "" {
		t.Errorf("hello (-want +got):\n%s", diff)
	}
	if _, err := client.Image(); !refusedWith(err, "no policy is in force") {
		t.Errorf("image of nothing: %v", err)
	}
	b := shop(t, nil)
	status, err := client.Apply(memfd(t, b), 0)
	must(t, err)
	if status.State != proto.StateEnforcing {
		t.Errorf("status %+v", status)
	}
	f, err := client.Image()
	must(t, err)
	defer f.Close()
	if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, b) {
		t.Errorf("image: %d bytes, %v; want %d", len(got), err, len(b))
	}
	if _, err := f.WriteAt([]byte{0}, 0); err == nil {
		t.Error("the image can be written")
	}
	must(t, client.Bind("/lab/pod", id(t, b, "pod")))
	if got := identity(t, c, "/lab/pod"); got != id(t, b, "pod") {
		t.Errorf("bound to %d", got)
	}
	must(t, client.Unbind("/lab/pod"))
	if _, err := client.Rollback(); !refusedWith(err, "there is no previous image") {
		t.Errorf("rollback: %v", err)
	}
	if _, err := client.Apply(memfd(t, b[:100]), 0); err == nil || !strings.HasPrefix(err.Error(), "verify image: ") {
		t.Errorf("half an image: %v", err)
	}
	again, err := client.Status()
	must(t, err)
	if again.Active.Version != 7 || again.State != proto.StateEnforcing {
		t.Errorf("after refusals: %+v", again)
	}
}

// A new agent says what it claims, and has the rest forgotten: what an agent before
// it claimed must not outlive the inventory.
func TestForget(t *testing.T) {
	m := newMachine(t)
	m.mkdir("/lab/stays")
	m.mkdir("/lab/goes")
	c := m.start()
	serve(t, c)
	before := dial(t, c)
	_, d, err := before.Hello()
	must(t, err)
	defer d.Close()
	b := shop(t, nil)
	_, err = before.Apply(memfd(t, b), 0)
	must(t, err)
	pod := id(t, b, "pod")
	must(t, before.Bind("/lab/stays", pod))
	must(t, before.Bind("/lab/goes", pod))

	after := dial(t, c)
	_, other, err := after.Hello()
	must(t, err)
	defer other.Close()
	must(t, after.Bind("/lab/stays", pod))
	must(t, after.Forget())
	if got := identity(t, c, "/lab/stays"); got != pod {
		t.Errorf("what is claimed again is bound to %d", got)
	}
	if got := identity(t, c, "/lab/goes"); got != uint32(image.Unmanaged) {
		t.Errorf("what nobody claims any more is bound to %d", got)
	}
}

func refusedWith(err error, message string) bool {
	var r *proto.Refused
	return errors.As(err, &r) && r.Message == message
}

// The agent's descriptors show and never change: verdicts are out of its reach.
func TestDescriptorsAreReadOnly(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	serve(t, c)
	_, d, err := dial(t, c).Hello()
	must(t, err)
	defer d.Close()
	for _, tt := range []struct {
		file   *os.File
		perCPU bool
	}{{d.Counts, true}, {d.Rings, true}, {d.Faults, true}, {d.Bindings, false}, {d.State, false}} {
		fd, err := unix.Dup(int(tt.file.Fd()))
		must(t, err)
		m, err := ebpf.NewMapFromFD(fd)
		must(t, err)
		defer m.Close()
		key, value := make([]byte, m.KeySize()), any(make([]byte, m.ValueSize()))
		if tt.perCPU {
			value = make([][]byte, ebpf.MustPossibleCPU())
			for i := range value.([][]byte) {
				value.([][]byte)[i] = make([]byte, m.ValueSize())
			}
		}
		if err := m.Put(key, value); !errors.Is(err, unix.EPERM) {
			t.Errorf("%v can be written: %v", m, err)
		}
		if err := m.Delete(key); !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EINVAL) {
			t.Errorf("%v can be deleted from: %v", m, err)
		}
	}
	for _, ring := range []*os.File{d.Denied, d.Allowed} {
		page, err := unix.Mmap(int(ring.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Errorf("ring cannot be read: %v", err)
			continue
		}
		must(t, unix.Munmap(page))
		if _, err := unix.Mmap(int(ring.Fd()), int64(os.Getpagesize()), os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
			t.Error("the ring's events can be written")
		}
	}
}

// Whatever arrives, the core answers an error or hangs up, and goes on.
func TestProtocolRefuses(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	serve(t, c)
	hello := frameOf(helloText)
	frame := func(texts ...string) (all []byte) {
		all = hello
		for _, text := range texts {
			all = append(all[:len(all):len(all)], frameOf(text)...)
		}
		return all
	}
	tests := []struct {
		name string
		send []byte
		want string // of the last answer
	}{
		{"bad status before hello", frameOf(`{"op":"status"}`), "status is out of order"},
		{"bad second hello", frame(helloText), "hello is out of order"},
		{"bad version", frameOf(`{"op":"hello","version":1}`), "the agent speaks protocol 1, the core 5"},
		{"bad op", frame(`{"op":"reboot"}`), `malformed "reboot" request`},
		{"bad no op", frame(`{}`), `malformed "" request`},
		{"bad field of another op", frame(`{"op":"status","path":"/x"}`), `malformed "status" request`},
		{"bad unknown field", frame(`{"op":"status","more":1}`), `decode frame: json: unknown field "more"`},
		{"bad trailing value", frame(`{"op":"status"}{}`), "decode frame: trailing data"},
		{"bad json", frame(`{"op"`), "decode frame: unexpected EOF"},
		{"bad number", frame(`{"op":"bind","path":"/x","identity":-1}`), "decode frame: json: cannot unmarshal number -1 "},
		{"bad own connections, too many", frame(`{"op":"preview","own":[{}` + strings.Repeat(`,{}`, proto.MaxOwn) + `]}`), "decode frame: 17 connections of one's own, at most 16"},
		{"bad own connection", frame(`{"op":"preview","own":[{"local":"192.0.2.1","remote":"192.0.2.9:1"}]}`), "decode frame: not an ip:port"},
		{"bad own connections of another op", frame(`{"op":"status","own":[{"local":"192.0.2.1:22","remote":"192.0.2.9:1"}]}`), `malformed "status" request`},
		{"bad apply without image", frame(`{"op":"apply"}`), `malformed "apply" request`},
		{"bad length", append(hello[:len(hello):len(hello)], 0xff, 0xff, 0xff, 0xff), "read frame: 4294967295 bytes, at most 1048576"},
		{"OK after an error", frame(`{"op":"rollback"}`, `{"op":"status"}`), ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: c.config.Socket(), Net: "unix"})
			must(t, err)
			defer conn.Close()
			must(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
			_, err = conn.Write(tt.send)
			must(t, err)
			must(t, conn.CloseWrite())
			var last proto.Response
			for {
				var r proto.Response
				files, err := proto.ReadFrame(conn, &r, nil)
				proto.CloseFiles(files)
				if err != nil {
					break
				}
				last = r
			}
			if !strings.HasPrefix(last.Error, tt.want) || tt.want == "" && last.Error != "" {
				t.Errorf("answer %+v, want %q", last, tt.want)
			}
		})
	}
	if _, _, err := dial(t, c).Hello(); err != nil {
		t.Errorf("the next one is not answered: %v", err)
	}
}

// frameOf writes a frame by hand, whatever its text is.
func frameOf(text string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
}

func TestDescriptorsOfRequests(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	serve(t, c)
	dev, err := os.Open("/dev/zero")
	must(t, err)
	defer dev.Close()
	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	defer w.Close()
	client := dial(t, c)
	_, d, err := client.Hello()
	must(t, err)
	d.Close()
	for _, f := range []*os.File{dev, r} {
		if _, err := client.Apply(f, 0); !refusedWith(err, "read image: the descriptor is not a regular file") {
			t.Errorf("%s: %v", f.Name(), err)
		}
	}
	big := memfd(t, nil)
	must(t, big.Truncate(1<<40))
	if _, err := client.Apply(big, 0); err == nil || !strings.HasPrefix(err.Error(), "read image: 1099511627776 bytes") {
		t.Errorf("a terabyte: %v", err)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	serve(t, c)
	for range maxConnections {
		_, d, err := dial(t, c).Hello()
		must(t, err)
		d.Close()
	}
	if _, _, err := dial(t, c).Hello(); !refusedWith(err, "there are 4 connections already") {
		t.Errorf("one too many: %v", err)
	}
}

// Who is neither root nor the agent is not answered, even if the socket's mode
// would let him in.
func TestPeerIsChecked(t *testing.T) {
	m := newMachine(t)
	m.config.AgentUID = 4242
	c := m.start()
	serve(t, c)
	info, err := os.Stat(c.config.Socket())
	must(t, err)
	var stat unix.Stat_t
	must(t, unix.Stat(c.config.Socket(), &stat))
	if info.Mode().Perm() != 0o660 || stat.Uid != 4242 {
		t.Errorf("socket has mode %v, owner %d", info.Mode(), stat.Uid)
	}
	for uid, want := range map[int]string{0: "", 4242: "", 4243: "user 4243 may not talk to the core"} {
		var err error
		as(t, uid, func() {
			var client *coreclient.Client
			if client, err = coreclient.Dial(t.Context(), c.config.Socket()); err == nil {
				var d *proto.Descriptors
				if _, d, err = client.Hello(); err == nil {
					d.Close()
				}
				client.Close()
			}
		}, c.config.Socket())
		if (err == nil) != (want == "") || err != nil && err.Error() != want {
			t.Errorf("user %d: %v, want %q", uid, err, want)
		}
	}
}

func FuzzSession(f *testing.F) {
	for _, text := range []string{
		helloText, `{"op":"bind","path":"/lab/x","identity":16}`, `{"op":"apply"}`, `{"op":"status"}x`, `{"op":"forget"}`,
		`{"op":"quarantine","identity":16,"for":60000,"reason":"x","automatic":true}`, `{"op":"release","identity":16}`, `{"op":"audit"}`,
	} {
		f.Add([]byte(text), uint8(0))
	}
	f.Add([]byte(`{"op":"apply"}`), uint8(1))
	f.Add([]byte(`{"op":"preview"}`), uint8(2))
	f.Add([]byte(`{"op":"preview","own":[{"local":"192.0.2.1:22","remote":"[2001:db8::9%eth0]:50112"}]}`), uint8(1))
	f.Add([]byte(`{"op":"audit"}`), uint8(3))
	null, err := os.Open(os.DevNull)
	if err != nil {
		f.Fatal(err)
	}
	defer null.Close()
	directory, err := os.Open("/")
	if err != nil {
		f.Fatal(err)
	}
	defer directory.Close()
	sent := [][]*os.File{nil, {null}, {directory}, {null, directory}}
	given := &proto.Descriptors{Denied: null, Allowed: null, Signals: null, Counts: null, Rings: null, Faults: null, Bindings: null, State: null}
	dir := f.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "audit.log"), nil, 0o600); err != nil {
		f.Fatal(err)
	}
	c := &Core{log: slog.New(slog.DiscardHandler), found: found{tree: &tree{dir: "/"}}, donated: given, links: &links{}, store: store{dir: dir, log: slog.New(slog.DiscardHandler)},
		journal: &journal{dir: dir}} // which has no room for what peers cause
	silent := []proto.Op{proto.OpUnbind, proto.OpForget} // done without more words
	f.Fuzz(func(t *testing.T, b []byte, kind uint8) {
		var q proto.Request
		if proto.Unmarshal(b, &q) != nil {
			return
		}
		// In whatever order requests come, nothing but hello opens the session.
		for _, s := range []session{{core: c}, {core: c, greeted: true}} {
			before := s.greeted
			r, files := s.handle(q, sent[int(kind)%len(sent)])
			answered := r.Hello != nil || r.Status != nil || r.Audit != nil
			proto.CloseFiles(files)
			if !before && (s.greeted != (r.Hello != nil) || r.Status != nil || r.Audit != nil) {
				t.Errorf("%s before hello: %+v", b, r)
			}
			if (r.Error != "") == answered && !slices.Contains(silent, q.Op) {
				t.Errorf("%s: %+v", b, r)
			}
			if r.Error != "" && len(files) > 0 {
				t.Errorf("%s is refused, and gets %d descriptors", b, len(files))
			}
		}
	})
}

// An agent that claims ever other paths takes no memory of the core by those that it is
// refused.
func TestRefusedClaimsAreForgotten(t *testing.T) {
	s := &session{core: &Core{log: slog.New(slog.DiscardHandler)}, greeted: true}
	for i := range 100 {
		if r, _ := s.handle(proto.Request{Op: proto.OpBind, Path: fmt.Sprintf("/lab/%d", i), Identity: 16}, nil); r.Error == "" {
			t.Fatal("bound without a policy")
		}
	}
	if len(s.claimed) != 0 {
		t.Errorf("%d refused paths are remembered", len(s.claimed))
	}
}

// Where others than root could put another socket, there is none.
func TestJ12RunDir(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	dir := m.config.RunDir
	must(t, os.Mkdir(dir, 0o755))
	for _, tt := range []struct {
		name string
		mode os.FileMode
		uid  int
		ok   bool
	}{
		{"bad writable by all", 0o777, 0, false},
		{"bad writable by all, though sticky", 0o777 | os.ModeSticky, 0, false},
		{"bad writable by a group", 0o775, 0, false},
		{"bad of another user", 0o755, 4242, false},
		{"OK", 0o755, 0, true},
	} {
		must(t, os.Chown(dir, tt.uid, 0))
		must(t, os.Chmod(dir, tt.mode))
		l, err := c.Listen()
		if err == nil {
			l.Close()
		}
		if tt.ok != (err == nil) || err != nil && !refusedWith(err, "others than root may put another socket into run_dir "+dir) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}
