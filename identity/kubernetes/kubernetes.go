// Package kubernetes learns from the Kubernetes API server which pods run on this
// node.
//
// It lists and watches the pods of one node and nothing else, over net/http with
// encoding/json. The official client would do that, too, but brings the types of all
// APIs: an estimated 8 MB of resident memory, in an agent that may have 40 and has 36,
// and 40 MB of program. What is used of the protocol is one list and one watch.
package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"sync"
	"syscall"
	"time"

	"github.com/demarc/demarc/identity"
)

// Intervals and bounds of what is asked.
const (
	maxPods     = 2048
	firstRetry  = 250 * time.Millisecond
	lastRetry   = 30 * time.Second
	firstLook   = 100 * time.Millisecond // for the cgroup of a new container
	lastLook    = 2 * time.Second
	maxProblems = 16
)

// Provider follows an API server. Make one with New.
type Provider struct {
	api   *client
	tree  *tree
	own   string // UID of the pod that the agent is in; "" = it is in none
	retry time.Duration

	changed chan struct{}
	ready   chan struct{}
	seen    chan struct{} // something new is in pods
	renew   chan struct{}
	version string // that the watch goes on from; "" = list first

	mu      sync.Mutex
	pods    map[string]pod // by UID
	listed  bool
	read    time.Time
	away    error // what is wrong with the API server
	problem error // also with what it says
	current *identity.Inventory
}

// New makes the provider. root is the directory of the managed root, "" as long as it
// is not known.
func New(o Options, root func() string) *Provider {
	return &Provider{api: newClient(o), tree: &tree{root: root}, own: o.Pod, retry: firstRetry, pods: map[string]pod{},
		changed: make(chan struct{}, 1), ready: make(chan struct{}), seen: make(chan struct{}, 1), renew: make(chan struct{}, 1)}
}

// Ready is closed as soon as the API server is followed.
func (p *Provider) Ready() <-chan struct{} { return p.ready }

func (p *Provider) String() string {
	return "pods of " + p.api.options.Node + " at " + p.api.options.Server
}

// Path is where the API server is.
func (p *Provider) Path() string { return p.api.options.Server }

// Renew has the API server asked by another connection, and soon. The policy may have
// changed: a connection that is older than the first one, or not declared any more, is
// cut without a word, and would be taken for one on which nothing happens.
func (p *Provider) Renew() {
	select {
	case p.renew <- struct{}{}:
	default:
	}
}

// Changed receives when something else runs, or the API server is away or back. There
// is one receiver.
func (p *Provider) Changed() <-chan struct{} { return p.changed }

// Current returns what ran when the API server was last heard, nil before, when that
// was, and what is wrong now, if anything.
func (p *Provider) Current() (*identity.Inventory, time.Time, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.current, p.read, p.problem
}

// Run follows the API server until ctx ends. One that is away changes nothing: who was
// named keeps its name.
func (p *Provider) Run(ctx context.Context) error {
	close(p.ready)
	var group sync.WaitGroup
	defer group.Wait()
	group.Go(func() { p.follow(ctx) })
	defer p.api.close()
	wait := firstLook
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		news := false
		select {
		case <-ctx.Done():
			return nil
		case <-p.seen:
			news = true
		case <-timer.C:
		}
		if news {
			wait = firstLook
		}
		if missing := p.name(); missing {
			timer.Reset(wait)
			wait = min(2*wait, lastLook)
		}
	}
}

// follow lists and watches, again and again.
func (p *Provider) follow(ctx context.Context) {
	wait := p.retry
	for ctx.Err() == nil {
		began := time.Now()
		renewed, err := p.hearUntilRenewed(ctx)
		if ctx.Err() != nil {
			return
		}
		if renewed {
			p.api.close()
			wait = p.retry
		}
		if anew(err) {
			p.version = "" // a list says what was missed meanwhile
		}
		if err != nil && !errors.Is(err, errExpired) {
			p.mu.Lock()
			p.away = err
			p.mu.Unlock()
			p.tell()
		}
		if time.Since(began) > lastRetry {
			wait = p.retry
		}
		// An answer that ends as it should is followed by the next one. One that ends at
		// once, again and again, must not keep anybody busy.
		select {
		case <-ctx.Done():
			return
		case <-p.renew:
			p.api.close()
			wait = p.retry
			continue
		case <-time.After(wait/2 + rand.N(wait/2+1)):
		}
		if err == nil {
			wait = p.retry
		} else {
			wait = min(2*wait, max(lastRetry, p.retry))
		}
	}
}

