// Package lateral_test does what intruders do, with the tools that they use, and
// waits for the findings; and it does what is usual, and waits for none.
package lateral_test

import (
	"testing"

	"github.com/demarc/demarc/test/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m) }
