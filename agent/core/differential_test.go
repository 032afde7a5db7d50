package core

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/policytest"
)

// The same policies and questions go to four judges: the reference evaluator, the
// image's tables in Go, verdict.h compiled natively, and the loaded program over
// kernel maps. They must give the same verdict, reason and crossing.
const (
	differentialPolicies = 10_000
	differentialProbes   = 100
)

func TestDifferential(t *testing.T) {
	native, bpf := startNative(t), startJudge(t)
	r := rand.New(rand.NewPCG(1, 2))
	verdicts, reasons, keptInQuarantine := map[abi.Verdict]int{}, map[abi.Reason]int{}, 0
	for n := range differentialPolicies {
		p := policytest.Random(r, policytest.Small)
		img, err := policy.Compile(p)
		if err != nil {
			t.Fatalf("policy %d: %v", n, err)
		}
		questions := make([]policy.Query, differentialProbes)
		asked := make([]abi.Query, differentialProbes)
		for i := range questions {
			questions[i] = policytest.RandomQuery(r, p)
			if !questions[i].Address.IsValid() {
				questions[i].Address = netip.IPv6Unspecified()
			}
			asked[i] = toKernel(questions[i])
		}
		// Some subjects are quarantined, until a time that some questions are asked after.
		quarantines := map[uint32]uint64{}
		for _, q := range asked {
			if len(quarantines) < 3 && r.IntN(3*differentialProbes/4) == 0 {
				quarantines[q.Subject] = uint64(policytest.Epoch.Add(time.Duration(r.IntN(90)) * time.Second).UnixNano())
			}
		}
		for i := range asked {
			questions[i].Quarantined = asked[i].Now < quarantines[asked[i].Subject]
		}
		byNative := native.judge(t, img, quarantines, slices.Clone(asked))
		byKernel := bpf.judge(t, img, quarantines, slices.Clone(asked))
		evaluator, index := p.Evaluator(), img.Index()
		for i, q := range questions {
			want := evaluator.Evaluate(q)
			verdicts[want.Verdict]++
			reasons[want.Reason]++
			if q.Quarantined && want.Verdict == abi.Allow {
				keptInQuarantine++
			}
			for _, got := range []struct {
				judge    string
				decision policy.Decision
			}{
				{"tables in Go", index.Decide(q)},
				{"native verdict.h", fromKernel(byNative[i])},
				{"loaded program", fromKernel(byKernel[i])},
			} {
				if got.decision != want {
					t.Fatalf("policy %d: %s: %+v, evaluator says %+v\nquestion %+v\npolicy %+v", n, got.judge, got.decision, want, q, p)
				}
			}
		}
	}
	// A generator that asks one kind of question proves little.
	for _, v := range []abi.Verdict{abi.Deny, abi.Allow, abi.Provisional} {
		if verdicts[v] < differentialPolicies*differentialProbes/100 {
			t.Errorf("verdict %v came up %d times in %d questions", v, verdicts[v], differentialPolicies*differentialProbes)
		}
	}
	if n := reasons[abi.Quarantined]; n < differentialPolicies*differentialProbes/200 || keptInQuarantine < 1000 {
		t.Errorf("%d denied by quarantine, %d allowed in it", n, keptInQuarantine)
	}
	t.Logf("%d questions, verdicts %v, reasons %v", differentialPolicies*differentialProbes, verdicts, reasons)
}

func toKernel(q policy.Query) abi.Query {
	return abi.Query{
		Subject: uint32(q.Subject), Peer: uint32(q.Peer), Port: q.Port.Number, Proto: uint8(q.Port.Proto),
		Direction: q.Direction, Proof: q.Proof, Bad: q.Bad, Now: uint64(q.Now.UnixNano()), Address: q.Address.As16(),
	}
}

func fromKernel(q abi.Query) policy.Decision {
	d := policy.Decision{Verdict: q.Verdict, Reason: q.Reason, Crossing: -1}
	if q.Crossing != abi.NoCrossing {
		d.Crossing = int(q.Crossing)
	}
	return d
}

// nativeJudge is verdict.h in a process of its own.
type nativeJudge struct {
	in  io.Writer
	out io.Reader
}

func startNative(t *testing.T) *nativeJudge {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "native")
	build := exec.Command("cc", "-O1", "-g", "-Wall", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover",
		"-I../../bpf", "-o", binary, "../../test/diff/native.c")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build native verdict: %v\n%s", err, out)
	}
	cmd := exec.Command(binary)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("native verdict: %v\n%s", err, stderr.Bytes())
		}
	})
	return &nativeJudge{in: in, out: out}
}

