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
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
)

// Bounds of the API.
const (
	maxConnections = 64
	maxHeader      = 16 << 10 // bytes
	headerTimeout  = 5 * time.Second
	bodyTimeout    = 60 * time.Second // an image of the largest size
	writeTimeout   = 10 * time.Second // of one line to a slow reader
	shutdownGrace  = 2 * time.Second
)

// server is the task that serves the API on a Unix socket. Everybody who may open
// the socket may read; only root and the agent's own user may change anything.
type server struct {
	path    string
	handler http.Handler
	log     *zap.Logger
	ready   chan struct{}
}

func newServer(path string, handler http.Handler, log *zap.Logger) *server {
	return &server{path: path, handler: handler, log: log, ready: make(chan struct{})}
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
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	var open atomic.Int64
	srv := &http.Server{
		Handler:           s.handler,
		Protocols:         protocols,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       withCaller,
		ErrorLog:          zap.NewStdLog(s.log),
		ConnState: func(c net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				if open.Add(1) > maxConnections {
					c.Close()
				}
			case http.StateClosed, http.StateHijacked:
				open.Add(-1)
			}
		},
	}
	var stop sync.WaitGroup
	serving, served := context.WithCancel(ctx)
	stop.Go(func() {
		<-serving.Done()
		grace, cancel := context.WithTimeout(context.Background(), shutdownGrace)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close()
		}
	})
	close(s.ready)
	err = srv.Serve(l)
	served()
	stop.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve %s: %w", s.path, err)
}

// caller is the context key of the peer's credentials, as the kernel recorded them
// when it connected.
type caller struct{}

func withCaller(ctx context.Context, c net.Conn) context.Context {
	conn, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return ctx
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			ctx = context.WithValue(ctx, caller{}, cred)
		}
	})
	return ctx
}

// mayChange reports whether a request may change anything. Unknown credentials may
// not.
func mayChange(r *http.Request) error {
	cred, ok := r.Context().Value(caller{}).(*unix.Ucred)
	if ok && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid()) {
		return nil
	}
	hint := "run it as root or as the agent's user"
	if !ok {
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
