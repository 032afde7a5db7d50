package core

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/coreclient"
)

// A start takes no time that its machine does not need: while privileges are dropped, no
// goroutine of the core's may be there to block in the kernel. (Go stopped for a minute,
// once in some hundred starts.)
func TestNothingRunsBeforeServe(t *testing.T) {
	m := newMachine(t)
	m.config.Devices = Devices{Auto: true}
	before := runtime.NumGoroutine()
	c, err := m.open(hooks{})
	must(t, err)
	defer c.Close()
	_, err = c.Apply(shop(t, nil), 0)
	must(t, err)
	if c.answers == nil {
		t.Fatal("nobody would answer refusals: their reader is what blocks")
	}
	for end := time.Now().Add(time.Minute); runtime.NumGoroutine() > before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			stacks := make([]byte, 1<<16)
			t.Fatalf("%d goroutines, %d before the core was opened:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

// daemon runs the real demarc-core beside this process, in the same namespaces,
// until the test ends. Giving up privileges is for good, so it is not done here.
func (m *machine) daemon(t *testing.T) *coreclient.Client {
	t.Helper()
	client, err := m.daemonUnder(t)
	must(t, err)
	return client
}

// daemonUnder does so by another program, which may be none. The error is what a core
// that refused to start said.
func (m *machine) daemonUnder(t *testing.T, command ...string) (*coreclient.Client, error) {
	t.Helper()
	dir := t.TempDir()
	binary, config := filepath.Join(dir, "demarc-core"), filepath.Join(dir, "core.json")
	build := exec.Command("go", "build", "-o", binary, "github.com/demarc/demarc/cmd/demarc-core")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	text, err := json.Marshal(map[string]any{
		"cgroup_root": m.config.CgroupRoot, "bpffs": m.config.BPFFS, "run_dir": m.config.RunDir, "state_dir": m.config.StateDir,
		"keyring": m.config.Keyring, "devices": "auto", "agent_user": m.config.AgentUID,
	})
	must(t, err)
	must(t, os.WriteFile(config, text, 0o600))
	command = append(command, binary, "run", "--config", config)
	core := exec.Command(command[0], command[1:]...)
	var said bytes.Buffer
	core.Stderr = io.MultiWriter(testWriter{t}, &said)
	// The kernel means the death of the thread, not of the process.
	runtime.LockOSThread()
	core.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, core.Start())
	ended := make(chan error, 1)
	go func() { ended <- core.Wait() }()
	refused := false
	t.Cleanup(func() {
		defer runtime.UnlockOSThread()
		if refused {
			return
		}
		_ = core.Process.Signal(syscall.SIGTERM)
		if err := <-ended; err != nil {
			t.Errorf("demarc-core: %v", err)
		}
	})
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		client, err := coreclient.Dial(context.Background(), m.config.Socket())
		if err == nil {
			t.Cleanup(func() { client.Close() })
			var given *proto.Descriptors
			if _, given, err = client.Hello(); err == nil {
				given.Close()
				return client, nil
			}
		}
		select {
		case <-ended:
			refused = true
			return nil, errors.New(said.String())
		default:
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// The service's bounding set is what a start needs: it is enough for everything, and
// without one of them the core does not start, or says what it cannot do.
func TestStartCapabilities(t *testing.T) {
	unit, err := os.ReadFile("../../deploy/systemd/demarc-core.service")
	must(t, err)
	_, list, _ := strings.Cut(string(unit), "\nCapabilityBoundingSet=")
	list, _, _ = strings.Cut(list, "\n")
	names := strings.Fields(strings.ToLower(strings.ReplaceAll(list, "CAP_", "")))
	start := func(t *testing.T, names []string) (*proto.Status, error) {
		m := newMachine(t)
		m.config.AgentUID = 4242
		client, err := m.daemonUnder(t, "setpriv", "--bounding-set", "-all,+"+strings.Join(names, ",+"))
		if err != nil {
			return nil, err
		}
		return client.Apply(memfd(t, shop(t, nil)), 0)
	}
	t.Run("OK all", func(t *testing.T) {
		s, err := start(t, names)
		must(t, err)
		if s.State != proto.StateEnforcing || len(beside(s.Limits)) > 0 {
			t.Errorf("status %+v", s)
		}
	})
	for i, name := range names {
		t.Run("bad without "+name, func(t *testing.T) {
			s, err := start(t, slices.Delete(slices.Clone(names), i, i+1))
			if err == nil && len(beside(s.Limits)) == 0 {
				t.Errorf("it is not needed: %+v", s)
			}
		})
	}
}

// What the core keeps of its privileges is enough to make boundaries of devices
// that appear, and to let go of those that disappear.
func TestDevicesAfterDrop(t *testing.T) {
	m := newMachine(t)
	plug(t, hostSide(t, "pod"))
	client := m.daemon(t)
	s, err := client.Apply(memfd(t, shop(t, nil)), 0)
	must(t, err)
	if s.State != proto.StateEnforcing {
		t.Fatalf("status %+v", s)
	}
	at(t, 0, "pod")
	plug(t, hostSide(t, "late"))
	at(t, patience, "pod", "late")
	unplug(t, "pod")
	var names []string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		s, err = client.Status()
		must(t, err)
		if names = linksOf(s); len(names) == 2 {
			break
		}
	}
	if diff := cmp.Diff([]string{"tc_door late", "tc_egress late"}, names); diff != "" || s.State != proto.StateEnforcing {
		t.Errorf("state %v, problems %q, links (-want +got):\n%s", s.State, s.Problems, diff)
	}
	pins, err := filepath.Glob(filepath.Join(m.config.BPFFS, "links", "tc_*"))
	must(t, err)
	if len(pins) != 2 {
		t.Errorf("pins %s", strings.Join(pins, ", "))
	}
}

// Each capability that the core keeps is one that it cannot do without: the first
// policy is refused, and nothing stays of it.
func TestKeptCapabilitiesAreNeeded(t *testing.T) {
	var all uint64
	for _, c := range keptCapabilities {
		all |= 1 << c
	}
	m := newMachine(t)
	c := m.start()
	for _, tt := range []struct {
		name    string
		without int
		want    string
	}{
		// Tables are made by other threads, which keep what this one gives up.
		{"bad without CAP_BPF", unix.CAP_BPF, "make abi map: "},
		{"bad without CAP_NET_ADMIN", unix.CAP_NET_ADMIN, "attach "},
		{"OK with those that are kept", -1, ""},
	} {
		keep := all
		if tt.without >= 0 {
			keep &^= 1 << tt.without
		}
		var err error
		holding(t, keep, func() { _, err = c.Apply(shop(t, nil), 0) })
		if (err == nil) != (tt.want == "") || err != nil && (!strings.HasPrefix(err.Error(), tt.want) || !errors.Is(err, unix.EPERM)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		if attached(t, m) > 0 != (tt.want == "") {
			t.Errorf("%s: %d programs are attached", tt.name, attached(t, m))
		}
	}
}

// holding runs something on a thread of its own with these capabilities.
func holding(t *testing.T, capabilities uint64, do func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its capabilities
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		data := [2]unix.CapUserData{
			{Effective: uint32(capabilities), Permitted: uint32(capabilities)},
			{Effective: uint32(capabilities >> 32), Permitted: uint32(capabilities >> 32)},
		}
		err := unix.Capset(&header, &data[0])
		if err == nil {
			do()
		}
		done <- err
	}()
	must(t, <-done)
}
