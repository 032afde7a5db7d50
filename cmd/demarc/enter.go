package main

import (
	"fmt"
	"os"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// newEnterCommand starts demarc-core in a container: runtimes give a container that is
// not privileged a cgroup namespace of its own, in which paths name other cgroups than
// the policy means. It is hidden: the DaemonSet uses it.
func newEnterCommand(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "enter-host-cgroups PROGRAM [ARG...]", Hidden: true, DisableFlagParsing: true,
		Short: "Become a program in the cgroup namespace of process 1",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("which program?")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error { return enterRun("/proc/1/ns/cgroup", args) },
	}
}

// enterRun returns only if it fails. With the host's processes in sight and
// CAP_SYS_PTRACE the namespace of process 1 can be opened, with CAP_SYS_ADMIN entered.
func enterRun(namespace string, args []string) error {
	// A namespace is a thread's; the thread that calls exec is what remains.
	runtime.LockOSThread()
	fd, err := unix.Open(namespace, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return hintError{fmt.Errorf("open cgroup namespace of the host: %s: %w", namespace, err), "set hostPID and grant CAP_SYS_PTRACE"}
	}
	if err := unix.Setns(fd, unix.CLONE_NEWCGROUP); err != nil {
		return hintError{fmt.Errorf("enter cgroup namespace of the host: %w", err), "grant CAP_SYS_ADMIN"}
	}
	if err := syscall.Exec(args[0], args, os.Environ()); err != nil {
		return fmt.Errorf("start %s: %w", args[0], err)
	}
	return nil
}
