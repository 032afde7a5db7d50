package core

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/core/trust"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/envelope"
)

// Check is one thing that enforcement needs, and whether it is there. It is found
// out by trying, never from a version.
type Check struct {
	Name    string `json:"name"`
	OK      bool   `json:"ok"`
	Tried   string `json:"tried"`             // what was done to find out
	Problem string `json:"problem,omitempty"` // why it is not there
	Limit   string `json:"limit,omitempty"`   // what is not enforced, though it is good enough to start
	Fix     string `json:"fix,omitempty"`     // what to do
}

// Preflight tries everything that enforcement needs and leaves nothing behind.
func Preflight(config Config) []Check {
	t := &trial{config: config, dry: true}
	defer t.close()
	return t.run()
}

// found is what the checks opened and learned for the core that comes of them.
type found struct {
	tree      *tree
	objects   *objects
	committed bool           // a former core finished its start here
	limits    []string       // what is not enforced, though a start is not refused
	trusted   []envelope.Key // images must be signed by one of them; none = need not be signed
	answers   *refusals      // nil = the machine does not let us: refused callers wait in vain
	guard     *guard         // nil = the kernel loads no BPF LSM programs
}

func (f *found) close() {
	f.answers.close()
	f.guard.close()
	if f.objects != nil {
		f.objects.Close()
	}
}

// trial is the checks. What they opened a start need not open again.
type trial struct {
	found
	config Config
	hooks  hooks
	dry    bool      // nothing may stay
	made   []string  // directories that go again if so, deepest first
	types  btf.Cache // of the kernel
	spec   *ebpf.CollectionSpec
	maps   map[string]*ebpf.Map
	links  map[hook]attachment // at the managed root
	taps   map[hook]attachment // at devices
	noTCX  bool                // the kernel has no place for programs at devices
}

func (t *trial) close() {
	closeAll(t.maps)
	closeAll(t.links)
	closeAll(t.taps)
	t.found.close()
	for _, dir := range t.made {
		os.Remove(dir)
	}
}

// checks run in this order. Each may use what those before it found, so after a
// failed one those that need it are not tried.
var checks = []struct {
	name, needs, tried, fix string
	try                     func(*trial) error
}{
	{"privileges", "", "read the effective capabilities", "run as root, with CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN and CAP_SYS_ADMIN", (*trial).privileges},
	{"trust", "", "read the keys in trust_dir, their owners and modes", "", (*trial).trust},
	{"state", "", "write and flush a file in state_dir", "make state_dir a directory of root's on a sound disk with room", (*trial).state},
	{"keyring", "state", "read the tag keys, their times, and the file's owner and mode", "", (*trial).keyring},
	{"clock", "", "read CLOCK_BOOTTIME and the wall clock", "set the clock, then restart demarc-core", (*trial).clock},
	{"cgroup2", "", "find the cgroup2 mount by its type, and cgroup_root in it", "mount cgroup2", (*trial).cgroup2},
	{"cgroup namespace", "cgroup2", "compare /proc/self/ns/cgroup with the initial one", "run in the host's cgroup namespace (cgroup: host)", (*trial).namespace},
	{"pins", "cgroup2", "compare what is pinned below bpffs with what this version would pin", "", (*trial).pins},
	{"btf", "", "read the kernel's type information", "use a kernel with CONFIG_DEBUG_INFO_BTF", (*trial).btf},
	{"read-only maps", "", "look for BPF file systems that others than root may write to", "chmod 0700 them", (*trial).donation},
	{"devices", "", "look for places for programs at devices, and for the devices that are named",
		`use a kernel with tcx (6.6 or later), or set "devices" to []`, (*trial).devices},
	{"programs", "pins", "load every program and map", "use a kernel that has it (6.1 or later)", (*trial).load},
	{"memory", "programs", "compare what tables may grow to with what the machine and memory.max leave", "raise memory.max of the core's cgroup, or free memory", (*trial).room},
	{"attach", "programs", "attach every program to a scratch cgroup and detach it", "look for another program that does not share the hook", (*trial).attach},
	{"other programs", "programs", "look for programs of others where ours are attached", "see that they are meant to be there: they may refuse more, or rewrite addresses", (*trial).others},
	{"walks", "programs", "begin a walk over all sockets, and one over all files of processes", "use a kernel with BPF iterators", (*trial).walks},
	{"refusals", "programs", "make the raw sockets that tell callers they are refused", "grant CAP_NET_RAW", (*trial).refusals},
	{"ring buffer", "programs", "map the events ring into memory", "use a kernel with BPF_MAP_TYPE_RINGBUF", (*trial).ring},
	{"guard", "", "load the BPF LSM programs that keep others from what enforces", "keep root in the host's namespaces to those who may end enforcement", (*trial).shield},
	{"self-test", "programs", "ask the loaded decision a question", "use a kernel with BPF_PROG_RUN for syscall programs", (*trial).judge},
}

