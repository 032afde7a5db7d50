package netlab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// machineName is what the test binary is called where it becomes a machine.
const machineName = "demarc-machine"

// Machine is a host of its own, as far as its programs can tell: the distribution's
// systemd is its PID 1, in namespaces of its own, on this machine's root file system
// with everything that is written kept aside. It has eth0 on the lab's switch.
//
// It can be halted and booted again: what was written stays, processes, pins and
// what is mounted on /run do not.
//
// No service of this machine's is enabled there, and nothing of the kernel that is
// not a namespace's own can be changed by systemd: /proc/sys is read-only but for
// net, and no modules are loaded.
type Machine struct {
	*Namespace
	Root *Cgroup // of its cgroup tree

	dir  string   // with the upper layer of its file system
	init *Process // nil while halted
}

// masked are units that would do something to the kernel that is everybody's, or wait
// for devices that are not there.
var masked = []string{
	"systemd-sysctl.service", "systemd-modules-load.service", "systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount",
	"systemd-udevd.service", "systemd-udev-trigger.service", "systemd-udevd-kernel.socket", "systemd-udevd-control.socket",
	"systemd-journald-audit.socket", "systemd-random-seed.service", "systemd-timesyncd.service", "modprobe@.service",
	"kmod-static-nodes.service", "getty.target", "systemd-remount-fs.service", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
	"dev-hugepages.mount", "sys-fs-fuse-connections.mount", "systemd-pstore.service", "ldconfig.service", "systemd-machine-id-commit.service",
}

// Machine makes a machine that is not booted yet: Write and Enable say what it will
// run.
func (l *Lab) Machine(name string) *Machine {
	l.t.Helper()
	m := &Machine{Namespace: l.Namespace(name), dir: filepath.Join(l.dir, "machine-"+name)}
	m.Root = l.makeCgroup(filepath.Join(l.cgroup, "machine-"+name))
	// As the kernel makes the root of a hierarchy: who has no capability for it cannot
	// make a cgroup there, be it root.
	l.check(os.Chmod(m.Root.dir, 0o555), "close cgroups")
	l.check(os.Chmod(l.cgroup, 0o755), "open cgroups to users") // whose managers make their own
	l.check(os.Mkdir(m.dir, 0o755), "make directory")
	l.check(unix.Mount("tmpfs", m.dir, "tmpfs", 0, "mode=755"), "mount the file system of %s", name)
	l.later(func() error { return unix.Unmount(m.dir, unix.MNT_DETACH) })
	for _, dir := range []string{"upper/etc/systemd/system", "upper/usr/sbin", "work", "root"} {
		l.check(os.MkdirAll(filepath.Join(m.dir, dir), 0o755), "make directory")
	}
	// Nothing shines through from below: what this machine has enabled is its own affair.
	l.check(unix.Setxattr(filepath.Join(m.dir, "upper/etc/systemd/system"), "trusted.overlay.opaque", []byte("y"), 0), "hide units")
	// A whiteout: there, packages may start their services.
	l.check(unix.Mknod(filepath.Join(m.dir, "upper/usr/sbin/policy-rc.d"), unix.S_IFCHR, 0), "hide policy-rc.d")
	for _, unit := range masked {
		l.check(os.Symlink("/dev/null", filepath.Join(m.dir, "upper/etc/systemd/system", unit)), "mask %s", unit)
	}
	m.Write("/etc/machine-id", "", 0o444)
	m.Write("/etc/hostname", name+"\n", 0o644)
	m.Write("/etc/fstab", "", 0o644)
	return m
}

// Path is where a file of the machine is found from outside.
func (m *Machine) Path(file string) string {
	if m.init == nil {
		return filepath.Join(m.dir, "upper", file)
	}
	return filepath.Join(fmt.Sprintf("/proc/%d/root", m.init.PID()), file)
}

// Write writes a file of the machine, with its directories.
func (m *Machine) Write(file, content string, mode os.FileMode) {
	m.lab.t.Helper()
	path := m.Path(file)
	m.lab.check(os.MkdirAll(filepath.Dir(path), 0o755), "make directory")
	m.lab.check(os.WriteFile(path, []byte(content), mode), "write %s", file)
	m.lab.check(os.Chmod(path, mode), "write %s", file)
}

// Install puts one of demarc's programs there, as it is released.
func (m *Machine) Install(program, file string) {
	m.lab.t.Helper()
	b, err := os.ReadFile(m.lab.release(program))
	m.lab.check(err, "read %s", program)
	m.Write(file, string(b), 0o755)
}

// Boot starts systemd and waits until everything that is enabled was started, or
// failed to.
func (m *Machine) Boot() {
	m.lab.t.Helper()
	m.BootOnly()
	m.await("is up", func() error {
		out, _ := m.Try("systemctl", "is-system-running")
		if s := strings.TrimSpace(out); s != "running" && s != "degraded" {
			return errors.New(s)
		}
		return nil
	})
}

// BootOnly starts systemd and waits for nothing.
func (m *Machine) BootOnly() {
	m.lab.t.Helper()
	m.init = &Process{}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{machineName, m.dir, m.Name}
	cmd.Stdout, cmd.Stderr = &m.init.output, &m.init.output
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC}
	m.start(m.init, m.Root, cmd)
}

// await tries until it works, as long as the machine runs.
func (m *Machine) await(what string, try func() error) {
	m.lab.t.Helper()
	var err error
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = try(); err == nil {
			return
		}
		select {
		case <-m.init.Ended():
			m.lab.t.Fatalf("wait until %s %s: its systemd ended: %v; it said:\n%s", m.Name, what, m.init.err, m.init.Output())
		default:
		}
	}
	m.lab.t.Fatalf("wait until %s %s: %v; its systemd said:\n%s", m.Name, what, err, m.init.Output())
}

