package fault

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The kernel tells of more devices than the core's socket can hold while the core
// stands still: some of it is lost, one of them the news of a device that matters.
// The core lists the devices anew and guards it. (X12)
func TestX12NetlinkOverflow(t *testing.T) {
	s := newScene(t)
	s.traffic()
	before := s.lost()
	s.node.Core.Signal(unix.SIGSTOP)
	err := s.host.Do(func() error {
		churn := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "churn"}}
		if err := netlink.LinkAdd(churn); err != nil {
			return err
		}
		for range 2000 {
			if err := netlink.LinkSetUp(churn); err != nil {
				return err
			}
			if err := netlink.LinkSetDown(churn); err != nil {
				return err
			}
		}
		return netlink.LinkDel(churn)
	})
	if err != nil {
		t.Fatal(err)
	}
	s.host.Device("late", netip.MustParsePrefix("192.0.2.1/24"))
	lost := s.lost() - before
	s.node.Core.Signal(unix.SIGCONT)
	if lost == 0 {
		t.Fatal("nothing was lost")
	}
	start := time.Now()
	for {
		names := fmt.Sprint(s.tags())
		if strings.Contains(names, "tc_ingress late") && strings.Contains(names, "tc_egress late") {
			break
		}
		if time.Since(start) > time.Minute {
			t.Fatalf("the device is not guarded: %+v", s.node.Status())
		}
		time.Sleep(2 * time.Millisecond)
	}
	t.Logf("%d messages were lost; the device is guarded %s after", lost, time.Since(start).Round(time.Millisecond))
	s.check("after an overflow")
	s.quiet()
}

// lost counts the messages that found no room in the rtnetlink sockets of the
// host's namespace.
func (s *scene) lost() (total int) {
	s.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/netlink", s.node.Core.PID()))
	if err != nil {
		s.t.Fatal(err)
	}
	// sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode
	for line := range strings.Lines(string(text)) {
		var socket, pid, groups string
		var family, rmem, wmem, dump, locks, drops int
		if n, _ := fmt.Sscan(line, &socket, &family, &pid, &groups, &rmem, &wmem, &dump, &locks, &drops); n == 9 && family == unix.NETLINK_ROUTE {
			total += drops
		}
	}
	return total
}