// hearUntilRenewed hears until that ends or the connection is to be another one.
func (p *Provider) hearUntilRenewed(ctx context.Context) (renewed bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan struct{})
	var group sync.WaitGroup
	defer group.Wait()
	defer close(done)
	group.Go(func() {
		select {
		case <-p.renew:
			cancel(errRenewed)
		case <-done:
		}
	})
	err = p.hear(ctx)
	if errors.Is(context.Cause(ctx), errRenewed) {
		return true, nil
	}
	return false, err
}

var errRenewed = errors.New("the connection is renewed")

// hear lists if it must, and watches until that ends.
func (p *Provider) hear(ctx context.Context) error {
	if p.version == "" {
		p.mu.Lock()
		first := !p.listed
		p.mu.Unlock()
		pods, version, err := p.api.list(ctx, first)
		if err != nil {
			return err
		}
		p.mu.Lock()
		p.pods, p.listed, p.away, p.read = pods, true, nil, time.Now()
		p.mu.Unlock()
		p.version = version
		p.tell()
	}
	begun := func() {
		p.mu.Lock()
		p.away, p.read = nil, time.Now()
		p.mu.Unlock()
		p.tell()
	}
	return p.api.watch(ctx, p.version, begun, func(e event) error {
		if v := e.Object.Metadata.ResourceVersion; v != "" {
			p.version = v
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.read = time.Now()
		uid := e.Object.Metadata.UID
		switch {
		case e.Type == bookmark:
			return nil
		case e.Type == deleted || !e.Object.here(p.api.options.Node):
			delete(p.pods, uid)
		case len(p.pods) >= maxPods && p.pods[uid].Metadata.UID == "":
			return errTooMany
		default:
			p.pods[uid] = e.Object
		}
		p.tell()
		return nil
	})
}

func (p *Provider) tell() {
	select {
	case p.seen <- struct{}{}:
	default:
	}
}

// name makes an inventory of the pods and tells of it if it says something new. Some
// container may have no cgroup yet.
func (p *Provider) name() (missing bool) {
	p.mu.Lock()
	listed, all := p.listed, make([]pod, 0, len(p.pods))
	for _, k := range p.pods {
		all = append(all, k)
	}
	p.mu.Unlock()
	var inv *identity.Inventory
	var strange []error
	switch {
	case listed:
		inv, strange, missing = workloads(all, p.tree)
	case p.own != "":
		inv, missing = p.itself()
	}
	p.mu.Lock()
	if !listed && p.listed {
		p.mu.Unlock()
		return true // the first list came meanwhile
	}
	problem := errors.Join(append([]error{explained(p.away)}, strange...)...)
	news := fmt.Sprint(problem) != fmt.Sprint(p.problem) || !reflect.DeepEqual(inv, p.current)
	p.current, p.problem = inv, problem
	p.mu.Unlock()
	if news {
		select {
		case p.changed <- struct{}{}:
		default:
		}
	}
	return missing
}

// explained says what to do where the policy keeps the agent from the API server.
func explained(err error) error {
	if errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("%w\nhint: the policy in force does not let the agent's processes reach it; declare a crossing for them", err)
	}
	return err
}

// itself is the agent's own pod, before anything else is known. Its containers are
// pending like all others, and may not call the API server, which has to name them:
// until it does they are somebody whom no workload selects.
func (p *Provider) itself() (inv *identity.Inventory, missing bool) {
	inv = &identity.Inventory{Partial: true}
	for _, at := range p.tree.pod(p.own) {
		inv.Workloads = append(inv.Workloads, identity.Workload{Name: "demarc", Cgroup: at})
	}
	return inv, true
}
