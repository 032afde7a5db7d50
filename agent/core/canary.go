package core

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

// canaryPath is a cgroup of the core's own below the managed root. Every image binds
// it to an identity that may do nothing.
const canaryPath = "/demarc-canary"

// CanaryCommand is the argument with which this program makes the canary's socket.
const CanaryCommand = "canary"

// canary is a socket that must not get anything out: what it sends proves that the
// kernel enforces. A socket keeps the cgroup that it was made in, so a child makes it
// there and hands it over. The child is in a network namespace of its own, which
// ends with the socket and has nothing but lo: no packet can get anywhere, whatever
// the hooks do. The socket is connected to itself.
type canary struct {
	dir    string
	socket int
}

// makeCanary makes the cgroup, before cgroups are named.
func makeCanary(t *tree) error {
	err := t.writing(func() error { return os.Mkdir(t.dir+canaryPath, 0o755) })
	if err != nil && !errors.Is(err, fs.ErrExist) { // of a core that was stopped
		return fmt.Errorf("make cgroup of the canary: %w", err)
	}
	return nil
}

// openCanary makes the socket, and needs the privileges of the start. Where an image
// is in force, the cgroup is bound under it by now.
func openCanary(t *tree) (_ *canary, err error) {
	c := &canary{dir: t.dir + canaryPath, socket: -1}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	cgroup, err := os.Open(c.dir)
	if err != nil {
		return nil, err
	}
	defer cgroup.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	here, there := os.NewFile(uintptr(pair[0]), "canary"), os.NewFile(uintptr(pair[1]), "canary")
	child, err := os.StartProcess("/proc/self/exe", []string{"demarc-core", CanaryCommand}, &os.ProcAttr{
		Env: []string{}, Files: []*os.File{nil, nil, nil, there},
		Sys: &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd()), Cloneflags: unix.CLONE_NEWNET},
	})
	there.Close()
	if err != nil {
		here.Close()
		return nil, err
	}
	defer child.Wait()
	defer child.Kill()
	conn, err := net.FileConn(here)
	here.Close()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return nil, err
	}
	var problem string
	files, err := proto.ReadFrame(conn.(*net.UnixConn), &problem, nil)
	defer proto.CloseFiles(files)
	if err != nil {
		return nil, err
	}
	if len(files) != 1 {
		return nil, errors.New(problem)
	}
	c.socket, err = unix.FcntlInt(files[0].Fd(), unix.F_DUPFD_CLOEXEC, 0)
	return c, err
}

// Canary is what the child does: it sends the socket, or what went wrong, to its
// parent.
func Canary() error {
	conn, err := net.FileConn(os.NewFile(3, "core"))
	if err != nil {
		return err
	}
	s, err := selfTalk()
	if err != nil {
		return proto.WriteFrame(conn.(*net.UnixConn), err.Error())
	}
	return proto.WriteFrame(conn.(*net.UnixConn), "", os.NewFile(uintptr(s), "canary"))
}

// selfTalk makes a socket that is connected to itself.
func selfTalk() (int, error) {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return 0, err
	}
	lo.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo); err != nil {
		return 0, fmt.Errorf("set lo up: %w", err)
	}
	if err := unix.Bind(s, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return 0, fmt.Errorf("bind: %w", err)
	}
	self, err := unix.Getsockname(s)
	if err == nil {
		err = unix.Connect(s, self)
	}
	if err != nil {
		return 0, fmt.Errorf("connect: %w", err)
	}
	return s, nil
}

func (c *canary) close() {
	if c == nil {
		return
	}
	if c.socket >= 0 {
		unix.Close(c.socket)
	}
	_ = os.Remove(c.dir) // may be forbidden by now; the next start uses it then
}

// removeCanary takes away what a core left.
func removeCanary(root string) error {
	t, err := openTree(root)
	if err != nil {
		return err
	}
	return t.writing(func() error { return remove(filepath.Join(t.dir, canaryPath)) })
}

// prove shows that what this core put in force is: a datagram of nobody is refused,
// or in mode observe let pass and told, and counted; and a question about the tables
// in force that has to be answered with yes is.
func (c *Core) prove() (err error) {
	if c.active == nil {
		return nil
	}
	defer func() {
		if err == nil {
			c.proved = time.Now()
		}
	}()
	if c.canary == nil {
		return errors.New("there is no canary: nothing proves that the kernel enforces")
	}
	key := abi.CountKey{Subject: uint32(image.Canary), Verdict: abi.Deny, Reason: abi.PendingSubject}
	var want error = unix.EPERM
	if c.active.flags&abi.ActiveObserve != 0 {
		key.Verdict, want = abi.Audit, nil
	}
	before, err := c.counted(key)
	if err != nil {
		return err
	}
	sent := c.canary.send()
	after, err := c.counted(key)
	if err != nil {
		return err
	}
	if sent != want {
		return fmt.Errorf("a datagram that nobody declared ended with %v, not with %v: packets are not judged", sent, want)
	}
	if before == after {
		return errors.New("a datagram that nobody declared was not counted: packets are not judged by these programs")
	}
	if c.active.known.Verdict != abi.Allow {
		return nil // nothing is allowed
	}
	asked := []abi.Query{c.active.known}
	asked[0].Crossing = abi.TablesAlone
	asked[0].Verdict = abi.Deny
	if err := ask(c.objects, asked); err != nil {
		return err
	}
	if asked[0] != c.active.known {
		return fmt.Errorf("the tables in force answer %v, %v to what they allowed", asked[0].Verdict, asked[0].Reason)
	}
	return nil
}

// send sends one datagram, and takes those that came.
func (c *canary) send() error {
	_, err := unix.Write(c.socket, []byte{0})
	var b [1]byte
	for range 16 {
		if _, _, bad := unix.Recvfrom(c.socket, b[:], unix.MSG_DONTWAIT); bad != nil {
			break
		}
	}
	return err
}

func (c *Core) counted(key abi.CountKey) (sum uint64, err error) {
	var cpus []uint64
	if err := c.objects.Maps["counts"].Lookup(key, &cpus); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return 0, fmt.Errorf("read counts: %w", err)
	}
	for _, n := range cpus {
		sum += n
	}
	return sum, nil
}
