package agent

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/agent/journal"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/policy/image"
)

// core is what the agent asks of the trusted core; *coreclient.Client is one. A refusal
// is a *proto.Refused; any other error ends the connection.
type core interface {
	Hello() (*proto.Hello, *proto.Descriptors, error)
	Status() (*proto.Status, error)
	ApplySparing(image *os.File, within, spare time.Duration) (*proto.Status, error)
	ApplyPreviewed(digest string, within, spare time.Duration) (*proto.Status, error)
	Prepare(image *os.File) error
	Preview(image *os.File, own proto.Own) (*proto.Preview, error)
	Shadow(image *os.File, lasting time.Duration) (*proto.Status, error)
	Unshadow() (*proto.Status, error)
	Shadowed() (*os.File, error)
	Confirm() (*proto.Status, error)
	Rollback() (*proto.Status, error)
	Image() (*os.File, error)
	Bind(path string, id uint32) error
	Unbind(path string) error
	Forget() error
	Audit() (*proto.Audit, []*os.File, error)
	Quarantine(id uint32, lasting time.Duration, reason string, automatic bool) (*proto.Status, error)
	Release(id uint32) (*proto.Status, error)
	Close() error
}

// Times of a link to the core.
const (
	pollEvery    = time.Second            // between two questions for the status
	staleAfter   = 5 * time.Second        // without an answer the state is unknown
	backoffFirst = 100 * time.Millisecond // before the first attempt to connect again
	backoffLast  = 2 * time.Second
)

// errAway means that the core is not connected.
var errAway = errors.New("the core is not connected")

// link is the task that keeps the agent connected to the core, however often the
// core restarts. With each connection come new descriptors, which it reads events
// from into the store.
type link struct {
	dial        func(context.Context) (core, error)
	open        func(*proto.Descriptors) (kernel, error) // takes over the descriptors
	log         *zap.Logger
	store       *flow.Store
	signals     *signalLog
	differences differences
	book        *flow.Book
	clock       *clock
	rate        rate // of events
	ready       chan struct{}
	news        chan struct{} // receives when the connection or the active image changed; one receiver

	asking sync.Mutex // held while the status is asked for and taken in

	root atomic.Pointer[string] // session's, for who asks for each event; nil without one

	mu      sync.RWMutex
	session *session
	problem string // why there is no session
	gaps    [record.AllRings]flow.Gaps
	rings   [record.AllRings]uint64 // that the gaps are of; 0 = not known

	// Of an agent before this one: how far it read which rings. Set before Run.
	resumed [record.Rings]uint64
	resume  [record.Rings]flow.Gaps
	born    func(context.Context, []journal.Birth) // is told of rings that are new, before they are read; may be nil
	boot    string                                 // tells one start of the machine from another
}

// session is one connection. Its fields below status are guarded by link.mu.
type session struct {
	core   core
	kernel kernel
	root   string // directory the managed tree starts at
	since  time.Time
	fail   context.CancelCauseFunc

	status *proto.Status
	asked  time.Time // when the status was last answered
	names  *flow.Names
}

func newLink(dial func(context.Context) (core, error), open func(*proto.Descriptors) (kernel, error), log *zap.Logger) *link {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // without it, ids alone tell rings apart
	return &link{
		boot: string(boot), dial: dial, open: open, log: log,
		store: flow.NewStore(flow.StoreSize), signals: newSignalLog(), book: &flow.Book{}, clock: newClock(),
		ready: make(chan struct{}), news: make(chan struct{}, 1),
		problem: "not connected yet",
	}
}

// Ready is closed after the first attempt to connect: the agent is of use without
// the core, too, to say that it is away.
func (l *link) Ready() <-chan struct{} { return l.ready }

func (l *link) String() string { return "core link" }

// Run connects again and again until ctx ends. It never gives up.
func (l *link) Run(ctx context.Context) error {
	defer l.store.Close()
	defer l.signals.change(func() { l.signals.closed = true })
	wait := backoffFirst
	first := sync.OnceFunc(func() { close(l.ready) })
	for ctx.Err() == nil {
		start := time.Now()
		err := l.connected(ctx, first)
		first()
		if ctx.Err() != nil {
			return nil
		}
		problem := oneLine(err)
		l.mu.Lock()
		changed := l.problem != problem
		l.problem = problem
		l.mu.Unlock()
		if changed {
			l.log.Warn("core is away", zap.String("problem", problem))
		}
		if time.Since(start) > backoffLast {
			wait = backoffFirst
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, backoffLast)
	}
	return nil
}

