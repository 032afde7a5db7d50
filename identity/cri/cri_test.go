package cri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/demarc/demarc/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// lists answers as a runtime does; test/systemd asks a real one.
type lists struct {
	runtime.UnimplementedRuntimeServiceServer
	pods       []*runtime.PodSandbox
	containers []*runtime.Container
	info       map[string]string // by id; none = it is gone
}

func (l *lists) ListPodSandbox(context.Context, *runtime.ListPodSandboxRequest) (*runtime.ListPodSandboxResponse, error) {
	return &runtime.ListPodSandboxResponse{Items: l.pods}, nil
}

func (l *lists) ListContainers(context.Context, *runtime.ListContainersRequest) (*runtime.ListContainersResponse, error) {
	return &runtime.ListContainersResponse{Containers: l.containers}, nil
}

func (l *lists) PodSandboxStatus(_ context.Context, r *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
	info, ok := l.info[r.PodSandboxId]
	if !ok {
		return nil, errors.New("not found")
	}
	return &runtime.PodSandboxStatusResponse{Info: map[string]string{"info": info}}, nil
}

func (l *lists) ContainerStatus(_ context.Context, r *runtime.ContainerStatusRequest) (*runtime.ContainerStatusResponse, error) {
	info, ok := l.info[r.ContainerId]
	if !ok {
		return nil, errors.New("not found")
	}
	return &runtime.ContainerStatusResponse{Info: map[string]string{"info": info}}, nil
}

func id(digit string) string { return strings.Repeat(digit, 64) }

func at(digit string) string { return "/kubepods.slice/cri-containerd-" + id(digit) + ".scope" }

// in says in which cgroup processes are, and that there are no others.
func in(processes map[int]string) func(int) (string, error) {
	return func(pid int) (string, error) {
		if at, ok := processes[pid]; ok {
			return at, nil
		}
		return "", os.ErrNotExist
	}
}

// follow runs a provider on a runtime that has the given processes.
func follow(t *testing.T, l *lists, process func(int) (string, error)) *Provider {
	t.Helper()
	return followAt(t, l, process, func(l net.Listener) net.Listener { return l })
}

func followAt(t *testing.T, l *lists, process func(int) (string, error), through func(net.Listener) net.Listener) *Provider {
	t.Helper()
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	listener = through(listener)
	server := grpc.NewServer()
	runtime.RegisterRuntimeServiceServer(server, l)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	if err := os.Chmod(socket, 0o660); err != nil {
		t.Fatal(err)
	}
	p := New(socket, func(cgroup string) (string, bool) { return cgroup, !strings.HasPrefix(cgroup, "/elsewhere") })
	p.owner = uint32(os.Geteuid())
	p.process = process
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-p.Changed():
	case <-time.After(time.Minute):
		t.Fatal("no answer")
	}
	return p
}

