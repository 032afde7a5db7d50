package netlab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/coreclient"
	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/policy/image"
)

// book is what a node's kernel has told so far, and the names to read it with. It
// outlives the core.
type book struct {
	names   flow.Book
	mu      sync.Mutex
	events  []record.Event
	signals []record.Signal
}

// coreLink is the test's own connection to a core.
type coreLink struct {
	client      *coreclient.Client
	descriptors *proto.Descriptors
	book        *book
	rings       []*ringbuf.Reader
	buffers     []*ebpf.Map
	reading     sync.WaitGroup
}

// dialCore says hello to a core. With events, it reads the rings in place of the
// agent.
func dialCore(socket string, events bool, b *book) (*coreLink, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	client, err := coreclient.Dial(ctx, socket)
	if err != nil {
		return nil, err
	}
	l := &coreLink{client: client, book: b}
	if _, l.descriptors, err = client.Hello(); err != nil {
		client.Close()
		return nil, err
	}
	if events {
		for _, f := range []*os.File{l.descriptors.Denied, l.descriptors.Allowed} {
			if err := l.read(f); err != nil {
				l.close()
				return nil, err
			}
		}
		if err := l.readSignals(l.descriptors.Signals); err != nil {
			l.close()
			return nil, err
		}
	}
	return l, nil
}

func (l *coreLink) readSignals(f *os.File) error {
	return l.readRing(f, func(b []byte) error {
		var s record.Signal
		if err := detect.DecodeRecord(b, &s); err != nil {
			return err
		}
		l.book.mu.Lock()
		l.book.signals = append(l.book.signals, s)
		l.book.mu.Unlock()
		return nil
	})
}

func (l *coreLink) read(f *os.File) error {
	return l.readRing(f, func(b []byte) error {
		var e record.Event
		if err := flow.DecodeEvent(b, &e); err != nil {
			return err
		}
		l.book.mu.Lock()
		l.book.events = append(l.book.events, e)
		l.book.mu.Unlock()
		return nil
	})
}

func (l *coreLink) readRing(f *os.File, take func([]byte) error) error {
	m, err := openMap(f)
	if err != nil {
		return err
	}
	l.buffers = append(l.buffers, m)
	r, err := ringbuf.NewReader(m)
	if err != nil {
		return err
	}
	l.rings = append(l.rings, r)
	l.reading.Go(func() {
		var record ringbuf.Record
		for {
			if err := r.ReadInto(&record); err != nil {
				return
			}
			if err := take(record.RawSample); err != nil {
				panic(err)
			}
		}
	})
	return nil
}

func openMap(f *os.File) (*ebpf.Map, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return ebpf.NewMapFromFD(fd)
}

func (l *coreLink) close() {
	for _, r := range l.rings {
		r.Close()
	}
	l.reading.Wait()
	for _, m := range l.buffers {
		m.Close()
	}
	l.descriptors.Close()
	l.client.Close()
}

func (l *coreLink) apply(b []byte) (*proto.Status, error) {
	fd, err := unix.MemfdCreate("image", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "image")
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return nil, err
	}
	return l.client.Apply(f, 0)
}

func (l *coreLink) learn(s *proto.Status) error {
	f, err := l.client.Image()
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, image.MaxSize))
	if err != nil {
		return err
	}
	img, err := image.Decode(b)
	if err != nil {
		return err
	}
	l.book.names.Add(s.Active.Epoch, s.Active.Digest, flow.NewNames(img))
	return nil
}

// Flows returns what the kernel has told so far, oldest first: on a node with
// agent, what `demarc flows --all` says, with more filters if wanted.
func (n *Node) Flows(filters ...string) []flow.Flow {
	n.lab.t.Helper()
	if !n.options.CoreOnly {
		return n.flowsOfAgent(filters)
	}
	if len(filters) > 0 {
		n.lab.t.Fatal("a node without agent has no filters")
	}
	r := flow.Resolver{Book: &n.book.names, Wall: func(boot uint64) time.Time { return time.Unix(0, int64(boot)) }}
	n.book.mu.Lock()
	defer n.book.mu.Unlock()
	flows := make([]flow.Flow, len(n.book.events))
	for i := range n.book.events {
		flows[i] = r.Flow(&n.book.events[i])
	}
	return flows
}

func (n *Node) flowsOfAgent(filters []string) (flows []flow.Flow) {
	n.lab.t.Helper()
	out, problems, status := n.Demarc(append([]string{"flows", "--all", "-o", "json"}, filters...)...)
	if status != 0 {
		n.lab.t.Fatalf("demarc flows: %d\n%s", status, problems)
	}
	for d := json.NewDecoder(bytes.NewReader([]byte(out))); ; {
		var f flow.Flow
		err := d.Decode(&f)
		if errors.Is(err, io.EOF) {
			return flows
		}
		n.lab.check(err, "read flows")
		flows = append(flows, f)
	}
}

