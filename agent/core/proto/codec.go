package proto

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// MaxFiles bounds the descriptors that travel with one frame.
const MaxFiles = 8

// Refused is an answer that says no. Hint says how to mend it, and may be empty.
type Refused struct {
	Message string
	Hint    string
}

func (e *Refused) Error() string { return e.Message }

// Refuse makes a refusal with a hint.
func Refuse(hint, format string, args ...any) *Refused {
	return &Refused{Message: fmt.Errorf(format, args...).Error(), Hint: hint}
}

// WriteFrame sends v as one frame, and the files beside it. The caller keeps the
// files.
func WriteFrame(c *net.UnixConn, v any, files ...*os.File) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode frame: %w", err)
	}
	if len(body) > MaxFrame {
		return fmt.Errorf("encode frame: %d bytes, at most %d", len(body), MaxFrame)
	}
	if len(files) > MaxFiles {
		return fmt.Errorf("send frame: %d descriptors, at most %d", len(files), MaxFiles)
	}
	frame := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(body)), uint32(len(body)))
	frame = append(frame, body...)
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	// Descriptors travel with the first byte, so a short write never splits them.
	n, _, err := c.WriteMsgUnix(frame, rights, nil)
	if err == nil && n < len(frame) {
		_, err = c.Write(frame[n:])
	}
	if err != nil {
		return fmt.Errorf("send frame: %w", err)
	}
	return nil
}

// ReadFrame receives one frame into v, strictly, and the files beside it, which
// the caller closes. It tells when a frame has begun, for which somebody may wait as long
// as it takes; nil = nobody wants to know. A connection that ends between two frames is
// io.EOF. After any other error the stream is out of step and must be closed.
func ReadFrame(c *net.UnixConn, v any, begun func() error) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			CloseFiles(files)
			files = nil
		}
	}()
	var header [4]byte
	for got := 0; got < len(header); {
		n, more, err := readRights(c, header[got:])
		files = append(files, more...)
		switch {
		case err != nil:
			return files, err
		case n == 0 && got == 0 && len(files) == 0:
			return files, io.EOF
		case n == 0:
			return files, fmt.Errorf("read frame: %w", io.ErrUnexpectedEOF)
		case len(files) > MaxFiles:
			return files, fmt.Errorf("read frame: more than %d descriptors", MaxFiles)
		case got == 0 && begun != nil:
			if err := begun(); err != nil {
				return files, err
			}
		}
		got += n
	}
	length := binary.BigEndian.Uint32(header[:])
	if length > MaxFrame {
		return files, fmt.Errorf("read frame: %d bytes, at most %d", length, MaxFrame)
	}
	body := make([]byte, length)
	if _, err := io.ReadFull(c, body); err != nil {
		return files, fmt.Errorf("read frame: %w", err)
	}
	return files, Unmarshal(body, v)
}

// Unmarshal decodes one JSON value strictly: no unknown key, nothing behind it.
func Unmarshal(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("decode frame: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("decode frame: trailing data")
	}
	return nil
}

// CloseFiles closes all of them; nil entries are fine.
func CloseFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// readRights reads into b, and takes the descriptors that arrive with it. Zero
// bytes without an error are the end of the stream.
func readRights(c *net.UnixConn, b []byte) (int, []*os.File, error) {
	oob := make([]byte, unix.CmsgSpace(4*(MaxFiles+1)))
	n, oobn, flags, _, err := c.ReadMsgUnix(b, oob)
	if err != nil && !errors.Is(err, io.EOF) {
		return n, nil, fmt.Errorf("read frame: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return n, nil, fmt.Errorf("read frame: parse control message: %w", err)
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // not descriptors: credentials, for one
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return n, files, fmt.Errorf("read frame: more than %d descriptors", MaxFiles)
	}
	return n, files, nil
}
