package main

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/demarc/demarc/agent"
)

func TestMain(m *testing.M) {
	if os.Getenv("TEST_RUN_AGENT") != "" {
		main()
	}
	goleak.VerifyTestMain(m)
}

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

// The confined agent, a process of its own, reaches the API server, lists and watches,
// and reads a token that was renewed by a link in its place.
func TestConfinedAgentAsksAPIServer(t *testing.T) {
	type question struct{ token, watch string }
	asked := make(chan question, 100)
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		watch := r.URL.Query().Get("watch")
		select {
		case asked <- question{r.Header.Get("Authorization"), watch}:
		default:
		}
		if watch == "" {
			io.WriteString(w, `{"metadata":{"resourceVersion":"1"},"items":[]}`)
		}
	}))
	defer server.Close()
	dir := t.TempDir()
	account := filepath.Join(dir, "account")
	for _, d := range []string{"1", "2"} {
		if err := os.MkdirAll(filepath.Join(account, d), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(account, d, "token"), d)
	}
	link := func(to string) {
		if err := os.Symlink(to, filepath.Join(account, "new")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(account, "new"), filepath.Join(account, "data")); err != nil {
			t.Fatal(err)
		}
	}
	link("1")
	write(t, filepath.Join(account, "ca.crt"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})))
	config := write(t, filepath.Join(dir, "agent.yaml"), fmt.Sprintf(`server: unix://%[1]s/agent.sock
core: unix://%[1]s/core.sock
identity: {providers: [kubernetes], kubernetes: {server: %[2]q, node: n1, token_file: account/data/token, ca_file: account/ca.crt}}
`, dir, server.URL))
	agent := exec.Command(os.Args[0], "--config", config, "--allow-root")
	agent.Env = append(os.Environ(), "TEST_RUN_AGENT=1", "GOCOVERDIR="+dir)
	var out output
	agent.Stdout, agent.Stderr = &out, &out
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := agent.Process.Signal(os.Interrupt); err != nil {
			t.Error(err)
		}
		if err := agent.Wait(); err != nil {
			t.Errorf("%v: %s", err, &out)
		}
	}()
	until := func(want question) {
		limit := time.After(time.Minute)
		for {
			select {
			case got := <-asked:
				if got == want {
					return
				}
			case <-limit:
				t.Fatalf("never asked %+v: %s", want, &out)
			}
		}
	}
	until(question{"Bearer 1", ""})
	until(question{"Bearer 1", "1"})
	link("2")
	until(question{"Bearer 2", "1"})
}
