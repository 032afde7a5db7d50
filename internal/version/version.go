// Package version says which build of demarc this is.
package version

import (
	"runtime"
	"runtime/debug"
)

// version is set at link time:
//
//	-ldflags "-X github.com/demarc/demarc/internal/version.version=v0.1.0"
var version = "dev"

// Info is one build.
type Info struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"` // commit, where the build knew it
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

// Get returns the running build.
func Get() Info {
	i := Info{Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	if b, ok := debug.ReadBuildInfo(); ok {
		for _, s := range b.Settings {
			if s.Key == "vcs.revision" {
				i.Revision = s.Value
			}
		}
	}
	return i
}

// String is the version alone.
func String() string { return version }
