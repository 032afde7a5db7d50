package proto

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
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

func TestFrames(t *testing.T) {
	a, b := pair(t)
	sent := []struct {
		request Request
		files   []*os.File
	}{
		{Request{Op: OpHello, Version: Version}, nil},
		{Request{Op: OpApply}, []*os.File{file(t, "image")}},
		{Request{Op: OpBind, Path: "/lab/x", Identity: 0xffffff}, nil},
		{Request{Op: OpPreview, Own: Own{{netip.MustParseAddrPort("192.0.2.1:22"), netip.MustParseAddrPort("192.0.2.9:50112")}, MaxOwn - 1: {Local: netip.MustParseAddrPort("[2001:db8::1]:22")}}}, nil},
		{Request{Op: OpStatus}, []*os.File{file(t, "1"), file(t, "2"), file(t, "3"), file(t, "4"), file(t, "5"), file(t, "6"), file(t, "7"), file(t, "8")}},
		{Request{Op: OpBind, Path: strings.Repeat("x", MaxFrame-100)}, nil}, // more than the socket holds at once
	}
	done := make(chan error, 1)
	go func() {
		for _, s := range sent {
			if err := WriteFrame(a, s.request, s.files...); err != nil {
				done <- err
				return
			}
		}
		done <- a.Close()
	}()
	for i, s := range sent {
		var got Request
		files, err := ReadFrame(b, &got, nil)
		if err != nil {
			t.Fatalf("frame %d: %v", i, err)
		}
		if got != s.request {
			t.Errorf("frame %d: %+v", i, got)
		}
		var want, names []string
		for _, f := range s.files {
			want = append(want, f.Name())
		}
		for _, f := range files {
			text, err := io.ReadAll(io.NewSectionReader(f, 0, 100))
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, string(text))
			if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("frame %d: a child would inherit the descriptor: %v", i, err)
			}
		}
		CloseFiles(files)
		if diff := cmp.Diff(want, names); diff != "" {
			t.Errorf("frame %d, descriptors (-want +got):\n%s", i, diff)
		}
	}
	if _, err := ReadFrame(b, &Request{}, nil); !errors.Is(err, io.EOF) {
		t.Errorf("after the last frame: %v", err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func frame(text string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
}

func TestReadFrameRefuses(t *testing.T) {
	tests := []struct {
		name string
		send []byte
		want string
	}{
		{"bad header cut off", []byte{0, 0, 0}, "read frame: unexpected EOF"},
		{"bad body cut off", frame(`{"op":"status"}`)[:10], "read frame: unexpected EOF"},
		{"bad body missing", frame(`{}`)[:4], "read frame: EOF"},
		{"bad too long", []byte{0, 0x10, 0, 1}, "read frame: 1048577 bytes, at most 1048576"},
		{"bad longest", []byte{0xff, 0xff, 0xff, 0xff}, "read frame: 4294967295 bytes, at most 1048576"},
		{"bad empty", frame(""), "decode frame: EOF"},
		{"bad json", frame(`{"op":`), "decode frame: unexpected EOF"},
		{"bad unknown key", frame(`{"op":"status","x":1}`), `decode frame: json: unknown field "x"`},
		{"bad unknown key inside", frame(`{"op":"preview","own":[{"local":"192.0.2.1:22","x":1}]}`), `decode frame: json: unknown field "x"`},
		{"bad trailing value", frame(`{"op":"status"} {}`), "decode frame: trailing data"},
		{"bad trailing garbage", frame(`{"op":"status"}}`), "decode frame: trailing data"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, b := pair(t)
			if _, err := a.Write(tt.send); err != nil {
				t.Fatal(err)
			}
			a.Close()
			files, err := ReadFrame(b, &Request{}, nil)
			if err == nil || err.Error() != tt.want || files != nil {
				t.Errorf("got %v, %v; want %s", files, err, tt.want)
			}
		})
	}
}

func TestWriteFrameRefuses(t *testing.T) {
	a, _ := pair(t)
	if err := WriteFrame(a, strings.Repeat("x", MaxFrame)); err == nil || err.Error() != "encode frame: 1048578 bytes, at most 1048576" {
		t.Errorf("long frame: %v", err)
	}
	if err := WriteFrame(a, Request{}, make([]*os.File, MaxFiles+1)...); err == nil || err.Error() != "send frame: 9 descriptors, at most 8" {
		t.Errorf("many descriptors: %v", err)
	}
}

// A peer that sends more descriptors than a frame may have costs none: all that
// arrived are closed.
func TestTooManyDescriptors(t *testing.T) {
	for _, n := range []int{MaxFiles + 1, 200} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			a, b := pair(t)
			f := file(t, "x")
			fds := make([]int, n)
			for i := range fds {
				fds[i] = int(f.Fd())
			}
			before := open(t)
			if _, _, err := a.WriteMsgUnix(frame(`{"op":"status"}`), unix.UnixRights(fds...), nil); err != nil {
				t.Fatal(err)
			}
			files, err := ReadFrame(b, &Request{}, nil)
			if err == nil || err.Error() != "read frame: more than 8 descriptors" || files != nil {
				t.Errorf("got %v, %v", files, err)
			}
			if after := open(t); after != before {
				t.Errorf("%d descriptors are open, %d were", after, before)
			}
		})
	}
}

func open(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// Whatever bytes arrive: an error or a frame that can be sent again and is the
// same, and no descriptor without owner.
func FuzzReadFrame(f *testing.F) {
	f.Add(frame(`{"op":"hello","version":1}`))
	f.Add(frame(`{"op":"bind","path":"/lab/x","identity":16}`))
	f.Add(frame(`{"op":"preview","own":[{"local":"192.0.2.1:22","remote":"[::ffff:192.0.2.9]:50112"},{"local":"[fe80::1%eth0]:1","remote":""}]}`))
	f.Add(frame(`{"op":"status"}x`))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, '{'})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 4096 { // beyond it, nobody reads while this end writes
			return
		}
		near, far := pair(t)
		if _, err := near.Write(b); err != nil {
			t.Fatal(err)
		}
		near.CloseWrite()
		var q, again Request
		files, err := ReadFrame(far, &q, nil)
		if len(files) != 0 {
			t.Fatal("descriptors out of nothing")
		}
		if err != nil {
			return
		}
		if err := WriteFrame(far, q); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadFrame(near, &again, nil); err != nil || q != again {
			t.Errorf("%+v, then %+v: %v", q, again, err)
		}
	})
}
