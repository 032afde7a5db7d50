package lateral_test

import (
	"net/netip"
	"time"

	"github.com/demarc/demarc/agent/detect"
)

// SSH on ports that are open for something else, from either side.
func banners(s *sensing) []scenario {
	return []scenario{
		{"ssh to port 8443", func(r *run) {
			r.tool("ssh", s.keys.ssh("user", netip.AddrPortFrom(s.target.IP4, 8443), "true")...)
		}, "T1571", "banner", detect.Medium, "ssh", 20 * time.Second, false},
		{"sshd on port 8005", func(r *run) {
			at := netip.AddrPortFrom(s.host.IP4, 8005)
			s.keys.sshdOf(s.t, s.host, r.node.Cgroup("/lab/"+r.workload), at)
			s.outside("%s true", command(append([]string{"ssh"}, s.keys.ssh("user", at)...)...))
		}, "T1571", "banner", detect.Medium, "sshd", 20 * time.Second, false},
	}
}
