package agent

import (
	"reflect"
	"testing"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// A contact is the same only if all of it is, and only for so long.
func TestRepeats(t *testing.T) {
	first := record.Event{Time: 5e9, Subject: 1, Peer: 2, Verdict: abi.Allow, Reason: abi.ByCrossing, Tuple: abi.Tuple{Proto: 6, SourcePort: 1}}
	if (&repeats{}).seen(&first) || (&repeats{}).seen(&record.Event{}) {
		t.Error("what was never noted was seen")
	}
	for name, c := range map[string]struct {
		change func(*record.Event)
		want   bool
	}{
		"OK again":            {func(*record.Event) {}, true},
		"OK another process":  {func(e *record.Event) { e.PID, e.Comm, e.Tuple.SourcePort, e.CPU, e.Seq = 9, [16]byte{'x'}, 9, 9, 9 }, true},
		"OK a little earlier": {func(e *record.Event) { e.Time -= 1e6 }, true},
		"OK just within":      {func(e *record.Event) { e.Time += uint64(repeatsWithin) - 1 }, true},
		"bad later":           {func(e *record.Event) { e.Time += uint64(repeatsWithin) }, false},
		"bad much earlier":    {func(e *record.Event) { e.Time -= uint64(repeatsWithin) }, false},
		"bad long ago":        {func(e *record.Event) { e.Time = 1 }, false},
		"bad address":         {func(e *record.Event) { e.Tuple.Source[0] = 1 }, false},
		"bad destination":     {func(e *record.Event) { e.Tuple.Destination[15] = 1 }, false},
		"bad port":            {func(e *record.Event) { e.Tuple.DestinationPort++ }, false},
		"bad protocol":        {func(e *record.Event) { e.Tuple.Proto = 17 }, false},
	} {
		var r repeats
		r.note(&first)
		e := first
		c.change(&e)
		if got := r.seen(&e); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
	// Whatever else an event has tells contacts apart, too: none is forgotten here.
	of := reflect.TypeFor[record.Event]()
	for i := range of.NumField() {
		switch field := of.Field(i); field.Name {
		case "Time", "Seq", "CPU", "PID", "Comm", "Kind", "Slot", "Tuple", "_":
		default:
			var r repeats
			r.note(&first)
			e := first
			v := reflect.ValueOf(&e).Elem().Field(i)
			v.SetUint(v.Uint() + 1)
			// Also where it falls into the same place.
			*r.place(&e) = *r.place(&first)
			if r.seen(&e) {
				t.Errorf("another %s is taken for the same", field.Name)
			}
		}
	}
}

// Detectors are given a plain flow once a second, and everything again under another
// policy; a recording has each.
func TestRepeatsAreLeftOut(t *testing.T) {
	s, k := busyNode(t, 4)
	d := newDetection(&Config{}, s.link, s.resolver(), s.log)
	given := func() (n int) {
		t.Helper()
		k.left, k.next = len(k.raw), 0
		if err := s.link.read(record.RingAllowed, k); err == nil {
			t.Fatal("the ring did not end")
		}
		for d.events.fill() {
			for _, e := range d.events.rest {
				d.follow()
				d.see(e)
				n++
			}
		}
		return n
	}
	const different = 4 * 5 * 2 // workloads, their ports, and both ends
	given()                     // before the policy was known
	for i, want := range []int{different, 0, 0} {
		if i == 0 {
			d.events.forget()
		}
		if got := given(); got != want {
			t.Errorf("turn %d: %d flows were given, want %d", i, got, want)
		}
	}
	k.at += time.Second
	if got := given(); got != different {
		t.Errorf("a second later: %d flows were given, want %d", got, different)
	}
	d.events.plain = nil
	if got := given(); got != len(k.raw) {
		t.Errorf("of a recording: %d flows were given, want %d", got, len(k.raw))
	}
}
