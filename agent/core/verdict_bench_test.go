package core

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/image/encode"
	"github.com/demarc/demarc/policy/policytest"
)

// BenchmarkVerdict is one whole decision on a packet, from parser to answer, by
// BPF_PROG_TEST_RUN (best of 25, of the kernel's own clock). It must not grow with
// the policy, but for cache misses: the figure is for one flow, warm. The control
// is a packet that ends in the parser.
func BenchmarkVerdict(b *testing.B) {
	for _, size := range []struct{ workloads, crossings int }{{10, 10}, {1_000, 10_000}, {10_000, 100_000}} {
		b.Run(fmt.Sprintf("%dx%d", size.workloads, size.crossings), func(b *testing.B) {
			c := newMachine(b).start()
			img, err := policy.Compile(policytest.Large(size.workloads, size.crossings))
			if err != nil {
				b.Fatal(err)
			}
			encoded, err := encode.Image(img)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := c.Apply(encoded, 0); err != nil {
				b.Fatal(err)
			}
			crossing := img.Crossings[3] // between two workloads, one TCP port
			subject, peer := img.Workloads[crossing.To[0].Index].ID, img.Workloads[crossing.From[0].Index].ID
			q := image.Query{
				Subject: subject, Peer: peer, Proof: abi.ProofIdentity, Direction: abi.Ingress,
				Port:    image.Port{Proto: crossing.Ports[0].Proto, Number: crossing.Ports[0].Low},
				Address: netip.MustParseAddr("192.0.2.1"), Now: time.Now(),
			}
			if d := img.Index().Decide(q); d.Verdict != abi.Allow {
				b.Fatalf("the question is not allowed: %+v", d)
			}
			who := []uint32{uint32(subject), c.active.slot, uint32(peer), uint32(abi.ProofIdentity)}
			if err := c.objects.Maps["selftest"].Put(uint32(0), who); err != nil {
				b.Fatal(err)
			}
			allowed := segmentOf(q, false).frame()
			fragment := append([]byte(nil), allowed...)
			fragment[14+6] = 0x20
			control := best(b, c.objects.Programs["selftest_ingress"], fragment, 0)
			whole := best(b, c.objects.Programs["selftest_ingress"], allowed, 1)
			for b.Loop() { // the time that counts is the kernel's own, below
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(control.Nanoseconds()), "ns-control")
			b.ReportMetric(float64(whole.Nanoseconds()), "ns-verdict")
		})
	}
}

func best(b *testing.B, p *ebpf.Program, frame []byte, want uint32) time.Duration {
	b.Helper()
	least := time.Duration(1<<63 - 1)
	for range 25 {
		got, d, err := p.Benchmark(frame, 20_000, nil)
		if err != nil || got != want {
			b.Fatalf("run: verdict %d, want %d: %v", got, want, err)
		}
		least = min(least, d)
	}
	return least
}
