package agent

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/audit"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// source is a policy of a given version; its workloads are found by metadata.
const source = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: shop, version: 1}
trustDomain: shop.example
zones:
  edge: {trust: 10}
  app: {trust: 20}
workloads:
  web: {zone: edge, match: [{systemdUnit: nginx.service}]}
  api: {zone: app, match: [{kubernetes: {namespace: shop, podLabels: {app: api}}}]}
networks:
  lan: {zone: edge, cidrs: [10.0.0.0/8]}
crossings:
  - {name: web-api, from: [workload/web], to: [workload/api], ports: [tcp/8080], limit: {connections: 100/s}, log: denied, purpose: calls}
`

// compile builds a policy source.
func compile(t *testing.T, src string) []byte {
	t.Helper()
	p, err := policy.Parse("shop.yaml", []byte(src))
	if err != nil {
		t.Fatal(err)
	}
	b, err := policy.Build(p)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// ids returns the identities of the workloads of an encoded image.
func ids(t *testing.T, encoded []byte) map[string]uint32 {
	t.Helper()
	img, err := image.Decode(encoded)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]uint32{}
	for _, w := range img.Workloads {
		out[w.Name] = uint32(w.ID)
	}
	return out
}

// standIn is a core and a kernel in memory, for the wiring around them. What it
// says of policies is not what a core decides: that is tested with a real one.
type standIn struct {
	events [record.AllRings]chan []byte

	mu          sync.Mutex
	up          bool
	closed      chan struct{} // of the current connection
	images      [][]byte      // applied ones, the active one last
	previewed   []byte        // last
	own         proto.Own     // as it was said with that
	unverified  error         // what it answers to Prepare
	epoch       uint32
	claims      map[string]uint32
	asked       []string // claims in the order they were asked for
	refuse      error
	counts      map[abi.CountKey]uint64
	rings       [record.AllRings]record.RingState
	bindings    map[uint64]uint32
	root        string
	quarantines []proto.Quarantine
}

func newStandIn() *standIn {
	s := &standIn{up: true, claims: map[string]uint32{}, bindings: map[uint64]uint32{}}
	for i := range s.events {
		s.events[i] = make(chan []byte, 1024)
	}
	return s
}

// connection is one connection to a stand-in.
type connection struct {
	bound map[string]bool // on this connection
	*standIn
	closed chan struct{}
	once   sync.Once
}

func (s *standIn) dial(context.Context) (core, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.up {
		return nil, errors.New("connect to core: nobody there")
	}
	s.closed = make(chan struct{})
	return &connection{standIn: s, closed: s.closed}, nil
}

// stop ends the stand-in as a crash would; start brings it back without claims.
func (s *standIn) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.up = false
}

func (s *standIn) start() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.up = true
	clear(s.claims)
}

func (c *connection) ask() error {
	if !c.up {
		return errors.New("ask core: connection reset")
	}
	return c.refuse
}

func (c *connection) Close() error { return nil }

func (c *connection) Hello() (*proto.Hello, *proto.Descriptors, error) {
	return &proto.Hello{Version: proto.Version, ABI: abi.Version, CgroupRoot: c.root}, &proto.Descriptors{}, nil
}

func (c *connection) Status() (*proto.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.up {
		return nil, errors.New("ask core: connection reset")
	}
	return c.status(), nil
}

func (s *standIn) status() *proto.Status {
	if len(s.images) == 0 {
		return &proto.Status{State: proto.StateIdle, Claims: len(s.claims)}
	}
	b := s.images[len(s.images)-1]
	sum := sha256.Sum256(b)
	img, _ := image.Decode(b)
	return &proto.Status{State: proto.StateEnforcing, Claims: len(s.claims), Links: []proto.Link{{Name: "egress", Attached: true}},
		Quarantines: slices.Clone(s.quarantines),
		Active:      &proto.Generation{Epoch: s.epoch, Name: img.Name, Version: img.Version, Digest: hex.EncodeToString(sum[:]), Mode: "enforce", Since: time.Unix(1000, 0).UTC()}}
}

func (c *connection) Preview(f *os.File, own proto.Own) (_ *proto.Preview, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.own = own
	c.previewed, err = readImage(f)
	return &proto.Preview{}, err
}

func (c *connection) Prepare(f *os.File) (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ask(); err != nil {
		return err
	}
	if c.unverified != nil {
		return c.unverified
	}
	c.previewed, err = readImage(f)
	return err
}

func (c *connection) Shadow(*os.File, time.Duration) (*proto.Status, error) {
	return nil, proto.Refuse("", "no policy is active")
}

func (c *connection) Unshadow() (*proto.Status, error) {
	return nil, proto.Refuse("", "no policy is in shadow")
}

func (c *connection) Shadowed() (*os.File, error) {
	return nil, proto.Refuse("", "no policy is in shadow")
}

func (c *connection) Confirm() (*proto.Status, error) { return nil, proto.Refuse("", "nothing waits") }

func (c *connection) ApplySparing(f *os.File, _, _ time.Duration) (*proto.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ask(); err != nil {
		return nil, err
	}
	b, err := readImage(f)
	if err != nil {
		return nil, err
	}
	return c.put(b), nil
}

func (c *connection) ApplyPreviewed(digest string, _, _ time.Duration) (*proto.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ask(); err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(c.previewed); hex.EncodeToString(sum[:]) != digest {
		return nil, proto.Refuse("apply the image itself", "it was not previewed")
	}
	return c.put(c.previewed), nil
}

// put has an image in force.
func (s *standIn) put(b []byte) *proto.Status {
	s.images = append(s.images, b)
	s.epoch++
	return s.status()
}

func (c *connection) Rollback() (*proto.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ask(); err != nil {
		return nil, err
	}
	if len(c.images) < 2 {
		return nil, proto.Refuse("apply another one first", "there is no previous policy")
	}
	c.images = c.images[:len(c.images)-1]
	c.epoch++
	return c.status(), nil
}

func (c *connection) Image() (*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.images) == 0 {
		return nil, proto.Refuse("", "no policy is active")
	}
	return memfd(c.images[len(c.images)-1])
}

func (c *connection) Quarantine(id uint32, lasting time.Duration, reason string, automatic bool) (*proto.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ask(); err != nil {
		return nil, err
	}
	c.quarantines = []proto.Quarantine{{Identity: id, Until: time.Unix(5000, 0).UTC().Add(lasting), Reason: reason, Automatic: automatic}}
	return c.status(), nil
}

func (c *connection) Release(id uint32) (*proto.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ask(); err != nil {
		return nil, err
	}
	c.quarantines = slices.DeleteFunc(c.quarantines, func(q proto.Quarantine) bool { return q.Identity == id })
	return c.status(), nil
}

// Audit is a log of one record.
func (c *connection) Audit() (*proto.Audit, []*os.File, error) {
	line, head, err := audit.Head{}.Line(audit.Record{What: "start", Who: "core", Time: time.Unix(1000, 0).UTC()})
	if err != nil {
		return nil, nil, err
	}
	f, err := memfd(line)
	return &proto.Audit{Seq: head.Seq, Hash: hex.EncodeToString(head.Hash[:])}, []*os.File{f}, err
}

func (c *connection) Bind(path string, id uint32) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = append(c.asked, "bind "+path)
	if err := c.ask(); err != nil {
		return err
	}
	c.claims[path] = id
	if c.bound == nil {
		c.bound = map[string]bool{}
	}
	c.bound[path] = true
	return nil
}

func (c *connection) Forget() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.claims, func(path string, _ uint32) bool { return !c.bound[path] })
	return nil
}

func (c *connection) Unbind(path string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = append(c.asked, "unbind "+path)
	if err := c.ask(); err != nil {
		return err
	}
	delete(c.claims, path)
	return nil
}

func (s *standIn) claimed() map[string]uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.claims)
}

// memory is the kernel of one connection.
type memory struct {
	*standIn
	closed chan struct{}
}

func (s *standIn) open(*proto.Descriptors) (kernel, error) {
	return &memory{s, make(chan struct{})}, nil
}

func (m *memory) Next(ring int) ([]byte, bool, error) {
	select {
	case b := <-m.events[ring]:
		return b, len(m.events[ring]) > 0, nil
	case <-m.closed:
		return nil, false, os.ErrClosed
	}
}

func (m *memory) Drained() bool { return len(m.events[0])+len(m.events[1]) == 0 }

func (m *memory) RingID(int) uint64 { return 1 }

func (m *memory) Counts() (map[abi.CountKey]uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.counts), nil
}

func (m *memory) Rings() ([record.AllRings]record.RingState, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.standIn.rings, nil
}

func (m *memory) Positions(ring int) ([]uint64, bool, error) { return nil, true, nil }

func (m *memory) Faults() ([record.Faults]uint64, error) {
	return [record.Faults]uint64{record.FaultStorage: 3}, nil
}

func (m *memory) Bindings() (map[uint64]uint32, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.bindings), nil
}

func (m *memory) Room() room { return room{Counts: 100, Bindings: 200} }

func (m *memory) Close() error {
	close(m.closed)
	return nil
}

// emit sends an event through a ring as the kernel lays it out.
func (s *standIn) emit(t *testing.T, ring int, e record.Event) {
	t.Helper()
	b, err := binary.Append(make([]byte, 0, flow.EventSize), binary.NativeEndian, e)
	if err != nil {
		t.Fatal(err)
	}
	s.events[ring] <- append(b, make([]byte, flow.EventSize-len(b))...)
}

// running is an agent at work beside a stand-in.
type running struct {
	core   *standIn
	link   *link
	client *api.Client
	config *Config
	stop   func() error

	metrics *metrics
}

// start runs an agent until the test ends.
func start(t *testing.T, core *standIn, change func(*Config)) *running {
	t.Helper()
	dir := t.TempDir()
	config := &Config{Node: "n1", Server: filepath.Join(dir, "agent.sock")}
	if change != nil {
		change(config)
	}
	log := zap.New(zaptest.NewLogger(t).Core())
	l := newLink(core.dial, core.open, log)
	a, err := build(config, log, l)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- a.Run(ctx, func() { close(ready) }) }()
	stop := sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	select {
	case <-ready:
	case <-time.After(10 * time.Second):
		t.Fatal("not ready within 10 s")
	}
	client, err := api.NewClient("unix://" + config.Server)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return &running{core, l, client, config, stop, a.service.metrics}
}

// eventually waits for something that takes a moment.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 10 s", what)
		}
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}
