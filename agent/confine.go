package agent

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"

	"github.com/demarc/demarc/agent/core/calls"
	"github.com/demarc/demarc/exporter"
)

// Confine gives up, for good and on every thread, whatever the agent has no use
// for: capabilities, files, networks, system calls, and that others look into it.
// It is called between New and Run. What the kernel cannot do of it is a limit that
// the status shows.
func (a *Agent) Confine(allowRoot bool) error {
	if os.Geteuid() == 0 && !allowRoot {
		return errors.New("it needs no privilege, and runs as root\n" +
			"hint: start it as the user that agent_user in core.json names, or with --allow-root where there is none")
	}
	if err := dropCapabilities(); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("set not dumpable: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if err := limitFiles(a.config); err != nil {
		return fmt.Errorf("limit files: %w", err)
	}
	if limit := landlockLimit(); limit != "" {
		a.service.limits = append(a.service.limits, limit)
	}
	if err := calls.Limit(ownCalls, ownRules); err != nil {
		return fmt.Errorf("limit system calls: %w", err)
	}
	return nil
}

// dropCapabilities empties every set but the bounding one, which is of no use under
// no_new_privs.
func dropCapabilities() error {
	if _, _, errno := psx.Syscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	_, _, errno := psx.Syscall3(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none[0])), 0)
	runtime.KeepAlive(&header)
	runtime.KeepAlive(&none)
	if errno != 0 {
		return errno
	}
	if _, _, errno := psx.Syscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// limitFiles leaves the agent what it reads and where it listens (Landlock), and no
// connection but to the core and the service manager. What is open stays open.
func limitFiles(c *Config) error {
	sockets := filepath.Dir(c.Server)
	if err := os.MkdirAll(sockets, 0o755); err != nil {
		return fmt.Errorf("make socket directory: %w", err)
	}
	rules := []landlock.Rule{
		landlock.PathAccess(ll.AccessFSReadDir|ll.AccessFSMakeSock|ll.AccessFSRemoveFile, sockets),
		// Names of cgroups, wherever they are mounted; sizes of maps; the number of CPUs.
		landlock.PathAccess(ll.AccessFSReadDir, cgroupMounts()...),
		landlock.RODirs("/proc", "/sys/devices/system/cpu").IgnoreIfMissing(),
		// The core makes its socket anew when it starts.
		landlock.PathAccess(ll.AccessFSResolveUnix, existing(filepath.Dir(c.Core))),
	}
	if notify := os.Getenv("NOTIFY_SOCKET"); filepath.IsAbs(notify) {
		rules = append(rules, landlock.PathAccess(ll.AccessFSResolveUnix, notify).IgnoreIfMissing())
	}
	if c.Runtime != "" {
		rules = append(rules, landlock.PathAccess(ll.AccessFSResolveUnix, existing(filepath.Dir(c.Runtime))))
	}
	if k := c.Kubernetes; k != nil { // directories: tokens are renewed by another link
		at, err := k.Address()
		if err != nil {
			return err
		}
		rules = append(rules, landlock.ConnectTCP(at.Port()), landlock.RODirs(filepath.Dir(k.TokenFile), filepath.Dir(k.CAFile)))
	}
	if c.Inventory != "" { // its directory: the file is replaced as it changes
		rules = append(rules, landlock.RODirs(filepath.Dir(c.Inventory)))
	}
	if c.State != "" {
		rules = append(rules, landlock.PathAccess(ll.AccessFSReadDir|ll.AccessFSReadFile|ll.AccessFSWriteFile|ll.AccessFSTruncate|ll.AccessFSMakeReg|ll.AccessFSRemoveFile, c.State))
	}
	if c.Journal != "" { // segments come and go
		if err := os.MkdirAll(c.Journal, 0o700); err != nil {
			return fmt.Errorf("make directory of the journal: %w", err)
		}
		rules = append(rules, landlock.RWDirs(c.Journal))
	}
	if c.Metrics != "" {
		_, port, err := net.SplitHostPort(c.Metrics)
		if err != nil {
			return err
		}
		number, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return err
		}
		rules = append(rules, landlock.BindTCP(uint16(number)),
			landlock.ROFiles("/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf").IgnoreIfMissing())
		if c.WebConfig != "" { // read again at each connection: certificates are renewed
			dirs, err := exporter.WebDirectories(c.WebConfig)
			if err != nil {
				return err
			}
			rules = append(rules, landlock.RODirs(dirs...))
		}
	}
	return landlock.V9.BestEffort().Restrict(rules...)
}

// existing is a directory, or the nearest above it that is there: the core may make its
// own after the agent has started.
func existing(dir string) string {
	for {
		if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

// cgroupMounts lists where cgroup2 is mounted.
func cgroupMounts() (points []string) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil // then cgroups are shown without their names
	}
	for line := range strings.Lines(string(text)) {
		left, right, _ := strings.Cut(line, " - ")
		if fields := strings.Fields(left); strings.HasPrefix(right, "cgroup2 ") && len(fields) > 4 {
			points = append(points, fields[4])
		}
	}
	return points
}

// landlockLimit says what the kernel's Landlock lacks. Later versions limit more, and
// nothing that matters here.
func landlockLimit() string {
	const complete = 6 // signals and abstract sockets; Linux 6.12
	version, err := ll.LandlockGetABIVersion()
	switch {
	case err != nil:
		return fmt.Sprintf("the agent is not confined to its files: this kernel has no Landlock (%v)", err)
	case version < complete:
		return fmt.Sprintf("the agent is confined to its files by Landlock %d, which lacks limits for networks or signals (%d has them)", version, complete)
	}
	return ""
}

// ownCalls and ownRules are what a running agent does beside what every Go program
// may. Whatever else is called ends it; the service manager starts it again, and
// enforcement goes on meanwhile.
var ownCalls = []uint32{
	unix.SYS_RENAMEAT, unix.SYS_FSYNC, // of findings, in the state directory
	unix.SYS_UNLINKAT, unix.SYS_MKDIRAT, unix.SYS_FLOCK, unix.SYS_FCHMOD, unix.SYS_FCHMODAT,
	unix.SYS_FDATASYNC, unix.SYS_FTRUNCATE, // the journal
	unix.SYS_RSEQ, unix.SYS_SET_ROBUST_LIST, // of the C library, where tests look for races
}

var ownRules = []calls.Rule{
	{Call: unix.SYS_SOCKET, Mask: ^uint32(0), Values: []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6}, Else: unix.SECCOMP_RET_KILL_PROCESS},
	// The maps that it was given can be read, and nothing else. Libraries try more, and
	// do without.
	{Call: unix.SYS_BPF, Mask: ^uint32(0), Values: []uint32{
		unix.BPF_MAP_LOOKUP_ELEM, unix.BPF_MAP_LOOKUP_BATCH, unix.BPF_MAP_GET_NEXT_KEY, unix.BPF_OBJ_GET_INFO_BY_FD,
	}, Else: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
}
