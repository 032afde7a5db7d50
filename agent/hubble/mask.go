package hubble

import (
	"fmt"
	"strings"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// mask keeps the fields of a flow that a client asked for. A name without a mask below
// it keeps the whole field.
type mask map[protoreflect.Name]mask

// maxPaths bounds a field mask.
const maxPaths = 256

// newMask is nil where everything is kept.
func newMask(m *fieldmaskpb.FieldMask) (mask, error) {
	if len(m.GetPaths()) == 0 {
		return nil, nil
	}
	if len(m.GetPaths()) > maxPaths {
		return nil, fmt.Errorf("field_mask: %d paths, at most %d are taken", len(m.GetPaths()), maxPaths)
	}
	out := mask{}
	for _, path := range m.GetPaths() {
		// One at a time: the error names the one that is wrong.
		if len(path) > maxText || !(&fieldmaskpb.FieldMask{Paths: []string{path}}).IsValid(&flowpb.Flow{}) {
			return nil, fmt.Errorf("field_mask: a flow has no field %.60q", path)
		}
		out.add(path)
	}
	return out, nil
}

func (m mask) add(path string) {
	name, rest, deeper := strings.Cut(path, ".")
	below, had := m[protoreflect.Name(name)]
	switch {
	case had && below == nil: // all of it is kept already
	case !deeper:
		m[protoreflect.Name(name)] = nil
	default:
		if below == nil {
			below = mask{}
			m[protoreflect.Name(name)] = below
		}
		below.add(rest)
	}
}

// apply takes away what is not kept.
func (m mask) apply(f *flowpb.Flow) { m.prune(f.ProtoReflect()) }

func (m mask) prune(message protoreflect.Message) {
	message.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		below, kept := m[field.Name()]
		switch {
		case !kept:
			message.Clear(field)
		case below != nil && field.Message() != nil && !field.IsList() && !field.IsMap():
			below.prune(value.Message())
		}
		return true
	})
}
