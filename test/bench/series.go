// Package bench measures what demarc costs beside having no agent, hooks that do
// nothing, and other ways to enforce the same policy. docs/performance.md tells the
// method.
package bench

import (
	"fmt"
	"slices"
)

// Spread is what is kept of a series: its median and quartiles.
type Spread struct {
	N      int     `json:"n"`
	Q1     float64 `json:"q1"`
	Median float64 `json:"median"`
	Q3     float64 `json:"q3"`
}

// spread sums a series up. Quartiles lie between two values where they fall there
// (R's type 7). An empty series is all zeros.
func spread(series []float64) Spread {
	if len(series) == 0 {
		return Spread{}
	}
	s := slices.Sorted(slices.Values(series))
	at := func(q float64) float64 {
		place := q * float64(len(s)-1)
		i := int(place)
		if i+1 == len(s) {
			return s[i]
		}
		return s[i] + (place-float64(i))*(s[i+1]-s[i])
	}
	return Spread{N: len(s), Q1: at(0.25), Median: at(0.5), Q3: at(0.75)}
}

// String prints a ratio: "1.08 [1.06, 1.11]".
func (s Spread) String() string { return fmt.Sprintf("%.3f [%.3f, %.3f]", s.Median, s.Q1, s.Q3) }

// within says whether both quartiles are at most so far from 1.
func (s Spread) within(width float64) bool { return s.N > 0 && s.Q1 >= 1-width && s.Q3 <= 1+width }
