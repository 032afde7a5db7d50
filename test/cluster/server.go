// Package cluster runs a Kubernetes API server and its etcd in a namespace of a lab.
//
// Both are the real ones, built from their modules (test/apiserver). There is no
// scheduler and no controller: a test does what they would, as far as it matters.
package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/test/netlab"
)

// Programs names the directory that has etcd and kube-apiserver.
const Programs = "DEMARC_KUBERNETES"

// Port is where the API server serves.
const Port = 6443

// Server is an API server with its etcd.
type Server struct {
	t        testing.TB
	lab      *netlab.Lab
	at       *netlab.Namespace
	dir      string // files of both
	programs string
	ca       *authority
	etcd     *netlab.Process
	api      *netlab.Process
}

// New starts an API server and waits until it is ready. It uses RBAC and the Node
// authorizer, and writes down who asked for what.
func New(t testing.TB, lab *netlab.Lab, at *netlab.Namespace) *Server {
	t.Helper()
	s := &Server{t: t, lab: lab, at: at, dir: filepath.Join(lab.Dir(), "cluster"), programs: os.Getenv(Programs)}
	if s.programs == "" {
		t.Fatalf("set %s to the directory of etcd and kube-apiserver, as `make test-kubernetes` does", Programs)
	}
	s.check(os.Mkdir(s.dir, 0o700), "make directory")
	var err error
	s.ca, err = newAuthority()
	s.check(err, "make CA")
	cert, key, err := s.ca.serve(at.IP4.AsSlice())
	s.check(err, "make certificate")
	signing, err := newKey()
	s.check(err, "make key of tokens")
	for name, text := range map[string][]byte{
		"ca.crt": s.ca.pem, "api.crt": cert, "api.key": key, "sa.key": signing,
		// Of every question one line, once it is answered; of a watch, when it begins.
		"audit.yaml": []byte(`{"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "rules": [{"level": "Metadata"}]}`),
	} {
		s.check(os.WriteFile(filepath.Join(s.dir, name), text, 0o600), "write "+name)
	}
	s.etcd = at.Start(lab.Cgroup("etcd"), netlab.Command{Path: filepath.Join(s.programs, "etcd"), Args: []string{
		"--data-dir", filepath.Join(s.dir, "etcd"), "--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379",
		"--listen-peer-urls", "http://127.0.0.1:2380", "--log-level", "warn",
		"--unsafe-no-fsync", // what a test writes need not outlive the machine
	}})
	s.Start()
	return s
}

// Start starts the API server, and waits until it is ready.
func (s *Server) Start() {
	s.t.Helper()
	file := func(name string) string { return filepath.Join(s.dir, name) }
	s.api = s.at.Start(s.lab.Cgroup("kube-apiserver"), netlab.Command{Path: filepath.Join(s.programs, "kube-apiserver"), Args: []string{
		"--etcd-servers", "http://127.0.0.1:2379", "--bind-address", s.at.IP4.String(), "--advertise-address", s.at.IP4.String(), "--secure-port", fmt.Sprint(Port),
		"--tls-cert-file", file("api.crt"), "--tls-private-key-file", file("api.key"), "--client-ca-file", file("ca.crt"),
		"--service-account-issuer", "https://kubernetes.default.svc", "--service-account-key-file", file("sa.key"), "--service-account-signing-key-file", file("sa.key"),
		"--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction", "--service-cluster-ip-range", "10.96.0.0/24", "--endpoint-reconciler-type", "none",
		"--audit-policy-file", file("audit.yaml"), "--audit-log-path", file("audit.log"),
	}})
	admin := s.Admin()
	s.await("the API server is ready", func() error {
		if status, body, err := admin.try(http.MethodGet, "/readyz", "", nil); err != nil || status != http.StatusOK {
			return fmt.Errorf("%d %s %w", status, body, err)
		}
		return nil
	})
}

// Stop kills the API server, as when its machine loses power. What it has said stays
// said, in etcd.
func (s *Server) Stop() { s.api.Kill() }

// URL is where it serves.
func (s *Server) URL() string { return fmt.Sprintf("https://%s:%d", s.at.IP4, Port) }

// CA is the certificate of its authority.
func (s *Server) CA() string { return string(s.ca.pem) }

// Admin may do everything.
func (s *Server) Admin() *Client { return s.certified("admin", "system:masters") }

// Node is a kubelet.
func (s *Server) Node(name string) *Client { return s.certified("system:node:"+name, "system:nodes") }

func (s *Server) certified(user, group string) *Client {
	s.t.Helper()
	pair, err := s.ca.client(user, group)
	s.check(err, "make certificate")
	return newClient(s, &pair, "")
}

// Bearer is who has a token.
func (s *Server) Bearer(token string) *Client { return newClient(s, nil, token) }

// dial connects to it from its own machine.
func (s *Server) dial(ctx context.Context, _, _ string) (c net.Conn, err error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	err = s.at.Do(func() (err error) {
		c, err = d.DialContext(ctx, "tcp4", strings.TrimPrefix(s.URL(), "https://"))
		return err
	})
	return c, err
}

// Asked is what somebody asked for.
type Asked struct {
	Verb string `json:"verb"`
	URI  string `json:"requestURI"`
	User struct {
		Username string `json:"username"`
	} `json:"user"`
	Agent    string `json:"userAgent"`
	Stage    string `json:"stage"`
	Response struct {
		Code int `json:"code"`
	} `json:"responseStatus"`
}

// Asked lists what a user has asked for so far.
func (s *Server) Asked(user string) (all []Asked) {
	s.t.Helper()
	text, err := os.ReadFile(filepath.Join(s.dir, "audit.log"))
	s.check(err, "read audit log")
	for line := range strings.Lines(string(text)) {
		var a Asked
		if !strings.HasSuffix(line, "\n") {
			break // it is being written
		}
		s.check(json.Unmarshal([]byte(line), &a), "read audit log")
		if a.User.Username == user {
			all = append(all, a)
		}
	}
	return all
}

// await tries until it works, as long as both run.
func (s *Server) await(what string, try func() error) {
	s.t.Helper()
	var err error
	for end := time.Now().Add(3 * time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = try(); err == nil {
			return
		}
		for _, p := range []*netlab.Process{s.etcd, s.api} {
			select {
			case <-p.Ended():
				s.t.Fatalf("wait until %s: %s ended; it said:\n%s", what, p.Name, p.Output())
			default:
			}
		}
	}
	s.t.Fatalf("wait until %s: %v; it said:\n%s", what, err, s.api.Output())
}

func (s *Server) check(err error, doing string) {
	s.t.Helper()
	if err != nil {
		s.t.Fatalf("%s: %v", doing, err)
	}
}
