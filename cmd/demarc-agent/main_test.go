package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/demarc/demarc/agent"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// output collects what a running agent writes.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

func write(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func unconfined(*agent.Agent, bool) error { return nil }

func TestBadInputStartsNothing(t *testing.T) {
	dir := t.TempDir()
	server := "server: unix://" + dir + "/agent.sock\n"
	good := write(t, filepath.Join(dir, "good.yaml"), server)
	bad := write(t, filepath.Join(dir, "bad.yaml"), server+"metric: {}\n")
	inventory := write(t, filepath.Join(dir, "i.yaml"), "workloads:\n- {name: a, cgroup: a}\n")
	withInventory := write(t, filepath.Join(dir, "inv.yaml"), server+"identity: {providers: [file], inventory: i.yaml}\n")
	for _, c := range []struct {
		name   string
		args   []string
		code   int
		stderr string
	}{
		{"bad flag", []string{"--what"}, exitUsage, "flag provided but not defined: -what\n"},
		{"bad argument", []string{"now"}, exitUsage, "demarc-agent: unexpected argument \"now\"\n"},
		{"bad missing", []string{"--config", dir + "/none"}, exitFailed, "demarc-agent: read configuration: open " + dir + "/none: no such file or directory\n"},
		{"bad key", []string{"--config", bad}, exitFailed, "demarc-agent: " + bad + ":2:1: unknown field \"metric\"\n"},
		{"bad inventory", []string{"--config", withInventory}, exitFailed, "demarc-agent: " + inventory + ":2:21: cgroup \"a\" is no path below the managed root\n"},
		{"OK check", []string{"--config", good, "--check"}, exitGood, ""},
		{"OK version", []string{"--version"}, exitGood, ""},
		{"OK help", []string{"--help"}, exitGood, "Usage of demarc-agent:\n"},
	} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), c.args, &stdout, &stderr, unconfined); code != c.code {
			t.Errorf("%s: exit code %d, want %d", c.name, code, c.code)
		}
		if !strings.HasPrefix(stderr.String(), c.stderr) || c.stderr == "" && stderr.Len() > 0 {
			t.Errorf("%s: %q does not start with %q", c.name, &stderr, c.stderr)
		}
	}
	if _, err := os.Lstat(filepath.Join(dir, "agent.sock")); err == nil {
		t.Error("bad input made a socket")
	}
}

func TestRunsWithoutCoreAndLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	config := write(t, filepath.Join(dir, "agent.yaml"), "server: unix://"+dir+"/agent.sock\ncore: unix://"+dir+"/core.sock\n")
	ctx, cancel := context.WithCancel(t.Context())
	var stderr output
	done := make(chan int)
	go func() { done <- run(ctx, []string{"--config", config}, &bytes.Buffer{}, &stderr, unconfined) }()
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(stderr.String(), "ready"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not ready: %s", &stderr)
		}
	}
	cancel()
	if code := <-done; code != exitGood {
		t.Errorf("exit code %d: %s", code, &stderr)
	}
	if left, err := filepath.Glob(dir + "/*"); err != nil || len(left) != 1 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}