func (n *nativeJudge) judge(t *testing.T, img *image.Image, quarantines map[uint32]uint64, queries []abi.Query) []abi.Query {
	t.Helper()
	type portRange struct{ Row, Low, High, Class uint32 }
	ranges := make([]portRange, len(img.Ports))
	for i, r := range img.Ports {
		row, base := portRow(r.Proto)
		ranges[i] = portRange{uint32(row), uint32(base) + uint32(r.Low), uint32(base) + uint32(r.High), uint32(r.Class)}
	}
	subjects, facts := subjectEntries(img)
	rules, lists := ruleEntries(img)
	crossings := crossingEntries(img, bootClock{})
	prefixes, classes := prefixEntries(img)

	var b bytes.Buffer
	put := func(v any) {
		if err := binary.Write(&b, binary.NativeEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	put([]uint32{uint32(len(subjects)), uint32(len(rules)), uint32(len(crossings)), uint32(len(prefixes)), uint32(len(ranges)), uint32(len(quarantines)), uint32(len(queries))})
	for i := range subjects {
		put(subjects[i])
		put(facts[i])
	}
	for i := range rules {
		put(rules[i])
		put(lists[i])
	}
	put(crossings)
	for i := range prefixes {
		put(prefixes[i])
		put(classes[i])
	}
	put(ranges)
	for id, until := range quarantines {
		put(until)
		put([]uint32{id, 0})
	}
	put(queries)
	if _, err := n.in.Write(b.Bytes()); err != nil {
		t.Fatalf("ask native verdict: %v", err)
	}
	if err := binary.Read(n.out, binary.NativeEndian, queries); err != nil {
		t.Fatalf("read native verdict: %v", err)
	}
	return queries
}

// kernelJudge is the loaded program over one slot's tables, which are refilled
// for each policy: making new ones would wait for the kernel eight times.
type kernelJudge struct {
	objects *objects
	tables  map[string]*ebpf.Map

	rules    []abi.RuleKey
	subjects []uint32
	prefixes []abi.PrefixKey
}

func startJudge(t *testing.T) *kernelJudge {
	t.Helper()
	spec, err := readSpec(&tree{})
	if err != nil {
		t.Fatal(err)
	}
	o, err := loadObjects(spec, nil, btf.NewCache())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Close)
	k := &kernelJudge{objects: o, tables: map[string]*ebpf.Map{}}
	for name, size := range map[string]uint32{"rules": 1 << 16, "subjects": 256, "crossings": 256, "prefixes": 1024, "ports": abi.Rows} {
		inner := spec.Maps[name].InnerMap.Copy()
		inner.MaxEntries = size
		m, err := ebpf.NewMap(inner)
		if err != nil {
			t.Fatalf("make table %s: %v", name, err)
		}
		t.Cleanup(func() { m.Close() })
		if err := o.Maps[name].Put(uint32(0), m); err != nil {
			t.Fatalf("insert table %s: %v", name, err)
		}
		k.tables[name] = m
	}
	return k
}

func (k *kernelJudge) judge(t *testing.T, img *image.Image, quarantines map[uint32]uint64, queries []abi.Query) []abi.Query {
	t.Helper()
	if err := k.refill(img); err != nil {
		t.Fatal(err)
	}
	for id, until := range quarantines {
		if err := k.objects.Maps["quarantines"].Put(id, until); err != nil {
			t.Fatal(err)
		}
	}
	if err := writeState(k.objects, abi.State{Quarantines: uint64(len(quarantines))}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		for id := range quarantines {
			if err := k.objects.Maps["quarantines"].Delete(id); err != nil {
				t.Error(err)
			}
		}
	}()
	for batch := range slices.Chunk(queries, abi.Questions) {
		if err := ask(k.objects, batch); err != nil {
			t.Fatal(err)
		}
	}
	return queries
}

func (k *kernelJudge) refill(img *image.Image) error {
	var errs []error
	errs = append(errs, deleteAll(k.tables["rules"], k.rules), deleteAll(k.tables["subjects"], k.subjects),
		deleteAll(k.tables["prefixes"], k.prefixes))
	subjects, facts := subjectEntries(img)
	rules, lists := ruleEntries(img)
	prefixes, classes := prefixEntries(img)
	k.rules, k.subjects, k.prefixes = rules, subjects, prefixes
	errs = append(errs,
		putAll(k.tables["rules"], rules, lists), putAll(k.tables["subjects"], subjects, facts),
		putAll(k.tables["prefixes"], prefixes, classes),
		putAll(k.tables["crossings"], indexes(len(img.Crossings)), crossingEntries(img, bootClock{})),
		putAll(k.tables["ports"], indexes(abi.Rows), portEntries(img)))
	return errors.Join(errs...)
}

func deleteAll[K any](m *ebpf.Map, keys []K) error {
	for i := range keys {
		if err := m.Delete(&keys[i]); err != nil {
			return fmt.Errorf("delete from %s: %w", m, err)
		}
	}
	return nil
}
