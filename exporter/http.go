package exporter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/exporter-toolkit/web"
)

// Server is the task that serves /metrics, /healthz and /readyz over HTTP.
type Server struct {
	address string
	web     string // file with TLS and users; "" = neither
	handler http.Handler
	ready   chan struct{}

	mu    sync.Mutex
	bound net.Addr
}

// NewServer makes a server for HOST:PORT. The web configuration says who may ask, and
// how; it is checked here, and read again at each connection; "" = everybody, in plain
// text.
func NewServer(address, webConfig string, source Source) (*Server, error) {
	if err := checkWeb(webConfig); err != nil {
		return nil, err
	}
	return &Server{address: address, web: webConfig, handler: Handler(source), ready: make(chan struct{})}, nil
}

// Handler serves /metrics; /healthz, which is good while the agent runs; and
// /readyz, which is good while the core is connected and enforces.
func Handler(source Source) http.Handler {
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(Collector{source}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	// Three at a time: a scrape walks the kernel's counters.
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 3, Timeout: 10 * time.Second, EnableOpenMetrics: true}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		switch s := source.Snapshot(); {
		case !s.Connected:
			http.Error(w, "the core is not connected", http.StatusServiceUnavailable)
		case !s.Enforcing:
			http.Error(w, "not enforcing", http.StatusServiceUnavailable)
		default:
			fmt.Fprintln(w, "ok")
		}
	})
	return mux
}

// Ready is closed when the address accepts connections.
func (s *Server) Ready() <-chan struct{} { return s.ready }

func (s *Server) String() string { return "metrics server" }

// Addr is where it listens once it is ready: the port that a 0 became.
func (s *Server) Addr() net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bound
}

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", s.address)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", s.address, err)
	}
	s.mu.Lock()
	s.bound = l.Addr()
	s.mu.Unlock()
	srv := &http.Server{
		Handler:           s.handler,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      20 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	close(s.ready)
	if err := web.Serve(l, srv, &web.FlagConfig{WebConfigFile: &s.web}, slog.New(slog.DiscardHandler)); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", s.address, err)
	}
	return nil
}
