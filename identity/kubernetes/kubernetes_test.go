package kubernetes

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/demarc/demarc/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server answers lists and watches as an API server does, over TLS. It is none: what
// it does not do as a real one, these tests do not see.
type server struct {
	*httptest.Server
	dir string // with the token, the CA and a tree

	mu     sync.Mutex
	asked  []url.Values
	tokens []string
	peers  []string // who asked
	list   func(w http.ResponseWriter, r *http.Request)
	lines  chan string // events of watches; "" = the end of one
	reply  int         // to watches, if not 200
}

func serve(t *testing.T) *server {
	t.Helper()
	s := &server{dir: t.TempDir(), lines: make(chan string, 16)}
	s.Server = httptest.NewUnstartedServer(s)
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // handshakes that fail are meant to
	s.StartTLS()
	t.Cleanup(s.Close)
	s.write(t, "ca.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	s.write(t, "token", "first\n")
	return s
}

func (s *server) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	q := r.URL.Query()
	s.asked = append(s.asked, q)
	s.tokens = append(s.tokens, r.Header.Get("Authorization"))
	s.peers = append(s.peers, r.RemoteAddr)
	list, reply := s.list, s.reply
	s.mu.Unlock()
	switch {
	case r.URL.Path != "/api/v1/pods" || r.Method != http.MethodGet:
		http.NotFound(w, r)
	case q.Get("watch") == "":
		list(w, r)
	case reply != 0:
		w.WriteHeader(reply)
	default:
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		for {
			select {
			case l := <-s.lines:
				if l == "" {
					return
				}
				if l == "cut" {
					panic(http.ErrAbortHandler)
				}
				io.WriteString(w, l)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	}
}

// answer sets what lists say from now on.
func (s *server) answer(version string, pods ...string) {
	s.text(`{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"` + version + `"},"items":[` + strings.Join(pods, ",") + `]}`)
}

func (s *server) text(body string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, body) }
}

// last is the last question of a kind.
func (s *server) last(watch string) url.Values {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.asked) - 1; i >= 0; i-- {
		if s.asked[i].Get("watch") == watch {
			return s.asked[i]
		}
	}
	return nil
}

func (s *server) count(watch string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, q := range s.asked {
		if q.Get("watch") == watch {
			n++
		}
	}
	return n
}

func (s *server) options() Options {
	return Options{Server: s.URL, TokenFile: filepath.Join(s.dir, "token"), CAFile: filepath.Join(s.dir, "ca.crt"), Node: "n1"}
}

func uid(n int) string { return fmt.Sprintf("%08d-0000-4000-8000-000000000000", n) }

func id(digit string) string { return strings.Repeat(digit, 64) }

// podText is a pod of a node with one running container.
func podText(n int, name, node, container string, more ...string) string {
	return fmt.Sprintf(`{"metadata":{"namespace":"shop","name":%q,"uid":%q,"resourceVersion":"%d","labels":{"app":%q}%s},"spec":{"nodeName":%q,"serviceAccountName":"sa",
"containers":[{"name":"main","image":"img:1"}]},"status":{"containerStatuses":[{"name":"main","containerID":"containerd://%s","state":{"running":{"startedAt":"2026-01-01T00:00:00Z"}}},
{"name":"old","containerID":"containerd://%s","state":{"terminated":{"exitCode":0}}}]}}`, name, uid(n), 100+n, name, strings.Join(more, ""), node, container, id("e"))
}

// group makes the cgroup of a container.
func (s *server) group(t *testing.T, n int, container string) string {
	t.Helper()
	at := "/kubepods/burstable/pod" + uid(n) + "/" + container
	s.mkdir(t, at)
	return at
}

func (s *server) mkdir(t *testing.T, at string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(s.dir, "tree", at), 0o755); err != nil {
		t.Fatal(err)
	}
}

