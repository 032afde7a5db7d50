// Package cri learns from a container runtime which pods and containers run on this
// node, by the Kubernetes Container Runtime Interface (CRI, runtime.v1).
//
// Whoever may speak to a runtime's socket commands the runtime, and so the host. The
// provider asks for lists and states only, but an agent that was taken over could ask
// for more: where there is a Kubernetes API server, prefer it.
package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/demarc/demarc/identity"
)

// Intervals and bounds of what is asked.
const (
	pollInterval  = 250 * time.Millisecond
	patience      = 5 * time.Second // of one question
	maxContainers = 4096
	maxProblems   = 16 // with single containers, that are told
)

// Provider follows a runtime. Make one with New.
type Provider struct {
	socket  string
	owner   uint32 // who must own it: root, but in tests
	place   func(cgroup string) (string, bool)
	process func(pid int) (string, error)
	changed chan struct{}
	ready   chan struct{}

	mu      sync.Mutex
	current *identity.Inventory
	read    time.Time
	problem error
	known   map[string]string // cgroups below the managed root, by id of container
	failed  map[string]bool   // containers that could not be placed at the last look
}

// New makes the provider for the runtime at a Unix socket. place turns a cgroup of the
// hierarchy into one below the managed root, if it is there.
func New(socket string, place func(cgroup string) (string, bool)) *Provider {
	return &Provider{socket: socket, place: place, process: cgroupOf, known: map[string]string{},
		changed: make(chan struct{}, 1), ready: make(chan struct{})}
}

// Run follows the runtime until ctx ends. A runtime that does not answer changes
// nothing: who was named keeps its name.
func (p *Provider) Run(ctx context.Context) error {
	close(p.ready)
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	conn, err := p.dial()
	if err != nil {
		return fmt.Errorf("runtime: %w", err)
	}
	defer conn.Close()
	for {
		inv, strange, err := p.ask(ctx, runtime.NewRuntimeServiceClient(conn))
		if ctx.Err() != nil {
			return nil
		}
		p.take(inv, errors.Join(append(strange, err)...))
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Ready is closed as soon as the runtime is followed.
func (p *Provider) Ready() <-chan struct{} { return p.ready }

func (p *Provider) String() string { return "runtime at " + p.socket }

// Path is where the runtime's socket is.
func (p *Provider) Path() string { return p.socket }

// Changed receives when something else runs, or the runtime is away or back. There
// is one receiver.
func (p *Provider) Changed() <-chan struct{} { return p.changed }

// Current returns what ran when the runtime last answered, nil before, when that was,
// and what is wrong now, if anything.
func (p *Provider) Current() (*identity.Inventory, time.Time, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.current, p.read, p.problem
}

// dial makes the client, which connects when it is asked, and again after a second at most
// where nobody answered: a runtime that is back is to be followed at once.
func (p *Provider) dial() (*grpc.ClientConn, error) {
	again := backoff.DefaultConfig
	again.BaseDelay, again.MaxDelay = pollInterval, time.Second
	return grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(p.connect), grpc.WithConnectParams(grpc.ConnectParams{Backoff: again, MinConnectTimeout: patience}))
}

// connect wants a socket that is root's, each time: whoever owns it says who is who. (C17)
func (p *Provider) connect(ctx context.Context, _ string) (net.Conn, error) {
	for _, path := range []string{p.socket, filepath.Dir(p.socket)} {
		var stat unix.Stat_t
		if err := unix.Stat(path, &stat); err != nil {
			return nil, fmt.Errorf("look at runtime: %s: %w", path, err)
		}
		if stat.Uid != p.owner || stat.Mode&0o002 != 0 {
			return nil, fmt.Errorf("runtime: %s belongs to user %d with mode %#o: only root may say who is who", path, stat.Uid, stat.Mode&0o7777)
		}
	}
	var d net.Dialer
	return d.DialContext(ctx, "unix", p.socket)
}

// ask makes an inventory of what runs. Strange are containers that run and cannot be
// placed, at two looks one after the other: at one, it may be that they have just ended.
func (p *Provider) ask(ctx context.Context, c runtime.RuntimeServiceClient) (inv *identity.Inventory, strange []error, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	pods, err := c.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{Filter: &runtime.PodSandboxFilter{State: &runtime.PodSandboxStateValue{State: runtime.PodSandboxState_SANDBOX_READY}}})
	if err != nil {
		return nil, nil, fmt.Errorf("list pods: %w", err)
	}
	containers, err := c.ListContainers(ctx, &runtime.ListContainersRequest{Filter: &runtime.ContainerFilter{State: &runtime.ContainerStateValue{State: runtime.ContainerState_CONTAINER_RUNNING}}})
	if err != nil {
		return nil, nil, fmt.Errorf("list containers: %w", err)
	}
	if n := len(pods.Items) + len(containers.Containers); n > maxContainers {
		return nil, nil, fmt.Errorf("list containers: %d run, at most %d are followed", n, maxContainers)
	}
	inv = &identity.Inventory{Namespaces: map[string]identity.Namespace{}}
	running, failed := map[string]string{}, map[string]bool{}
	sandboxes := map[string]*runtime.PodSandbox{}
	add := func(id, cgroup string, all ...identity.Workload) {
		running[id] = cgroup
		for _, w := range all {
			w.Cgroup = cgroup
			inv.Workloads = append(inv.Workloads, w)
		}
	}
	var lines []string
	fail := func(id, name string, err error) {
		if failed[id] = true; p.failed[id] {
			lines = append(lines, plain(name+": "+status.Convert(err).Message()+": it stays pending"))
		}
	}
	for _, s := range pods.Items {
		sandboxes[s.Id] = s
		cgroup, err := p.cgroup(s.Id, func() (map[string]string, error) {
			status, err := c.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: s.Id, Verbose: true})
			return status.GetInfo(), err
		})
		switch w := pod(s); {
		case err != nil:
			fail(s.Id, "pod "+w.Namespace+"/"+w.Name, err)
		case cgroup != "": // or it is elsewhere
			add(s.Id, cgroup, w)
		}
	}
	for _, k := range containers.Containers {
		cgroup, err := p.cgroup(k.Id, func() (map[string]string, error) {
			status, err := c.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: k.Id, Verbose: true})
			return status.GetInfo(), err
		})
		if err != nil {
			fail(k.Id, fmt.Sprintf("container %.12s (%s)", k.Id, k.GetMetadata().GetName()), err)
		}
		if cgroup == "" {
			continue // who is not named stays pending
		}
		all := []identity.Workload{{Name: k.GetMetadata().GetName(), Image: k.GetImage().GetUserSpecifiedImage(), Labels: k.GetLabels()}}
		if s := sandboxes[k.PodSandboxId]; s != nil {
			all = append(all, pod(s))
		}
		add(k.Id, cgroup, all...)
	}
	p.known, p.failed = running, failed
	slices.Sort(lines)
	if more := len(lines) - maxProblems; more > 0 {
		lines = append(lines[:maxProblems], fmt.Sprintf("and %d more", more))
	}
	for _, l := range lines {
		strange = append(strange, errors.New(l))
	}
	return inv, strange, nil
}