// connected runs one connection until it ends, and always returns why.
func (l *link) connected(parent context.Context, up func()) error {
	c, err := l.dial(parent)
	if err != nil {
		return err
	}
	defer c.Close()
	// Closing the connection ends a request that is still waiting for its answer.
	defer context.AfterFunc(parent, func() { c.Close() })()
	hello, descriptors, err := c.Hello()
	if err != nil {
		return err
	}
	if hello.Version != proto.Version || hello.ABI != abi.Version {
		descriptors.Close()
		return fmt.Errorf("the core speaks protocol %d with layouts %d, this agent %d with %d: install the same version of both",
			hello.Version, hello.ABI, proto.Version, abi.Version)
	}
	k, err := l.open(descriptors)
	if err != nil {
		return err
	}
	ctx, fail := context.WithCancelCause(parent)
	defer fail(nil)
	s := &session{core: c, kernel: k, root: hello.CgroupRoot, since: time.Now(), fail: fail}

	var readers sync.WaitGroup
	defer readers.Wait()
	defer func() {
		l.mu.Lock() // nobody reads the maps while they are closed
		l.session = nil
		l.root.Store(nil)
		if err := k.Close(); err != nil {
			l.log.Warn("close maps", zap.Error(err))
		}
		l.mu.Unlock()
		l.tell()
	}()
	var born []journal.Birth
	l.mu.Lock()
	l.session = s
	l.root.Store(&s.root)
	for ring := range l.rings {
		if id := l.ringNumber(k.RingID(ring)); id != l.rings[ring] {
			l.rings[ring], l.gaps[ring] = id, flow.Gaps{}
			if ring == record.RingSignals { // nobody keeps signals over a restart
				continue
			}
			last, read, err := k.Positions(ring)
			if err != nil {
				l.log.Warn("read positions", zap.Error(err)) // then losses show from each CPU's first event on
			}
			switch {
			case id != 0 && id == l.resumed[ring]:
				l.gaps[ring] = l.resume[ring]
			default:
				for cpu, seq := range last {
					if seq == 0 { // its first event will be number 1
						l.gaps[ring].Resume(uint32(cpu), 0)
					}
				}
				born = append(born, journal.Birth{Ring: ring, Number: id, Last: last, Read: read})
			}
			l.resumed[ring] = 0 // only once: after that the gaps are newer
		}
	}
	l.mu.Unlock()
	if l.born != nil {
		l.born(ctx, born)
	}
	if err := l.refresh(); err != nil {
		return cmp.Or(context.Cause(ctx), err)
	}
	l.log.Info("connected to the core", zap.String("cgroup_root", s.root))
	for ring := range record.Rings {
		readers.Go(func() { fail(l.read(ring, k)) })
	}
	readers.Go(func() { fail(l.readSignals(k)) })
	l.tell()
	up()

	poll := time.NewTicker(pollEvery)
	defer poll.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-poll.C:
			if err := l.refresh(); err != nil {
				return cmp.Or(context.Cause(ctx), err)
			}
		}
	}
}

// readBatch is how many events are put into the store at a time, at most. Each time wakes
// all who follow it; so many come in a rest at 20,000 a second.
const readBatch = 1024