func (t *trial) run() []Check {
	go t.btf() // it takes a while, and the check waits for it
	results := make([]Check, len(checks))
	failed := map[string]bool{}
	for i, c := range checks {
		r := Check{Name: c.name, OK: true, Tried: c.tried}
		var err error
		if failed[c.needs] {
			err = fmt.Errorf("not tried: it needs %s", c.needs)
		} else {
			known := len(t.limits)
			err = c.try(t)
			r.Limit = strings.Join(t.limits[known:], "; ")
		}
		if r.Limit != "" {
			r.Fix = c.fix
		}
		if err != nil {
			failed[c.name] = true
			r.OK, r.Problem, r.Fix = false, err.Error(), c.fix
			if errors.Is(err, unix.EPERM) && c.name != "privileges" {
				r.Fix = "a seccomp filter, lockdown or a security module forbids it to root: allow it"
			}
			var refused *proto.Refused
			if errors.As(err, &refused) && refused.Hint != "" {
				r.Fix = refused.Hint
			}
		}
		results[i] = r
	}
	return results
}

// passed turns the first failed check into an error.
func (t *trial) passed() error {
	for _, c := range t.run() {
		if !c.OK {
			return proto.Refuse(c.Fix, "preflight: %s: %s", c.Name, c.Problem)
		}
	}
	return nil
}

