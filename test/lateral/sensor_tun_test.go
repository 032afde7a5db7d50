package lateral_test

import (
	"time"

	"github.com/demarc/demarc/agent/detect"
)

// A network device of one's own.
func tunDevices(*sensing) []scenario {
	return []scenario{
		{"ip tuntap add", func(r *run) {
			r.tool("ip", "tuntap", "add", "dev", "tun7", "mode", "tun")
		}, "T1572", "tun", detect.Medium, "ip", 20 * time.Second, false},
	}
}
