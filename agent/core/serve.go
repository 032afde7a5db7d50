package core

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/bpf/abi"
)

const (
	maxConnections = 4                // of root, and as many of the agent
	frameTimeout   = 10 * time.Second // for a frame that has begun, in either direction
)

// Listen makes the socket. It needs the privileges of the start.
func (c *Core) Listen() (*net.UnixListener, error) {
	path := c.config.Socket()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make run_dir: %w", err)
	}
	var stat unix.Stat_t
	if err := unix.Stat(filepath.Dir(path), &stat); err != nil {
		return nil, fmt.Errorf("look at run_dir: %w", err)
	}
	if stat.Uid != 0 || stat.Mode&0o022 != 0 {
		return nil, proto.Refuse("chown root and chmod go-w it", "others than root may put another socket into run_dir %s", filepath.Dir(path))
	}
	// Of a core that was killed: the lock says that no other one runs.
	if err := remove(path); err != nil {
		return nil, fmt.Errorf("remove old socket: %w", err)
	}
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if uid := int(c.config.AgentUID); uid != 0 {
		if err := errors.Join(os.Chmod(path, 0o660), os.Chown(path, uid, 0)); err != nil {
			l.Close()
			return nil, fmt.Errorf("give socket to the agent: %w", err)
		}
	}
	return l, nil
}

// Serve keeps everything up and answers the agent until the context ends, and then
// closes the socket.
func (c *Core) Serve(ctx context.Context, l *net.UnixListener) error {
	c.start()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var all sync.WaitGroup
	defer func() { // what others sent may be slow to close, which must not keep the core from ending
		done := make(chan struct{})
		go func() { all.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(frameTimeout):
		}
	}()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	// The agent, who may be in an attacker's hands, takes no place of root's. As many
	// again may wait to be turned away.
	places := map[bool]chan struct{}{true: make(chan struct{}, 2*maxConnections), false: make(chan struct{}, 2*maxConnections)}
	for {
		conn, err := l.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		root, by, err := c.checkPeer(conn)
		place := places[root]
		select {
		case place <- struct{}{}:
		default:
			go conn.Close() // which is slow if it holds a descriptor that is slow to close
			continue
		}
		if err == nil && len(place) > maxConnections {
			err = proto.Refuse("close one", "there are %d connections already", maxConnections)
		}
		all.Go(func() {
			defer func() { <-place }()
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			if err != nil {
				c.turnAway(conn, err)
			} else {
				err = c.serveOne(conn, by)
			}
			if err != nil && ctx.Err() == nil {
				c.log.Warn("connection ended", "problem", err)
			}
		})
	}
}

func (c *Core) turnAway(conn *net.UnixConn, why error) {
	_ = conn.SetDeadline(time.Now().Add(time.Second))
	_ = proto.WriteFrame(conn, refusal(why))
}

// refusal is the answer that says no.
func refusal(why error) proto.Response {
	r := proto.Response{Error: why.Error()}
	var refused *proto.Refused
	if errors.As(why, &refused) {
		r.Hint = refused.Hint
	}
	return r
}

// serveOne answers one connection. It trusts nothing that arrives: whoever is at
// the other end may be in an attacker's hands.
func (c *Core) serveOne(conn *net.UnixConn, by string) error {
	s := session{core: c, by: by}
	hurry := func() error { return conn.SetDeadline(time.Now().Add(frameTimeout)) }
	for {
		if err := conn.SetDeadline(time.Time{}); err != nil {
			return err
		}
		var q proto.Request
		files, err := proto.ReadFrame(conn, &q, hurry)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			c.turnAway(conn, err)
			return err
		}
		r, answer := s.handle(q, files)
		proto.CloseFiles(files)
		if err = hurry(); err == nil {
			err = proto.WriteFrame(conn, r, answer...)
		}
		proto.CloseFiles(answer)
		if err != nil {
			return err
		}
		if s.then != nil {
			s.then()
			s.then = nil
		}
	}
}

// checkPeer asks the kernel who opened the connection: root, the agent, or somebody
// who may not; and says it in words.
func (c *Core) checkPeer(conn *net.UnixConn) (root bool, by string, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false, "", err
	}
	var peer *unix.Ucred
	var optErr error
	err = raw.Control(func(fd uintptr) { peer, optErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, optErr); err != nil {
		return false, "", fmt.Errorf("read peer credentials: %w", err)
	}
	if peer.Uid != 0 && peer.Uid != c.config.AgentUID {
		return false, "", fmt.Errorf("user %d may not talk to the core", peer.Uid)
	}
	return peer.Uid == 0, fmt.Sprintf("user %d, process %d", peer.Uid, peer.Pid), nil
}

// session is the state of one connection: nothing but hello is answered before
// hello, and hello only once.
type session struct {
	core    *Core
	by      string // who is at the other end
	greeted bool
	claimed map[string]bool // paths bound on this connection
	then    func()          // what is done once the answer is sent; nil = nothing
}

