// Package systemd_test runs demarc under the distribution's systemd, from the
// packaged units, with the workloads that a host has.
package systemd_test

import (
	"testing"

	"github.com/demarc/demarc/test/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m) }
