package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/identity"
	"github.com/demarc/demarc/policy/image"
)

// retryEvery is how long a refused claim waits for the next attempt: its cgroup may
// not have existed yet.
const retryEvery = 2 * time.Second

// renewer is a source that asks over a network, whose connections a policy may cut.
type renewer interface {
	// Renew has it make them anew.
	Renew()
}

// binder is the task that claims the inventory's cgroups from the core for the
// workloads of the active image. It works again whenever the inventory, the image
// or the connection changes.
type binder struct {
	link   *link
	source identity.Source
	log    *zap.Logger
	ready  chan struct{}

	containers containers // what flows call those of the inventory

	mu       sync.Mutex
	made     map[string]image.ID // claims that the core accepted on this connection
	since    time.Time           // of that connection
	gaveBack time.Time
	settled  bool        // on this connection, the core has forgotten what an agent before claimed
	names    *flow.Names // of the image they were made under
	judged   *flow.Names // of the image under which the source's connections were made
	problems []string
}

func newBinder(l *link, source identity.Source, log *zap.Logger) *binder {
	b := &binder{link: l, source: source, log: log, ready: make(chan struct{})}
	inv, _, _ := source.Current()
	b.containers.follow(inv)
	return b
}

// Ready is closed when the binder follows its sources.
func (b *binder) Ready() <-chan struct{} { return b.ready }

func (b *binder) String() string { return "binder" }

// Run binds until ctx ends. Claims stay with the core when it does: the agent's end
// changes nobody's identity.
func (b *binder) Run(ctx context.Context) error {
	close(b.ready)
	retry := time.NewTicker(retryEvery)
	defer retry.Stop()
	for {
		b.reconcile()
		select {
		case <-ctx.Done():
			return nil
		case <-b.link.news:
		case <-b.source.Changed():
		case <-retry.C:
		}
	}
}

// reconcile makes the core's claims what inventory and image say.
func (b *binder) reconcile() {
	inv, _, bad := b.source.Current()
	b.containers.follow(inv)
	v := b.link.view()
	problems := linesOf(bad)
	b.mu.Lock()
	defer b.mu.Unlock()
	defer func() {
		if !slices.Equal(problems, b.problems) && len(problems) > 0 {
			b.log.Warn("inventory", zap.Strings("problems", problems))
		}
		b.problems = problems
	}()
	if !v.Connected || !v.Since.Equal(b.since) {
		// A core that restarted has forgotten our claims, and one that did not
		// accepts them twice.
		b.made, b.since, b.settled = nil, v.Since, false
	}
	if v.Connected && v.Names != b.judged {
		b.judged = v.Names
		if s, ok := b.source.(renewer); ok {
			s.Renew()
		}
	}
	if !v.Connected || v.Names == nil || inv == nil {
		return
	}
	want, clashes := identity.Claims(inv, v.Names.Image)
	problems = append(problems, clashes...)
	for _, path := range slices.Sorted(maps.Keys(b.made)) {
		if _, ok := want[path]; ok || inv.Partial {
			continue
		}
		if err := b.ask(path, "unbind", func(c core) error { return c.Unbind(path) }); err != nil {
			problems = append(problems, err.Error())
			continue
		}
		delete(b.made, path)
	}
	// A core that took another image has judged the claims again and may have
	// dropped some that an image after it allows: claim them all.
	again, news := b.names != v.Names, false
	b.names = v.Names
	for _, path := range slices.Sorted(maps.Keys(want)) {
		id := want[path]
		if had, ok := b.made[path]; ok && had == id && !again {
			continue
		}
		if err := b.ask(path, "bind", func(c core) error { return c.Bind(path, uint32(id)) }); err != nil {
			delete(b.made, path)
			problems = append(problems, err.Error())
			continue
		}
		if b.made == nil {
			b.made = make(map[string]image.ID)
		}
		b.made[path] = id
		news = true
	}
	if news {
		b.giveBack()
	}
	// What an agent before this one claimed, and the inventory no longer names,
	// must not keep its identity.
	if !b.settled && !inv.Partial {
		if err := b.link.with(func(c core) error { return c.Forget() }); err != nil {
			problems = append(problems, "forget earlier claims: "+err.Error())
			return
		}
		b.settled = true
	}
}

// giveBack returns to the system what a large policy or inventory took for a moment: the
// runtime by itself keeps most of it for hours. At most once a minute, for it stops to
// collect garbage.
func (b *binder) giveBack() {
	if time.Since(b.gaveBack) > time.Minute {
		debug.FreeOSMemory()
		b.gaveBack = time.Now()
	}
}

func (b *binder) ask(path, verb string, request func(core) error) error {
	err := b.link.with(request)
	var refused *proto.Refused
	switch {
	case err == nil:
		b.log.Info(verb, zap.String("cgroup", path))
		return nil
	case errors.As(err, &refused) && refused.Hint != "":
		return fmt.Errorf("%s %s: %s (%s)", verb, path, refused.Message, refused.Hint)
	}
	return fmt.Errorf("%s %s: %w", verb, path, err)
}

// status is what the API says of the inventory.
func (b *binder) status() *api.Inventory {
	inv, read, bad := b.source.Current()
	b.mu.Lock()
	defer b.mu.Unlock()
	s := &api.Inventory{File: b.source.Path(), Read: read, Bound: len(b.made), Problems: slices.Clone(b.problems)}
	if len(s.Problems) == 0 {
		s.Problems = linesOf(bad)
	}
	if inv != nil {
		s.Workloads = len(inv.Workloads)
	}
	return s
}

// linesOf are the problems that a source has: each that it joined is one.
func linesOf(err error) (lines []string) {
	if err == nil {
		return nil
	}
	all := []error{err}
	if of, ok := err.(interface{ Unwrap() []error }); ok && err.Error() == errors.Join(of.Unwrap()...).Error() {
		all = of.Unwrap()
	}
	for _, e := range all {
		lines = append(lines, oneLine(e))
	}
	return lines
}

// oneLine is an error with its hint and its parts in one line.
func oneLine(err error) string {
	return strings.NewReplacer("\nhint: ", ": ", "\n", "; ").Replace(err.Error())
}
