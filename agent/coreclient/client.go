// Package coreclient is the agent's end of a connection to the core.
package coreclient

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/demarc/demarc/agent/core/proto"
)

// Timeout bounds one request and its answer. Applying a large image takes the
// kernel seconds on a busy machine.
const Timeout = 60 * time.Second

// Client is the agent's end of a connection to the core. Its methods may be
// called from any goroutine; requests go one after the other. The first must be
// Hello.
type Client struct {
	mu   sync.Mutex
	conn *net.UnixConn
}

// Dial connects to the core's socket.
func Dial(ctx context.Context, path string) (*Client, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to core: %w", err)
	}
	return &Client{conn: c.(*net.UnixConn)}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Hello opens the conversation. The caller closes the descriptors.
func (c *Client) Hello() (*proto.Hello, *proto.Descriptors, error) {
	r, files, err := c.ask(proto.Request{Op: proto.OpHello, Version: proto.Version}, nil)
	if err != nil {
		return nil, nil, err
	}
	var d proto.Descriptors
	places := d.Places()
	if r.Hello == nil || len(files) != len(places) {
		proto.CloseFiles(files)
		return nil, nil, fmt.Errorf("hello: the core sent %d descriptors of %d", len(files), len(places))
	}
	for i, place := range places {
		*place = files[i]
	}
	return r.Hello, &d, nil
}

// Status asks what is in force.
func (c *Client) Status() (*proto.Status, error) {
	return c.status(proto.Request{Op: proto.OpStatus}, nil)
}

// Apply hands over an encoded image: a memfd, read from its start. Unless it is
// confirmed within a time, in whole milliseconds, the kernel takes it back; 0 = it
// is for good.
func (c *Client) Apply(image *os.File, within time.Duration) (*proto.Status, error) {
	return c.ApplySparing(image, within, 0)
}

// ApplySparing is Apply that lets live connections go on for a time, in whole
// milliseconds, which the image cuts.
func (c *Client) ApplySparing(image *os.File, within, spare time.Duration) (*proto.Status, error) {
	return c.status(proto.Request{Op: proto.OpApply, Within: within.Milliseconds(), Spare: spare.Milliseconds()}, image)
}

// ApplyPreviewed is ApplySparing of the image that was previewed last, by its digest,
// in hex, which is that of the image without an envelope.
func (c *Client) ApplyPreviewed(digest string, within, spare time.Duration) (*proto.Status, error) {
	return c.status(proto.Request{Op: proto.OpApply, Digest: digest, Within: within.Milliseconds(), Spare: spare.Milliseconds()}, nil)
}

// Prepare has the core verify an image that is about to be applied. When it answers, it goes
// on to make it ready, so that applying it takes less time; nothing is in force by that.
func (c *Client) Prepare(image *os.File) error {
	return c.done(proto.Request{Op: proto.OpPrepare}, image)
}

// Preview asks which live connections an image would cut, and to name one's own first.
func (c *Client) Preview(image *os.File, own proto.Own) (*proto.Preview, error) {
	r, files, err := c.ask(proto.Request{Op: proto.OpPreview, Own: own}, image)
	proto.CloseFiles(files)
	if err != nil {
		return nil, err
	}
	if r.Preview == nil {
		return nil, errors.New("preview: the core sent none")
	}
	return r.Preview, nil
}

// Shadow has live traffic judged by an image beside the one in force, for a time in
// whole milliseconds.
func (c *Client) Shadow(image *os.File, lasting time.Duration) (*proto.Status, error) {
	return c.status(proto.Request{Op: proto.OpShadow, For: lasting.Milliseconds()}, image)
}

// Unshadow ends that.
func (c *Client) Unshadow() (*proto.Status, error) {
	return c.status(proto.Request{Op: proto.OpUnshadow}, nil)
}

// Confirm keeps the change that waits for it.
func (c *Client) Confirm() (*proto.Status, error) {
	return c.status(proto.Request{Op: proto.OpConfirm}, nil)
}

// Rollback goes back to the previous image.
func (c *Client) Rollback() (*proto.Status, error) {
	return c.status(proto.Request{Op: proto.OpRollback}, nil)
}