// ringNumber tells a ring from any other, also of another start of the machine; 0 where
// the kernel tells none.
func (l *link) ringNumber(id uint64) uint64 {
	if id == 0 {
		return 0
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", l.boot, id))
	return binary.BigEndian.Uint64(sum[:])
}

// read takes a ring's events into the store until the kernel is closed. Only one
// reader of a ring runs at a time, so that it owns the ring's gaps.
func (l *link) read(ring int, k kernel) error {
	events := make([]record.Event, readBatch)
	n := 0
	var missed int64
	for {
		b, more, err := k.Next(ring)
		e := &events[n]
		if err == nil {
			err = flow.DecodeEvent(b, e)
		}
		if err != nil {
			l.store.AddAll(ring, events[:n])
			return fmt.Errorf("read %s ring: %w", ringNames[ring], err)
		}
		missed += l.gaps[ring].See(e.CPU, e.Seq)
		if e.Kind == record.EventVerdict {
			l.differences.add(e)
			n++
		}
		// What is there is handed on before anything is waited for, and a loss before
		// what came after it.
		if !more || n == len(events) || missed != 0 {
			if missed != 0 {
				l.store.Missed(ring, missed)
				missed = 0
			}
			l.store.AddAll(ring, events[:n])
			n = 0
		}
	}
}

// with runs a request on the current connection. An error that is no refusal ends
// the connection.
func (l *link) with(request func(core) error) error {
	l.mu.RLock()
	s := l.session
	l.mu.RUnlock()
	if s == nil {
		return errAway
	}
	err := request(s.core)
	var refused *proto.Refused
	if err != nil && !errors.As(err, &refused) {
		// What the core said last is not known to hold any more: whoever looks
		// before the session has ended must not be told that it does.
		l.mu.Lock()
		if l.session == s {
			l.session, l.problem = nil, err.Error()
			l.root.Store(nil)
		}
		l.mu.Unlock()
		s.fail(err)
		return fmt.Errorf("%w: %w", errAway, err)
	}
	return err
}

// refresh asks for the status, and for the image if another one is active.
func (l *link) refresh() error {
	l.asking.Lock()
	defer l.asking.Unlock()
	return l.ask()
}

// refreshIfIdle does so unless somebody else is doing it. What goes wrong shows in
// the view.
func (l *link) refreshIfIdle() {
	if l.asking.TryLock() {
		defer l.asking.Unlock()
		_ = l.ask()
	}
}

// ask is refresh with l.asking held.
func (l *link) ask() error {
	l.clock.adjust()
	var seen uint64
	for _, c := range l.store.Counts() {
		seen += c.Received
	}
	l.rate.note(time.Now(), seen)
	return l.with(func(c core) error {
		status, err := c.Status()
		if err != nil {
			return err
		}
		return l.take(c, status)
	})
}

// change runs a request that may put another image in force, and takes in what it
// leads to, so that the next reader sees it.
func (l *link) change(request func(core) (*proto.Status, error)) error {
	return l.with(func(c core) error {
		status, err := request(c)
		if err != nil {
			return err
		}
		l.asking.Lock()
		defer l.asking.Unlock()
		return l.take(c, status)
	})
}

// take accepts a status, with the names of the image that it says is active.
func (l *link) take(c core, status *proto.Status) error {
	if err := l.takeShadow(c, status.Shadow); err != nil {
		return err
	}
	var names *flow.Names
	changed := false
	if status.Active != nil {
		var digest string
		if names, digest = l.book.Current(); digest != status.Active.Digest {
			var err error
			if names, err = fetchNames(c.Image, status.Active.Digest); err != nil {
				return fmt.Errorf("fetch the active image: %w", err)
			}
			if names == nil {
				return nil // replaced since the status was made; the next one tells
			}
			l.book.Add(status.Active.Epoch, status.Active.Digest, names)
			l.log.Info("policy in force", zap.String("name", status.Active.Name), zap.Uint64("version", status.Active.Version),
				zap.String("mode", status.Active.Mode), zap.String("digest", status.Active.Digest))
			changed = true
		}
	}
	l.mu.Lock()
	if s := l.session; s != nil && s.core == c {
		if before := s.status; before != nil && before.State != status.State {
			l.log.Info("state of enforcement", zap.String("state", string(status.State)), zap.Strings("problems", status.Problems))
		}
		s.status, s.asked, s.names = status, time.Now(), names
	}
	l.mu.Unlock()
	if changed {
		l.tell()
	}
	return nil
}

// fetchNames asks for an image. It returns nil if another one than the digest's is
// there by now.
func fetchNames(ask func() (*os.File, error), digest string) (*flow.Names, error) {
	f, err := ask()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := readImage(f)
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != digest {
		return nil, nil
	}
	img, err := image.Decode(b) // which the core has verified
	if err != nil {
		return nil, err
	}
	// Names are kept for several images; the tables, by far the larger part, are
	// of use to the kernel only.
	img.Rules, img.Addresses, img.Ports = nil, nil, nil
	return flow.NewNames(img), nil
}

// readImage reads from the start of a file, whose offset may be shared.
func readImage(f *os.File) ([]byte, error) {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, image.MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read image: %w", err)
	}
	if len(b) > image.MaxSize {
		return nil, fmt.Errorf("read image: larger than %d bytes", image.MaxSize)
	}
	return b, nil
}

// tell says that something changed, without waiting for anybody to hear it.
func (l *link) tell() {
	select {
	case l.news <- struct{}{}:
	default:
	}
}

// view is what is known of the core at one moment.
type view struct {
	Connected bool
	Problem   string
	Since     time.Time
	Root      string
	Status    *proto.Status // nil while unknown
	Names     *flow.Names   // nil while no policy is in force
}

// look runs f on the current view and kernel, which is nil while the core is away.
// f must not keep the kernel.
func (l *link) look(f func(view, kernel)) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	s := l.session
	if s == nil {
		f(view{Problem: l.problem}, nil)
		return
	}
	v := view{Connected: true, Since: s.since, Root: s.root, Status: s.status, Names: s.names}
	if age := time.Since(s.asked); v.Status != nil && age > staleAfter {
		v.Status = nil
		v.Problem = fmt.Sprintf("the core has not answered for %s", age.Round(time.Second))
	}
	f(v, s.kernel)
}

// catchUp waits until what happened so far has been read, but not for long: what
// happens all the time is never all read.
func (l *link) catchUp(ctx context.Context) {
	const longest = 10 * longestRest
	for end := time.Now().Add(longest); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(time.Millisecond) {
		drained := true
		l.look(func(_ view, k kernel) { drained = k == nil || k.Drained() })
		if drained {
			return
		}
	}
}

// cgroupRoot is where the managed tree starts, or "" while the core is away.
func (l *link) cgroupRoot() string {
	if root := l.root.Load(); root != nil {
		return *root
	}
	return ""
}

func (l *link) view() (v view) {
	l.look(func(now view, _ kernel) { v = now })
	return v
}

// age is how long ago the core last told its status.
func (l *link) age() time.Duration {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.session == nil {
		return 0 // there is nobody to ask
	}
	return time.Since(l.session.asked)
}
