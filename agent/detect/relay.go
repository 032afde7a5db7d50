package detect

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"time"
)

// relay finds who hands on what it receives: a process, or several that one started,
// whose connections carry the same bytes. Once is enough where they are exactly the same;
// where one side is encrypted or changes a little, it takes several times. What is typed
// is little, and told by its segments.
//
// Two connections of one kind are often alike where nobody relays: one that copies reads
// here and writes there, and peers that ask each other how they are say the same. So both
// directions have to match there, unless SSH is on one side, which a forwarding alone does.
func relay(g *Engine, m *moment) []Finding {
	if m.kind() != Relay {
		return nil
	}
	s, c := m.event.Signal, g.config.Relay
	ssh := s.SSH || strings.HasPrefix(s.Comm, "ssh") || strings.HasPrefix(path.Base(s.Exe), "ssh")
	how := m.relaysBytes(s, &c, ssh)
	if how == "" {
		how = m.relaysTyping(s, &c, ssh)
	}
	if how == "" {
		return nil
	}
	technique := internalProxy
	if ssh {
		technique = protocolTunnel
	}
	from := map[string]string{"": "its own callers", "opened": "another place that it went to", "accepted": "another of its callers"}[s.Between]
	f := m.finding("relay", technique, Medium, 75, "", "relays between %s and %s, %s", from, m.target(), how)
	f.Advice = "A proxy belongs into a workload with the role proxy. If it is none, end the process and look for who calls it."
	return []Finding{f}
}

// relaysBytes says how much was relayed, if it is enough.
func (m *moment) relaysBytes(s *Signal, c *RelayConfig, ssh bool) string {
	unlike := unlikeness(&s.Values)
	if unlike > c.Unlike || s.Between != "" && !ssh && !bothWays(&s.Values, c.Unlike) {
		return ""
	}
	times, bytes := m.actors.relayed.see(m.at, c.Within, s.Bytes+s.Back)
	once := unlike <= c.Exact && (s.Between == "" || ssh)
	if bytes < c.Bytes || times < c.Times && !once {
		return ""
	}
	return fmt.Sprintf("%d bytes so far", bytes)
}

// relaysTyping does so for small messages.
func (m *moment) relaysTyping(s *Signal, c *RelayConfig, ssh bool) string {
	if !typed(&s.Values) || s.Between != "" && !ssh && s.Received == s.Answered {
		return ""
	}
	seen := &m.actors.typed
	times, parts := seen.see(m.at, c.Within, uint64(s.Parts[0]))
	if times < c.Times || parts < c.Typed || !seen.uneven() {
		return ""
	}
	return fmt.Sprintf("%d small messages so far, as of somebody who types", parts)
}

// bothWays says whether each direction matches by itself, and the two are not as large
// as each other.
func bothWays(v *Values, unlike float64) bool {
	alike := func(a, b uint64) bool { return min(a, b) > 0 && float64(apart(a, b)) <= unlike*float64(max(a, b)) }
	return alike(v.Received, v.Bytes) && alike(v.Answered, v.Back) && !alike(v.Received, v.Answered) && 4*apart(v.Received, v.Answered) > v.Received+v.Answered
}

// What SSH puts around each message: 34 bytes at least, 66 with a long MAC and a cipher of
// 16 bytes a block. Here the average of a few counts, of which some are not the same on
// both sides.
const framedLeast, framedMost = 28, 72

// typedLargest is the average size, in bytes, of messages that somebody types, as they are
// on the side that has less around them.
const typedLargest = 64

// typed says whether the same small messages pass on both sides: byte for byte, or each
// with as much more around it as SSH puts there, in both directions.
func typed(v *Values) bool {
	for _, n := range v.Parts {
		if n == 0 {
			return false
		}
	}
	if v.Received == v.Bytes && v.Answered == v.Back {
		return v.Bytes <= typedLargest*uint64(v.Parts[2])
	}
	// Whichever side has more around it.
	outer, back, inner, innerBack := v.Received, v.Answered, v.Bytes, v.Back
	if outer < inner {
		outer, inner, back, innerBack = inner, outer, innerBack, back
	}
	if outer <= inner || back <= innerBack {
		return false
	}
	around := func(outer, inner uint64, a, b uint32) float64 { return float64(outer-inner) / (float64(a+b) / 2) }
	there, here := around(outer, inner, v.Parts[0], v.Parts[2]), around(back, innerBack, v.Parts[1], v.Parts[3])
	return min(there, here) >= framedLeast && max(there, here) <= framedMost && min(v.Received, v.Bytes) <= typedLargest*uint64(max(v.Parts[0], v.Parts[2]))
}

func apart(a, b uint64) uint64 { return max(a, b) - min(a, b) }

// unlikeness is the share of what passed that was on one side only: 0 = the same on
// both.
func unlikeness(v *Values) float64 {
	all := v.Received + v.Answered + v.Bytes + v.Back
	if all == 0 {
		return 1
	}
	return 2 * float64(apart(v.Received, v.Bytes)+apart(v.Answered, v.Back)) / float64(all)
}

// relayed is how often, and how much, a party relayed within a time.
type relayed struct {
	times []time.Time
	much  []uint64
}

// relaysKept bounds it.
const relaysKept = 64

func (r *relayed) see(at time.Time, span time.Duration, more uint64) (times int, sum uint64) {
	r.times, r.much = append(r.times, at), append(r.much, more)
	old := max(0, len(r.times)-relaysKept)
	for old < len(r.times) && r.times[old].Before(at.Add(-span)) {
		old++
	}
	r.times, r.much = append(r.times[:0], r.times[old:]...), append(r.much[:0], r.much[old:]...)
	for _, n := range r.much {
		sum += n
	}
	return len(r.times), sum
}

// uneven says whether it was more at some times than at others. What machines tell each
// other at fixed times is not.
func (r *relayed) uneven() bool { return 5*slices.Max(r.much) >= 6*slices.Min(r.much) }
