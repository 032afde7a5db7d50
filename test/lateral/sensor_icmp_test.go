package lateral_test

import (
	"time"

	"github.com/demarc/demarc/agent/detect"
)

// Pings that carry something.
func pings(s *sensing) []scenario {
	return []scenario{
		{"ping with 1000 bytes", func(r *run) {
			r.tool("ping", "-I", s.host.IP4.String(), "-n", "-c", "30", "-i", "0.1", "-s", "1000", s.target.IP4.String())
		}, "T1095", "icmp-tunnel", detect.Medium, "ping", 20 * time.Second, false},
	}
}
