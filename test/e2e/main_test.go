// Package e2e_test runs whole nodes and what crosses them, or does not.
package e2e_test

import (
	"testing"

	"github.com/demarc/demarc/test/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m) }
