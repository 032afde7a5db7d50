package core

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
)

// legal says which sequences of requests a session may answer: hello first, and once.
// Everything else is refused for itself, whatever came before.
type legal struct {
	name    string
	request proto.Request
	file    func(t *testing.T) *os.File // nil = none is sent
	answer  string                      // of a greeted session; "" = yes, "?" = yes if somebody asked for the contrary before
}

// alphabet is every kind of request, good ones and bad ones, at a core where an
// image is in force, none was before, nothing waits to be confirmed, and nobody but pod is
// ever quarantined.
func alphabet(t *testing.T, image []byte) []legal {
	t.Helper()
	good := func(t *testing.T) *os.File { return memfd(t, image) }
	pod, web := id(t, image, "pod"), id(t, image, "web")
	own := proto.Own{{Local: netip.MustParseAddrPort("192.0.2.1:22"), Remote: netip.MustParseAddrPort("192.0.2.9:50112")}}
	return []legal{
		{"hello", proto.Request{Op: proto.OpHello, Version: proto.Version}, nil, "hello is out of order"},
		{"hello of another version", proto.Request{Op: proto.OpHello, Version: 99}, nil, "hello is out of order"},
		{"hello with more", proto.Request{Op: proto.OpHello, Version: proto.Version, Path: "/x"}, nil, "hello is out of order"},
		{"status", proto.Request{Op: proto.OpStatus}, nil, ""},
		{"status with a descriptor", proto.Request{Op: proto.OpStatus}, good, `malformed "status" request`},
		{"apply", proto.Request{Op: proto.OpApply}, good, ""},
		{"apply without image", proto.Request{Op: proto.OpApply}, nil, `malformed "apply" request`},
		{"apply of nothing", proto.Request{Op: proto.OpApply}, func(t *testing.T) *os.File { return memfd(t, nil) }, "verify image: "},
		{"apply of what was not previewed", proto.Request{Op: proto.OpApply, Digest: "00"}, nil, `no image with digest "00" was just previewed`},
		{"apply by digest with an image", proto.Request{Op: proto.OpApply, Digest: "00"}, good, `malformed "apply" request`},
		{"preview by digest", proto.Request{Op: proto.OpPreview, Digest: "00"}, good, `malformed "preview" request`},
		{"apply for a negative time", proto.Request{Op: proto.OpApply, Within: -1}, good, `malformed "apply" request`},
		{"preview", proto.Request{Op: proto.OpPreview}, good, ""},
		{"preview that names some first", proto.Request{Op: proto.OpPreview, Own: own}, good, ""},
		{"apply that names some first", proto.Request{Op: proto.OpApply, Own: own}, good, `malformed "apply" request`},
		{"prepare by digest", proto.Request{Op: proto.OpPrepare, Digest: "00"}, good, `malformed "prepare" request`},
		{"prepare for a time", proto.Request{Op: proto.OpPrepare, Within: 1000}, good, `malformed "prepare" request`},
		{"prepare", proto.Request{Op: proto.OpPrepare}, good, ""},
		{"prepare what is none", proto.Request{Op: proto.OpPrepare}, func(t *testing.T) *os.File { return memfd(t, nil) }, "verify image: "},
		{"prepare nothing", proto.Request{Op: proto.OpPrepare}, nil, `malformed "prepare" request`},
		{"preview of nothing", proto.Request{Op: proto.OpPreview}, nil, `malformed "preview" request`},
		{"apply that spares for a negative time", proto.Request{Op: proto.OpApply, Spare: -1}, good, `malformed "apply" request`},
		{"shadow of nothing", proto.Request{Op: proto.OpShadow, For: 60_000}, nil, `malformed "shadow" request`},
		{"shadow for ever", proto.Request{Op: proto.OpShadow, For: 1 << 40}, good, `malformed "shadow" request`},
		{"shadow for no time", proto.Request{Op: proto.OpShadow}, good, "shadow for 0s is out of bounds"},
		{"unshadow", proto.Request{Op: proto.OpUnshadow}, nil, "no policy is in shadow"},
		{"shadowed", proto.Request{Op: proto.OpShadowed}, nil, "no policy is in shadow"},
		{"confirm", proto.Request{Op: proto.OpConfirm}, nil, "no change waits to be confirmed"},
		{"rollback", proto.Request{Op: proto.OpRollback}, nil, "there is no previous image"},
		{"image", proto.Request{Op: proto.OpImage}, nil, ""},
		{"bind", proto.Request{Op: proto.OpBind, Path: "/lab/pod", Identity: pod}, nil, ""},
		{"bind to another", proto.Request{Op: proto.OpBind, Path: "/lab/pod", Identity: web}, nil, "bind /lab/pod: "},
		{"bind somewhere", proto.Request{Op: proto.OpBind, Path: "/../pod", Identity: pod}, nil, "bind /../pod: not a canonical path"},
		{"unbind", proto.Request{Op: proto.OpUnbind, Path: "/lab/pod"}, nil, ""},
		{"forget", proto.Request{Op: proto.OpForget}, nil, ""},
		{"quarantine", proto.Request{Op: proto.OpQuarantine, Identity: pod, For: 60_000, Reason: "x"}, nil, ""},
		{"quarantine for ever", proto.Request{Op: proto.OpQuarantine, Identity: pod, For: 1 << 62, Reason: "x"}, nil, `malformed "quarantine" request`},
		{"quarantine without a reason", proto.Request{Op: proto.OpQuarantine, Identity: pod, For: 60_000}, nil, "quarantine needs a reason"},
		{"quarantine of nobody", proto.Request{Op: proto.OpQuarantine, Identity: math.MaxUint32, For: 60_000, Reason: "x"}, nil, "identity 4294967295 is no workload"},
		{"quarantine with a descriptor", proto.Request{Op: proto.OpQuarantine, Identity: pod, For: 60_000, Reason: "x"}, good, `malformed "quarantine" request`},
		{"release", proto.Request{Op: proto.OpRelease, Identity: pod}, nil, "?"},
		{"release of one that is not", proto.Request{Op: proto.OpRelease, Identity: web}, nil, fmt.Sprintf("identity %d is not quarantined", web)},
		{"audit", proto.Request{Op: proto.OpAudit}, nil, ""},
		{"audit of a path", proto.Request{Op: proto.OpAudit, Path: "/etc/shadow"}, nil, `malformed "audit" request`},
		{"reboot", proto.Request{Op: "reboot"}, nil, `malformed "reboot" request`},
	}
}

