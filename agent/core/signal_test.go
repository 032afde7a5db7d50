package core

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi/record"
)

// What observes loads here, can change no verdict, and attaches. At a cgroup that means
// that whatever it sees, it returns what refuses nothing.
func TestObserversLoad(t *testing.T) {
	programs, err := loadSignal()
	must(t, err)
	for name, p := range programs.Programs {
		switch p.AttachType {
		case ebpf.AttachTraceRawTp, ebpf.AttachTraceIter, ebpf.AttachTraceFEntry:
		case ebpf.AttachCGroupDevice, ebpf.AttachCGroupInetEgress:
			if !returnsOne(p.Instructions) {
				t.Errorf("%s may return something else than 1", name)
			}
		default:
			t.Errorf("%s is a program of type %v, attached as %v", name, p.Type, p.AttachType)
		}
	}
	a := newMachine(t).start().observers
	missing := len(programs.Programs) - len(a.links)
	if a.survey != nil {
		missing--
	}
	if a.looksInside() {
		missing--
	}
	t.Log(strings.Join(a.blind, "\n"))
	if refused := a.links["switched"] == nil; missing != 0 && !(missing == 1 && refused) || len(a.blind) != missing {
		t.Errorf("%d are not attached: %s", missing, strings.Join(a.blind, "\n"))
	}
	must(t, a.look())
	a.sealPackets()
	if a.looksInside() {
		t.Error("somebody still looks into packets")
	}
}

func (a *observers) looksInside() bool {
	var program ebpf.ProgramID
	return a.inside.Lookup(uint32(0), &program) == nil
}

// Observers end with the core, and its successor says for how long there were none.
func TestObserversResume(t *testing.T) {
	m := newMachine(t)
	c := still(m.start())
	if _, err := c.Apply(shop(t, nil), 0); err != nil {
		t.Fatal(err)
	}
	must(t, c.observers.look())
	if blind := c.Status().Blind; slices.ContainsFunc(blind, whileNoCoreRan) {
		t.Errorf("before there was a gap: %q", blind)
	}
	must(t, c.Close())
	time.Sleep(300 * time.Millisecond)
	c = still(m.start())
	blind := c.Status().Blind
	at := slices.IndexFunc(blind, whileNoCoreRan)
	if at < 0 {
		t.Fatalf("behind a gap: %q", blind)
	}
	_, rest, _ := strings.Cut(blind[at], "at most ")
	text, _, _ := strings.Cut(rest, " ")
	if gap, err := time.ParseDuration(text); err != nil || gap < 300*time.Millisecond || gap > time.Minute {
		t.Errorf("the gap is %q: %v", text, err)
	}
	t.Log(blind[at])
}

func whileNoCoreRan(s string) bool { return strings.Contains(s, "when no core ran") }

// returnsOne says whether a program leaves its first function by no other way than
// with the constant 1: each exit has its move before it, and no jump leads between.
func returnsOne(all asm.Instructions) bool {
	exits, targets := map[asm.RawInstructionOffset]bool{}, map[asm.RawInstructionOffset]bool{}
	var before asm.Instruction
	for it := all.Iterate(); it.Next(); before = *it.Ins {
		if it.Index > 0 && it.Ins.Symbol() != "" { // the next function
			break
		}
		switch op := it.Ins.OpCode.JumpOp(); op {
		case asm.Exit:
			if before.OpCode.ALUOp() != asm.Mov || before.Dst != asm.R0 || before.OpCode.Source() != asm.ImmSource || before.Constant != 1 {
				return false
			}
			exits[it.Offset] = true
		case asm.Call, asm.InvalidJumpOp:
		default:
			targets[it.Offset+1+asm.RawInstructionOffset(it.Ins.Offset)] = true
		}
	}
	for at := range exits {
		if targets[at] {
			return false
		}
	}
	return len(exits) > 0
}

// What is remembered for signals stays below 16 MiB with 16,384 identities, each of which
// does something and has something done to it; and one identity more takes nothing from
// those.
func TestSignalMemory(t *testing.T) {
	const identities, most = record.SeenMax, 16 << 20
	spec, err := readSpec(&tree{})
	must(t, err)
	o, err := loadObjects(spec, nil, btf.NewCache())
	must(t, err)
	t.Cleanup(o.Close)
	sum := uint64(0)
	for _, name := range []string{"tellings", "seen", "marks", "hops", "signals", "lineages", "families"} {
		m := o.Maps[name]
		entries := map[string]uint32{"tellings": 2 * identities, "seen": identities}[name]
		if entries > 0 {
			value := make([]byte, m.ValueSize())
			for key := range entries {
				must(t, m.Put(key+32, value))
			}
			if err := m.Put(entries+32, value); !errors.Is(err, unix.E2BIG) {
				t.Errorf("%s has room for more than %d: %v", name, entries, err)
			}
			var key, n uint32
			for all := m.Iterate(); all.Next(&key, &value); n++ {
			}
			if n != entries {
				t.Errorf("%s: %d entries, want %d", name, n, entries)
			}
		}
		info, err := m.Info()
		must(t, err)
		size, known := info.Memlock()
		if !known {
			t.Fatalf("%s: the kernel does not say", name)
		}
		if m.Type() == ebpf.Hash { // the kernel counts what it asks for, and is given more
			asked := uint64(48 + 8 + 8 + m.ValueSize())
			size += (allocated(asked) - asked) * uint64(entries)
		}
		t.Logf("%-8s %8d bytes", name, size)
		sum += size
	}
	t.Logf("together %8d of %d", sum, most)
	if sum >= most {
		t.Errorf("%d bytes, less than %d are meant to be", sum, most)
	}
}

// allocated is what the kernel's allocator gives for so many bytes.
func allocated(n uint64) uint64 {
	for _, size := range []uint64{64, 96, 128, 192, 256, 512, 1024, 2048} {
		if n <= size {
			return size
		}
	}
	return n
}
