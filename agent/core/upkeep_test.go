package core

import (
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/bpf/abi"
)

// wallOff is how far the kernel's idea of the time is from the machine's.
func wallOff(t *testing.T, c *Core) time.Duration {
	t.Helper()
	clock, err := readBootClock()
	must(t, err)
	state, err := readState(c.objects)
	must(t, err)
	return time.Duration(clock.offset - int64(state.Wall)).Abs()
}

// The programs know the time from the start, and again soon after a clock step;
// nothing else of the state changes.
func TestWallFollowsClock(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	if off := wallOff(t, c); off > wallTolerance {
		t.Errorf("at the start the time is off by %v", off)
	}
	_, err := c.Apply(shop(t, nil), 0)
	must(t, err)
	for _, step := range []time.Duration{time.Hour, 2 * wallTolerance, -2 * wallTolerance} {
		before, err := readState(c.objects)
		must(t, err)
		c.mu.Lock()
		stepped := before
		stepped.Wall -= uint64(step)
		err = writeState(c.objects, stepped)
		c.mu.Unlock()
		must(t, err)
		for end := time.Now().Add(patience); wallOff(t, c) > wallTolerance; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("a step of %v is not followed", step)
			}
		}
		after, err := readState(c.objects)
		must(t, err)
		before.Wall, after.Wall = 0, 0
		if before != after {
			t.Errorf("state before %+v, after %+v", before, after)
		}
	}
}

// A wall clock that went back is not followed at once, and not silently: the tags of
// the time in between would be good again.
func TestI12WallWentBack(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	c.stop() // nobody else looks at the clock
	c.stop = func() {}
	c.mu.Lock()
	defer c.mu.Unlock()
	ahead := func(d time.Duration, last time.Duration) (left time.Duration, err error) {
		t.Helper()
		clock, err := readBootClock()
		must(t, err)
		state, err := readState(c.objects)
		must(t, err)
		state.Wall = uint64(clock.offset + int64(d))
		must(t, writeState(c.objects, state))
		c.walled = clock.now() - uint64(last)
		err = c.setWall()
		state, bad := readState(c.objects)
		must(t, bad)
		return time.Duration(int64(state.Wall) - clock.offset), err
	}
	left, err := ahead(24*time.Hour, time.Second)
	if near := 24*time.Hour - time.Second/wallSlew; left > near || left < near-time.Second {
		t.Errorf("a day back: after a second the tags are %v ahead, want %v", left, near)
	}
	if err == nil || !strings.Contains(err.Error(), "wall clock went back: tags are 24h0m0s ahead") {
		t.Errorf("a day back is told as %v", err)
	}
	if left, err = ahead(500*time.Millisecond, 10*time.Second); left.Abs() > wallTolerance || err != nil {
		t.Errorf("half a second back, ten seconds later: %v ahead, problem %v", left, err)
	}
	if left, err = ahead(-24*time.Hour, time.Second); left.Abs() > wallTolerance || err != nil {
		t.Errorf("a day forward: %v ahead, problem %v", left, err)
	}
}

// The time is written between two changes of the policy without undoing either.
func TestWallDuringApply(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 2000 {
			c.mu.Lock()
			state, err := readState(c.objects)
			if err == nil {
				state.Wall -= uint64(time.Hour)
				err = writeState(c.objects, state)
			}
			c.mu.Unlock()
			c.upkeep()
			if err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for v := uint64(7); v < 27; v++ {
		s, err := c.Apply(shop(t, version(v)), 0)
		must(t, err)
		state, err := readState(c.objects)
		must(t, err)
		if want := abi.MakeActive(uint32(s.Active.Slot), abi.ActiveFlags(state.Active), s.Active.Epoch); state.Active != want {
			t.Fatalf("version %d: active %#x, want %#x", v, state.Active, want)
		}
	}
	<-done
	if off := wallOff(t, c); off > wallTolerance {
		t.Errorf("the time is off by %v", off)
	}
}

// Whoever wants to know hears of a core only as long as it works.
func TestBeat(t *testing.T) {
	m := newMachine(t)
	c := m.start()
	beats := make(chan struct{}, 100)
	c.Beat = func() { beats <- struct{}{} }
	c.mu.Lock() // so that it hangs
	c.start()
	select {
	case <-beats:
		t.Error("a core that hangs was heard")
	case <-time.After(3 * upkeepInterval):
	}
	c.mu.Unlock()
	select {
	case <-beats:
	case <-time.After(10 * time.Second):
		t.Error("a core that works is not heard")
	}
}
