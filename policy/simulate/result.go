package simulate

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
)

// Result is what a policy would do to the flows that were recorded.
type Result struct {
	Policy        string            `json:"policy"`
	Version       uint64            `json:"version"`
	Conversations uint64            `json:"conversations"` // that were judged
	NewlyDenied   uint64            `json:"newlyDenied"`   // that passed, and would not
	NewlyPassed   uint64            `json:"newlyPassed"`   // that were denied, and would pass
	Changes       []Change          `json:"changes"`       // what would be denied first, then by count
	NotListed     uint64            `json:"notListed"`     // changes of kinds beyond the bound
	NotJudged     map[string]uint64 `json:"notJudged"`     // flows that no policy decides about, by reason
	Lost          uint64            `json:"lost"`          // flows that were not recorded
}

// Change is a kind of conversation whose verdict would be another one.
type Change struct {
	kind
	Flows uint64    `json:"flows"` // conversations
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
}

// kind is what conversations have in common that are shown together.
type kind struct {
	From          string      `json:"from"`
	To            string      `json:"to"`
	Port          string      `json:"port"`
	Was           abi.Verdict `json:"was"`
	WasReason     abi.Reason  `json:"wasReason"`
	WasCrossing   string      `json:"wasCrossing,omitempty"`
	Would         abi.Verdict `json:"would"`
	WouldReason   abi.Reason  `json:"wouldReason"`
	WouldCrossing string      `json:"wouldCrossing,omitempty"`
}

// rank puts first what would break something.
func (c *Change) rank() int {
	switch {
	case c.Would == abi.Deny:
		return 0
	case c.Was == abi.Deny:
		return 1
	}
	return 2
}

// Result judges what is left, and says what was found. Nothing may be added afterwards.
func (s *Simulator) Result() *Result {
	for len(s.queue) > 0 {
		s.end(s.queue[0])
	}
	for c := range maps.Values(s.kinds) {
		s.result.Changes = append(s.result.Changes, *c)
	}
	slices.SortFunc(s.result.Changes, func(a, b Change) int {
		return cmp.Or(a.rank()-b.rank(), cmp.Compare(b.Flows, a.Flows), cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To), cmp.Compare(a.Port, b.Port),
			cmp.Compare(a.Was, b.Was), cmp.Compare(a.Would, b.Would), cmp.Compare(a.WasReason, b.WasReason), cmp.Compare(a.WouldReason, b.WouldReason),
			cmp.Compare(a.WasCrossing, b.WasCrossing), cmp.Compare(a.WouldCrossing, b.WouldCrossing))
	})
	return &s.result
}

// portWord is the port as a policy writes it.
func portWord(f *flow.Flow) string {
	if f.Destination.Port == 0 {
		return f.Protocol
	}
	return f.Protocol + "/" + strconv.Itoa(int(f.Destination.Port))
}