// Await tries until it works.
func (m *Machine) Await(what string, try func() error) {
	m.lab.t.Helper()
	m.await(what, try)
}

// Halt takes the power away: every process of the machine is killed.
func (m *Machine) Halt() {
	m.lab.t.Helper()
	m.init.Kill()
	m.lab.check(awaitEmpty(m.Root.dir), "halt %s", m.Name) // the kernel kills the rest of its process namespace
	m.init = nil
	entries, err := os.ReadDir(m.Root.dir)
	m.lab.check(err, "read cgroups of %s", m.Name)
	for _, e := range entries {
		if e.IsDir() {
			m.lab.check(removeCgroup(filepath.Join(m.Root.dir, e.Name())), "remove cgroups of %s", m.Name)
		}
	}
}

// Try runs a program in the machine, as root and outside its managed tree, and returns
// what it said, on both outputs, and its exit status.
func (m *Machine) Try(program string, args ...string) (output string, status int) {
	m.lab.t.Helper()
	p := m.StartIn(m.lab.Cgroup("daemons"), program, args...)
	status = p.Wait(5 * time.Minute)
	return p.Output(), status
}

// StartIn starts a program in the machine, and in a cgroup.
func (m *Machine) StartIn(c *Cgroup, program string, args ...string) *Process {
	m.lab.t.Helper()
	// Not the network: this namespace is the machine's, and its thread starts it.
	enter := []string{"-t", fmt.Sprint(m.init.PID()), "-m", "-u", "-i", "-p", "--", "/usr/bin/env", "-i",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", "DEBIAN_FRONTEND=noninteractive",
		"SYSTEMD_COLORS=0", "SYSTEMD_PAGER=", program}
	return m.Start(c, Command{Path: "/usr/bin/nsenter", Args: append(enter, args...)})
}

// Run runs a program in the machine, which has to work.
func (m *Machine) Run(program string, args ...string) string {
	m.lab.t.Helper()
	out, status := m.Try(program, args...)
	if status != 0 {
		m.lab.t.Fatalf("%s %s in %s: %d\n%s", program, strings.Join(args, " "), m.Name, status, out)
	}
	return out
}

// Journal is what a unit has logged, for messages.
func (m *Machine) Journal(unit string) string {
	m.lab.t.Helper()
	out, _ := m.Try("journalctl", "--no-pager", "-o", "cat", "-u", unit)
	return out
}

// Property is one property of a unit, as systemctl shows it.
func (m *Machine) Property(unit, name string) string {
	m.lab.t.Helper()
	return strings.TrimSpace(m.Run("systemctl", "show", "-P", name, unit))
}

// becomeMachine turns this process, the first one of its namespaces, into systemd.
func becomeMachine(dir, name string) error {
	runtime.LockOSThread()
	at := func(path string) string { return filepath.Join(dir, "root", path) }
	layers := fmt.Sprintf("lowerdir=/,upperdir=%s/upper,workdir=%s/work", dir, dir)
	mounts := []struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}{
		{"overlay", "", "overlay", 0, layers},
		{"proc", "proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		// Read-only but for what is a namespace's own.
		{at("proc/sys"), "proc/sys", "", unix.MS_BIND, ""},
		{at("proc/sys/net"), "proc/sys/net", "", unix.MS_BIND, ""},
		{"", "proc/sys", "", unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY, ""},
		{"sysfs", "sys", "sysfs", unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		// Without a cgroup namespace: the core asks for the host's.
		{"cgroup2", "sys/fs/cgroup", "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"bpf", "sys/fs/bpf", "bpf", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "mode=700"},
		{"tmpfs", "run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
		{"tmpfs", "tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "dev", "tmpfs", unix.MS_NOSUID, "mode=755"},
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	for _, m := range mounts {
		if err := unix.Mount(m.source, at(m.target), m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount /%s: %w", m.target, err)
		}
	}
	for node, number := range map[string][2]uint32{
		"null": {1, 3}, "zero": {1, 5}, "full": {1, 7}, "random": {1, 8}, "urandom": {1, 9}, "tty": {5, 0},
	} {
		if err := unix.Mknod(at("dev/"+node), unix.S_IFCHR|0o666, int(unix.Mkdev(number[0], number[1]))); err != nil {
			return fmt.Errorf("make /dev/%s: %w", node, err)
		}
		if err := os.Chmod(at("dev/"+node), 0o666); err != nil {
			return err
		}
	}
	for _, dir := range []string{"dev/pts", "dev/shm", "outside"} {
		if err := os.Mkdir(at(dir), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	err := errors.Join(
		unix.Mount("devpts", at("dev/pts"), "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5"),
		unix.Mount("tmpfs", at("dev/shm"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"),
		os.Symlink("pts/ptmx", at("dev/ptmx")), os.Symlink("/proc/self/fd", at("dev/fd")),
		os.Symlink("/proc/self/fd/0", at("dev/stdin")), os.Symlink("/proc/self/fd/1", at("dev/stdout")), os.Symlink("/proc/self/fd/2", at("dev/stderr")),
		unix.Sethostname([]byte(name)),
		unix.PivotRoot(at(""), at("outside")), os.Chdir("/"), unix.Unmount("/outside", unix.MNT_DETACH))
	if err != nil {
		return err
	}
	_ = os.Remove("/outside")
	// As on a host: systemd hands credentials over by mounts that spread.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return err
	}
	return unix.Exec("/lib/systemd/systemd", []string{"/lib/systemd/systemd", "--system", "--unit=multi-user.target",
		"--show-status=false"},
		[]string{"container=demarc-lab", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"})
}