// handle answers one request. The files stay the caller's, who closes those of the
// answer, too.
func (s *session) handle(q proto.Request, files []*os.File) (r proto.Response, answer []*os.File) {
	var err error
	switch {
	case (q.Op == proto.OpHello) == s.greeted:
		err = proto.Refuse("say hello first, and once", "%s is out of order", q.Op)
	case !wellFormed(q, len(files)):
		err = proto.Refuse("", "malformed %q request", q.Op)
	default:
		var image []byte
		if len(files) > 0 {
			image, err = readImage(files[0])
		}
		if err == nil {
			r, answer, err = s.answer(q, image)
		}
	}
	if err != nil {
		return refusal(err), nil
	}
	s.greeted = true
	return r, answer
}

// forms are the requests that there are: what each may hold beside its kind, and
// whether an image comes with it.
var forms = map[proto.Op]struct {
	holds func(proto.Request) proto.Request // nil = nothing
	image bool
}{
	proto.OpHello: {holds: func(q proto.Request) proto.Request { return proto.Request{Version: q.Version} }},
	proto.OpApply: {holds: func(q proto.Request) proto.Request {
		return proto.Request{Within: q.Within, Spare: q.Spare, Digest: q.Digest}
	}, image: true},
	proto.OpShadow: {holds: func(q proto.Request) proto.Request { return proto.Request{For: q.For} }, image: true},
	proto.OpQuarantine: {holds: func(q proto.Request) proto.Request {
		return proto.Request{Identity: q.Identity, For: q.For, Reason: q.Reason, Automatic: q.Automatic}
	}},
	proto.OpRelease: {holds: func(q proto.Request) proto.Request { return proto.Request{Identity: q.Identity} }},
	proto.OpBind:    {holds: func(q proto.Request) proto.Request { return proto.Request{Path: q.Path, Identity: q.Identity} }},
	proto.OpUnbind:  {holds: func(q proto.Request) proto.Request { return proto.Request{Path: q.Path} }},
	proto.OpPreview: {holds: func(q proto.Request) proto.Request { return proto.Request{Own: q.Own} }, image: true},
	proto.OpPrepare: {image: true},
	proto.OpStatus:  {}, proto.OpConfirm: {}, proto.OpRollback: {}, proto.OpUnshadow: {}, proto.OpImage: {}, proto.OpShadowed: {}, proto.OpForget: {}, proto.OpAudit: {},
}

// wellFormed says whether a request has the fields and descriptors of its kind,
// and no others.
func wellFormed(q proto.Request, files int) bool {
	form, known := forms[q.Op]
	var want proto.Request
	if form.holds != nil {
		want = form.holds(q)
	}
	want.Op = q.Op
	wantFiles := 0
	if form.image && q.Digest == "" { // one that was just previewed need not come again
		wantFiles = 1
	}
	// What does not fit a time.Duration would come out as another time.
	return known && q == want && files == wantFiles && min(q.Within, q.Spare, q.For) >= 0 &&
		q.Within <= maxTrial.Milliseconds() && q.Spare <= maxSpare.Milliseconds() && q.For <= maxQuarantine.Milliseconds()
}

// answer does what a request asks for. The image is nil where there is none.
func (s *session) answer(q proto.Request, image []byte) (r proto.Response, files []*os.File, err error) {
	c, lasting := s.core, time.Duration(q.For)*time.Millisecond
	switch q.Op {
	case proto.OpHello:
		if q.Version != proto.Version {
			return r, nil, proto.Refuse("install core and agent of one version", "the agent speaks protocol %d, the core %d", q.Version, proto.Version)
		}
		c.greeted(s.by)
		r.Hello = &proto.Hello{Version: proto.Version, ABI: abi.Version, CgroupRoot: c.tree.dir}
		files, err = c.hand()
	case proto.OpStatus:
		r.Status = c.Status()
	case proto.OpApply:
		how := change{previewed: q.Digest, within: time.Duration(q.Within) * time.Millisecond, spare: time.Duration(q.Spare) * time.Millisecond}
		r.Status, err = c.apply(image, how, s.by)
	case proto.OpPrepare:
		s.then, err = c.Prepare(image)
	case proto.OpPreview:
		r.Preview, err = c.Preview(image, q.Own)
	case proto.OpShadow:
		r.Status, err = c.beginShadow(image, lasting, s.by)
	case proto.OpUnshadow:
		r.Status, err = c.stopShadow(s.by)
	case proto.OpConfirm:
		r.Status, err = c.confirm(s.by)
	case proto.OpRollback:
		r.Status, err = c.rollback(s.by)
	case proto.OpQuarantine:
		r.Status, err = c.quarantine(q.Identity, lasting, q.Reason, q.Automatic, s.by)
	case proto.OpRelease:
		r.Status, err = c.release(q.Identity, s.by)
	case proto.OpImage, proto.OpShadowed:
		files, err = c.imageOf(q.Op == proto.OpShadowed)
	case proto.OpAudit:
		r.Audit, files, err = c.Audit()
	case proto.OpBind:
		// What is refused is not remembered: there is no end to it.
		if err = c.Bind(q.Path, q.Identity); err == nil && s.claimed == nil {
			s.claimed = map[string]bool{q.Path: true}
		} else if err == nil {
			s.claimed[q.Path] = true
		}
	case proto.OpUnbind:
		if err = c.Unbind(q.Path); err == nil {
			delete(s.claimed, q.Path)
		}
	case proto.OpForget:
		err = c.forget(s.claimed)
	}
	return r, files, err
}
