package coreclient

import (
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
)

// pair is both ends of a connection.
func pair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "end")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
		if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	return ends[0], ends[1]
}

// file is a descriptor that says its name when read.
func file(t testing.TB, text string) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), text)
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	return f
}

func open(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// A core that breaks the protocol is an error, and the connection is over; one
// that refuses is a refusal, and the connection goes on.
func TestClient(t *testing.T) {
	tests := []struct {
		name  string
		files int
		send  proto.Response
		want  string
	}{
		{"bad refused", 0, proto.Response{Error: "no", Hint: "ask later"}, "no"},
		{"bad no hello", 8, proto.Response{}, "hello: the core sent 8 descriptors of 8"},
		{"bad too few descriptors", 6, proto.Response{Hello: &proto.Hello{}}, "hello: the core sent 6 descriptors of 8"},
		{"bad refused, with descriptors", 1, proto.Response{Error: "no"}, "no"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, b := pair(t)
			f := file(t, "x")
			files := make([]*os.File, tt.files)
			for i := range files {
				files[i] = f
			}
			done := make(chan error, 1)
			go func() {
				if _, err := proto.ReadFrame(b, &proto.Request{}, nil); err != nil {
					done <- err
					return
				}
				done <- proto.WriteFrame(b, tt.send, files...)
			}()
			before := open(t)
			_, d, err := (&Client{conn: a}).Hello()
			if err == nil || err.Error() != tt.want || d != nil {
				t.Errorf("got %v, %v", d, err)
			}
			var refused *proto.Refused
			if errors.As(err, &refused) != (tt.send.Error != "") || refused != nil && refused.Hint != tt.send.Hint {
				t.Errorf("refusal %+v", refused)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			if after := open(t); after != before {
				t.Errorf("%d descriptors are open, %d were", after, before)
			}
		})
	}
}

func TestClientHangsUpAfterNonsense(t *testing.T) {
	a, b := pair(t)
	go func() {
		if _, err := proto.ReadFrame(b, &proto.Request{}, nil); err == nil {
			_, _ = b.Write(append([]byte{0, 0, 0, 13}, `{"strange":1}`...))
		}
	}()
	c := &Client{conn: a}
	if _, err := c.Status(); err == nil || !strings.Contains(err.Error(), `unknown field "strange"`) {
		t.Errorf("got %v", err)
	}
	if _, err := c.Status(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the connection is used again: %v", err)
	}
}
