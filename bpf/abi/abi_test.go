package abi_test

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// Every struct that C and Go share has the same fields at the same places.
func TestLayout(t *testing.T) {
	spec, err := ebpf.LoadCollectionSpec("../../agent/core/demarc_bpfel.o")
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]any{
		"demarc_rule_key":     abi.RuleKey{},
		"demarc_rule":         abi.Rule{},
		"demarc_crossing":     abi.Crossing{},
		"demarc_subject":      abi.Subject{},
		"demarc_port_classes": abi.PortClasses{},
		"demarc_prefix_key":   abi.PrefixKey{},
		"demarc_path_key":     abi.PathKey{},
		"demarc_unit":         abi.Unit{},
		"demarc_binding":      abi.Binding{},
		"demarc_state":        abi.State{},
		"demarc_floor":        abi.Floor{},
		"demarc_key":          abi.Key{},
		"demarc_tuple":        abi.Tuple{},
		"demarc_door":         abi.Door{},
		"demarc_refusal":      abi.Refusal{},
		"demarc_event":        record.Event{},
		"demarc_signal":       record.Signal{},
		"demarc_count_key":    abi.CountKey{},
		"demarc_ring_state":   record.RingState{},
		"demarc_query":        abi.Query{},
		"demarc_seal":         abi.Seal{},
		"demarc_cut":          abi.Cut{},
	} {
		var c *btf.Struct
		if err := spec.Types.TypeByName(name, &c); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		compare(t, name, c, reflect.TypeOf(value))
	}
}

func compare(t *testing.T, name string, c *btf.Struct, g reflect.Type) {
	t.Helper()
	if uintptr(c.Size) != g.Size() {
		t.Errorf("%s: %d bytes in C, %d in Go", name, c.Size, g.Size())
	}
	if len(c.Members) != g.NumField() {
		t.Errorf("%s: %d fields in C, %d in Go", name, len(c.Members), g.NumField())
		return
	}
	for i, m := range c.Members {
		f := g.Field(i)
		size, err := btf.Sizeof(m.Type)
		if err != nil {
			t.Errorf("%s.%s: %v", name, m.Name, err)
			continue
		}
		if uintptr(m.Offset.Bytes()) != f.Offset || uintptr(size) != f.Type.Size() {
			t.Errorf("%s.%s: %d bytes at %d in C; %s: %d bytes at %d in Go", name, m.Name, size, m.Offset.Bytes(), f.Name, f.Type.Size(), f.Offset)
		}
		if strings.HasPrefix(m.Name, "zero") != (f.Name == "_") {
			t.Errorf("%s.%s is padding on one side only (Go: %s)", name, m.Name, f.Name)
		}
		if inner, ok := btf.UnderlyingType(m.Type).(*btf.Struct); ok {
			compare(t, name+"."+m.Name, inner, f.Type)
		}
		if array, ok := btf.UnderlyingType(m.Type).(*btf.Array); ok {
			if inner, ok := btf.UnderlyingType(array.Type).(*btf.Struct); ok {
				compare(t, name+"."+m.Name, inner, f.Type.Elem())
			}
		}
	}
}

// What a reason prints, it parses.
func TestNames(t *testing.T) {
	for r := abi.Reason(0); r < abi.Reasons; r++ {
		var back abi.Reason
		text, _ := r.MarshalText()
		if err := back.UnmarshalText(text); err != nil || back != r {
			t.Errorf("reason %d: %q reads back as %d: %v", r, text, back, err)
		}
	}
	if got := abi.Reason(abi.Reasons).String(); got != fmt.Sprintf("reason(%d)", abi.Reasons) {
		t.Errorf("an unknown reason prints %q", got)
	}
}
