package fault

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core"
	"github.com/demarc/demarc/agent/core/proto"
)

// notSupported is what the kernel answers to what it knows and has not got:
// ENOTSUPP, which no user should ever have seen.
const notSupported = unix.Errno(524)

// outcome is what becomes of a start on a machine that lacks something.
type outcome string

const (
	full     outcome = "full"     // it is not needed, or there is another way
	limited  outcome = "limited"  // what is not enforced is said, by preflight and by status
	degraded outcome = "degraded" // what is stored is enforced; status says what cannot be done
	refused  outcome = "refused"  // nothing is attached; one line says what is missing
)

// when makes the kernel answer an error to calls of a kind.
func when(e unix.Errno, is func(*Call) bool) func(*Call) Answer {
	return func(c *Call) Answer {
		if is(c) {
			return Answer{Errno: e}
		}
		return Answer{}
	}
}

func bpf(is func(*BPF) bool) func(*Call) bool {
	return func(c *Call) bool { return c.BPF != nil && is(c.BPF) }
}

func command(n uint32) func(*Call) bool {
	return bpf(func(b *BPF) bool { return b.Command == n })
}

func noMap(kind uint32) func(*Call) Answer {
	return when(unix.EINVAL, bpf(func(b *BPF) bool { return b.Command == unix.BPF_MAP_CREATE && b.Type == kind }))
}

func noProgram(kind uint32) func(*Call) Answer {
	return when(unix.EINVAL, bpf(func(b *BPF) bool { return b.Command == unix.BPF_PROG_LOAD && b.Type == kind }))
}

func noHelper(helpers ...asm.BuiltinFunc) func(*Call) Answer {
	return when(unix.EINVAL, bpf(func(b *BPF) bool {
		return slices.ContainsFunc(b.Helpers, func(h uint32) bool { return slices.Contains(helpers, asm.BuiltinFunc(h)) })
	}))
}

func noAttach(kinds ...ebpf.AttachType) func(*Call) Answer {
	return when(unix.EINVAL, bpf(func(b *BPF) bool {
		return b.Command == unix.BPF_LINK_CREATE && slices.Contains(kinds, ebpf.AttachType(b.Attach))
	}))
}

func noSocket(e unix.Errno, is func(domain, kind, protocol uint64) bool) func(*Call) Answer {
	return when(e, func(c *Call) bool { return c.Name == "socket" && is(c.Args[0], c.Args[1]&0xff, c.Args[2]) })
}

func noFile(e unix.Errno, path string) func(*Call) Answer {
	return when(e, func(c *Call) bool { return strings.HasPrefix(c.Name, "openat") && strings.Contains(c.Path, path) })
}

