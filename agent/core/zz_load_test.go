package core

import (
	"errors"
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
)

func TestZZLoad(t *testing.T) {
	spec, err := loadDemarc()
	if err != nil {
		t.Fatal(err)
	}
	c, err := ebpf.NewCollection(spec)
	if err != nil {
		var ve *ebpf.VerifierError
		if errors.As(err, &ve) {
			n := len(ve.Log)
			if n > 60 {
				ve.Log = ve.Log[n-60:]
			}
			t.Fatalf("%+v", ve)
		}
		t.Fatal(err)
	}
	for n, p := range c.Programs {
		i, _ := p.Info()
		v, _ := i.VerifiedInstructions()
		fmt.Println(n, v)
	}
}
