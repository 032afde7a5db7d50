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
	// Somebody types, now and then, or a file goes over, and comes back.
	const types, sends = `(while :; do for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do printf x; sleep 0.1; done; sleep $(($(date +%s) % 3)); done)`, `(while head -c 100000 /dev/zero; do sleep 1; done)`
	const little = `(while head -c 2000 /dev/zero; do sleep 1; done)` // a terminal holds 4 KB, and no more
	to := func(what string, at netip.AddrPort) {
		s.outside("%s | socat - TCP:%s,retry=100,interval=0.1 >/dev/null", what, at)
	}
	forwards := func(r *run, port uint16, more ...string) string {
		s.keys.sshdOf(s.t, s.host, r.node.Cgroup("/lab/"+r.workload), netip.AddrPortFrom(s.host.IP4, port))
		return command(append(append([]string{"ssh", "-N", "-o", "ExitOnForwardFailure=yes"}, more...), s.keys.ssh("user", netip.AddrPortFrom(s.host.IP4, port))...)...)
	}
	local := func(port uint16) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
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
		{"socat hands on what came in more than a round before", func(r *run) {
			next(8031, netip.AddrPortFrom(s.target.IP4, 7013))(r)
			through(8031, 20_000)
			s.outside("sleep 7; socat -u TCP-LISTEN:7013,reuseaddr - >/dev/null")
		}, "T1090.001", "relay", detect.Medium, "socat", 30 * time.Second, false},
		{"K03: sshd hands on connections (ssh -L)", func(r *run) {
			s.keys.sshdOf(s.t, s.host, r.node.Cgroup("/lab/"+r.workload), netip.AddrPortFrom(s.host.IP4, 8003))
			s.outside("%s & (while head -c 100000 /dev/zero; do sleep 1; done) | socat - TCP:127.0.0.1:9003,retry=100,interval=0.1 >/dev/null",
				command(append([]string{"ssh", "-N", "-L", fmt.Sprintf("9003:%s:7001", s.target.IP4)}, s.keys.ssh("user", netip.AddrPortFrom(s.host.IP4, 8003))...)...))
		}, "T1572", "relay", detect.Medium, "sshd", 60 * time.Second, true},
		{"K03: ssh hands on connections of the other side (ssh -R)", func(r *run) {
			r.tool("ssh", append([]string{"-N", "-o", "ExitOnForwardFailure=yes", "-R", fmt.Sprintf("9021:%s:7001", s.target.IP4)}, s.keys.ssh("user", netip.AddrPortFrom(s.target.IP4, 22))...)...)
			to(sends, local(9021))
		}, "T1572", "relay", detect.Medium, "ssh", 60 * time.Second, false},
		{"K03: sshd hands on connections to the other side (ssh -R)", func(r *run) {
			s.outside("%s", forwards(r, 8022, "-R", "0.0.0.0:8023:127.0.0.1:7001"))
			to(sends, at(8023))
		}, "T1572", "relay", detect.Medium, "sshd", 60 * time.Second, true},
		{"socat and nc, through a terminal", func(r *run) {
			r.tool("socat", "TCP-LISTEN:8024,reuseaddr", fmt.Sprintf("EXEC:nc.openbsd %s 7001,pty,raw,echo=0", s.target.IP4))
			to(little, at(8024))
		}, "T1090.001", "relay", detect.Medium, "nc.openbsd", 60 * time.Second, false},
		{"socat and nc, through a terminal of another session", func(r *run) {
			r.tool("socat", "TCP-LISTEN:8025,reuseaddr", fmt.Sprintf("EXEC:nc.openbsd %s 7001,pty,raw,echo=0,setsid,ctty", s.target.IP4))
			to(little, at(8025))
		}, "T1090.001", "relay", detect.Medium, "nc.openbsd", 60 * time.Second, true},
		{"socat and nc, through a pair of sockets", func(r *run) {
			r.tool("socat", "TCP-LISTEN:8026,reuseaddr,fork", fmt.Sprintf("EXEC:nc.openbsd %s 7001", s.target.IP4))
			to(sends, at(8026))
		}, "T1090.001", "relay", detect.Medium, "nc.openbsd", 60 * time.Second, true},
		{"nc and nc, through two pipes", func(r *run) {
			r.shell("cd %s && mkfifo back && nc.openbsd -l %s 8027 <back | nc.openbsd %s 7001 >back; true", s.lab.lab.Dir(), s.host.IP4, s.target.IP4)
			to(sends, at(8027))
		}, "T1090.001", "relay", detect.Medium, "nc.openbsd", 60 * time.Second, true},
		{"socat between two places that it goes to", func(r *run) {
			s.outside(`socat TCP-LISTEN:7012,reuseaddr 'SYSTEM:while read line; do head -c 3000 /dev/zero; done'`)
			s.outside(`(while :; do echo what is there in this place; sleep 1; done) | nc.openbsd -l %s 7011 >/dev/null`, s.target.IP4)
			r.tool("socat", fmt.Sprintf("TCP:%s:7011,retry=100,interval=0.1", s.target.IP4), fmt.Sprintf("TCP:%s:7012,retry=100,interval=0.1", s.target.IP4))
		}, "T1090.001", "relay", detect.Medium, "socat", 60 * time.Second, true},
		{"somebody types through socat", func(r *run) {
			r.tool("socat", "TCP-LISTEN:8028,reuseaddr", fmt.Sprintf("TCP:%s:7001", s.target.IP4))
			to(types, at(8028))
		}, "T1090.001", "relay", detect.Medium, "socat", 2 * time.Minute, true},
		{"somebody types through sshd (ssh -L)", func(r *run) {
			s.outside("%s", forwards(r, 8029, "-L", fmt.Sprintf("9029:%s:7001", s.target.IP4)))
			to(types, local(9029))
		}, "T1572", "relay", detect.Medium, "sshd", 2 * time.Minute, false},
		{"somebody types through ssh (ssh -R)", func(r *run) {
			r.tool("ssh", append([]string{"-N", "-o", "ExitOnForwardFailure=yes", "-R", fmt.Sprintf("9030:%s:7001", s.target.IP4)}, s.keys.ssh("user", netip.AddrPortFrom(s.target.IP4, 22))...)...)
			to(types, local(9030))
		}, "T1572", "relay", detect.Medium, "ssh", 2 * time.Minute, true},
		{"K03: sshd hands on connections (ssh -D)", func(r *run) {
			s.keys.sshdOf(s.t, s.host, r.node.Cgroup("/lab/"+r.workload), netip.AddrPortFrom(s.host.IP4, 8004))
			s.outside("%s & sleep 1; while :; do head -c 100000 /dev/zero | nc.openbsd -N -w 3 -X 5 -x 127.0.0.1:9004 %s 7001 >/dev/null; sleep 0.5; done",
				command(append([]string{"ssh", "-N", "-D", "9004"}, s.keys.ssh("user", netip.AddrPortFrom(s.host.IP4, 8004))...)...), s.target.IP4)
		}, "T1572", "relay", detect.Medium, "sshd", 60 * time.Second, true},
	}
}
