package agent

import (
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/policy/envelope"
)

// Somebody else made the place of the socket before the agent did, or could put
// something else there later.
func TestJ12SocketPlace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root, to give a directory to another user")
	}
	for _, tt := range []struct {
		name string
		make func(dir, path string) error
		want string // "" = it listens
	}{
		{"OK of root", func(dir, _ string) error { return os.Chmod(dir, 0o755) }, ""},
		{"OK sticky", func(dir, _ string) error { return os.Chmod(dir, 0o777|os.ModeSticky) }, ""},
		{"bad writable by all", func(dir, _ string) error { return os.Chmod(dir, 0o777) }, "everybody may write to "},
		{"bad of another user", func(dir, _ string) error { return os.Chown(dir, 4242, 0) }, "belongs to user 4242"},
		{"bad symlink", func(dir, path string) error { return os.Symlink(filepath.Join(dir, "other"), path) }, "there is a file that is no socket"},
		{"bad symlink to a file", func(dir, path string) error {
			other := filepath.Join(dir, "other")
			if err := os.WriteFile(other, []byte("precious"), 0o600); err != nil {
				return err
			}
			return os.Symlink(other, path)
		}, "there is a file that is no socket"},
		{"bad directory", func(_, path string) error { return os.Mkdir(path, 0o755) }, "there is a file that is no socket"},
		{"bad fifo", func(_, path string) error { return unix.Mkfifo(path, 0o666) }, "there is a file that is no socket"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "run")
			path := filepath.Join(dir, "agent.sock")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := tt.make(dir, path); err != nil {
				t.Fatal(err)
			}
			before, _ := os.Lstat(path)
			l, err := listen(path)
			if err == nil {
				l.Close()
			}
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if after, err := os.Lstat(path); before != nil && (err != nil || !os.SameFile(before, after)) {
				t.Errorf("what was there is gone: %v", err)
			}
			if b, err := os.ReadFile(filepath.Join(dir, "other")); err == nil && string(b) != "precious" {
				t.Errorf("the symlink's target now holds %q", b)
			}
		})
	}
}

// Whoever may open the socket cannot fill the agent: neither with an image that is
// too large, nor with descriptors.
func TestJ12Oversized(t *testing.T) {
	r := start(t, newStandIn(), nil)
	client := &http.Client{Transport: &http.Transport{Dial: func(string, string) (net.Conn, error) { return net.Dial("unix", r.config.Server) }}}
	defer client.CloseIdleConnections()
	res, err := client.Post("http://demarc"+api.PathPolicy, "application/octet-stream", io.LimitReader(zeros{}, envelope.MaxSize+1))
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("an image that is too large: %s", res.Status)
	}
	client.CloseIdleConnections()

	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: r.config.Server, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	files := func() int {
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	many := make([]int, 200)
	for i := range many {
		many[i] = int(null.Fd())
	}
	before := files()
	if _, _, err := conn.WriteMsgUnix([]byte("GET "+api.PathStatus+" HTTP/1.1\r\nHost: x\r\n\r\n"), unix.UnixRights(many...), nil); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 12)
	if _, err := io.ReadFull(conn, b); err != nil || string(b) != "HTTP/1.1 200" {
		t.Errorf("with descriptors: %q, %v", b, err)
	}
	if after := files(); after > before+1 { // the other end of this connection
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}
