package lateral_test

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/demarc/demarc/agent/detect"
)

// Who hands on what he receives: exactly, or through a session that is encrypted.
func relays(s *sensing) []scenario {
	through := func(port uint16, bytes int) {
		s.outside("head -c %d /dev/zero | socat -t 10 - TCP:%s,retry=100,interval=0.1", bytes, netip.AddrPortFrom(s.host.IP4, port))
	}
	// What comes in on a port is handed on to the next workload's, or to the target's.
	next := func(port uint16, to netip.AddrPort) func(*run) {
		return func(r *run) {
			r.tool("socat", fmt.Sprintf("TCP-LISTEN:%d,fork,reuseaddr", port), fmt.Sprintf("TCP:%s,retry=100,interval=0.1", to))
		}
	}
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(s.host.IP4, port) }
	return []scenario{
		{"K01: socat, first of three in a row", next(8011, at(8012)), "T1090.001", "relay", detect.Medium, "socat", 60 * time.Second, false},
		{"K01: socat, second of three", next(8012, at(8013)), "T1090.001", "relay", detect.Medium, "socat", 60 * time.Second, false},
		{"K01: socat, third of three", func(r *run) {
			next(8013, netip.AddrPortFrom(s.target.IP4, 7001))(r)
			through(8011, 20_000)
		}, "T1090.001", "relay", detect.Medium, "socat", 60 * time.Second, false},
		{"socat hands on a connection", func(r *run) {
			r.tool("socat", "TCP-LISTEN:8001,fork,reuseaddr", fmt.Sprintf("TCP:%s:7001", s.target.IP4))
			through(8001, 20_000)
		}, "T1090.001", "relay", detect.Medium, "socat", 30 * time.Second, false},
		{"socat hands on a connection that lasts", func(r *run) {
			r.tool("socat", "TCP-LISTEN:8002,reuseaddr", fmt.Sprintf("TCP:%s:7001", s.target.IP4))
			s.outside("(while head -c 3000 /dev/zero; do sleep 1; done) | socat - TCP:%s:8002,retry=100,interval=0.1 >/dev/null", s.host.IP4)
		}, "T1090.001", "relay", detect.Medium, "socat", 30 * time.Second, false},
		{"K03: sshd hands on connections (ssh -L)", func(r *run) {
			s.keys.sshdOf(s.t, s.host, r.node.Cgroup("/lab/"+r.workload), netip.AddrPortFrom(s.host.IP4, 8003))
			s.outside("%s & (while head -c 100000 /dev/zero; do sleep 1; done) | socat - TCP:127.0.0.1:9003,retry=100,interval=0.1 >/dev/null",
				command(append([]string{"ssh", "-N", "-L", fmt.Sprintf("9003:%s:7001", s.target.IP4)}, s.keys.ssh("user", netip.AddrPortFrom(s.host.IP4, 8003))...)...))
		}, "T1572", "relay", detect.Medium, "sshd", 60 * time.Second, true},
		{"K03: sshd hands on connections (ssh -D)", func(r *run) {
			s.keys.sshdOf(s.t, s.host, r.node.Cgroup("/lab/"+r.workload), netip.AddrPortFrom(s.host.IP4, 8004))
			s.outside("%s & sleep 1; while :; do head -c 100000 /dev/zero | nc.openbsd -N -w 3 -X 5 -x 127.0.0.1:9004 %s 7001 >/dev/null; sleep 0.5; done",
				command(append([]string{"ssh", "-N", "-D", "9004"}, s.keys.ssh("user", netip.AddrPortFrom(s.host.IP4, 8004))...)...), s.target.IP4)
		}, "T1572", "relay", detect.Medium, "sshd", 60 * time.Second, true},
	}
}
