package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/hubble"
)

// Bounds of the API.
const (
	maxHeader     = 16 << 10 // bytes
	headerTimeout = 5 * time.Second
	bodyTimeout   = 60 * time.Second // an image of the largest size
	writeTimeout  = 30 * time.Second // that a reader may take nothing
	shutdownGrace = 2 * time.Second
)

// server is the task that serves the API on a Unix socket: JSON by HTTP/1.1, and
// Hubble's Observer by gRPC, which is what HTTP/2 is taken for. Everybody who may open
// the socket may read; only root and the agent's own user may change anything.
type server struct {
	path    string
	handler http.Handler
	source  hubble.Source
	gate    *gate
	log     *zap.Logger
	ready   chan struct{}
}

func newServer(path string, handler http.Handler, source hubble.Source, log *zap.Logger) *server {
	return &server{path: path, handler: handler, source: source, gate: newGate(), log: log, ready: make(chan struct{})}
}

// Ready is closed when the socket accepts connections.
func (s *server) Ready() <-chan struct{} { return s.ready }

func (s *server) String() string { return "api server" }

// Run serves until ctx ends, then ends all streams and removes the socket.
func (s *server) Run(ctx context.Context) error {
	l, err := listen(s.path)
	if err != nil {
		return err
	}
	defer l.Close()
	srv := &http.Server{
		Handler:           counted(s.handler),
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       withCaller,
		ErrorLog:          zap.NewStdLog(s.log),
	}
	rpc := newGRPC(s.source, writeTimeout, s.log)
	one, two := newHanded(l), newHanded(l)

	ctx, end := context.WithCancel(ctx)
	defer end()
	var working sync.WaitGroup
	failed := make(chan error, 3)
	for _, serve := range []func() error{
		func() error { return s.accept(l, one, two, &working) },
		func() error { return srv.Serve(one) },
		func() error { return rpc.Serve(two) },
	} {
		working.Go(func() {
			defer end()
			err := serve()
			// grpc has an error of its own for a server that is stopped before it serves.
			if err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, grpc.ErrServerStopped) && !errors.Is(err, net.ErrClosed) {
				failed <- err
			}
		})
	}
	close(s.ready)
	<-ctx.Done()
	// Whoever still waits for an answer gets a little time for it; streams see ctx end.
	l.Close()
	grace, cancel := context.WithTimeout(context.Background(), shutdownGrace)
	defer cancel()
	stopped := context.AfterFunc(grace, rpc.Stop)
	working.Go(func() {
		rpc.GracefulStop()
		stopped()
	})
	if srv.Shutdown(grace) != nil {
		srv.Close()
	}
	one.Close()
	two.Close()
	s.gate.closeSilent()
	working.Wait()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", s.path, err)
	default:
		return nil
	}
}

// accept admits connections and hands each to the server of what it speaks.
func (s *server) accept(l net.Listener, one, two *handed, working *sync.WaitGroup) error {
	for {
		c, err := l.Accept()
		if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
			s.log.Warn("accept a connection", zap.Error(err))
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if err != nil {
			return err
		}
		g, refused := s.gate.admit(c)
		if refused != nil {
			turnAway(g, refused)
			continue
		}
		working.Go(func() {
			switch c, http2 := speaks(g, headerTimeout); {
			case c == nil:
			case http2:
				two.give(c)
			default:
				one.give(c)
			}
		})
	}
}

// turnAway says why there is no room, as far as that can be said without waiting.
func turnAway(g *guest, why error) {
	body, _ := json.Marshal(&api.Error{Message: why.Error(), Hint: "end some of them"})
	_ = g.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
	fmt.Fprintf(g.Conn, "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
	g.Conn.Close()
}

// counted notes which connections are being answered.
func counted(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c, ok := r.Context().Value(caller{}).(*guest); ok {
			c.asking.Add(1)
			defer c.asking.Add(-1)
		}
		h.ServeHTTP(w, r)
	})
}

// caller is the context key of a request's connection.
type caller struct{}

func withCaller(ctx context.Context, c net.Conn) context.Context {
	if p, ok := c.(*prefaced); ok {
		return context.WithValue(ctx, caller{}, p.guest)
	}
	return ctx
}

// callerOf are the credentials of a request's peer, or nil.
func callerOf(r *http.Request) *unix.Ucred {
	if g, ok := r.Context().Value(caller{}).(*guest); ok {
		return g.cred
	}
	return nil
}

// mayChange reports whether a request may change anything. Unknown credentials may
// not.
func mayChange(r *http.Request) error {
	cred := callerOf(r)
	if cred != nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid()) {
		return nil
	}
	hint := "run it as root or as the agent's user"
	if cred == nil {
		return &api.Error{Code: http.StatusForbidden, Message: "the caller's user is not known", Hint: hint}
	}
	return &api.Error{Code: http.StatusForbidden, Message: fmt.Sprintf("user %d may not change the policy", cred.Uid), Hint: hint}
}

// answer makes a handler of a function that returns what is to be sent as JSON.
func answer(f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		v, err := f(r)
		if err != nil {
			refuse(w, err)
			return
		}
		write(w, http.StatusOK, v)
	}
}

func write(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v) // the caller has gone; nobody is left to tell
}

// refuse sends an error: an *api.Error as it is, a refusal of the core with its
// hint, and a core that is away as 503.
func refuse(w http.ResponseWriter, err error) {
	var known *api.Error
	var refused *proto.Refused
	switch {
	case errors.As(err, &known):
	case errors.As(err, &refused):
		known = &api.Error{Code: http.StatusUnprocessableEntity, Message: refused.Message, Hint: refused.Hint}
	case errors.Is(err, errAway):
		known = &api.Error{Code: http.StatusServiceUnavailable, Message: err.Error(), Hint: "start demarc-core; what it enforced before goes on meanwhile"}
	default:
		known = &api.Error{Code: http.StatusBadGateway, Message: err.Error()}
	}
	write(w, known.Code, known)
}