// Who runs is told with the place that carries his id, and nobody else.
func TestProvider(t *testing.T) {
	pid := func(n int) string { return fmt.Sprintf(`{"pid":%d}`, n) }
	pods := []*runtime.PodSandbox{{Id: id("a"), Metadata: &runtime.PodSandboxMetadata{Namespace: "shop", Name: "api-1"}, Labels: map[string]string{"app": "api"}}}
	container := func(digit string) *runtime.Container {
		return &runtime.Container{Id: id(digit), PodSandboxId: id("a"), Metadata: &runtime.ContainerMetadata{Name: "main"}, Image: &runtime.ImageSpec{UserSpecifiedImage: "img:1"}}
	}
	pod := identity.Workload{Namespace: "shop", Name: "api-1", Labels: map[string]string{"app": "api"}, Cgroup: at("a")}
	inner := pod
	inner.Cgroup = at("b")
	tests := []struct {
		name      string
		info      map[string]string
		processes map[int]string
		want      []identity.Workload
		problem   string
	}{
		{"OK", map[string]string{id("a"): pid(1), id("b"): pid(2)}, map[int]string{1: at("a"), 2: at("b") + "/child"},
			[]identity.Workload{pod, {Name: "main", Image: "img:1", Cgroup: at("b")}, inner}, ""},
		{"bad number taken by another", map[string]string{id("a"): pid(1), id("b"): pid(2)}, map[int]string{1: at("a"), 2: at("c")}, []identity.Workload{pod}, "process 2 is in " + at("c") + ", which is not container bbbbbbbbbbbb"},
		{"bad number taken by a service", map[string]string{id("a"): pid(1), id("b"): pid(2)}, map[int]string{1: at("a"), 2: "/system.slice/nginx.service"}, []identity.Workload{pod}, "process 2 is in /system.slice/nginx.service, which is not container bbbbbbbbbbbb"},
		{"bad not known", map[string]string{id("a"): pid(1)}, map[int]string{1: at("a")}, []identity.Workload{pod}, "not found"},
		{"bad no such process", map[string]string{id("a"): pid(1), id("b"): pid(2)}, map[int]string{1: at("a")}, []identity.Workload{pod}, "file does not exist"},
		{"bad no process", map[string]string{id("a"): pid(1), id("b"): "{}"}, map[int]string{1: at("a")}, []identity.Workload{pod}, "the runtime does not say which process container bbbbbbbbbbbb has"},
		{"bad nonsense", map[string]string{id("a"): pid(1), id("b"): "pid"}, map[int]string{1: at("a")}, []identity.Workload{pod}, "the runtime does not say which process container bbbbbbbbbbbb has"},
		{"OK elsewhere", map[string]string{id("a"): pid(1), id("b"): pid(2)}, map[int]string{1: at("a"), 2: "/elsewhere" + at("b")}, []identity.Workload{pod}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := follow(t, &lists{pods: pods, containers: []*runtime.Container{container("b")}, info: tt.info}, in(tt.processes))
			// At the first look nothing is told: who has just ended is no problem.
			inv, _, err := p.Current()
			if err != nil {
				t.Fatal(err)
			}
			want := ""
			if tt.problem != "" {
				want = "container bbbbbbbbbbbb (main): " + tt.problem + ": it stays pending"
				<-p.Changed()
			}
			time.Sleep(4 * pollInterval) // and it is told once
			select {
			case <-p.Changed():
				t.Error("it was told again")
			default:
			}
			if inv, _, err = p.Current(); err != nil && err.Error() != want || err == nil && want != "" {
				t.Errorf("problem %v, want %q", err, want)
			}
			if diff := cmp.Diff(tt.want, inv.Workloads); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// A container that could not be placed and then can is a problem no more; names that
// would move a terminal's cursor do not.
func TestProblemEnds(t *testing.T) {
	bad := "ma\x1b[2Jin"
	containers := []*runtime.Container{{Id: id("b"), Metadata: &runtime.ContainerMetadata{Name: bad}}}
	var moved atomic.Bool
	p := follow(t, &lists{containers: containers, info: map[string]string{id("b"): `{"pid":2}`}}, func(int) (string, error) {
		if moved.Load() {
			return at("b"), nil
		}
		return at("c"), nil
	})
	<-p.Changed()
	want := `container bbbbbbbbbbbb (ma\x1b[2Jin): process 2 is in ` + at("c") + `, which is not container bbbbbbbbbbbb: it stays pending`
	if _, _, err := p.Current(); err == nil || err.Error() != want {
		t.Errorf("problem %v, want %q", err, want)
	}
	moved.Store(true)
	<-p.Changed()
	inv, _, err := p.Current()
	if err != nil || len(inv.Workloads) != 1 || inv.Workloads[0].Cgroup != at("b") {
		t.Errorf("%v, %v", inv, err)
	}
}

// stopping is a listener whose connections say no more, from the middle of whatever they
// say next, until they are let go on.
type stopping struct {
	net.Listener
	mu   sync.Mutex
	on   *sync.Cond
	stop bool
	keep float64 // of what is said next, that still comes
}

func (s *stopping) Accept() (net.Conn, error) {
	c, err := s.Listener.Accept()
	return half{c, s}, err
}

func (s *stopping) let(stop bool, keep float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop, s.keep = stop, keep
	s.on.Broadcast()
}

type half struct {
	net.Conn
	of *stopping
}

func (h half) Write(b []byte) (int, error) {
	h.of.mu.Lock()
	defer h.of.mu.Unlock()
	said := 0
	for first := true; h.of.stop; first = false {
		if n := int(float64(len(b)) * h.of.keep); first && n > 0 {
			if _, err := h.Conn.Write(b[:n]); err != nil {
				return 0, err
			}
			said = n
		}
		h.of.on.Wait()
	}
	n, err := h.Conn.Write(b[said:])
	return said + n, err
}

// A runtime that hangs, before a word or in the middle of one, takes nobody's name, and
// that it hangs is told. When it goes on, so does everything. (X12)
func TestX12RuntimeHangs(t *testing.T) {
	for _, tt := range []struct {
		name string
		keep float64
	}{{"before a word", 0}, {"in the middle of one", 0.5}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := &stopping{}
			l.on = sync.NewCond(&l.mu)
			containers := []*runtime.Container{{Id: id("b"), Metadata: &runtime.ContainerMetadata{Name: "main"}}}
			p := followAt(t, &lists{containers: containers, info: map[string]string{id("b"): `{"pid":2}`}}, in(map[int]string{2: at("b")}),
				func(under net.Listener) net.Listener { l.Listener = under; return l })
			// await waits until a problem is told, or none; who runs stays the same.
			await := func(told bool) time.Duration {
				t.Helper()
				for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
					inv, _, err := p.Current()
					if inv == nil || len(inv.Workloads) != 1 || inv.Workloads[0].Cgroup != at("b") {
						t.Fatalf("%+v, %v", inv, err)
					}
					if told && err != nil && strings.Contains(err.Error(), "DeadlineExceeded") || !told && err == nil {
						return time.Since(start)
					}
					if time.Since(start) > time.Minute {
						t.Fatalf("problem told: %v, want one: %t", err, told)
					}
				}
			}
			await(false)
			l.let(true, tt.keep)
			defer l.let(false, 0)
			took := await(true)
			l.let(false, 0)
			again := await(false)
			t.Logf("told after %s, in order again after %s", took.Round(time.Millisecond), again.Round(time.Millisecond))
			if again > 5*time.Second { // 2 on a machine that never stands still
				t.Errorf("in order again only after %s", again)
			}
		})
	}
	t.Run("from the first", func(t *testing.T) {
		t.Parallel()
		socket := filepath.Join(t.TempDir(), "s")
		listener, err := net.Listen("unix", socket) // which nobody accepts from
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		if err := os.Chmod(socket, 0o660); err != nil {
			t.Fatal(err)
		}
		p := New(socket, nil)
		p.owner = uint32(os.Geteuid())
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- p.Run(ctx) }()
		defer func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}()
		select {
		case <-p.Changed():
		case <-time.After(time.Minute):
			t.Fatal("nothing is told")
		}
		if inv, _, err := p.Current(); inv != nil || err == nil || !strings.Contains(err.Error(), "list pods: ") {
			t.Errorf("%+v, %v", inv, err)
		}
	})
}

