package core

import (
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// refusedHere are observers that many kernels refuse.
var refusedHere = []string{"switched"}

// What observes loads here, can change no verdict, and attaches. At a cgroup that means
// that whatever it sees, it returns what refuses nothing.
func TestObserversLoad(t *testing.T) {
	spec, err := readSpec(&tree{})
	must(t, err)
	o, err := loadObjects(spec, nil)
	must(t, err)
	t.Cleanup(o.Close)
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
		if observed[name] == "" {
			t.Errorf("nobody says what %s is for", name)
		}
	}
	m := newMachine(t)
	tree, err := openTree(m.config.CgroupRoot)
	must(t, err)
	a := observe(o, tree.dir, true)
	defer a.close()
	missing := len(programs.Programs) - len(a.links)
	if a.survey != nil {
		missing--
	}
	t.Log(strings.Join(a.blind, "\n"))
	if refused := a.links["switched"] == nil; missing != 0 && !(missing == 1 && refused) || len(a.blind) != len(neverSeen)+missing {
		t.Errorf("%d are not attached: %s", missing, strings.Join(a.blind, "\n"))
	}
	must(t, a.look())
}

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