// say makes one request of a session, and checks the answer.
func (l legal) say(t *testing.T, s *session) {
	t.Helper()
	var files []*os.File
	if l.file != nil {
		files = append(files, l.file(t))
	}
	want := l.answer
	if want == "?" {
		s.core.mu.Lock()
		if _, is := s.core.quarantines[l.request.Identity]; is {
			want = ""
		} else {
			want = fmt.Sprintf("identity %d is not quarantined", l.request.Identity)
		}
		s.core.mu.Unlock()
	}
	greets := false
	if !s.greeted {
		switch l.name {
		case "hello":
			want, greets = "", true
		case "hello of another version":
			want = "the agent speaks protocol 99"
		case "hello with more":
			want = `malformed "hello" request`
		default:
			want = string(l.request.Op) + " is out of order"
		}
	}
	before := s.greeted
	r, answer := s.handle(l.request, files)
	proto.CloseFiles(files)
	proto.CloseFiles(answer)
	if s.then != nil {
		s.then()
		s.then = nil
	}
	if !strings.HasPrefix(r.Error, want) || want == "" && r.Error != "" {
		t.Fatalf("%s: %q, want %q", l.name, r.Error, want)
	}
	if r.Error != "" && (len(answer) > 0 || r.Status != nil || r.Hello != nil || r.Audit != nil) {
		t.Fatalf("%s is refused and answered: %+v", l.name, r)
	}
	if s.greeted != (before || greets) {
		t.Fatalf("%s: greeted %v after %v", l.name, s.greeted, before)
	}
}

// standing is what no legal request may change here.
type standing struct {
	Flags, Slot uint32
	Digest      [32]byte
	Attached    int
	Claims      []string
}

func (c *Core) standsAt(t *testing.T, m *machine) standing {
	t.Helper()
	state, err := readState(c.objects)
	must(t, err)
	s := standing{Flags: abi.ActiveFlags(state.Active), Slot: abi.ActiveSlot(state.Active), Attached: attached(t, m)}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Digest = c.active.digest
	for _, claim := range sortedKeys(c.active.selectors.claims) {
		if claim != "/lab/pod/" { // the one that the agent may make
			s.Claims = append(s.Claims, claim)
		}
	}
	return s
}

