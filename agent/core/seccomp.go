package core

import (
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/calls"
)

// ownCalls are what a running core does beside what every Go program may. None
// starts a program, changes who it is, mounts, traces, or enters a namespace.
var ownCalls = []uint32{
	// Images and keys, cgroups, pins. Devices and files of others are beyond a root without capabilities.
	unix.SYS_OPENAT2, unix.SYS_MKDIRAT, unix.SYS_UNLINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_LINKAT, unix.SYS_FSYNC,
	unix.SYS_FDATASYNC, unix.SYS_FTRUNCATE, unix.SYS_FLOCK, unix.SYS_FCHMOD, unix.SYS_FCHMODAT,
}

var ownRules = []calls.Rule{
	{Call: unix.SYS_SOCKET, Mask: ^uint32(0), Values: []uint32{unix.AF_UNIX, unix.AF_NETLINK, unix.AF_INET, unix.AF_INET6}, Else: unix.SECCOMP_RET_KILL_PROCESS},
	// Maps and links, no programs: whoever takes the core over brings no code of his
	// own into the kernel. Refused only, because cilium/ebpf loads small programs to
	// find out why something else failed.
	{Call: unix.SYS_BPF, Mask: ^uint32(0), Values: []uint32{
		unix.BPF_MAP_LOOKUP_ELEM, unix.BPF_MAP_UPDATE_ELEM, unix.BPF_MAP_DELETE_ELEM, unix.BPF_MAP_GET_NEXT_KEY, unix.BPF_MAP_LOOKUP_BATCH,
		unix.BPF_MAP_UPDATE_BATCH, unix.BPF_MAP_CREATE, unix.BPF_MAP_FREEZE, unix.BPF_BTF_LOAD, unix.BPF_PROG_TEST_RUN, unix.BPF_PROG_QUERY,
		unix.BPF_LINK_CREATE, unix.BPF_LINK_UPDATE, unix.BPF_LINK_DETACH, unix.BPF_ITER_CREATE, unix.BPF_OBJ_PIN, unix.BPF_OBJ_GET,
		unix.BPF_OBJ_GET_INFO_BY_FD,
	}, Else: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
}
