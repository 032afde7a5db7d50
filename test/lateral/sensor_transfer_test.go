package lateral_test

import (
	"net/netip"
	"time"

	"github.com/demarc/demarc/agent/detect"
)

// A file goes over a connection that is there for administration.
func transfers(s *sensing) []scenario {
	return []scenario{
		{"10 MB by ssh", func(r *run) {
			r.shell("head -c 10000000 /dev/zero | %s 'cat >/dev/null'", command(append([]string{"ssh"}, s.keys.ssh("user", netip.AddrPortFrom(s.target.IP4, 22))...)...))
		}, "T1570", "transfer", detect.Medium, "ssh", 30 * time.Second, false},
	}
}