// A kernel or a machine that lacks something: enforcement is full, or what it
// lacks is named by preflight and by status, or both refuse it. Nothing is lost
// silently. (X10)
func TestX10Missing(t *testing.T) {
	s := newScene(t)
	s.node.Detach()
	bpffs := filepath.Join(s.node.Dir(), "bpf")
	little := filepath.Join(t.TempDir(), "meminfo")
	if err := os.WriteFile(little, []byte("MemTotal: 100000 kB\nMemAvailable: 10000 kB\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name    string
		machine Machine
		decide  func(*Call) Answer
		want    outcome
		text    string // what names it
		fix     string // what preflight says to do about it, among more
	}{
		{name: "nothing", want: full},
		{name: "type information", decide: noFile(unix.ENOENT, "/sys/kernel/btf/vmlinux"), want: refused, text: "btf: ", fix: "CONFIG_DEBUG_INFO_BTF"},
		{name: "BPF file system", machine: Machine{Unshare: unix.CLONE_NEWNS, Hide: []string{bpffs}}, want: refused, text: "is not in a BPF file system"},
		{name: "cgroup2", machine: Machine{Unshare: unix.CLONE_NEWNS, Hide: []string{"/sys/fs/cgroup"}}, want: refused, text: "cgroup2: "},
		{name: "the host's cgroup namespace", machine: Machine{Unshare: unix.CLONE_NEWCGROUP}, want: refused, text: "cgroup namespace: "},
		{name: "a writable /sys", machine: Machine{Unshare: unix.CLONE_NEWNS, ReadOnly: []string{"/sys"}}, want: refused, text: "read-only file system"},
		{name: "locked memory", machine: Machine{Memlock: 1}, want: full}, // memory is the cgroup's since Linux 5.11
		{name: "memory", decide: when(unix.ENOMEM, bpf(func(b *BPF) bool { return b.Command == unix.BPF_MAP_CREATE && b.Object == "young" })),
			want: refused, text: "map young: "},
		{name: "room for tables to grow", machine: Machine{Unshare: unix.CLONE_NEWNS, Replace: map[string]string{"/proc/meminfo": little}},
			want: limited, text: "and 9 MiB are available"},
		{name: "bpf(2), by seccomp", decide: when(unix.EPERM, func(c *Call) bool { return c.BPF != nil }), want: refused, text: "operation not permitted", fix: "seccomp"},
		{name: "ring buffers", decide: noMap(unix.BPF_MAP_TYPE_RINGBUF), want: refused, text: "RingBuf map"},
		{name: "socket storage", decide: noMap(unix.BPF_MAP_TYPE_SK_STORAGE), want: refused, text: "SkStorage map"},
		{name: "longest-prefix tries", decide: noMap(unix.BPF_MAP_TYPE_LPM_TRIE), want: refused, text: "LPMTrie map"},
		{name: "LRU hashes", decide: noMap(unix.BPF_MAP_TYPE_LRU_HASH), want: refused, text: "LRUHash map"},
		{name: "cgroup storage", decide: noMap(unix.BPF_MAP_TYPE_CGRP_STORAGE), want: full},
		{name: "batches", decide: when(notSupported, command(unix.BPF_MAP_UPDATE_BATCH)), want: full},
		{name: "header options", decide: noHelper(asm.FnStoreHdrOpt, asm.FnReserveHdrOpt), want: refused, text: "program sock_ops: "},
		{name: "loops", decide: noHelper(asm.FnLoop), want: refused, text: "program "},
		{name: "kernel reads, by lockdown", decide: noHelper(asm.FnProbeReadKernel, asm.FnProbeReadKernelStr), want: refused, text: "program "},
		{name: "functions of the kernel, without JIT", decide: when(notSupported, bpf(func(b *BPF) bool { return b.Kfuncs })), want: refused, text: "program "},
		{name: "tracing programs", decide: noProgram(unix.BPF_PROG_TYPE_TRACING), want: refused, text: "Tracing program"},
		{name: "socket option hooks", decide: noProgram(unix.BPF_PROG_TYPE_CGROUP_SOCKOPT), want: refused, text: "CGroupSockopt program"},
		{name: "syscall programs", decide: noProgram(unix.BPF_PROG_TYPE_SYSCALL), want: refused, text: "Syscall program"},
		{name: "LSM programs", decide: noProgram(unix.BPF_PROG_TYPE_LSM), want: full},
		{name: "links", decide: when(unix.EINVAL, command(unix.BPF_LINK_CREATE)), want: refused, text: "attach: "},
		{name: "the hook where sockets end", decide: noAttach(ebpf.AttachCgroupInetSockRelease), want: refused, text: "attach: sock_release: "},
		{name: "the hook of IPv6 datagrams", decide: noAttach(ebpf.AttachCGroupUDP6Sendmsg), want: refused, text: "attach: sendmsg6: "},
		{name: "hooks of Unix sockets", decide: noAttach(ebpf.AttachCgroupUnixConnect, ebpf.AttachCgroupUnixSendmsg), want: full},
		{name: "tcx", decide: noAttach(ebpf.AttachTCXIngress, ebpf.AttachTCXEgress), want: limited, text: "no device boundary"},
		{name: "runs of programs", decide: when(notSupported, command(unix.BPF_PROG_TEST_RUN)), want: refused, text: "self-test: "},
		{name: "walks over sockets", decide: when(unix.EINVAL, command(unix.BPF_ITER_CREATE)), want: limited,
			text: "listeners of workloads that are older than demarc cannot prove themselves"},
		{name: "raw sockets", decide: noSocket(unix.EPERM, func(domain, kind, _ uint64) bool {
			return domain != unix.AF_NETLINK && kind == unix.SOCK_RAW
		}), want: limited, text: "no quick refusals", fix: "CAP_NET_RAW"},
		{name: "IPv6", decide: noSocket(unix.EAFNOSUPPORT, func(domain, _, _ uint64) bool { return domain == unix.AF_INET6 }), want: full},
		{name: "routing sockets", decide: noSocket(unix.EPROTONOSUPPORT, func(domain, _, protocol uint64) bool {
			return domain == unix.AF_NETLINK && protocol == unix.NETLINK_ROUTE
		}), want: refused, text: "devices: open netlink"},
		{name: "socket diagnosis", decide: noSocket(unix.EPROTONOSUPPORT, func(domain, _, protocol uint64) bool {
			return domain == unix.AF_NETLINK && protocol == unix.NETLINK_SOCK_DIAG
		}), want: full},
		{name: "multipath TCP", decide: noSocket(unix.EPROTONOSUPPORT, func(_, _, protocol uint64) bool { return protocol == unix.IPPROTO_MPTCP }), want: full},
		{name: "a writable state_dir", decide: when(unix.EROFS, func(c *Call) bool {
			return c.Name == "openat" && strings.HasPrefix(c.Path, filepath.Join(s.node.Dir(), "state")) && c.Args[2]&unix.O_ACCMODE != unix.O_RDONLY
		}), want: degraded, text: "read-only file system"},
	}
	known := s.preflight(Machine{}, record).limits
	seen := map[outcome]int{}
	for _, tt := range tests {
		t.Run("without "+tt.name, func(t *testing.T) {
			s := *s
			s.t = t
			seen[tt.want]++
			agreed := s.preflight(tt.machine, tt.decide)
			agreed.limits = slices.DeleteFunc(agreed.limits, func(l limit) bool { return slices.Contains(known, l) })
			if agreed.outcome == full && len(agreed.limits) > 0 {
				agreed.outcome, agreed.text, agreed.fix = limited, agreed.limits[0].text, agreed.limits[0].fix
			}
			got, said := s.try(tt.machine, tt.decide)
			t.Logf("%s: %s", got, said)
			if got != tt.want || !strings.Contains(said, tt.text) {
				t.Errorf("start: %s, %s\nwant %s, %q", got, said, tt.want, tt.text)
			}
			wanted := tt.want
			if tt.want == degraded {
				wanted = limited
			}
			if agreed.outcome != wanted || !strings.Contains(agreed.text, tt.text) {
				t.Errorf("preflight: %s, %s\nwant %s, %q", agreed.outcome, agreed.text, wanted, tt.text)
			}
			if check, _, _ := strings.Cut(agreed.text, ": "); agreed.outcome == refused && !strings.HasPrefix(said, "preflight: "+check+": ") && check != "state" {
				t.Errorf("preflight says %q, the start %q", agreed.text, said)
			}
			if agreed.outcome != full && agreed.fix == "" || !strings.Contains(agreed.fix, tt.fix) {
				t.Errorf("preflight says to %q about %q", agreed.fix, agreed.text)
			}
		})
	}
	t.Logf("variants: %v", seen)
}

// verdict is what preflight makes of a machine.
type verdict struct {
	outcome   outcome // full or refused
	text, fix string  // of what decided; a refusal as a start puts it
	limits    []limit // of every check
}

// limit is what preflight says cannot be enforced, and what to do about it.
type limit struct{ text, fix string }

// preflight asks the core's own command, which must leave nothing behind.
func (s *scene) preflight(m Machine, decide func(*Call) Answer) verdict {
	s.t.Helper()
	c := s.node.CoreCommand()
	c.Args = []string{"preflight", "--config", s.node.CoreConfig()}
	p := Supervise(s.t, s.lab, s.host, s.lab.Cgroup("daemons"), c, m, decide)
	status := p.Gone(s.t, time.Minute)
	var checks []core.Check
	if err := json.NewDecoder(strings.NewReader(p.Output())).Decode(&checks); err != nil {
		s.t.Fatalf("preflight ended with %d: %v; it said:\n%s", status, err, p.Output())
	}
	v := verdict{outcome: full}
	for _, c := range checks {
		switch {
		case !c.OK && v.outcome != refused:
			v = verdict{outcome: refused, text: c.Name + ": " + c.Problem, fix: c.Fix}
		case c.Limit != "":
			v.limits = append(v.limits, limit{c.Limit, c.Fix})
		}
	}
	if (status == 0) == (v.outcome == refused) {
		s.t.Errorf("preflight ended with %d, and says %s", status, v.outcome)
	}
	if left := listing(s.t, s.node); len(left) > 0 {
		s.t.Errorf("preflight left pins %v", left)
	}
	return v
}

// try starts the core on the machine, with a policy on disk, and ends enforcement
// again.
func (s *scene) try(m Machine, decide func(*Call) Answer) (got outcome, said string) {
	s.t.Helper()
	core := s.supervise(m, decide)
	client := s.ready(core)
	if client == nil {
		status := core.Gone(s.t, time.Minute)
		if problem := clearRefusal(status, core.Output()); problem != "" {
			s.t.Errorf("%s; it said:\n%s", problem, core.Output())
		}
		if left := listing(s.t, s.node); len(left) > 0 {
			s.t.Errorf("refused, and left pins %v", left)
		}
		return refused, complaint(core.Output())
	}
	defer client.Close()
	status, err := client.Status()
	if err != nil {
		s.t.Fatal(err)
	}
	s.truthful("start", status)
	core.Signal(unix.SIGTERM)
	core.Gone(s.t, time.Minute)
	s.detach()
	if status.State != proto.StateEnforcing {
		return outcome(status.State), fmt.Sprint(status.Problems)
	}
	if more := slices.DeleteFunc(status.Limits, func(l string) bool { return slices.Contains(s.limits, l) }); len(more) > 0 {
		return limited, strings.Join(more, "; ")
	}
	return full, ""
}
