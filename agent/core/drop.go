package core

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/calls"
)

// keptCapabilities are the privileges of a running core, and what for. All else is
// given up, by every thread and for good. Programs are loaded before, so nothing
// more is needed to attach them.
var keptCapabilities = []int{
	unix.CAP_BPF,       // make maps, write them, run the self-test
	unix.CAP_NET_ADMIN, // attach to cgroups at the first policy, and to devices
}

// DropPrivileges leaves a started core with the few capabilities that it needs to
// apply policies, unable to gain any by execve, closed to ptrace and core dumps of
// others, since tag keys pass through its memory, and with few system calls.
func DropPrivileges() error {
	var keep uint64
	for _, c := range keptCapabilities {
		keep |= 1 << c
	}
	for c := uintptr(0); ; c++ {
		err := onAllThreads(syscall.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0)
		if errors.Is(err, unix.EINVAL) && c > unix.CAP_LAST_CAP { // this kernel knows no more
			break
		}
		if err != nil {
			return fmt.Errorf("drop capability %d from the bounding set: %w", c, err)
		}
	}
	if err := onAllThreads(syscall.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	if err := setCapabilities(keep); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	if err := onAllThreads(syscall.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("set not dumpable: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if err := calls.Limit(ownCalls, ownRules); err != nil {
		return fmt.Errorf("limit system calls: %w", err)
	}
	return nil
}

// onAllThreads makes a system call on every thread, for which Go stops all goroutines:
// none may be on its way into a system call that takes long. Go cannot do it in a
// program that is linked with C.
func onAllThreads(trap, a1, a2, a3 uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall6(trap, a1, a2, a3, 0, 0, 0); errno != 0 {
		if errno == syscall.ENOTSUP {
			return errors.New("this binary is linked with C: build it with CGO_ENABLED=0")
		}
		return errno
	}
	return nil
}
