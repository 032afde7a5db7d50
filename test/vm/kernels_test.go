//go:build kernels

package vm_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/test/netlab"
)

func TestKernels(t *testing.T) {
	programs := build(t)
	var table strings.Builder
	for _, s := range series(t) {
		t.Run(s, func(t *testing.T) {
			begin := time.Now()
			lab := netlab.New(t)
			m := boot(t, programs, lab, s)[0]
			fmt.Fprintf(&table, "%-8s %-28s boot %.1fs", s, m.hello.Release, m.hello.Uptime)
			t.Log(m.run("demarc", "preflight"))
			m.settle()
			m.stop()
			fmt.Fprintf(&table, " %s\n", time.Since(begin))
			_ = cmp.Diff
		})
	}
	t.Logf("\n%s", &table)
}
