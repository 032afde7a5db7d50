package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/demarc/demarc/policy/image"
)

// maxPort is the highest number within each protocol.
func maxPort(p image.Proto) uint16 {
	switch p {
	case image.ICMP, image.ICMP6:
		return 255
	case image.Other:
		return 0
	}
	return 65535
}

// everyPort is what `any` covers.
var everyPort = []image.Span{
	{Proto: image.Other, Low: 0, High: 0},
	{Proto: image.ICMP, Low: 0, High: 255},
	{Proto: image.TCP, Low: 0, High: 65535},
	{Proto: image.UDP, Low: 0, High: 65535},
	{Proto: image.ICMP6, Low: 0, High: 255},
	{Proto: image.SCTP, Low: 0, High: 65535},
}

// icmpNames are the messages that both families have: RFC 792 and RFC 4443.
var icmpNames = map[string][2]uint16{
	"echo":          {8, 128},
	"echo-reply":    {0, 129},
	"unreachable":   {3, 1},
	"time-exceeded": {11, 3},
}

// hinted is an error with a way out.
type hinted struct{ msg, hint string }

func (h *hinted) Error() string { return h.msg }

const portHint = "write tcp/80, udp/8000-8999, sctp/*, icmp/echo or any"

// parseSpans reads what one entry of `ports` covers, sorted by protocol.
func parseSpans(s string) ([]image.Span, *hinted) {
	switch s {
	case "any":
		return everyPort, nil
	case "other":
		return []image.Span{{Proto: image.Other}}, nil
	}
	name, rest, ok := strings.Cut(s, "/")
	if !ok {
		hint := portHint
		if plainDecimal(s) {
			hint = "name the protocol: tcp/" + s
		}
		return nil, &hinted{fmt.Sprintf("port %s names no protocol", quote(s)), hint}
	}
	var proto image.Proto
	switch name {
	case "tcp":
		proto = image.TCP
	case "udp":
		proto = image.UDP
	case "sctp":
		proto = image.SCTP
	case "icmp":
		proto = image.ICMP
	case "icmp6":
		proto = image.ICMP6
	default:
		hint := "one of: tcp, udp, sctp, icmp, icmp6, any"
		if lower := strings.ToLower(name); lower != name && slices.Contains([]string{"tcp", "udp", "sctp", "icmp", "icmp6"}, lower) {
			hint = "write " + lower + "/" + rest
		}
		return nil, &hinted{fmt.Sprintf("port %s names the unknown protocol %s", quote(s), quote(name)), hint}
	}
	if rest == "*" {
		spans := []image.Span{{Proto: proto, Low: 0, High: maxPort(proto)}}
		if proto == image.ICMP {
			spans = append(spans, image.Span{Proto: image.ICMP6, Low: 0, High: 255})
		}
		return spans, nil
	}
	if types, ok := icmpNames[rest]; ok && (proto == image.ICMP || proto == image.ICMP6) {
		if proto == image.ICMP6 {
			return nil, &hinted{fmt.Sprintf("port %s: message names cover both families", quote(s)), fmt.Sprintf("write icmp/%s for both or icmp6/%d for ICMPv6 alone", rest, types[1])}
		}
		return []image.Span{{Proto: image.ICMP, Low: types[0], High: types[0]}, {Proto: image.ICMP6, Low: types[1], High: types[1]}}, nil
	}
	first, last, isRange := strings.Cut(rest, "-")
	low, okLow := portNumber(first, proto)
	high, okHigh := low, okLow
	if isRange {
		high, okHigh = portNumber(last, proto)
	}
	what, hint := "a port from 1 to 65535", portHint
	if proto == image.ICMP || proto == image.ICMP6 {
		what, hint = "a message type from 0 to 255", "write icmp/echo, icmp/8 or icmp/*"
	}
	if !okLow || !okHigh {
		return nil, &hinted{fmt.Sprintf("port %s is not %s", quote(s), what), hint}
	}
	if low > high {
		return nil, &hinted{fmt.Sprintf("port range %s ends before it starts", quote(s)), fmt.Sprintf("write %s/%d-%d", name, high, low)}
	}
	return []image.Span{{Proto: proto, Low: low, High: high}}, nil
}

// portNumber reads one number. Port 0 cannot be listened on or sent to; as a
// number of its own it is a mistake.
func portNumber(s string, proto image.Proto) (uint16, bool) {
	if !plainDecimal(s) {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n > uint64(maxPort(proto)) {
		return 0, false
	}
	if n == 0 && proto != image.ICMP && proto != image.ICMP6 {
		return 0, false
	}
	return uint16(n), true
}

// ports reads the `ports` of a crossing: sorted, and no two alike.
func (r *reporter) ports(n *node) []image.Span {
	type entry struct {
		image.Span
		text string
		pos  Pos
	}
	var all []entry
	for _, item := range r.list(n, "ports") {
		if item.kind != stringNode {
			hint := portHint
			if item.kind == intNode {
				hint = "name the protocol: tcp/" + item.text
			}
			r.add(item.pos, hint, "port is %s, not a string", item.kind)
			continue
		}
		spans, bad := parseSpans(item.text)
		if bad != nil {
			r.add(item.pos, bad.hint, "%s", bad.msg)
			continue
		}
		for _, s := range spans {
			all = append(all, entry{s, item.text, item.pos})
		}
	}
	slices.SortStableFunc(all, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Low, b.Low), cmp.Compare(a.High, b.High))
	})
	spans := make([]image.Span, 0, len(all))
	for i, e := range all {
		if i > 0 && all[i-1].Proto == e.Proto && all[i-1].High >= e.Low {
			a, b := all[i-1], e
			if a.pos.compare(b.pos) > 0 {
				a, b = b, a
			}
			r.add(b.pos, "remove one of them", "port %s overlaps %s", quote(b.text), quote(a.text))
			return nil
		}
		spans = append(spans, e.Span)
	}
	return spans
}