// AwaitFlow waits until the kernel has told of a flow that matches, and returns
// it.
func (n *Node) AwaitFlow(what string, match func(flow.Flow) bool) flow.Flow {
	n.lab.t.Helper()
	end := time.Now().Add(10 * time.Second)
	for {
		flows := n.Flows()
		for _, f := range flows {
			if match(f) {
				return f
			}
		}
		if time.Now().After(end) {
			var seen strings.Builder
			for _, f := range flows {
				fmt.Fprintf(&seen, "  %s\n", Describe(f))
			}
			n.lab.t.Fatalf("no event of %s; there are:\n%s", what, &seen)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// AwaitDenied waits for a denial with a reason of traffic of a protocol to a port
// of an address; port 0 and an invalid address are any.
func (n *Node) AwaitDenied(reason abi.Reason, proto uint8, to Place) flow.Flow {
	n.lab.t.Helper()
	return n.AwaitFlow(fmt.Sprintf("%s %s to %v", reason, flow.ProtocolName(proto), to), func(f flow.Flow) bool {
		return f.Verdict == abi.Deny && f.Reason == reason && f.Protocol == flow.ProtocolName(proto) && to.is(f.Destination)
	})
}

// Forget forgets what the kernel has told so far; only on a node without agent.
func (n *Node) Forget() {
	n.book.mu.Lock()
	defer n.book.mu.Unlock()
	n.book.events, n.book.signals = nil, nil
}

// Signals returns what the kernel has told so far, oldest first; only on a node
// without agent.
func (n *Node) Signals() []detect.Signal {
	n.lab.t.Helper()
	if !n.options.CoreOnly {
		n.lab.t.Fatal("the agent of this node reads the signals")
	}
	r := flow.Resolver{Book: &n.book.names, Wall: func(boot uint64) time.Time { return time.Unix(0, int64(boot)) }}
	n.book.mu.Lock()
	defer n.book.mu.Unlock()
	signals := make([]detect.Signal, len(n.book.signals))
	for i := range n.book.signals {
		signals[i] = *detect.SignalOf(&r, &n.book.signals[i])
	}
	return signals
}

// AwaitSignal waits until the kernel has told of a signal that matches.
func (n *Node) AwaitSignal(what string, match func(detect.Signal) bool) detect.Signal {
	n.lab.t.Helper()
	end := time.Now().Add(10 * time.Second)
	for {
		signals := n.Signals()
		for _, s := range signals {
			if match(s) {
				return s
			}
		}
		if time.Now().After(end) {
			var seen strings.Builder
			for _, s := range signals {
				fmt.Fprintf(&seen, "  %s\n", DescribeSignal(s))
			}
			n.lab.t.Fatalf("no signal of %s; there are:\n%s", what, &seen)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// DescribeSignal says a signal in a line.
func DescribeSignal(s detect.Signal) string {
	return fmt.Sprintf("%s %s pid %d %s exe %q to %s %s %s, cause %q, hops %d of %d, crossing %q, %+v", s.Kind, s.Workload, s.PID, s.Comm, s.Exe,
		s.Peer.Label(), s.Protocol, s.Peer.Place(), s.Cause, s.Hops, s.Origin, s.Crossing, s.Values)
}

// Describe says a flow in a line.
func Describe(f flow.Flow) string {
	return fmt.Sprintf("%s %s %s/%s %s %s (%s) -> %s (%s) crossing=%q proof=%s", f.Verdict, f.Reason, f.Direction, f.Hook,
		f.Protocol, f.Source.Label(), f.Source.Place(), f.Destination.Label(), f.Destination.Place(), f.Crossing, f.Proof)
}

// Counts are the kernel's exact counts of verdicts, but for those of the canary.
func (n *Node) Counts() map[abi.CountKey]uint64 {
	n.lab.t.Helper()
	m, err := openMap(n.link.descriptors.Counts)
	n.lab.check(err, "open counts")
	defer m.Close()
	counts := make(map[abi.CountKey]uint64)
	var key abi.CountKey
	var cpus []uint64
	walk := m.Iterate()
	for walk.Next(&key, &cpus) {
		if key.Subject == uint32(image.Canary) {
			continue
		}
		counts[key] = 0
		for _, c := range cpus {
			counts[key] += c
		}
	}
	n.lab.check(walk.Err(), "read counts")
	return counts
}

// Denied counts the denials with a reason, of every subject and direction.
func (n *Node) Denied(reason abi.Reason) (total uint64) {
	n.lab.t.Helper()
	for key, count := range n.Counts() {
		if key.Verdict == abi.Deny && key.Reason == reason {
			total += count
		}
	}
	return total
}

// Rings say how many events each ring was given and how many it lost.
func (n *Node) Rings() (states [record.Rings]record.RingState) {
	n.lab.t.Helper()
	m, err := openMap(n.link.descriptors.Rings)
	n.lab.check(err, "open ring states")
	defer m.Close()
	for i := range states {
		var cpus []record.RingState
		n.lab.check(m.Lookup(uint32(i), &cpus), "read ring states")
		for _, s := range cpus {
			states[i].Seq += s.Seq
			states[i].Lost += s.Lost
		}
	}
	return states
}

// Faults are what went wrong inside the kernel programs, by number.
func (n *Node) Faults() (faults [record.Faults]uint64) {
	n.lab.t.Helper()
	m, err := openMap(n.link.descriptors.Faults)
	n.lab.check(err, "open faults")
	defer m.Close()
	for i := range faults {
		var cpus []uint64
		n.lab.check(m.Lookup(uint32(i), &cpus), "read faults")
		for _, c := range cpus {
			faults[i] += c
		}
	}
	return faults
}
