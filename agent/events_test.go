package agent

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

// told are the events of a ring that repeat for ever: what many workloads tell, each of
// which calls another by five crossings.
type told struct {
	kernel
	raw  [][]byte
	next int // in raw
	seq  uint64
	left int // until it ends

	at time.Duration // the last one, since boot
}

func (k *told) Next(int) ([]byte, bool, error) {
	if k.left == 0 {
		return nil, false, os.ErrClosed
	}
	b := k.raw[k.next]
	k.next = (k.next + 1) % len(k.raw)
	k.seq++
	k.left--
	k.at += 50 * time.Microsecond // 20,000 a second
	binary.NativeEndian.PutUint64(b[0:], uint64(k.at))
	binary.NativeEndian.PutUint64(b[8:], k.seq)
	return b, k.left > 0, nil
}

// busyNode is a node's link with the policy of many workloads, and what both ends of
// their connections tell. Each workload makes a few connections before the next does.
func busyNode(b testing.TB, workloads int) (*service, *told) {
	b.Helper()
	const ports, inARow = 5, 16
	var src strings.Builder
	src.WriteString("apiVersion: demarc.dev/v1alpha1\nkind: BoundaryPolicy\nmetadata: {name: many, version: 1}\ntrustDomain: bench.example\nzones:\n  app: {trust: 10}\nworkloads:\n")
	for i := range workloads {
		fmt.Fprintf(&src, "  w%03d: {zone: app, match: [{cgroup: /w%03[1]d}]}\n", i)
	}
	src.WriteString("crossings:\n")
	for i := range workloads {
		for port := range ports {
			fmt.Fprintf(&src, "  - {name: c%03d-%d, from: [workload/w%03[1]d], to: [workload/w%03[3]d], ports: [tcp/%[4]d], log: all, purpose: bench}\n",
				i, port, (i+workloads/2)%workloads, 9000+port)
		}
	}
	p, err := policy.Parse("many.yaml", []byte(src.String()))
	if err != nil {
		b.Fatal(err)
	}
	encoded, err := policy.Build(p)
	if err != nil {
		b.Fatal(err)
	}
	img, err := image.Decode(encoded)
	if err != nil {
		b.Fatal(err)
	}
	l := newLink(nil, nil, zap.NewNop())
	l.book.Add(1, "digest", flow.NewNames(img))
	s := &service{node: "n1", link: l, cgroups: &cgroups{}, log: zap.NewNop()}
	s.cgroups.paths = map[uint64]string{}
	id, number := map[string]uint32{}, map[string]uint32{}
	for i, w := range img.Workloads {
		id[w.Name] = uint32(w.ID)
		s.cgroups.paths[uint64(1000+i)] = "/" + w.Name
	}
	for _, c := range img.Crossings {
		number[c.Name] = c.Number
	}
	k := &told{}
	for i := range workloads {
		from, to := id[fmt.Sprintf("w%03d", i)], id[fmt.Sprintf("w%03d", (i+workloads/2)%workloads)]
		for n := range inARow {
			port := n % ports
			tuple := abi.Tuple{Proto: 6, SourcePort: uint16(40000 + i*inARow + n), DestinationPort: uint16(9000 + port)}
			tuple.Source = [16]byte{10: 0xff, 11: 0xff, 12: 10, 13: 1, 15: 1}
			tuple.Destination = [16]byte{10: 0xff, 11: 0xff, 12: 10, 13: 1, 15: 2}
			for _, direction := range []abi.Direction{abi.Egress, abi.Ingress} {
				e := record.Event{
					Kind: record.EventVerdict, Hook: record.HookIngress, Epoch: 1, Subject: from, Peer: to, Cgroup: uint64(1000 + i), Direction: direction,
					Proof: abi.ProofIdentity, Verdict: abi.Allow, Reason: abi.ByCrossing, Crossing: number[fmt.Sprintf("c%03d-%d", i, port)], Tuple: tuple,
				}
				if direction == abi.Ingress {
					e.Subject, e.Peer, e.Cgroup = to, from, uint64(1000+(i+workloads/2)%workloads)
				}
				raw, err := binary.Append(nil, binary.NativeEndian, e)
				if err != nil {
					b.Fatal(err)
				}
				k.raw = append(k.raw, append(raw, make([]byte, flow.EventSize-len(raw))...))
			}
		}
	}
	return s, k
}

// BenchmarkEvents is what the agent does with an event: it takes it off the ring, shows
// it to the detectors, and tells a reader as JSON.
func BenchmarkEvents(b *testing.B) {
	const batch = 8192
	s, k := busyNode(b, 200)
	read := func() {
		k.left = batch
		if err := s.link.read(record.RingAllowed, k); err == nil {
			b.Fatal("the ring did not end")
		}
	}
	each := func(b *testing.B) {
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/batch, "ns/event")
	}
	b.Run("read", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			read()
		}
		each(b)
	})
	b.Run("detect", func(b *testing.B) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // so that Next does not wait
		d := newDetection(&Config{}, s.link, s.resolver(), zap.NewNop())
		b.ReportAllocs()
		for b.Loop() {
			b.StopTimer()
			read()
			b.StartTimer()
			for {
				e, err := d.events.Next(ctx)
				if err != nil {
					break
				}
				d.follow()
				d.see(e)
			}
		}
		each(b)
	})
	b.Run("tell", func(b *testing.B) {
		out := &lines{to: unread{}, control: http.NewResponseController(unread{})}
		q, resolver := flow.Query{Last: -1}, s.resolver()
		b.ReportAllocs()
		for b.Loop() {
			b.StopTimer()
			s.link.store = flow.NewStore(batch)
			read()
			b.StartTimer()
			if err := q.Run(context.Background(), s.link.store, nil, resolver, out); err != nil {
				b.Fatal(err)
			}
		}
		each(b)
	})
}

// unread is a response that nobody reads.
type unread struct{ http.ResponseWriter }

func (unread) Write(b []byte) (int, error)      { return len(b), nil }
func (unread) SetWriteDeadline(time.Time) error { return nil }
func (unread) Flush()                           {}
