package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vishvananda/netlink"

	"github.com/demarc/demarc/test/probe"
	"github.com/demarc/demarc/test/vm/talk"
)

// Node is what can be called.
type Node struct {
	stop chan struct{}

	mu      sync.Mutex
	probes  map[string]*workload // by cgroup
	daemons map[string]*exec.Cmd // by path
}

// workload is a probe in a cgroup.
type workload struct {
	mu      sync.Mutex // one call at a time
	calls   *json.Encoder
	results *json.Decoder
}

// Probe hands a call to the probe in a cgroup, which is started with its first one.
func (n *Node) Probe(c talk.ProbeCall, reply *probe.Result) error {
	w, err := n.workload(c.Cgroup)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.calls.Encode(c.Call); err != nil {
		return err
	}
	return w.results.Decode(reply)
}

func (n *Node) workload(cgroup string) (*workload, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if w := n.probes[cgroup]; w != nil {
		return w, nil
	}
	path := filepath.Join("/sys/fs/cgroup", cgroup)
	if err := os.MkdirAll(path, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{probeName}
	cmd.Stderr = os.Stdout
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	w := &workload{calls: json.NewEncoder(in), results: json.NewDecoder(out)}
	n.probes[cgroup] = w
	return w, nil
}

// Sentinels sends a frame from every CPU behind everything that was sent before. The
// first has the given type, the next one more; the reply is their number.
func (n *Node) Sentinels(first uint16, reply *int) (err error) {
	device, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: device.Attrs().Index}); err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.SchedSetaffinity(0, &all)) }()
	frame := make([]byte, 60)
	copy(frame, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2})
	for cpu := range 1024 {
		if !all.IsSet(cpu) {
			continue
		}
		var one unix.CPUSet
		one.Set(cpu)
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			return err
		}
		binary.BigEndian.PutUint16(frame[12:], first+uint16(*reply))
		if _, err := unix.Write(fd, frame); err != nil {
			return err
		}
		*reply++
	}
	return nil
}