// X24: an agent in an attacker's hands says everything in every order, three
// requests deep, and longer at random. The core answers what is legal and refuses
// the rest, each time the same, and nothing of what it enforces changes.
func TestX24Orders(t *testing.T) {
	m := newMachine(t)
	m.mkdir("/lab/pod")
	m.config.AgentUID = 4242
	c, err := open(m.config, slog.New(slog.DiscardHandler), hooks{})
	must(t, err)
	t.Cleanup(func() { c.Close() })
	b := shop(t, nil)
	_, err = c.Apply(b, 0)
	must(t, err)
	all := alphabet(t, b)
	before := c.standsAt(t, m)
	kinds := map[proto.Op]bool{}
	for _, l := range all {
		kinds[l.request.Op] = true
	}
	for op := range forms {
		if !kinds[op] {
			t.Errorf("the agent never says %s", op)
		}
	}
	sequence := func(of ...legal) {
		t.Helper()
		s := &session{core: c}
		for _, l := range of {
			l.say(t, s)
		}
	}
	n := 0
	for _, x := range all {
		sequence(x)
		for _, y := range all {
			sequence(x, y)
			for _, z := range all {
				sequence(x, y, z)
				n += 3
			}
		}
	}
	if diff := cmp.Diff(before, c.standsAt(t, m)); diff != "" {
		t.Errorf("three deep (-before +after):\n%s", diff)
	}
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 24))
	for range 100 {
		of := []legal{all[0]}
		for range random.IntN(30) {
			of = append(of, all[random.IntN(len(all))])
			n++
		}
		sequence(of...)
	}
	if diff := cmp.Diff(before, c.standsAt(t, m)); diff != "" {
		t.Errorf("at random, seed %d (-before +after):\n%s", seed, diff)
	}
	t.Logf("%d requests", n)
}

// caller is a raw connection to the core.
type caller struct {
	t *testing.T
	*net.UnixConn
}

func call(t *testing.T, c *Core) caller {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: c.config.Socket(), Net: "unix"})
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	must(t, conn.SetDeadline(time.Now().Add(time.Minute)))
	return caller{t, conn}
}

// answer reads one, and its error.
func (c caller) answer() string {
	c.t.Helper()
	var r proto.Response
	files, err := proto.ReadFrame(c.UnixConn, &r, nil)
	proto.CloseFiles(files)
	if err != nil {
		return err.Error()
	}
	return r.Error
}

// X24, in bytes: frames that are torn, too long, or never end, floods, and
// descriptors of every kind. Others are served meanwhile, and nothing is left.
func TestX24Frames(t *testing.T) {
	m := newMachine(t)
	m.config.AgentUID = 4242
	c := m.start()
	serve(t, c)
	b := shop(t, nil)
	_, err := c.Apply(b, 0)
	must(t, err)
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // it would close what is forgotten
	before, goroutines := settled(t, 0, 0)
	other := dial(t, c)
	_, given, err := other.Hello()
	must(t, err)
	served := func(when string) {
		t.Helper()
		if s, err := other.Status(); err != nil || s.State != proto.StateEnforcing {
			t.Fatalf("%s: %+v, %v", when, s, err)
		}
	}

	for name, f := range strange(t, c, b, given) {
		conn := call(t, c)
		_, err := conn.Write(frameOf(helloText))
		must(t, err)
		if got := conn.answer(); got != "" {
			t.Fatalf("hello: %s", got)
		}
		_, _, err = conn.WriteMsgUnix(frameOf(`{"op":"apply"}`), unix.UnixRights(int(f.Fd())), nil)
		must(t, err)
		got := conn.answer()
		if strings.HasPrefix(name, "bad ") && !strings.HasPrefix(got, "read image: ") && !strings.HasPrefix(got, "verify image: ") {
			t.Errorf("%s: %q", name, got)
		}
		if strings.HasPrefix(name, "OK ") && got != "" {
			t.Errorf("%s: %q", name, got)
		}
		conn.Close()
		f.Close()
		served(name)
	}

	// Slow ones: each takes a place until it has been told off, and no more.
	var slow []caller
	for _, torn := range [][]byte{{}, {0}, {0, 0, 0, 9}, frameOf(`{"op":"status"}`)[:10]} {
		conn := call(t, c)
		_, err := conn.Write(torn)
		must(t, err)
		slow = append(slow, conn)
		if len(slow) == maxConnections-1 { // one is the other's
			break
		}
	}
	served("slow frames")
	for _, conn := range slow {
		conn.Close()
	}

	// A flood of connections, and of frames in one.
	for range 200 {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: c.config.Socket(), Net: "unix"})
		must(t, err)
		_, _ = conn.Write(frameOf(`{"op":"status"}`))
		conn.Close()
	}
	var conn caller
	for end := time.Now().Add(time.Minute); ; {
		conn = call(t, c)
		_, _ = conn.Write(frameOf(helloText))
		if got := conn.answer(); got == "" {
			break
		}
		conn.Close()
		if time.Now().After(end) {
			t.Fatal("the core serves nobody after a flood")
		}
	}
	for range 500 {
		_, err := conn.Write(frameOf(`{"op":"bind","path":"/lab/x","identity":4294967295}`))
		must(t, err)
		if got := conn.answer(); !strings.HasPrefix(got, "bind /lab/x: ") {
			t.Fatalf("flood: %q", got)
		}
	}
	conn.Close()
	served("floods")
	other.Close()
	given.Close()
	settled(t, before, goroutines)
}

