package kubernetes

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/demarc/demarc/policy/image"
)

// ports is a set of ports of all protocols: sorted spans, disjoint and not
// touching within a protocol. The empty set is nil.
type ports []image.Span

// everyPort holds all ports, also those of protocols that the API does not name.
var everyPort = func() ports {
	var out ports
	for _, proto := range image.Protos {
		out = append(out, whole(proto))
	}
	return normal(out)
}()

// whole is all ports of one protocol. Port 0 is none of them: nobody can listen there,
// and neither language knows it by itself.
func whole(proto image.Proto) image.Span {
	last, _ := proto.Last()
	s := image.Span{Proto: proto, High: last}
	if protoWords[proto] != "" {
		s.Low = 1
	}
	return s
}

// normal makes a set of any spans.
func normal(spans []image.Span) ports {
	slices.SortFunc(spans, func(a, b image.Span) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Low, b.Low))
	})
	var out ports
	for _, s := range spans {
		if n := len(out); n > 0 && out[n-1].Proto == s.Proto && uint32(s.Low) <= uint32(out[n-1].High)+1 {
			out[n-1].High = max(out[n-1].High, s.High)
		} else {
			out = append(out, s)
		}
	}
	return out
}

func (p ports) union(q ports) ports { return normal(slices.Concat(p, q)) }

func (p ports) intersect(q ports) ports {
	var out ports
	for _, a := range p {
		for _, b := range q {
			if low, high := max(a.Low, b.Low), min(a.High, b.High); a.Proto == b.Proto && low <= high {
				out = append(out, image.Span{Proto: a.Proto, Low: low, High: high})
			}
		}
	}
	return normal(out)
}

func (p ports) minus(q ports) ports {
	var out ports
	for _, a := range p {
		low, open := uint32(a.Low), true
		for _, b := range q { // ascending
			if b.Proto != a.Proto || uint32(b.High) < low || b.Low > a.High {
				continue
			}
			if uint32(b.Low) > low {
				out = append(out, image.Span{Proto: a.Proto, Low: uint16(low), High: b.Low - 1})
			}
			if low = uint32(b.High) + 1; low > uint32(a.High) {
				open = false
				break
			}
		}
		if open {
			out = append(out, image.Span{Proto: a.Proto, Low: uint16(low), High: a.High})
		}
	}
	return out
}

// within says whether q holds all of p.
func (p ports) within(q ports) bool { return len(p.minus(q)) == 0 }

// words is the set as a policy writes it.
func (p ports) words() []string {
	if slices.Equal(p, everyPort) {
		return []string{"any"}
	}
	icmp := slices.Contains(p, image.Span{Proto: image.ICMP, High: 255})
	var out []string
	for _, s := range p {
		if s.Proto == image.ICMP6 && icmp {
			continue // icmp/* names both families
		}
		out = append(out, word(s))
	}
	return out
}

var protoWords = map[image.Proto]string{
	image.TCP: "tcp", image.UDP: "udp", image.SCTP: "sctp",
}

// word is a span as a policy writes it. The API cannot part ICMP, so it is whole or
// absent, in both families.
func word(s image.Span) string {
	switch s.Proto {
	case image.Other:
		return "other"
	case image.ICMP:
		return "icmp/*"
	}
	switch name := protoWords[s.Proto]; {
	case s == whole(s.Proto):
		return name + "/*"
	case s.Low == s.High:
		return fmt.Sprintf("%s/%d", name, s.Low)
	default:
		return fmt.Sprintf("%s/%d-%d", name, s.Low, s.High)
	}
}

func (p ports) String() string { return strings.Join(p.words(), " ") }

// portTable gives each set of ports a small number; the empty set is 0. Sets are
// few, pairs of ends are many.
type portTable struct {
	sets  []ports
	index map[string]int
}

func newPortTable() *portTable {
	t := &portTable{index: map[string]int{}}
	t.number(nil)
	return t
}

func (t *portTable) number(p ports) int {
	key := make([]byte, 0, len(p)*5)
	for _, s := range p {
		key = append(key, byte(s.Proto), byte(s.Low>>8), byte(s.Low), byte(s.High>>8), byte(s.High))
	}
	n, ok := t.index[string(key)]
	if !ok {
		n = len(t.sets)
		t.sets, t.index[string(key)] = append(t.sets, p), n
	}
	return n
}