// A socket that others than root could have put there says nothing. (C17)
func TestC17ForeignSocket(t *testing.T) {
	dir := t.TempDir()
	listener, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	socket := filepath.Join(dir, "s")
	p := New(socket, nil)
	me := uint32(os.Geteuid())
	for _, tt := range []struct {
		name  string
		spoil func() error
	}{
		{"OK", func() error { p.owner = me; return os.Chmod(socket, 0o660) }},
		{"bad mode", func() error { return os.Chmod(socket, 0o777) }},
		{"bad owner", func() error { p.owner = me + 1; return os.Chmod(socket, 0o660) }},
		{"bad mode of the directory", func() error { p.owner = me; return os.Chmod(dir, 0o777) }},
		{"bad missing", func() error { return os.RemoveAll(dir) }},
	} {
		if err := tt.spoil(); err != nil {
			t.Fatal(err)
		}
		conn, err := p.connect(t.Context(), "")
		if err == nil {
			conn.Close()
		}
		if believed := err == nil; believed != strings.HasPrefix(tt.name, "OK") {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// A runtime that was away is followed as soon as it is back, at another socket of the same
// name. (X12)
func TestX12RuntimeAway(t *testing.T) {
	l := &lists{containers: []*runtime.Container{{Id: id("b"), Metadata: &runtime.ContainerMetadata{Name: "main"}}}, info: map[string]string{id("b"): `{"pid":2}`}}
	var first net.Listener
	p := followAt(t, l, in(map[int]string{2: at("b")}), func(under net.Listener) net.Listener { first = &killed{Listener: under}; return first })
	first.(*killed).kill()
	told := func(want bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			if _, _, err := p.Current(); (err != nil) == want {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("a problem is told: %v", !want)
			}
		}
	}
	told(true)
	time.Sleep(8 * time.Second) // by then, whoever waits twice as long each time waits long
	if inv, _, _ := p.Current(); inv == nil || len(inv.Workloads) != 1 {
		t.Fatalf("who was named has no name: %+v", inv)
	}
	listener, err := net.Listen("unix", p.socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	runtime.RegisterRuntimeServiceServer(server, l)
	if err := os.Chmod(p.socket, 0o660); err != nil {
		t.Fatal(err)
	}
	go server.Serve(listener)
	defer server.Stop()
	start := time.Now()
	told(false)
	took := time.Since(start)
	t.Logf("followed again after %s", took.Round(time.Millisecond))
	if took > 4*time.Second { // 2 on a machine that never stands still
		t.Errorf("followed again only after %s", took)
	}
}

// killed is a listener that ends with all its connections, as with its process.
type killed struct {
	net.Listener
	mu  sync.Mutex
	all []net.Conn
}

func (k *killed) Accept() (net.Conn, error) {
	c, err := k.Listener.Accept()
	if err == nil {
		k.mu.Lock()
		k.all = append(k.all, c)
		k.mu.Unlock()
	}
	return c, err
}

func (k *killed) kill() {
	k.Listener.Close()
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range k.all {
		c.Close()
	}
}

// An agent in a pod sees cgroups from its own: the way to others leads up, and its own
// has no name.
func TestOwnNamespace(t *testing.T) {
	p := New("/none", func(cgroup string) (string, bool) {
		for strings.HasPrefix(cgroup, "/../") {
			cgroup = strings.TrimPrefix(cgroup, "/..")
		}
		return "/kubepods.slice" + strings.TrimPrefix(cgroup, "/kubepods.slice"), strings.HasSuffix(cgroup, ".scope")
	})
	p.process = func(pid int) (string, error) {
		return map[int]string{1: "/", 2: "/../cri-containerd-" + id("b") + ".scope", 3: "/../../.." + at("c"), 4: "/../other.scope"}[pid], nil
	}
	for i, tt := range []struct{ name, id, want, problem string }{
		{"OK itself", id("a"), at("a"), ""},
		{"OK beside it", id("b"), at("b"), ""},
		{"OK elsewhere", id("c"), at("c"), ""},
		{"bad name", id("d"), "", "process 4 is in /../other.scope, which is not container dddddddddddd"},
	} {
		got, err := p.cgroup(tt.id, func() (map[string]string, error) {
			return map[string]string{"info": fmt.Sprintf(`{"pid":%d}`, i+1)}, nil
		})
		problem := ""
		if err != nil {
			problem = err.Error()
		}
		if got != tt.want || problem != tt.problem {
			t.Errorf("%s: %q, %q, want %q, %q", tt.name, got, problem, tt.want, tt.problem)
		}
	}
}
