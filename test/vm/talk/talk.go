// Package talk is what a test says to the node program in a virtual machine: calls
// of net/rpc on a virtio-serial port, so that no traffic of the test itself is on the
// network that is watched.
package talk

import (
	"net/netip"

	"github.com/demarc/demarc/test/probe"
)

// Service is the name that calls start with.
const Service = "Node"

// Ports matches the machine's end of the channel, which has a number of the device
// in its name.
const Ports = "/dev/vport*p1"

// ConfigFile holds the Config of the machine.
const ConfigFile = "/etc/node.json"

// Marker is the start of the line that ends a machine's log; the node's exit status
// follows. Nothing else says that a machine did what it should: QEMU ends with 0
// also where the kernel panicked.
const Marker = "DEMARC-VM "

// Started is the line that init says first.
const Started = "DEMARC-VM-INIT"

// Systemd is where a machine has one. What is first there hands the machine over to it.
const Systemd = "/usr/lib/systemd/systemd"

// Config is what a machine is told before it starts.
type Config struct {
	Addresses []netip.Prefix // of eth0, which the node gives it; none = who else does
}

// Machine is what the node found.
type Machine struct {
	Release string  // of the kernel
	Uptime  float64 // in seconds
	CPUs    int
}

// Command is a program of the machine to run.
type Command struct {
	Path string
	Args []string
	Env  []string
	User uint32 // and group
}

// Outcome is what came of it.
type Outcome struct {
	Stdout, Stderr string
	Status         int
}

// ProbeCall is a call for the probe of a workload.
type ProbeCall struct {
	Cgroup string // below the root of the hierarchy: "lab/web"
	Call   probe.Call
}

// Setting is a file to write, such as a sysctl.
type Setting struct{ Path, Value string }

// Tampering is something that root does to what enforces.
type Tampering struct {
	What  string // what was tried
	Errno string // how the kernel answered: "EPERM", "" = it was done
}
