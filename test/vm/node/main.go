// Command node does in a virtual machine what a test on the host says: it runs
// demarc's programs, starts probes in workloads' cgroups, and hands on their calls.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/test/probe"
	"github.com/demarc/demarc/test/vm/talk"
)

// probeName is what this program is called where it acts as a probe.
const probeName = "demarc-probe"

func main() {
	if os.Args[0] == probeName {
		probe.Main()
	}
	if err := serve(); err != nil {
		fmt.Println("node:", err)
		os.Exit(1)
	}
}

func serve() error {
	text, err := os.ReadFile(talk.ConfigFile)
	if err != nil {
		return err
	}
	var config talk.Config
	if err := json.Unmarshal(text, &config); err != nil {
		return err
	}
	if len(config.Addresses) > 0 {
		if err := network(config.Addresses); err != nil {
			return fmt.Errorf("set up network: %w", err)
		}
	}
	channel, err := openPort()
	if err != nil {
		return fmt.Errorf("open channel: %w", err)
	}
	n := &Node{probes: map[string]*workload{}, daemons: map[string]*exec.Cmd{}, stop: make(chan struct{})}
	server := rpc.NewServer()
	if err := server.RegisterName(talk.Service, n); err != nil {
		return err
	}
	go server.ServeConn(channel)
	<-n.stop
	return nil
}

func network(addresses []netip.Prefix) error {
	// Duplicate address detection would keep IPv6 addresses back for a second.
	for _, scope := range []string{"all", "default", "eth0"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+scope+"/accept_dad", []byte("0"), 0); err != nil {
			return err
		}
	}
	for _, name := range []string{"lo", "eth0"} {
		device, err := netlink.LinkByName(name)
		if err == nil {
			err = netlink.LinkSetUp(device)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if name == "lo" {
			continue
		}
		for _, a := range addresses {
			err := netlink.AddrAdd(device, &netlink.Addr{
				IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())},
				Flags: unix.IFA_F_NODAD,
			})
			if err != nil {
				return fmt.Errorf("add %s: %w", a, err)
			}
		}
	}
	return nil
}

// port is the channel. The kernel says that it is at its end as long as it has not
// learnt yet that QEMU holds the other one; it ends with the machine only.
type port struct{ *os.File }

// openPort waits until the kernel has found the device.
func openPort() (port, error) {
	for range 1000 {
		found, err := filepath.Glob(talk.Ports)
		if err != nil {
			return port{}, err
		}
		if len(found) > 0 {
			f, err := os.OpenFile(found[0], os.O_RDWR, 0)
			return port{f}, err
		}
		time.Sleep(10 * time.Millisecond)
	}
	return port{}, errors.New("no device")
}

func (p port) Read(b []byte) (int, error) {
	for {
		n, err := p.File.Read(b)
		if !errors.Is(err, io.EOF) {
			return n, err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Hello says what the machine is.
func (n *Node) Hello(_ struct{}, reply *talk.Machine) error {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err
	}
	up, err := sinceBoot()
	*reply = talk.Machine{Release: unix.ByteSliceToString(name.Release[:]), Uptime: up.Seconds(), CPUs: runtime.NumCPU()}
	return err
}

func sinceBoot() (time.Duration, error) {
	var at unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &at)
	return time.Duration(at.Nano()), err
}

// SetClock sets the wall clock.
func (n *Node) SetClock(now time.Time, _ *bool) error {
	at := unix.NsecToTimespec(now.UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &at)
}

// Run runs a program to its end.
func (n *Node) Run(c talk.Command, reply *talk.Outcome) error {
	var out, problems bytes.Buffer
	cmd := command(c, &out, &problems)
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		return err
	}
	*reply = talk.Outcome{Stdout: out.String(), Stderr: problems.String(), Status: cmd.ProcessState.ExitCode()}
	return nil
}

// Start starts a program that goes on. What it says is in the machine's log.
func (n *Node) Start(c talk.Command, _ *bool) error {
	cmd := command(c, os.Stdout, os.Stdout)
	if err := cmd.Start(); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.daemons[c.Path] = cmd
	return nil
}

// Kill ends a program that was started, as a crash does.
func (n *Node) Kill(path string, _ *bool) error {
	n.mu.Lock()
	cmd := n.daemons[path]
	delete(n.daemons, path)
	n.mu.Unlock()
	if cmd == nil {
		return fmt.Errorf("%s was not started", path)
	}
	if err := cmd.Process.Kill(); err != nil {
		return err
	}
	_, err := cmd.Process.Wait()
	return err
}

func command(c talk.Command, stdout, stderr io.Writer) *exec.Cmd {
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if c.User != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: c.User, Gid: c.User}}
	}
	return cmd
}

// Set writes a file.
func (n *Node) Set(s talk.Setting, _ *bool) error {
	return os.WriteFile(s.Path, []byte(s.Value), 0o644)
}

// List names what is in a directory.
func (n *Node) List(dir string, reply *[]string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		*reply = append(*reply, e.Name())
	}
	return err
}

// Stop ends the node, and so the machine.
func (n *Node) Stop(_ struct{}, _ *bool) error {
	close(n.stop)
	return nil
}
