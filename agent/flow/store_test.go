package flow

import (
	"context"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/bpf/abi/record"
)

func add(s *Store, ring int, times ...uint64) {
	for _, at := range times {
		s.Add(ring, &record.Event{Time: at})
	}
}

// read takes up to n events and returns their times.
func read(c *Cursor, n int) ([]uint64, Loss) {
	events := make([]record.Event, n)
	got, loss := c.Read(events)
	var times []uint64
	for _, e := range events[:got] {
		times = append(times, e.Time)
	}
	return times, loss
}

func TestCursorMergesRingsByTime(t *testing.T) {
	s := NewStore(8)
	add(s, record.RingDenied, 2, 5, 6)
	add(s, record.RingAllowed, 1, 3, 7)
	c := s.Oldest()
	first, _ := read(c, 4)
	rest, _ := read(c, 4)
	if d := cmp.Diff([][]uint64{{1, 2, 3, 5}, {6, 7}}, [][]uint64{first, rest}); d != "" {
		t.Errorf("times (-want +got):\n%s", d)
	}
	if got, loss := read(c, 4); got != nil || loss.Total() != 0 {
		t.Errorf("nothing is new, got %v, %v", got, loss)
	}
	add(s, record.RingDenied, 9)
	if got, _ := read(s.Newest(), 4); got != nil {
		t.Errorf("the newest cursor saw %v", got)
	}
	if got, _ := read(c, 4); len(got) != 1 || got[0] != 9 {
		t.Errorf("follow saw %v", got)
	}
}

func TestFloodOfOneRingCostsTheOtherNothing(t *testing.T) {
	s := NewStore(4)
	c := s.Oldest()
	add(s, record.RingDenied, 1)
	for i := range uint64(1000) {
		add(s, record.RingAllowed, 2+i)
	}
	got, loss := read(c, 10)
	if d := cmp.Diff([]uint64{1, 998, 999, 1000, 1001}, got); d != "" {
		t.Errorf("times (-want +got):\n%s", d)
	}
	if want := (Loss{Agent: 996}); loss != want {
		t.Errorf("loss %+v, want %+v", loss, want)
	}
}

func TestEveryEventIsReadOrCountedAsLost(t *testing.T) {
	s := NewStore(16)
	c := s.Oldest()
	var seen, lost uint64
	for i := range uint64(10_000) {
		add(s, int(i%record.Rings), i)
		if i%97 == 0 {
			got, loss := read(c, 5)
			seen, lost = seen+uint64(len(got)), lost+loss.Total()
		}
	}
	for {
		got, loss := read(c, 5)
		seen, lost = seen+uint64(len(got)), lost+loss.Total()
		if got == nil {
			break
		}
	}
	if seen+lost != 10_000 || lost == 0 {
		t.Errorf("%d seen, %d lost, together not 10000", seen, lost)
	}
}

func TestKernelLossIsToldOnce(t *testing.T) {
	s := NewStore(4)
	c := s.Oldest()
	s.Missed(record.RingDenied, 12)
	s.Missed(record.RingDenied, -2)
	if _, loss := read(c, 4); loss != (Loss{Kernel: 10}) {
		t.Errorf("loss %+v, want 10 of the kernel", loss)
	}
	s.Missed(record.RingDenied, -1)
	if _, loss := read(c, 4); loss.Total() != 0 {
		t.Errorf("loss %+v was told twice", loss)
	}
	if got := s.Counts()[record.RingDenied]; got != (Counts{Missed: 9}) {
		t.Errorf("counts %+v", got)
	}
}

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewStore(4)
		c := s.Newest()
		ctx, cancel := context.WithCancel(t.Context())
		woken := make(chan bool, 1)
		wait := func() { woken <- c.Wait(ctx) }
		check := func(when string, want bool) {
			t.Helper()
			synctest.Wait()
			select {
			case got := <-woken:
				if got != want {
					t.Errorf("%s: Wait = %v, want %v", when, got, want)
				}
			default:
				t.Errorf("%s: still waiting", when)
			}
		}
		go wait()
		synctest.Wait()
		if len(woken) > 0 {
			t.Error("nothing is new and Wait returned")
		}
		add(s, record.RingAllowed, 1)
		check("after an event", true)
		read(c, 4)
		go wait()
		synctest.Wait()
		s.Missed(record.RingDenied, 1)
		check("after a loss", true)
		read(c, 4)
		go wait()
		cancel()
		check("after the reader went", false)
		ctx = t.Context()
		go wait()
		s.Close()
		check("after the store closed", false)
	})
}

// Many at once are kept and read as one after the other would be, wherever the store's
// end lies.
func TestManyAtOnce(t *testing.T) {
	const size = 7
	s := NewStore(size)
	c := s.Oldest()
	made, at := uint64(0), uint64(0) // numbers of the last event made, and of the last read or lost
	for i := range 500 {
		all := make([]record.Event, i%17)
		for j := range all {
			made++
			all[j].Time = made
		}
		s.AddAll(record.RingAllowed, all)
		for _, room := range []int{i % 3, i % 11} {
			got := make([]record.Event, room)
			n, lost := c.Read(got)
			at += lost.Agent
			if oldest := made - min(made, size); lost.Total() > 0 && at != oldest {
				t.Fatalf("turn %d: %d are lost, up to %d, want %d", i, lost.Total(), at, oldest)
			}
			if want := min(room, int(made-at)); n != want {
				t.Fatalf("turn %d: %d were read, want %d", i, n, want)
			}
			for _, e := range got[:n] {
				if at++; e.Time != at {
					t.Fatalf("turn %d: event %d was read, want %d", i, e.Time, at)
				}
			}
		}
	}
}
