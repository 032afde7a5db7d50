package core

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/core/proto"
)

// daemon runs the real demarc-core beside this process, in the same namespaces,
// until the test ends. Giving up privileges is for good, so it is not done here.
func (m *machine) daemon(t *testing.T) *proto.Client {
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
		"keyring": m.config.Keyring, "devices": "auto",
	})
	must(t, err)
	must(t, os.WriteFile(config, text, 0o600))
	core := exec.Command(binary, "run", "--config", config)
	core.Stderr = testWriter{t}
	// The kernel means the death of the thread, not of the process.
	runtime.LockOSThread()
	core.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, core.Start())
	t.Cleanup(func() {
		defer runtime.UnlockOSThread()
		_ = core.Process.Signal(syscall.SIGTERM)
		if err := core.Wait(); err != nil {
			t.Errorf("demarc-core: %v", err)
		}
	})
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		client, err := proto.Dial(context.Background(), m.config.Socket())
		if err == nil {
			t.Cleanup(func() { client.Close() })
			_, given, err := client.Hello()
			must(t, err)
			given.Close()
			return client
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
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
	at(t, hotPlug, "pod", "late")
	unplug(t, "pod")
	var names []string
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
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
