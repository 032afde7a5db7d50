package agent

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/api"
)

func TestListenTakesOnlyAStaleSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "run", "agent.sock")
	first, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != os.ModeSocket|0o660 {
		t.Errorf("mode %v, %v, want a socket with 0660", info.Mode(), err)
	}
	if _, err := listen(path); err == nil || !strings.HasSuffix(err.Error(), "another agent serves it") {
		t.Errorf("a served socket was taken: %v", err)
	}

	// A crash leaves the file behind.
	first.UnixListener.Close()
	second, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	// Whoever replaced our socket keeps it.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	third, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	second.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the old listener removed the new one's socket: %v", err)
	}
	third.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(file); err == nil || !strings.HasSuffix(err.Error(), "there is a file that is no socket") {
		t.Errorf("a file was taken for a stale socket: %v", err)
	}
}

func TestSecondAgentIsRefused(t *testing.T) {
	r := start(t, newStandIn(), nil)
	a, err := build(r.config, r.link.log, newLink(r.core.dial, r.core.open, r.link.log))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Run(t.Context(), func() { t.Error("the second agent became ready") }); err == nil || !strings.Contains(err.Error(), "another agent serves it") {
		t.Errorf("second agent: %v", err)
	}
	if _, err := r.client.Status(t.Context()); err != nil {
		t.Errorf("the first agent no longer answers: %v", err)
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	if _, err := r.client.Status(t.Context()); !errors.Is(err, api.ErrNotRunning) {
		t.Errorf("after the end: %v", err)
	}
}

// TestChangesNeedTheRightUser runs this test again as another user, who may open
// the socket here, and asks for a change. It needs root to become that user.
func TestChangesNeedTheRightUser(t *testing.T) {
	if server := os.Getenv("DEMARC_TEST_SERVER"); server != "" {
		c, err := api.NewClient(server)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Status(t.Context()); err != nil {
			t.Errorf("read: %v", err)
		}
		_, err = c.Apply(t.Context(), []byte("x"), 0)
		fmt.Println("apply:", err, errors.Is(err, api.ErrPermission))
		_, err = c.Rollback(t.Context())
		fmt.Println("rollback:", err, errors.Is(err, api.ErrPermission))
		return
	}
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root, to become another user")
	}
	dir, err := os.MkdirTemp("", "demarc")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	core := newStandIn()
	r := start(t, core, func(c *Config) { c.Server = filepath.Join(dir, "agent.sock") })
	self := filepath.Join(dir, "test")
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{os.WriteFile(self, b, 0o755), os.Chmod(dir, 0o755), os.Chmod(r.config.Server, 0o666)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	child := exec.Command(self, "-test.run", "^TestChangesNeedTheRightUser$", "-test.v")
	child.Env = []string{"DEMARC_TEST_SERVER=unix://" + r.config.Server}
	child.Dir = "/"
	child.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := child.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{
		"apply: permission denied: user 65534 may not change the policy true\n",
		"rollback: permission denied: user 65534 may not change the policy true\n",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	if len(core.images) != 0 {
		t.Error("the policy changed")
	}
}

func TestBoundsOfRequests(t *testing.T) {
	r := start(t, newStandIn(), nil)
	connect := func() net.Conn {
		c, err := net.Dial("unix", r.config.Server)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(10 * time.Second))
		return c
	}
	ask := func(request string) string {
		c := connect()
		fmt.Fprint(c, request)
		line, _ := bufio.NewReader(c).ReadString('\n')
		return strings.TrimSpace(line)
	}
	for _, c := range []struct{ name, request, want string }{
		{"OK HTTP/1.1", "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 200 OK"},
		{"bad path", "GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 404 Not Found"},
		{"bad method", "DELETE /v1/policy HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 404 Not Found"},
		{"bad header size", "GET /v1/status HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("a", 64<<10) + "\r\n\r\n", "HTTP/1.1 431 Request Header Fields Too Large"},
		{"bad request", "\x00\x01\x02\r\n\r\n", "HTTP/1.1 400 Bad Request"},
	} {
		if got := ask(c.request); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}

	// Any number of connections that ask nothing keep nobody out.
	for range 2 * maxUserConnections {
		connect()
	}
	if got := ask("GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n"); got != "HTTP/1.1 200 OK" {
		t.Errorf("among idle connections: %q", got)
	}
}
