package main

import (
	"testing"
	"time"

	"github.com/demarc/demarc/agent/core/keyring"
)

func TestGap(t *testing.T) {
	at := func(seconds int64) time.Time { return time.Unix(seconds, 0).UTC() }
	r := &keyring.Ring{Keys: []keyring.Key{
		{Epoch: 1, Until: at(300)},
		{Epoch: 2, Accept: at(100), Send: at(200), Until: at(500)},
		{Epoch: 4, Send: at(1000)},
	}}
	for _, tt := range []struct {
		name           string
		from, to, want int64 // 0 = none
	}{
		{"OK up to the end of a key", 1, 500, 0},
		{"bad one second longer", 1, 501, 500},
		{"bad from within", 600, 601, 600},
		{"OK without end", 1000, 1 << 40, 0},
	} {
		gap, found := gapIn(r, at(tt.from), at(tt.to))
		if found != (tt.want != 0) || found && gap != at(tt.want) {
			t.Errorf("%s: %v, %v; want %d", tt.name, gap, found, tt.want)
		}
	}
}
