package fault

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The kernel tells of more devices than the core's socket can hold while the core
// stands still: some of it is lost, one of them the news of a device that matters.
// The core lists the devices anew and guards it, within 2 s from when it goes on: in
// the median of three, for it takes turns with all else that the machine does. (X12)
func TestX12NetlinkOverflow(t *testing.T) {
	s := newScene(t)
	s.traffic()
	var took []time.Duration
	for i := range 3 {
		took = append(took, s.overflow(fmt.Sprintf("late%d", i), netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + i)}), 32)))
		s.check("after an overflow")
	}
	slices.Sort(took)
	if took[1] >= 2*time.Second {
		t.Errorf("devices were guarded %v after the core went on, want less than 2 s in the median", took)
	}
	s.quiet()
}

// overflow makes a device whose news is lost, and returns how long after it could go on
// the core took to guard it.
func (s *scene) overflow(device string, at netip.Prefix) time.Duration {
	s.t.Helper()
	before := s.lost()
	s.node.Core.Signal(unix.SIGSTOP)
	err := s.host.Do(func() error {
		churn := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "churn"}}
		if err := netlink.LinkAdd(churn); err != nil {
			return err
		}
		for range 1000 {
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
		s.t.Fatal(err)
	}
	s.host.Device(device, at)
	lost := s.lost() - before
	s.node.Core.Signal(unix.SIGCONT)
	if lost == 0 {
		s.t.Fatal("nothing was lost")
	}
	start := time.Now()
	for {
		tags := s.tags()
		if tags["tc_ingress "+device] != "" && tags["tc_egress "+device] != "" {
			break
		}
		if time.Since(start) > time.Minute {
			s.t.Fatalf("the device is not guarded: %+v", s.node.Status())
		}
		time.Sleep(2 * time.Millisecond)
	}
	took := time.Since(start)
	s.t.Logf("%d messages were lost; %s is guarded %s after", lost, device, took.Round(time.Millisecond))
	return took
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