// named is what a container of podText becomes.
func named(n int, name, container, at string) []identity.Workload {
	return []identity.Workload{
		{Name: "main", Image: "img:1", Cgroup: at, Labels: map[string]string{"io.kubernetes.container.name": "main",
			"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "shop", "io.kubernetes.pod.uid": uid(n)}},
		{Namespace: "shop", Name: name, Labels: map[string]string{"app": name}, ServiceAccount: "sa", Cgroup: at},
	}
}

// follow runs a provider on the server.
func (s *server) follow(t *testing.T, change func(*Provider)) *Provider {
	t.Helper()
	p := New(s.options(), func() string { return filepath.Join(s.dir, "tree") })
	p.retry = 2 * time.Millisecond
	if change != nil {
		change(p)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return p
}

// until waits for a condition.
func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not so after a minute: %s", what)
		}
	}
}

func untilNamed(t *testing.T, p *Provider, want []identity.Workload) {
	t.Helper()
	var got []identity.Workload
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		inv, _, _ := p.Current()
		if inv != nil {
			got = inv.Workloads
			if cmp.Equal(want, got) {
				return
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("workloads (-want +got):\n%s", cmp.Diff(want, got))
		}
	}
}

// What is listed and what happens after it is known, and the server is asked for this
// node's pods only, with a token that is read anew.
func TestListAndWatch(t *testing.T) {
	s := serve(t)
	a, b := s.group(t, 1, id("a")), s.group(t, 2, id("b"))
	// A server that answers what was not asked: a pod of another node.
	s.group(t, 3, id("c"))
	s.answer("10", podText(1, "api", "n1", id("a")), podText(3, "foreign", "n2", id("c")))
	p := s.follow(t, nil)
	one := named(1, "api", id("a"), a)
	untilNamed(t, p, one)
	s.lines <- `{"type":"ADDED","object":` + podText(2, "db", "n1", id("b")) + `}`
	both := append(named(1, "api", id("a"), a), named(2, "db", id("b"), b)...)
	untilNamed(t, p, both)
	s.lines <- `{"type":"ADDED","object":` + podText(3, "foreign", "n2", id("c")) + `}`
	s.lines <- `{"type":"DELETED","object":` + podText(2, "db", "n1", id("b")) + `}`
	untilNamed(t, p, one)
	// A bookmark moves the version that a watch goes on from; the end of one is no problem.
	s.write(t, "token", "second")
	s.lines <- `{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"555"}}}`
	s.lines <- ""
	until(t, "a watch from the bookmark", func() bool { return s.last("1").Get("resourceVersion") == "555" })
	if _, _, err := p.Current(); err != nil {
		t.Errorf("the end of a watch is a problem: %v", err)
	}
	if n := s.count(""); n != 1 {
		t.Errorf("listed %d times, want once", n)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, q := range s.asked {
		if q.Get("fieldSelector") != "spec.nodeName=n1" {
			t.Errorf("question %d is for %q", i, q)
		}
		if q.Get("watch") == "1" && (q.Get("allowWatchBookmarks") != "true" || q.Get("timeoutSeconds") == "") {
			t.Errorf("watch %d is %q", i, q)
		}
	}
	if got, want := []string{s.tokens[0], s.tokens[len(s.tokens)-1]}, []string{"Bearer first", "Bearer second"}; !cmp.Equal(got, want) {
		t.Errorf("tokens %q, want %q", got, want)
	}
}

// A list comes in pages.
func TestPages(t *testing.T) {
	s := serve(t)
	a, b := s.group(t, 1, id("a")), s.group(t, 2, id("b"))
	s.list = func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("continue") == "" {
			io.WriteString(w, `{"metadata":{"resourceVersion":"10","continue":"more"},"items":[`+podText(1, "api", "n1", id("a"))+`]}`)
			return
		}
		io.WriteString(w, `{"items":[`+podText(2, "db", "n1", id("b"))+`],"metadata":{"resourceVersion":"10"}}`)
	}
	untilNamed(t, s.follow(t, nil), append(named(1, "api", id("a"), a), named(2, "db", id("b"), b)...))
}

