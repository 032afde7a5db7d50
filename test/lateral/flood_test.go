package lateral_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/test/netlab"
)

// flooder sends datagrams where nothing may go, as often as it is told, to ever other
// places, and says how many were refused.
const flooder = `
	use Socket; use Errno "EPERM";
	socket(my $s, PF_INET, SOCK_DGRAM, 0) or die $!;
	my $refused = 0;
	for my $i (1 .. $ARGV[0]) {
		send($s, "x", 0, pack_sockaddr_in(1 + $i % 65000, pack("C4", 10, 66, 100 + ($i >> 8 & 127), $i & 255)));
		$refused++ if $! == EPERM; $! = 0;
	}
	print "refused $refused\n";`

// Two workloads flood the rings with a million denials; a hundred others each do one
// thing that is refused, here and there in the flood. Each is found, with its process. (H04)
func TestH04NeedlesInAFlood(t *testing.T) {
	events, needles := 20_000, 10
	if all {
		events, needles = 1_000_000, 100
	}
	const floods = 2
	var workloads []string
	for i := range floods {
		workloads = append(workloads, fmt.Sprintf("flood%d", i))
	}
	for i := range needles {
		workloads = append(workloads, fmt.Sprintf("needle%03d", i))
	}
	l := newLab(t, 1, workloads, "", netlab.NodeOptions{})
	begin := time.Now()
	var flood []*netlab.Process
	for i := range floods {
		flood = append(flood, l.start(workloads[i], "perl", "-e", flooder, strconv.Itoa(events/floods)))
	}
	during := 0
	for _, w := range workloads[floods:] {
		for _, p := range flood {
			select {
			case <-p.Ended():
			default:
				during++
			}
		}
		l.start(w, "curl", "-s", "-m", "1", "http://169.254.169.254/").Wait(time.Minute)
	}
	refused := 0
	for _, p := range flood {
		if status := p.Wait(10 * time.Minute); status != 0 {
			t.Fatalf("the flood ended with %d: %s", status, p.Output())
		}
		var n int
		if _, err := fmt.Sscanf(p.Output(), "refused %d", &n); err != nil {
			t.Fatalf("the flood says %q", p.Output())
		}
		refused += n
	}
	if refused < events {
		t.Errorf("%d events were meant, %d were refused", events, refused)
	}
	took := time.Since(begin)
	found := map[string]bool{}
	for end := time.Now().Add(time.Minute); len(found) < needles && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		for _, f := range l.findings(detect.Filter{}) {
			if f.Detector == "metadata" && f.Process != nil && f.Process.Comm == "curl" && strings.HasPrefix(f.Subject.Workload, "needle") {
				found[f.Subject.Workload] = true
			}
		}
	}
	t.Logf("%d refused datagrams in %s, %d needles of which %d began while a flood ran: %d found after %s", refused, took.Round(time.Second), needles, during/floods, len(found), time.Since(begin).Round(time.Second))
	if len(found) != needles {
		t.Errorf("%d of %d needles are found", len(found), needles)
	}
}
