package core

import (
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

func TestPace(t *testing.T) {
	tests := []struct {
		name            string
		rate, burst     uint64
		interval, slack uint64
	}{
		{"OK 200 a second, 400 at once", 200 * 3600, 400, 5_000_000, 399 * 5_000_000},
		{"OK 1 a minute", 60, 1, uint64(time.Minute), 0},
		{"OK 1 an hour", 1, 2, uint64(time.Hour), uint64(time.Hour)},
		{"OK the highest", image.MaxRate, 1, 1, 0},
		{"OK rounds towards fewer", 7 * 3600, 1, 142_857_143, 0},
		{"OK no burst is one", 3600, 0, uint64(time.Second), 0},
		{"bad burst beyond all time", 1, math.MaxUint64, uint64(time.Hour), math.MaxInt64},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			interval, slack := pace(tt.rate, tt.burst)
			if interval != tt.interval || slack != tt.slack {
				t.Errorf("got %d, %d; want %d, %d", interval, slack, tt.interval, tt.slack)
			}
		})
	}
}

// A bound that lies before the boot must not become "no bound".
func TestBootClock(t *testing.T) {
	c := bootClock{offset: 1000 * int64(time.Second)}
	for seconds, want := range map[int64]uint64{
		0: 0, 1: 1, 999: 1, 1000: 1, 1001: uint64(time.Second), 2000: 1000 * uint64(time.Second),
		-5: 1, math.MaxInt64: (1<<33)*uint64(time.Second) - 1000*uint64(time.Second),
	} {
		if got := c.at(seconds); got != want {
			t.Errorf("at(%d) = %d, want %d", seconds, got, want)
		}
	}
	real, err := readBootClock()
	if err != nil {
		t.Fatal(err)
	}
	if now, at := real.now(), real.at(time.Now().Unix()); now < at || now-at > 2*uint64(time.Second) {
		t.Errorf("now is %d, this second began at %d", now, at)
	}
}

func TestCrossingEntries(t *testing.T) {
	img := &image.Image{Crossings: []image.Crossing{
		{Number: 7, Need: image.NoProof, NAT: image.NATSource, Log: image.LogAll, Decoy: true, Refuse: image.RefuseDrop,
			Rate: 3600, Burst: 3, Since: 1001, Until: 1002},
		{Number: 8},
	}}
	want := []abi.Crossing{
		{Number: 7, Need: 2, NAT: 1, Log: 1, Flags: abi.CrossingDecoy | abi.CrossingDrop,
			Since: 1e9, Until: 2e9, Interval: 1e9, Slack: 2e9},
		{Number: 8},
	}
	if diff := cmp.Diff(want, crossingEntries(img, bootClock{offset: 1000e9})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestActiveFlags(t *testing.T) {
	unmanaged := []image.Crossing{{}, {To: []image.Term{{Kind: image.TermUnmanaged}}}}
	for _, tt := range []struct {
		name string
		img  image.Image
		want uint32
	}{
		{"OK enforce", image.Image{}, abi.ActiveOn},
		{"OK observe", image.Image{Mode: image.Observe}, abi.ActiveOn | abi.ActiveObserve},
		{"OK unmanaged", image.Image{Crossings: unmanaged}, abi.ActiveOn | abi.ActiveUnmanaged},
	} {
		if got := activeFlags(&tt.img); got != tt.want {
			t.Errorf("%s: %#x, want %#x", tt.name, got, tt.want)
		}
	}
}
