package agent

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// clock turns CLOCK_BOOTTIME into wall clock time. Both clocks are read once and
// then only adjusted when the wall clock was stepped, so that the times of two
// events keep their distance.
type clock struct{ offset atomic.Int64 } // wall clock minus boot time, ns

// stepped is how far the clocks must drift apart to be adjusted.
const stepped = time.Millisecond

func newClock() *clock {
	c := &clock{}
	c.offset.Store(clockOffset())
	return c
}

func (c *clock) adjust() {
	now := clockOffset()
	if d := time.Duration(now - c.offset.Load()); d > stepped || d < -stepped {
		c.offset.Store(now)
	}
}

// Wall is the wall clock time at so many nanoseconds of CLOCK_BOOTTIME.
func (c *clock) Wall(boot uint64) time.Time {
	return time.Unix(0, int64(boot)+c.offset.Load()).UTC()
}

// clockOffset reads the wall clock between two readings of the boot clock. These
// two clocks exist on every supported kernel, so that reading them cannot fail.
func clockOffset() int64 {
	before, wall, after := now(unix.CLOCK_BOOTTIME), now(unix.CLOCK_REALTIME), now(unix.CLOCK_BOOTTIME)
	return wall - (before + (after-before)/2)
}

func now(clock int32) int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(clock, &t); err != nil {
		return 0
	}
	return t.Nano()
}
