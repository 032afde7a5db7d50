package lateral_test

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/test/netlab"
)

// Names that carry something, to a server that answers each.
func names(s *sensing) []scenario {
	s.target.Start(s.lab.lab.Cgroup("target"), netlab.Command{Path: lookPath(s.t, "dnsmasq"), Args: []string{
		"--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--no-resolv", "--no-hosts", "--user=root",
		"--bind-interfaces", "--listen-address=" + s.target.IP4.String(), "--address=/example/10.0.0.1"}})
	ask := func(r *run, tag string, more ...string) {
		var list strings.Builder
		for i := range 150 {
			sum := sha256.Sum256([]byte{byte(i)})
			fmt.Fprintf(&list, "%x.%s.example\n", sum[:28], tag) // a label has at most 63 bytes
		}
		file := filepath.Join(s.lab.lab.Dir(), tag)
		if err := os.WriteFile(file, []byte(list.String()), 0o644); err != nil {
			s.t.Fatal(err)
		}
		r.tool("dig", append([]string{"@" + s.target.IP4.String(), "+short", "+tries=1", "+time=1", "-f", file}, more...)...)
	}
	return []scenario{
		{"dig, 150 names of 71 bytes", func(r *run) { ask(r, "tunnel") }, "T1071.004", "dns-tunnel", detect.Medium, "dig", 40 * time.Second, false},
		{"dig, 150 names of 71 bytes, by TCP", func(r *run) { ask(r, "stream", "+tcp") }, "T1071.004", "dns-tunnel", detect.Medium, "dig", 40 * time.Second, true},
	}
}
