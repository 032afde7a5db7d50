package kubernetes

import (
	"net/netip"
	"slices"

	"github.com/demarc/demarc/policy"
)

// span is an inclusive range of addresses of one family.
type span struct{ low, high netip.Addr }

// families are all addresses: IPv4 and IPv6, where the IPv4 addresses that IPv6
// maps are the IPv4 ones, so that no two ranges mean the same host.
var families = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}

func spanOf(block netip.Prefix) span {
	return span{block.Masked().Addr(), policy.LastAddress(block.Masked())}
}

// cut parts both families at the edges of blocks: within one of the spans no block
// begins or ends. They are ascending, and each holds at least one address.
func cut(blocks []netip.Prefix) []span {
	var starts []netip.Addr
	for _, b := range slices.Concat(families, blocks) {
		s := spanOf(b)
		starts = append(starts, s.low)
		if next := s.high.Next(); next.IsValid() {
			starts = append(starts, next)
		}
	}
	slices.SortFunc(starts, netip.Addr.Compare)
	starts = slices.Compact(starts)
	out := make([]span, 0, len(starts))
	for i, low := range starts {
		high := policy.LastAddress(netip.PrefixFrom(low, 0))
		if i+1 < len(starts) && starts[i+1].BitLen() == low.BitLen() {
			high = starts[i+1].Prev()
		}
		out = append(out, span{low, high})
	}
	return out
}

// find returns the index of the span of a cut that holds an address.
func find(spans []span, a netip.Addr) int {
	i, exact := slices.BinarySearchFunc(spans, a, func(s span, a netip.Addr) int { return s.low.Compare(a) })
	if !exact {
		i--
	}
	return i
}

// without takes single addresses out of a span; holes are ascending.
func (s span) without(holes []netip.Addr) []span {
	var out []span
	low := s.low
	for _, h := range holes {
		if h.Compare(low) > 0 {
			out = append(out, span{low, h.Prev()})
		}
		if h == s.high {
			return out
		}
		low = h.Next()
	}
	return append(out, span{low, s.high})
}

// merge sorts spans and joins those that overlap or touch.
func merge(spans []span) []span {
	slices.SortFunc(spans, func(a, b span) int { return a.low.Compare(b.low) })
	var out []span
	for _, s := range spans {
		if n := len(out); n > 0 && out[n-1].low.BitLen() == s.low.BitLen() &&
			(s.low.Compare(out[n-1].high) <= 0 || s.low == out[n-1].high.Next()) {
			if s.high.Compare(out[n-1].high) > 0 {
				out[n-1].high = s.high
			}
			continue
		}
		out = append(out, s)
	}
	return out
}

// blocks writes spans as the fewest blocks.
func blocks(spans []span) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range merge(spans) {
		for low := s.low; low.IsValid() && low.Compare(s.high) <= 0; {
			bits := low.BitLen()
			for bits > 0 {
				wider := netip.PrefixFrom(low, bits-1)
				if wider.Masked().Addr() != low || policy.LastAddress(wider).Compare(s.high) > 0 {
					break
				}
				bits--
			}
			block := netip.PrefixFrom(low, bits)
			out = append(out, block)
			low = policy.LastAddress(block).Next()
		}
	}
	return out
}
