package detect

import (
	"slices"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
)

// Plain says whether the same flow, seen again within a second under the same policy,
// tells the detectors nothing: somebody was let in, by no decoy, where nobody logs in. What
// is remembered of such a contact is that there was one, and when last. Whoever gives
// events may leave it out then.
//
// A detector that looks at more of what was let in has to say so here.
func (g *Engine) Plain(f *flow.Flow) bool {
	if f.Verdict != abi.Allow && f.Verdict != abi.Provisional || !f.Destination.Address.IsValid() {
		return false
	}
	switch f.Reason {
	case abi.ByCrossing, abi.ByUnmanaged, abi.ByReply, abi.ByKernel, abi.Unproven:
	default:
		return false
	}
	_, admin := adminPorts[f.Destination.Port]
	return !admin && !slices.Contains(g.config.BruteForce.Services, f.Destination.Port) && !g.policy.decoys[f.Crossing] &&
		!slices.Contains(metadataPlaces, f.Destination.Address)
}