// plain is a text that moves no cursor and breaks no line.
func plain(s string) string {
	q := strconv.QuoteToASCII(s)
	return q[1 : len(q)-1]
}

// pod says whose a sandbox is.
func pod(s *runtime.PodSandbox) identity.Workload {
	return identity.Workload{Namespace: s.GetMetadata().GetNamespace(), Name: s.GetMetadata().GetName(), Labels: s.GetLabels()}
}

// cgroup finds where a container runs, by its first process. Its path must carry the
// container's id: a process that has taken the number of another one does not count.
func (p *Provider) cgroup(id string, info func() (map[string]string, error)) (string, error) {
	if at, ok := p.known[id]; ok {
		return at, nil
	}
	verbose, err := info()
	if err != nil {
		return "", err
	}
	var first struct {
		PID int `json:"pid"`
	}
	if err := json.Unmarshal([]byte(verbose["info"]), &first); err != nil || first.PID <= 0 {
		return "", fmt.Errorf("the runtime does not say which process container %.12s has", id)
	}
	whole, err := p.process(first.PID)
	if err != nil {
		return "", err
	}
	// From a cgroup namespace of one's own the way leads up first.
	up, down := "", whole
	for strings.HasPrefix(down, "/../") {
		up, down = up+"/..", strings.TrimPrefix(down, "/..")
	}
	if whole == "/" {
		return p.itself(id), nil
	}
	c, at, found := identity.ContainerOf(down)
	if !found || c.ID != id {
		return "", fmt.Errorf("process %d is in %s, which is not container %.12s", first.PID, whole, id)
	}
	here, managed := p.place(up + at)
	if !managed {
		return "", nil
	}
	return here, nil
}

// itself finds the container that this process is in, whose cgroup is the top of its
// namespace, without a name: by what runtimes call a cgroup.
func (p *Provider) itself(id string) string {
	for _, name := range []string{id, "cri-containerd-" + id + ".scope", "crio-" + id + ".scope"} {
		if here, managed := p.place("/../" + name); managed {
			return here
		}
	}
	return ""
}

// cgroupOf reads which cgroup of the second version a process is in.
func cgroupOf(pid int) (string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if at, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			return at, nil
		}
	}
	return "", errors.New("it is in no cgroup of the second version")
}

// take keeps an answer, if there is one, and tells of it if it says something new.
func (p *Provider) take(inv *identity.Inventory, problem error) {
	p.mu.Lock()
	news := fmt.Sprint(problem) != fmt.Sprint(p.problem)
	if inv != nil {
		news = news || p.current == nil || !same(p.current, inv)
		p.current, p.read = inv, time.Now()
	}
	p.problem = problem
	p.mu.Unlock()
	if news {
		select {
		case p.changed <- struct{}{}:
		default:
		}
	}
}

// same says whether two answers name the same.
func same(a, b *identity.Inventory) bool {
	key := func(inv *identity.Inventory) map[string]int {
		all := map[string]int{}
		for _, w := range inv.Workloads {
			all[fmt.Sprint(w.Cgroup, "\x00", w.Namespace, "\x00", w.Name, "\x00", w.Image, "\x00", w.Labels)]++
		}
		return all
	}
	x, y := key(a), key(b)
	if len(x) != len(y) {
		return false
	}
	for k, n := range x {
		if y[k] != n {
			return false
		}
	}
	return true
}