func (t *trial) privileges() error {
	caps, err := readCapabilities()
	if err != nil {
		return err
	}
	for _, c := range []struct {
		number int
		name   string
	}{
		{unix.CAP_BPF, "CAP_BPF"},
		{unix.CAP_PERFMON, "CAP_PERFMON"},
		{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"},
		{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"},
	} {
		if caps&(1<<c.number) == 0 {
			return fmt.Errorf("%s is missing", c.name)
		}
	}
	return nil
}

// trust reads the keys. A directory that is configured and not there is a mistake:
// without its keys any image would do.
func (t *trial) trust() (err error) {
	if t.config.TrustDir != "" {
		t.trusted, err = trust.Read(t.config.TrustDir)
	}
	return err
}

// state tries to write. A disk that was written before and is full or read-only now
// is no reason not to enforce what is on it.
func (t *trial) state() error {
	dir := t.config.StateDir
	for d := dir; t.dry && missing(d); d = filepath.Dir(d) {
		t.made = append(t.made, d)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var stat unix.Stat_t
	if err := unix.Lstat(dir, &stat); err != nil {
		return err
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFDIR || stat.Uid != 0 || stat.Mode&0o022 != 0 {
		return fmt.Errorf("%s can be written by others than root (mode %#o, owner %d)", dir, stat.Mode&0o7777, stat.Uid)
	}
	err := tryWrite(dir)
	if err != nil && (&store{dir: dir}).used() {
		t.limits = append(t.limits, fmt.Sprintf("%v: no new policy until it can be written; what is stored is enforced", err))
		return nil
	}
	return err
}

func tryWrite(dir string) error {
	// Always the same name: what a killed start leaves, the next one removes.
	f, err := os.OpenFile(filepath.Join(dir, "preflight"), os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString("demarc")
	return errors.Join(err, f.Sync(), f.Close())
}

func missing(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}

func (t *trial) keyring() error {
	if t.dry && missing(t.config.Keyring) { // a start makes it
		return nil
	}
	ring, err := firstKeyring(t.config.Keyring, time.Now())
	if err == nil {
		ring.Wipe()
	}
	return err
}

func (t *trial) clock() error {
	clock, err := readBootClock()
	if err == nil && clock.now() == 0 {
		return errors.New("it stands at zero")
	}
	if limit := wallLimit(time.Now()); limit != "" {
		t.limits = append(t.limits, limit)
	}
	return err
}

// wallLimit says what does not hold under a wall clock that cannot be right.
// Machines without a clock of their own begin long ago; they must be guarded
// before they have asked anybody for the time.
func wallLimit(now time.Time) string {
	if now.Year() >= 2026 {
		return ""
	}
	return fmt.Sprintf("the wall clock says %s: windows of crossings and of keys are not when they should be, and tags do not cross hosts", now.UTC().Format(time.DateOnly))
}

func (t *trial) cgroup2() (err error) {
	t.tree, err = openTree(t.config.CgroupRoot)
	return err
}

// namespace: paths that the kernel programs see start at the hierarchy's root, so
// the core must see that root too. The initial namespace has a fixed number
// (PROC_CGROUP_INIT_INO in include/linux/proc_ns.h).
func (t *trial) namespace() error {
	const initial = "cgroup:[4026531835]"
	name, err := os.Readlink("/proc/self/ns/cgroup")
	if err == nil && name != initial {
		return fmt.Errorf("this is %s, not %s", name, initial)
	}
	return err
}

func (t *trial) btf() error {
	_, err := t.types.Kernel()
	return err
}

func (t *trial) pins() (err error) {
	if t.spec, err = readSpec(t.tree); err != nil {
		return err
	}
	p := pins{dir: t.config.BPFFS}
	if t.committed, err = p.check(t.spec); err != nil || !t.committed {
		return err
	}
	if t.maps, t.links, err = p.adopt(t.spec, t.tree); err != nil {
		return err
	}
	t.taps, err = p.openLinks(p.hooks(), t.spec, t.tree)
	return err
}

func (t *trial) load() (err error) {
	if t.hooks.load != nil {
		if err := t.hooks.load(); err != nil {
			return err
		}
	}
	if t.noTCX {
		for _, name := range devicePrograms {
			delete(t.spec.Programs, name)
		}
	}
	t.objects, err = loadObjects(t.spec, t.maps, &t.types)
	return err
}

// attach tries every hook where nobody is: in a cgroup of its own, which a try
// that was killed may have left. Of starts there is one at a time.
func (t *trial) attach() (err error) {
	dir := filepath.Join(t.tree.dir, "demarc-start")
	if t.dry {
		dir = filepath.Join(t.tree.dir, fmt.Sprintf("demarc-preflight-%d", os.Getpid()))
	}
	if err := t.tree.writing(func() error { return os.Mkdir(dir, 0o755) }); err != nil && !errors.Is(err, fs.ErrExist) {
		return proto.Refuse("mount cgroup2 so that root can make cgroups", "%w", err)
	}
	defer func() { err = errors.Join(err, t.tree.writing(func() error { return os.Remove(dir) })) }()
	for _, name := range attachOrder {
		l, err := attachProgram(t.objects.Programs[name], t.spec.Programs[name], dir, 0)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		// A kernel without links has nothing to ask, and nothing to pin.
		_, err = l.Info()
		if err = errors.Join(err, l.Close()); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// others names programs that are not ours. A core that runs looks for them each second.
func (t *trial) others() error {
	if !t.dry {
		return nil
	}
	l := newLinks(t.objects, nil)
	l.tree = t.tree
	for _, name := range attachOrder {
		l.open[hook{name, 0}] = t.links[hook{name, 0}] // a former core's, if there is one
	}
	all, err := l.others(&observers{})
	if t.limits = append(t.limits, all...); t.noTCX || err != nil {
		return err
	}
	b := &boundary{links: newLinks(t.objects, nil), choice: t.config.Devices}
	b.tree = t.tree
	devices, err := b.list()
	wanted, _ := b.choose(devices) // what is missing, another check says
	for index, d := range wanted {
		b.names[index] = d.name
		for _, program := range d.programs() {
			b.open[hook{program, index}] = t.taps[hook{program, index}]
		}
	}
	all, _ = b.others(&observers{}) // who runs first is a problem once ours are there
	t.limits = append(t.limits, all...)
	return err
}

// walks tries what finds the connections that a change would cut, and listeners that are
// older than demarc. A start does without.
func (t *trial) walks() error {
	if !t.dry {
		return nil
	}
	for _, name := range []string{"cuts", "old_listeners"} {
		iter, err := link.AttachIter(link.IterOptions{Program: t.objects.Programs[name]})
		if err == nil {
			var all io.ReadCloser
			if all, err = iter.Open(); err == nil {
				all.Close()
			}
			iter.Close()
		}
		if err != nil {
			t.limits = append(t.limits, fmt.Sprintf("apply does not name the connections that it cuts, and listeners of workloads that are older than demarc cannot prove themselves: %s: %v", name, err))
			break
		}
	}
	return nil
}

func (t *trial) refusals() (err error) {
	if t.answers, err = openRefusals(t.objects); err != nil {
		t.limits = append(t.limits, fmt.Sprintf("no quick refusals: %v; refused callers wait until they give up", err))
	}
	return nil
}

func (t *trial) ring() error {
	page, err := unix.Mmap(t.objects.Maps["denied_events"].FD(), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	return unix.Munmap(page)
}

func (t *trial) judge() error {
	q := []abi.Query{{Subject: 1 << 31, Proof: abi.ProofNone}}
	if err := ask(t.objects, q); err != nil {
		return err
	}
	out := q[0]
	if out.Verdict != abi.Deny || out.Reason != abi.Unbound {
		return fmt.Errorf("a subject that does not exist got %v, %v", out.Verdict, out.Reason)
	}
	return nil
}

// Passed says whether nothing is missing.
func Passed(results []Check) bool {
	return !slices.ContainsFunc(results, func(c Check) bool { return !c.OK })
}
