package core

import (
	"strings"
	"testing"

	"github.com/cilium/ebpf"
)

// What observes loads here, is of kinds that can change no verdict, and attaches.
func TestObserversLoad(t *testing.T) {
	spec, err := readSpec(&tree{})
	if err != nil {
		t.Fatal(err)
	}
	o, err := loadObjects(spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Close)
	programs, err := loadSignal()
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range programs.Programs {
		if p.Type != ebpf.Tracing || p.AttachType != ebpf.AttachTraceRawTp {
			t.Errorf("%s is a program of type %v, attached as %v", name, p.Type, p.AttachType)
		}
		if observed[name] == "" {
			t.Errorf("nobody says what %s is for", name)
		}
	}
	a := observe(o)
	defer a.close()
	if len(a.links) != len(programs.Programs) || len(a.blind) != len(neverSeen) {
		t.Errorf("%d of %d attached: %s", len(a.links), len(programs.Programs), strings.Join(a.blind, "\n"))
	}
}
