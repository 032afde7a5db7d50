package lateral_test

import (
	"fmt"
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/test/netlab"
)

// Into another network namespace: a neighbour's, or a new one; by a program that is
// started there, and by one that goes there and opens a connection.
func namespaceMoves(s *sensing) []scenario {
	return []scenario{
		{"nsenter into another network namespace", func(r *run) {
			there := s.target.Start(s.lab.lab.Cgroup("target"), netlab.Command{Path: lookPath(s.t, "sleep"), Args: []string{"60"}})
			r.tool("nsenter", "--net=/proc/"+fmt.Sprint(there.PID())+"/ns/net", "sleep", "3")
		}, "T1611", "namespace", detect.High, "", 20 * time.Second, false},
		{"unshare --net", func(r *run) {
			r.tool("unshare", "--net", "sleep", "3")
		}, "T1611", "namespace", detect.High, "", 20 * time.Second, false},
		{"setns and connect, without a program", func(r *run) {
			there := s.target.Start(s.lab.lab.Cgroup("target"), netlab.Command{Path: lookPath(s.t, "sleep"), Args: []string{"60"}})
			r.tool("perl", "-MSocket", "-e", `open(my $n, "<", "/proc/$ARGV[0]/ns/net"); syscall(308, fileno($n), 0) == 0 or die $!;
				socket(my $s, PF_INET, SOCK_STREAM, 0); connect($s, sockaddr_in(7001, inet_aton($ARGV[1]))); sleep 3`, fmt.Sprint(there.PID()), s.target.IP4.String())
		}, "T1611", "namespace", detect.High, "perl", 20 * time.Second, false},
		{"setns, and nothing else", func(r *run) {
			there := s.target.Start(s.lab.lab.Cgroup("target"), netlab.Command{Path: lookPath(s.t, "sleep"), Args: []string{"60"}})
			r.tool("perl", "-e", `open(my $n, "<", "/proc/$ARGV[0]/ns/net"); syscall(308, fileno($n), 0) == 0 or die $!; sleep 30`, fmt.Sprint(there.PID()))
		}, "T1611", "namespace", detect.High, "perl", 20 * time.Second, false},
	}
}
