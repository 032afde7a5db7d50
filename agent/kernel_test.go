package agent

import (
	"encoding/binary"
	"errors"
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// donate makes real maps of the types that the core donates, and descriptors of
// them. It needs root, as loading maps does.
func donate(t *testing.T) (*proto.Descriptors, map[string]*ebpf.Map) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root, to make BPF maps")
	}
	made := map[string]*ebpf.Map{}
	file := func(name string, spec ebpf.MapSpec) *os.File {
		m, err := ebpf.NewMap(&spec)
		if err != nil {
			t.Fatalf("make %s: %v", name, err)
		}
		t.Cleanup(func() { m.Close() })
		made[name] = m
		fd, err := unix.FcntlInt(uintptr(m.FD()), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), name)
	}
	size := func(v any) uint32 { return uint32((binary.Size(v) + 7) / 8 * 8) }
	return &proto.Descriptors{
		Denied:   file("denied", ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: uint32(os.Getpagesize())}),
		Allowed:  file("allowed", ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: uint32(os.Getpagesize())}),
		Signals:  file("signals", ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: uint32(os.Getpagesize())}),
		Counts:   file("counts", ebpf.MapSpec{Type: ebpf.PerCPUHash, KeySize: uint32(binary.Size(abi.CountKey{})), ValueSize: 8, MaxEntries: 64}),
		Rings:    file("rings", ebpf.MapSpec{Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: size(record.RingState{}), MaxEntries: record.AllRings}),
		Faults:   file("faults", ebpf.MapSpec{Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: record.Faults}),
		Bindings: file("bindings", ebpf.MapSpec{Type: ebpf.Hash, KeySize: 8, ValueSize: size(abi.Binding{}), MaxEntries: 64}),
		State:    file("state", ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: size(abi.State{}), MaxEntries: 1}),
	}, made
}

// emitReal has the kernel put a record of EventSize bytes into a ring; its first
// eight bytes are value.
func emitReal(t *testing.T, ring *ebpf.Map, value int64) {
	t.Helper()
	code := asm.Instructions{asm.Mov.Imm(asm.R0, 0)}
	for at := int16(0); at < flow.EventSize; at += 8 {
		code = append(code, asm.StoreMem(asm.RFP, at-flow.EventSize, asm.R0, asm.DWord))
	}
	code = append(code,
		asm.LoadImm(asm.R1, value, asm.DWord),
		asm.StoreMem(asm.RFP, -flow.EventSize, asm.R1, asm.DWord),
		asm.LoadMapPtr(asm.R1, ring.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -flow.EventSize),
		asm.Mov.Imm(asm.R3, flow.EventSize), asm.Mov.Imm(asm.R4, 0),
		asm.FnRingbufOutput.Call(),
		asm.Mov.Imm(asm.R0, 0), asm.Return(),
	)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SocketFilter, License: "GPL", Instructions: code})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, _, err := p.Test(make([]byte, 64)); err != nil {
		t.Fatal(err)
	}
}

func TestDonatedMapsAreRead(t *testing.T) {
	descriptors, made := donate(t)
	k, err := openMaps(descriptors)
	if err != nil {
		t.Fatal(err)
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		t.Fatal(err)
	}
	put := func(name string, key, value any) {
		t.Helper()
		if err := made[name].Put(key, value); err != nil {
			t.Fatalf("put %s: %v", name, err)
		}
	}
	everywhere := func(n uint64) []uint64 {
		values := make([]uint64, cpus)
		for i := range values {
			values[i] = n
		}
		return values
	}
	key := abi.CountKey{Subject: 1, Verdict: abi.Deny, Reason: abi.NoCrossingFor}
	put("counts", key, everywhere(3))
	put("faults", uint32(record.FaultFlow), everywhere(2))
	states := make([]record.RingState, cpus)
	for i := range states {
		states[i] = record.RingState{Seq: 10, Lost: 1}
	}
	put("rings", uint32(record.RingAllowed), states)
	put("state", uint32(0), abi.State{Active: abi.MakeActive(2, abi.ActiveOn, 1)})
	put("bindings", uint64(77), abi.Binding{Identity: [abi.Slots]uint32{1, 2, 3, 4}})

	n := uint64(cpus)
	counts, err := k.Counts()
	if d := cmp.Diff(map[abi.CountKey]uint64{key: 3 * n}, counts, cmp.AllowUnexported(abi.CountKey{})); d != "" || err != nil {
		t.Errorf("counts: %v\n%s", err, d)
	}
	rings, err := k.Rings()
	if want := [record.AllRings]record.RingState{record.RingAllowed: {Seq: 10 * n, Lost: n}}; rings != want || err != nil {
		t.Errorf("rings %v, %v", rings, err)
	}
	faults, err := k.Faults()
	if want := [record.Faults]uint64{record.FaultFlow: 2 * n}; faults != want || err != nil {
		t.Errorf("faults %v, %v", faults, err)
	}
	bound, err := k.Bindings()
	if d := cmp.Diff(map[uint64]uint32{77: 3}, bound); d != "" || err != nil {
		t.Errorf("bindings: %v\n%s", err, d)
	}
	if k.RingID(record.RingDenied) == k.RingID(record.RingAllowed) {
		t.Error("two rings have one id")
	}

	for i := range int64(3) {
		emitReal(t, made["denied"], 100+i)
		b, _, err := k.Next(record.RingDenied)
		var e record.Event
		if err == nil {
			err = flow.DecodeEvent(b, &e)
		}
		if err != nil || e.Time != uint64(100+i) {
			t.Errorf("event %d: %+v, %v", i, e, err)
		}
	}

	// Closing ends a reader that waits.
	ended := make(chan error)
	go func() {
		_, _, err := k.Next(record.RingAllowed)
		ended <- err
	}()
	if err := k.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("the reader ended with %v", err)
	}
}

func TestWrongDescriptorsAreRefused(t *testing.T) {
	d, _ := donate(t)
	d.Counts, d.Bindings = d.Bindings, d.Counts
	if _, err := openMaps(d); err == nil || err.Error() != "open counts: the core sent a map of type Hash, want PerCPUHash" {
		t.Errorf("swapped maps: %v", err)
	}
	d, _ = donate(t)
	d.Denied.Close()
	var err error
	if d.Denied, err = os.Open("/dev/null"); err != nil {
		t.Fatal(err)
	}
	if _, err := openMaps(d); err == nil {
		t.Error("/dev/null was taken for a ring")
	}
}