// settled waits until this process has no more descriptors and goroutines than
// these; 0 = whatever it has when they change no more.
func settled(t *testing.T, files, goroutines int) (int, int) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		entries, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		n := runtime.NumGoroutine()
		if files == 0 || len(entries) <= files && n <= goroutines {
			return len(entries), n
		}
		if time.Now().After(end) {
			stacks := make([]byte, 64<<10)
			stacks = stacks[:runtime.Stack(stacks, true)]
			t.Fatalf("%d descriptors, %d before; %d goroutines, %d before\n%s", len(entries), files, n, goroutines, stacks)
		}
	}
}

// strange are descriptors that a core may be sent for an image.
func strange(t *testing.T, c *Core, image []byte, given *proto.Descriptors) map[string]*os.File {
	t.Helper()
	all := map[string]*os.File{}
	add := func(name string, fd int, err error) {
		t.Helper()
		must(t, err)
		all[name] = os.NewFile(uintptr(fd), name)
	}
	dir := t.TempDir()
	open := func(name, path string, flags int) {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
		add(name, fd, err)
	}
	open("bad directory", dir, unix.O_RDONLY)
	open("bad device", "/dev/zero", unix.O_RDONLY)
	open("bad path only", dir, unix.O_PATH)
	fifo := filepath.Join(dir, "fifo")
	must(t, unix.Mkfifo(fifo, 0o600))
	open("bad fifo that never ends", fifo, unix.O_RDWR)
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, image, 0o600))
	if kind := fileSystem(t, dir); kind != unix.TMPFS_MAGIC {
		open("bad file on a disk", file, unix.O_RDONLY)
	}
	whole := memfd(t, image)
	open("bad not readable", fmt.Sprintf("/proc/self/fd/%d", whole.Fd()), unix.O_WRONLY)
	whole.Close()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	add("bad socket", fd, err)
	fd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	add("bad epoll", fd, err)
	fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC)
	add("bad eventfd", fd, err)
	fd, err = unix.PidfdOpen(os.Getpid(), 0)
	add("bad process", fd, err)
	fd, err = unix.Dup(int(given.State.Fd()))
	add("bad map", fd, err)
	fd, err = unix.Dup(int(c.lock.Fd()))
	add("bad lock of the core", fd, err)
	memory := func(name string, size int64, content []byte) {
		fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
		add(name, fd, err)
		_, err = all[name].Write(content)
		must(t, err)
		must(t, all[name].Truncate(size))
	}
	memory("bad empty", 0, nil)
	memory("bad sparse and huge", 1<<40, image)
	memory("bad half", int64(len(image)/2), image)
	memory("OK offset at the end", int64(len(image)), image) // it is read from its start
	return all
}

func fileSystem(t *testing.T, path string) int64 {
	t.Helper()
	var stat unix.Statfs_t
	must(t, unix.Statfs(path, &stat))
	return int64(stat.Type)
}

// An image that changes while it is read is one of its contents, or refused; what is
// verified is what is used.
func TestX24ImageThatChanges(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	b := shop(t, nil)
	_, err := c.Apply(b, 0)
	must(t, err)
	f := memfd(t, b)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		var err error
		for ctx.Err() == nil && err == nil {
			if err = f.Truncate(int64(len(b) / 2)); err == nil {
				_, err = f.WriteAt(b[len(b)/2:], int64(len(b)/2))
			}
		}
		done <- err
	}()
	whole := 0
	for range 2000 {
		s := &session{core: c, greeted: true}
		r, _ := s.handle(proto.Request{Op: proto.OpApply}, []*os.File{f})
		switch {
		case r.Error == "":
			whole++
		case !strings.HasPrefix(r.Error, "verify image: "):
			t.Fatalf("answer %q", r.Error)
		}
	}
	cancel()
	must(t, <-done)
	if s := c.Status(); s.State != proto.StateEnforcing || s.Active.Version != 7 {
		t.Errorf("status %+v", s)
	}
	t.Logf("%d of 2000 were whole", whole)
}