// What goes wrong on the way leaves who was named his name, and is over when the server
// is back: the watch goes on where it was, or a list says what happened.
func TestNoGap(t *testing.T) {
	gone := `{"type":"ERROR","object":{"kind":"Status","status":"Failure","reason":"Expired","code":410}}`
	for _, tt := range []struct {
		name   string
		lines  []string
		relist bool
	}{
		{"410", []string{gone}, true},
		{"disconnect", []string{"cut"}, false},
		{"truncated", []string{`{"type":"ADDED","obj`, ""}, false},
		{"no JSON", []string{`<html>`}, true},
		{"endless event", []string{`{"type":"` + strings.Repeat("x", maxPod), ""}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := serve(t)
			a, b := s.group(t, 1, id("a")), s.group(t, 2, id("b"))
			s.answer("10", podText(1, "api", "n1", id("a")))
			p := s.follow(t, nil)
			one := named(1, "api", id("a"), a)
			untilNamed(t, p, one)
			until(t, "a watch", func() bool { return s.count("1") == 1 })
			// From here nobody gets through until the problem was seen.
			s.mu.Lock()
			s.reply = http.StatusServiceUnavailable
			s.list = func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }
			s.mu.Unlock()
			for _, l := range tt.lines {
				s.lines <- l
			}
			until(t, "a problem", func() bool {
				inv, _, err := p.Current()
				if inv == nil || !cmp.Equal(inv.Workloads, one) {
					t.Fatalf("a gap: %v", inv)
				}
				return err != nil && len(s.questions()) > 4
			})
			lists := s.count("")
			s.answer("20", podText(1, "api", "n1", id("a")), podText(2, "db", "n1", id("b")))
			s.mu.Lock()
			s.reply = 0
			s.mu.Unlock()
			if !tt.relist {
				if lists != 1 {
					t.Errorf("listed %d times", lists)
				}
				s.lines <- `{"type":"ADDED","object":` + podText(2, "db", "n1", id("b")) + `}`
			} else if got := s.last(""); got.Has("resourceVersion") {
				t.Errorf("a later list may be old: %q", got)
			}
			untilNamed(t, p, append(one, named(2, "db", id("b"), b)...))
			until(t, "no problem", func() bool { _, _, err := p.Current(); return err == nil })
		})
	}
}

// A renewed connection is another one, that goes on where the first one was.
func TestRenew(t *testing.T) {
	s := serve(t)
	a, b := s.group(t, 1, id("a")), s.group(t, 2, id("b"))
	s.answer("10", podText(1, "api", "n1", id("a")))
	p := s.follow(t, nil)
	one := named(1, "api", id("a"), a)
	untilNamed(t, p, one)
	until(t, "a watch", func() bool { return s.count("1") == 1 })
	p.Renew()
	until(t, "another watch", func() bool { return s.count("1") == 2 })
	s.mu.Lock()
	if first, second := s.peers[len(s.peers)-2], s.peers[len(s.peers)-1]; first == second {
		t.Errorf("both watches are on the connection of %s", first)
	}
	s.mu.Unlock()
	s.lines <- `{"type":"ADDED","object":` + podText(2, "db", "n1", id("b")) + `}`
	untilNamed(t, p, append(one, named(2, "db", id("b"), b)...))
	if _, _, err := p.Current(); err != nil || s.count("") != 1 || s.last("1").Get("resourceVersion") != "10" {
		t.Errorf("%v; %d lists, watch from %s", err, s.count(""), s.last("1").Get("resourceVersion"))
	}
}

// Who may not connect is told why.
func TestExplained(t *testing.T) {
	err := explained(fmt.Errorf("watch pods: %w", &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.EPERM)}))
	if want := "watch pods: dial: connect: operation not permitted\nhint: the policy in force does not let the agent's processes reach it; declare a crossing for them"; err.Error() != want {
		t.Errorf("%q, want %q", err, want)
	}
	if err := explained(io.ErrUnexpectedEOF); err != io.ErrUnexpectedEOF {
		t.Error(err)
	}
}

