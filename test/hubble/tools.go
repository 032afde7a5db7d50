//go:build tools

// Package hubble names the command that `make test-hubble` builds.
package hubble

import _ "github.com/cilium/cilium/hubble"