// A descriptor that is slow to close, here a socket that lingers for an hour, keeps
// its own connection waiting, and neither others nor the end of the core.
func TestX24SlowToClose(t *testing.T) {
	m := newMachine(t)
	m.config.AgentUID = 4242
	c := m.start()
	l, err := c.Listen()
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Serve(ctx, l) }()
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	must(t, netlink.LinkSetUp(lo))
	sink, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer sink.Close() // resets what hangs
	as(t, int(m.config.AgentUID), func() {
		for range maxConnections {
			conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: c.config.Socket(), Net: "unix"})
			if err != nil {
				t.Error(err)
				return
			}
			socket := lingering(t, sink.Addr().(*net.TCPAddr))
			// The core is its last owner before the frame ends.
			frame := frameOf(`{"op":"apply"}`)
			if _, _, err := conn.WriteMsgUnix(frame[:2], unix.UnixRights(socket), nil); err != nil {
				t.Error(err)
				return
			}
			unix.Close(socket)
			if _, err := conn.Write(frame[2:]); err != nil {
				t.Error(err)
			}
			conn.Close()
		}
	}, c.config.Socket())
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		if strings.Count(string(stacks), "proto.CloseFiles(") >= maxConnections {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the core waits for nobody:\n%s", stacks)
		}
	}
	if _, given, err := dial(t, c).Hello(); err != nil {
		t.Errorf("root is not served: %v", err)
	} else {
		given.Close()
	}
	cancel()
	must(t, <-done)
}

// lingering is a connected socket whose last owner waits for an hour as it closes it:
// nobody reads what was sent.
func lingering(t *testing.T, to *net.TCPAddr) int {
	t.Helper()
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	must(t, unix.Connect(s, &unix.SockaddrInet4{Port: to.Port, Addr: [4]byte{127, 0, 0, 1}}))
	must(t, unix.SetsockoptLinger(s, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 3600}))
	must(t, unix.SetNonblock(s, true))
	for err = nil; err == nil; {
		_, err = unix.Write(s, make([]byte, 1<<20))
	}
	return s
}

// X24, I07: who was given the agent's maps to read finds no way to write them: not by
// their number, not in a file system of root's. Where everybody may pin, the kernel
// opens such a way, and the status says so.
func TestX24MapsStayReadOnly(t *testing.T) {
	m := newMachine(t)
	m.config.AgentUID = 4242
	c := m.start()
	serve(t, c)
	_, given, err := dial(t, c).Hello()
	must(t, err)
	defer given.Close()
	theirs := filepath.Join(t.TempDir(), "theirs")
	must(t, os.Mkdir(theirs, 0o755))
	must(t, unix.Mount("bpf", theirs, "bpf", 0, "mode=01777"))
	defer func() { must(t, unix.Unmount(theirs, 0)) }()
	fd, err := unix.Dup(int(given.State.Fd()))
	must(t, err)
	state, err := ebpf.NewMapFromFD(fd)
	must(t, err)
	defer state.Close()
	info, err := state.Info()
	must(t, err)
	number, _ := info.ID()
	as(t, 4242, func() {
		if _, err := ebpf.NewMapFromID(number); !errors.Is(err, unix.EPERM) {
			t.Errorf("by its number: %v", err)
		}
		if _, err := ebpf.LoadPinnedMap(c.pins.maps("state"), nil); !errors.Is(err, unix.EACCES) {
			t.Errorf("by its pin: %v", err)
		}
		if err := state.Pin(filepath.Join(filepath.Dir(m.config.BPFFS), "mine")); !errors.Is(err, unix.EACCES) {
			t.Errorf("pinned anew: %v", err)
		}
	}, m.config.Socket())
	want := "others than root may write to the BPF file system " + theirs
	found := func() bool {
		return slices.ContainsFunc(Preflight(m.config), func(c Check) bool { return strings.Contains(c.Limit, want) })
	}
	if !found() {
		t.Errorf("preflight does not say that %s", want)
	}
	must(t, os.Chmod(theirs, 0o700))
	if found() {
		t.Errorf("preflight still says that %s", want)
	}
}