// What a watch says is taken, or said to make no sense, and then it does not go on where
// it was.
func TestReadEvents(t *testing.T) {
	const good = `{"type":"ADDED","object":{"metadata":{"uid":"u"}}}`
	for _, tt := range []struct {
		name, text string
		events     int
		want       string
		anew       bool
	}{
		{"OK", good + "\n" + good, 2, "", false},
		{"OK nothing", "", 0, "", false},
		{"bad truncated", good + `{"type":"ADDED","obj`, 1, "unexpected EOF", false},
		{"bad old", `{"type":"ERROR","object":{"kind":"Status","status":"Failure","code":410}}`, 0, "the API server has forgotten what came after the last answer", true},
		{"bad error", good + `{"type":"ERROR","object":{"kind":"Status","status":"Failure","code":500}}`, 1, "the answer makes no sense: it reports error 500", true},
		{"bad type", `{"type":"X","object":{}}`, 0, `the answer makes no sense: it reports "X"`, true},
		{"bad text", `<html>`, 0, "the answer makes no sense: invalid character '<' looking for beginning of value", true},
		{"bad kind", `{"type":"ADDED","object":[]}`, 0, "the answer makes no sense: json: cannot unmarshal array into Go value of type kubernetes.pod", true},
		{"bad long", `{"type":"` + strings.Repeat("x", 2*maxPod), 0, "the answer is too long", true},
	} {
		n, got := 0, ""
		err := readEvents(strings.NewReader(tt.text), func(event) error { n++; return nil })
		if err != nil {
			got = err.Error()
		}
		if n != tt.events || got != tt.want || anew(err) != tt.anew {
			t.Errorf("%s: %d events, %q, anew %v; want %d, %q, %v", tt.name, n, got, anew(err), tt.events, tt.want, tt.anew)
		}
	}
}

func (s *server) questions() []url.Values {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

// Lists that are no good name nobody, and say why.
func TestBadLists(t *testing.T) {
	many := make([]string, maxPods+1)
	for i := range many {
		many[i] = podText(i+10, fmt.Sprintf("p%d", i), "n1", id("a"))
	}
	for _, tt := range []struct {
		name string
		list func(w http.ResponseWriter, r *http.Request)
		want string
	}{
		{"bad truncated", say(`{"metadata":{"resourceVersion":"1"},"items":[` + podText(1, "api", "n1", id("a")) + `]`), "list pods: unexpected EOF"},
		{"bad truncated pod", say(`{"metadata":{"resourceVersion":"1"},"items":[{"metadata":{`), "list pods: unexpected EOF"},
		{"bad empty", say(``), "list pods: unexpected EOF"},
		{"bad status", say(`{"kind":"Status","code":500}`), "list pods: the answer is no list"},
		{"bad no version", say(`{"items":[]}`), "list pods: the answer is no list"},
		{"bad items", say(`{"items":{}}`), "list pods: items are no list"},
		{"bad oversized pod", say(`{"items":[{"metadata":{"name":"` + strings.Repeat("x", 2*maxPod) + `"}}]}`), "list pods: the answer is too long"},
		{"bad oversized field", say(`{"x":"` + strings.Repeat("x", 2*maxPod) + `"}`), "list pods: the answer is too long"},
		{"bad pods without end", say(`{"metadata":{"resourceVersion":"1"},"items":[` + strings.Join(many, ",") + `]}`), "list pods: more than 2048 pods are on this node"},
		{"bad pages without end", say(`{"metadata":{"resourceVersion":"1","continue":"x"},"items":[]}`), "list pods: a page brings nothing new"},
		{"bad token", code(401), "list pods: it does not know the token (401)"},
		{"bad role", code(403), "list pods: the service account may not list and watch pods (403)"},
		{"bad redirect", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) }, "list pods: it answers 302"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := serve(t)
			s.group(t, 1, id("a"))
			s.list = tt.list
			p := s.follow(t, nil)
			until(t, "a problem", func() bool { _, _, err := p.Current(); return err != nil })
			if inv, _, err := p.Current(); inv != nil || err.Error() != tt.want {
				t.Errorf("%v, %q; want %q", inv, err, tt.want)
			}
			if n := s.count("1"); n != 0 {
				t.Errorf("%d watches", n)
			}
		})
	}
}