// Image returns the active image. The caller closes it.
func (c *Client) Image() (*os.File, error) { return c.file(proto.OpImage) }

// Shadowed returns the image in shadow. The caller closes it.
func (c *Client) Shadowed() (*os.File, error) { return c.file(proto.OpShadowed) }

func (c *Client) file(op proto.Op) (*os.File, error) {
	_, files, err := c.ask(proto.Request{Op: op}, nil)
	if err != nil {
		return nil, err
	}
	if len(files) != 1 {
		proto.CloseFiles(files)
		return nil, fmt.Errorf("%s: the core sent %d descriptors", op, len(files))
	}
	return files[0], nil
}

// Quarantine leaves an identity its forensic crossings only, for a time in whole
// milliseconds. Automatic ones, which nobody ordered, are few at a time.
func (c *Client) Quarantine(id uint32, lasting time.Duration, reason string, automatic bool) (*proto.Status, error) {
	return c.status(proto.Request{Op: proto.OpQuarantine, Identity: id, For: lasting.Milliseconds(), Reason: reason, Automatic: automatic}, nil)
}

// Release ends a quarantine.
func (c *Client) Release(id uint32) (*proto.Status, error) {
	return c.status(proto.Request{Op: proto.OpRelease, Identity: id}, nil)
}

// Audit returns where the audit log ends, and its files, the oldest first. The caller
// closes them.
func (c *Client) Audit() (*proto.Audit, []*os.File, error) {
	r, files, err := c.ask(proto.Request{Op: proto.OpAudit}, nil)
	if err != nil {
		return nil, nil, err
	}
	if r.Audit == nil || len(files) == 0 {
		proto.CloseFiles(files)
		return nil, nil, fmt.Errorf("audit: the core sent %d files", len(files))
	}
	return r.Audit, files, nil
}

// Bind claims that a cgroup path below the managed root belongs to a workload.
func (c *Client) Bind(path string, id uint32) error {
	return c.done(proto.Request{Op: proto.OpBind, Path: path, Identity: id}, nil)
}

// Unbind withdraws a claim.
func (c *Client) Unbind(path string) error {
	return c.done(proto.Request{Op: proto.OpUnbind, Path: path}, nil)
}

// Forget withdraws every claim that was not made on this connection: those of an
// agent before.
func (c *Client) Forget() error { return c.done(proto.Request{Op: proto.OpForget}, nil) }

func (c *Client) done(q proto.Request, file *os.File) error {
	_, files, err := c.ask(q, file)
	proto.CloseFiles(files)
	return err
}

func (c *Client) status(q proto.Request, file *os.File) (*proto.Status, error) {
	r, files, err := c.ask(q, file)
	proto.CloseFiles(files)
	if err != nil {
		return nil, err
	}
	if r.Status == nil {
		return nil, fmt.Errorf("%s: the core sent no status", q.Op)
	}
	return r.Status, nil
}

// ask sends a request and reads its answer. A refusal is a *proto.Refused; after any
// other error the connection is closed.
func (c *Client) ask(q proto.Request, file *os.File) (*proto.Response, []*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, files, err := c.exchange(q, file)
	if err != nil {
		c.conn.Close()
		return nil, nil, fmt.Errorf("ask core to %s: %w", q.Op, err)
	}
	if r.Error != "" {
		proto.CloseFiles(files)
		return nil, nil, &proto.Refused{Message: r.Error, Hint: r.Hint}
	}
	return r, files, nil
}

func (c *Client) exchange(q proto.Request, file *os.File) (*proto.Response, []*os.File, error) {
	if err := c.conn.SetDeadline(time.Now().Add(Timeout)); err != nil {
		return nil, nil, err
	}
	var files []*os.File
	if file != nil {
		files = append(files, file)
	}
	// A core that refuses a whole connection answers and hangs up, so that the
	// write may fail while the reason is waiting to be read.
	writeErr := proto.WriteFrame(c.conn, q, files...)
	var r proto.Response
	got, err := proto.ReadFrame(c.conn, &r, nil)
	if err != nil {
		return nil, nil, errors.Join(writeErr, err)
	}
	return &r, got, nil
}
