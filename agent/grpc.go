package agent

import (
	"context"
	"net"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/demarc/demarc/agent/hubble"
	"github.com/demarc/demarc/internal/version"
)

// Bounds of gRPC. A connection carries few streams at a time, and no large message.
const (
	maxStreams = 16
	maxMessage = 256 << 10 // bytes, of a request
)

// newGRPC is a gRPC server on the connections that a gate admitted.
func newGRPC(source hubble.Source, timeout time.Duration, log *zap.Logger) *grpc.Server {
	s := grpc.NewServer(
		grpc.Creds(admitted{}),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeader),
		grpc.ConnectionTimeout(headerTimeout),
		grpc.SharedWriteBuffer(true),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 5 * time.Minute, Time: time.Minute, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, r any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (answer any, err error) {
			defer asking(ctx)()
			defer caught(log, &err)
			return handle(ctx, r)
		}),
		grpc.ChainStreamInterceptor(func(srv any, to grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) (err error) {
			defer asking(to.Context())()
			defer caught(log, &err)
			timed := &timedStream{ServerStream: to, guest: guestOf(to.Context()), timeout: timeout}
			defer timed.stop()
			return handle(srv, timed)
		}),
	)
	hubble.Register(s, source)
	return s
}

// admitted are the credentials of a connection that a gate has looked at. There is no
// TLS: the socket is a local one, and the kernel says who is at its other end.
type admitted struct{}

// guestInfo takes the connection along to the handlers.
type guestInfo struct {
	credentials.CommonAuthInfo
	*guest
}

func (guestInfo) AuthType() string { return "peercred" }

func (admitted) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	info := guestInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}
	if p, ok := c.(*prefaced); ok {
		info.guest = p.guest
	}
	return c, info, nil
}

func (admitted) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errNoTLS
}
func (admitted) Info() credentials.ProtocolInfo          { return credentials.ProtocolInfo{} }
func (admitted) Clone() credentials.TransportCredentials { return admitted{} }
func (admitted) OverrideServerName(string) error         { return errNoTLS }

func guestOf(ctx context.Context) *guest {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(guestInfo); ok {
			return info.guest
		}
	}
	return nil
}

// asking notes that a connection is in use until the returned function is called.
func asking(ctx context.Context) func() {
	g := guestOf(ctx)
	if g == nil {
		return func() {}
	}
	g.asking.Add(1)
	return func() { g.asking.Add(-1) }
}

// caught turns a panic into an answer: one request must not end the others.
func caught(log *zap.Logger, err *error) {
	if p := recover(); p != nil {
		log.Error("panic in a request", zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
		*err = status.Error(codes.Internal, "the agent failed on this request; its log says how")
	}
}

// timedStream ends the connection of a reader that takes nothing for a time.
type timedStream struct {
	grpc.ServerStream
	guest   *guest
	timeout time.Duration
	timer   *time.Timer
}

func (s *timedStream) SendMsg(m any) error {
	if s.guest == nil {
		return s.ServerStream.SendMsg(m)
	}
	if s.timer == nil {
		s.timer = time.AfterFunc(s.timeout, func() { s.guest.Close() })
	} else {
		s.timer.Reset(s.timeout)
	}
	s.guest.writing.CompareAndSwap(0, time.Now().UnixNano())
	err := s.ServerStream.SendMsg(m)
	s.guest.writing.Store(0)
	s.timer.Stop()
	return err
}

func (s *timedStream) stop() {
	if s.timer != nil {
		s.timer.Stop()
	}
}

// rate counts events over the last minute, in seconds' steps.
type rate struct {
	mu    sync.Mutex
	at    [60]int64 // Unix second of a step
	count [60]uint64
}

// note takes the total so far.
func (r *rate) note(now time.Time, total uint64) {
	r.mu.Lock()
	i := now.Unix() % 60
	r.at[i], r.count[i] = now.Unix(), total
	r.mu.Unlock()
}

// per second since the oldest total of the last minute.
func (r *rate) per(now time.Time, total uint64) float64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	oldest, base := now.Unix(), total
	for i, at := range r.at {
		if at > now.Unix()-60 && at < oldest {
			oldest, base = at, r.count[i]
		}
	}
	if oldest == now.Unix() || total < base {
		return 0
	}
	return float64(total-base) / float64(now.Unix()-oldest)
}

// Tell implements hubble.Source.
func (s *service) Tell() hubble.Node {
	n := hubble.Node{Name: s.node, Version: version.String(), Address: "unix://" + s.server, Uptime: time.Since(s.since)}
	n.Kept, n.Room = s.link.store.Kept()
	for _, c := range s.link.store.Counts() {
		n.Seen += c.Received
	}
	n.Rate = s.link.rate.per(time.Now(), n.Seen)
	if names, _ := s.link.book.Current(); names != nil {
		for _, z := range names.Image.Zones {
			n.Zones = append(n.Zones, z.Name)
		}
		slices.Sort(n.Zones)
	}
	return n
}