func say(body string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, body) }
}

func code(n int) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(n) }
}

// A server whose certificate the CA did not sign gets no token.
func TestForeignServer(t *testing.T) {
	s := serve(t)
	s.answer("1")
	right, err := os.ReadFile(filepath.Join(s.dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	other, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	s.write(t, "ca.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other})))
	p := s.follow(t, nil)
	until(t, "a problem", func() bool { _, _, err := p.Current(); return err != nil })
	if _, _, err := p.Current(); !strings.Contains(err.Error(), "signed by unknown authority") {
		t.Error(err)
	}
	if n := len(s.questions()); n != 0 {
		t.Errorf("%d questions", n)
	}
	// The right one is read at the next connection.
	s.write(t, "ca.crt", string(right))
	until(t, "no problem", func() bool { inv, _, err := p.Current(); return inv != nil && err == nil })
}

// Only a place that carries the id, below the pod that the server names, is believed.
func TestPlaces(t *testing.T) {
	pods := func(texts ...string) (all []pod) {
		for _, text := range texts {
			var k pod
			if err := json.Unmarshal([]byte(text), &k); err != nil {
				t.Fatal(err)
			}
			all = append(all, k)
		}
		return all
	}
	api := podText(1, "api", "n1", id("a"))
	systemd := "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + strings.ReplaceAll(uid(1), "-", "_") + ".slice"
	good := "/kubepods/pod" + uid(1) + "/" + id("a")
	hash := strings.Repeat("5", 32)
	mirror := podText(1, "api", "n1", id("a"), `,"annotations":{"kubernetes.io/config.hash":"`+hash+`","kubernetes.io/config.mirror":"`+hash+`"}`)
	static := named(1, "api", id("a"), "/kubepods/pod"+hash+"/"+id("a"))
	static[0].Labels["io.kubernetes.pod.uid"] = hash
	for _, tt := range []struct {
		name    string
		pods    []pod
		groups  []string
		want    []identity.Workload
		strange string
		missing bool
	}{
		{"OK cgroupfs", pods(api), []string{good}, named(1, "api", id("a"), good), "", false},
		{"OK systemd", pods(api), []string{systemd + "/cri-containerd-" + id("a") + ".scope"}, named(1, "api", id("a"), systemd+"/cri-containerd-"+id("a")+".scope"), "", false},
		{"OK group of the kubelet", pods(api), []string{"/kubelet/kubelet-kubepods.slice/x-pod" + uid(1) + ".slice/crio-" + id("a") + ".scope"},
			named(1, "api", id("a"), "/kubelet/kubelet-kubepods.slice/x-pod"+uid(1)+".slice/crio-"+id("a")+".scope"), "", false},
		{"OK static pod", pods(mirror), []string{"/kubepods/pod" + hash + "/" + id("a")}, static, "", false},
		{"bad hash of another pod", pods(podText(1, "api", "n1", id("a"), `,"annotations":{"kubernetes.io/config.hash":"`+uid(2)+`","kubernetes.io/config.mirror":"x"}`)),
			[]string{"/kubepods/pod" + uid(2) + "/" + id("a")}, nil, "container aaaaaaaaaaaa of shop/api: /kubepods/pod" + uid(2) + "/" + id("a") + " is not below its pod: not bound", false},
		{"OK the sandbox waits", pods(api), []string{good, "/kubepods/pod" + uid(1) + "/" + id("f")}, named(1, "api", id("a"), good), "", false},
		{"OK imitated inside another container", pods(api), []string{good, "/kubepods/pod" + uid(2) + "/" + id("b") + "/kubepods/pod" + uid(1) + "/" + id("a")},
			named(1, "api", id("a"), good), "", false},
		{"bad nowhere", pods(api), nil, nil, "", true},
		{"bad only imitated", pods(api), []string{"/kubepods/pod" + uid(2) + "/" + id("b") + "/pod" + uid(1) + "/" + id("a")}, nil, "", true},
		{"bad not the kubelet's", pods(api), []string{"/system.slice/pod" + uid(1) + "/" + id("a")}, nil, "", true},
		{"bad other pod", pods(api), []string{"/kubepods/pod" + uid(2) + "/" + id("a")}, nil,
			"container aaaaaaaaaaaa of shop/api: /kubepods/pod" + uid(2) + "/" + id("a") + " is not below its pod: not bound", false},
		{"bad no pod", pods(api), []string{"/kubepods/" + id("a")}, nil, "container aaaaaaaaaaaa of shop/api: /kubepods/" + id("a") + " is not below its pod: not bound", false},
		{"bad two places", pods(api), []string{good, systemd + "/cri-containerd-" + id("a") + ".scope"}, nil,
			"container aaaaaaaaaaaa of shop/api: both " + good + " and " + systemd + "/cri-containerd-" + id("a") + ".scope carry its id: not bound", false},
		{"bad two pods", pods(api, podText(2, "db", "n1", id("a"))), []string{good}, nil, "container aaaaaaaaaaaa: both shop/api and shop/db have it: not bound", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &server{dir: t.TempDir()}
			for _, g := range tt.groups {
				s.mkdir(t, g)
			}
			inv, strange, missing := workloads(tt.pods, &tree{root: func() string { return filepath.Join(s.dir, "tree") }})
			told := ""
			for _, err := range strange {
				told += err.Error()
			}
			if d := cmp.Diff(tt.want, inv.Workloads); d != "" || missing != tt.missing {
				t.Errorf("missing %v, workloads (-want +got):\n%s", missing, d)
			}
			if told != tt.strange {
				t.Errorf("told %q, want %q", told, tt.strange)
			}
		})
	}
}

// A container whose group comes after its name is found when it is there.
func TestLateGroup(t *testing.T) {
	s := serve(t)
	s.mkdir(t, "/kubepods")
	s.answer("10", podText(1, "api", "n1", id("a")))
	p := s.follow(t, nil)
	until(t, "a list", func() bool { inv, _, _ := p.Current(); return inv != nil })
	untilNamed(t, p, named(1, "api", id("a"), s.group(t, 1, id("a"))))
}

// An agent in a pod claims its own containers before it has heard anything, or it could
// not ask. That is not taken for all.
func TestItself(t *testing.T) {
	s := serve(t)
	at := s.group(t, 7, id("d"))
	s.list = code(http.StatusServiceUnavailable)
	p := s.follow(t, func(p *Provider) { p.own = uid(7) })
	untilNamed(t, p, []identity.Workload{{Name: "demarc", Cgroup: at}})
	if inv, _, _ := p.Current(); !inv.Partial {
		t.Error("it is taken for all who run")
	}
	s.answer("10", podText(7, "demarc", "n1", id("d")))
	untilNamed(t, p, named(7, "demarc", id("d"), at))
	if inv, _, _ := p.Current(); inv.Partial {
		t.Error("it is not taken for all who run")
	}
}

func TestOptions(t *testing.T) {
	for _, tt := range []struct{ name, server, node, want string }{
		{"OK", "https://10.96.0.1:443", "n1", ""},
		{"OK version 6", "https://[fd00::1]:6443/", "n1.example", ""},
		{"OK no port", "https://10.96.0.1", "n1", ""},
		{"bad plain", "http://127.0.0.1:8080", "n1", `server "http://127.0.0.1:8080": want https://ADDRESS:PORT`},
		{"bad name", "https://kubernetes.default:443", "n1", `server "https://kubernetes.default:443": "kubernetes.default" is no address`},
		{"bad path", "https://10.96.0.1/x", "n1", `server "https://10.96.0.1/x": want https://ADDRESS:PORT`},
		{"bad port", "https://10.96.0.1:0", "n1", `server "https://10.96.0.1:0": "0" is no port`},
		{"bad node", "https://10.96.0.1", "n1,spec.nodeName!=n1", `node name "n1,spec.nodeName!=n1" is no name of a Kubernetes node`},
	} {
		got := ""
		if err := (Options{Server: tt.server, Node: tt.node}).Check(); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}
