package flow

import (
	"fmt"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/demarc/demarc/bpf/abi"
)

// Filter selects flows. Several values of one field mean any of them, several
// fields mean all of them, and a negated value must not hold. The zero value
// selects everything.
type Filter struct {
	conditions []condition
}

type condition struct {
	field string
	not   bool
	value string // as given, for Values
	holds func(*Flow) bool
}

// Negated prefixes a field's name in a query string.
const Negated = "not-"

// Field is one thing that flows are filtered by.
type Field struct {
	Name  string // of the flag and of the query parameter
	Help  string
	Words []string // all values there are; nil where they depend on the policy
	parse func(string) (func(*Flow) bool, error)
}

// Fields lists what a Filter can filter by. What is said of one side may be said with
// from-, with to-, and without, for either.
var Fields = slices.Concat([]Field{
	{"verdict", "deny, allow, provisional, audit, would-deny or would-allow; or as Hubble has it: DROPPED, FORWARDED, TRACED, AUDIT", []string{"deny", "allow", "provisional", "audit", "would-deny", "would-allow", "DROPPED", "FORWARDED", "TRACED", "AUDIT"}, parseVerdict},
	{"reason", "reason of the verdict", reasons(), parseReason},
	{"direction", "egress or ingress, the side that was judged", []string{"egress", "ingress"}, parseDirection},
	{"protocol", "tcp, udp, icmp, icmp6, sctp or proto-N", []string{"tcp", "udp", "icmp", "icmp6", "sctp"}, parseProtocol},
	{"type", "drop, policy-verdict or trace: Hubble's words for denied, decided otherwise, and waiting for proof", []string{"drop", "policy-verdict", "trace"}, parseType},
	{"ip-version", "v4 or v6", []string{"v4", "v6"}, parseIPVersion},
	{"crossing", "name of the crossing that decided", nil, parseCrossing},
	{"node-name", "name of the node", nil, parseNode},
	{"from", "source: WORKLOAD, ZONE/WORKLOAD, network/NAME, unmanaged, kernel, pending or unknown", nil, source.with(party)},
	{"to", "destination, in the words of --from", nil, destination.with(party)},
}, sides("zone", "zone of %s", zone),
	sides("ip", "address or CIDR of %s", within),
	sides("port", "port of %s, like 443 or tcp/443", port),
	sides("workload", "workload of %s, without its zone", workload),
	sides("namespace", "namespace of %s, which is its zone", zone),
	sides("pod", "[ZONE/]PREFIX of the workload of %s", pod),
	sides("identity", "identity of %s: a number, or a word as for --from", identity),
	sides("label", "label selector of %s, like demarc:zone=edge", label))

// A side is one end of a flow, or either.
type side []func(*Flow) *Endpoint

var (
	source      = side{func(f *Flow) *Endpoint { return &f.Source }}
	destination = side{func(f *Flow) *Endpoint { return &f.Destination }}
	either      = slices.Concat(source, destination)
)

// onEndpoint reads a value into a predicate on an endpoint of a flow.
type onEndpoint func(string) (func(*Flow, *Endpoint) bool, error)

func (s side) with(parse onEndpoint) func(string) (func(*Flow) bool, error) {
	return func(value string) (func(*Flow) bool, error) {
		holds, err := parse(value)
		if err != nil {
			return nil, err
		}
		return func(f *Flow) bool {
			return slices.ContainsFunc(s, func(end func(*Flow) *Endpoint) bool { return holds(f, end(f)) })
		}, nil
	}
}

// sides are the three fields of something that is said of an endpoint.
func sides(name, help string, parse onEndpoint) []Field {
	return []Field{
		{"from-" + name, fmt.Sprintf(help, "the source"), nil, source.with(parse)},
		{"to-" + name, fmt.Sprintf(help, "the destination"), nil, destination.with(parse)},
		{name, fmt.Sprintf(help, "either side"), nil, either.with(parse)},
	}
}

func field(name string) (Field, bool) {
	i := slices.IndexFunc(Fields, func(f Field) bool { return f.Name == name })
	if i < 0 {
		return Field{}, false
	}
	return Fields[i], true
}

// maxConditions bounds the work that one request can ask for on each flow.
const maxConditions = 256

// Add adds a value of a field; not selects the flows for which it does not hold.
func (f *Filter) Add(name, value string, not bool) error {
	known, ok := field(name)
	if !ok {
		return fmt.Errorf("unknown filter %q", name)
	}
	if len(f.conditions) == maxConditions {
		return fmt.Errorf("more than %d filters", maxConditions)
	}
	holds, err := known.parse(value)
	if err != nil {
		return err
	}
	f.conditions = append(f.conditions, condition{name, not, value, holds})
	return nil
}

// Match reports whether the filter selects a flow.
func (f *Filter) Match(flow *Flow) bool {
	for i, c := range f.conditions {
		holds := c.holds(flow)
		if c.not {
			if holds {
				return false
			}
			continue
		}
		if holds {
			continue
		}
		// Another value of the same field may hold; ask only once for each field.
		same := func(d condition) bool { return !d.not && d.field == c.field }
		if slices.IndexFunc(f.conditions, same) != i {
			continue
		}
		if !slices.ContainsFunc(f.conditions[i+1:], func(d condition) bool { return same(d) && d.holds(flow) }) {
			return false
		}
	}
	return true
}

// Values is the filter as query parameters; ParseFilter reads them back.
func (f *Filter) Values() url.Values {
	v := url.Values{}
	for _, c := range f.conditions {
		name := c.field
		if c.not {
			name = Negated + name
		}
		v.Add(name, c.value)
	}
	return v
}

// ParseFilter takes the parameters that are filters off v; what is left there
// belongs to somebody else.
func ParseFilter(v url.Values) (*Filter, error) {
	f := &Filter{}
	for _, known := range Fields {
		for _, not := range []bool{false, true} {
			name := known.Name
			if not {
				name = Negated + name
			}
			for _, value := range v[name] {
				if err := f.Add(known.Name, value, not); err != nil {
					return nil, err
				}
			}
			delete(v, name)
		}
	}
	return f, nil
}

// parseVerdict also takes the words of other tools, in any case.
func parseVerdict(s string) (func(*Flow) bool, error) {
	word := strings.ToLower(s)
	switch word {
	case "denied", "dropped":
		word = "deny"
	case "allowed", "forwarded":
		word = "allow"
	case "traced":
		word = "provisional"
	case "error", "redirected", "translated": // of Hubble, for what is none of demarc's
		return func(*Flow) bool { return false }, nil
	}
	var want abi.Verdict
	if err := want.UnmarshalText([]byte(word)); err != nil {
		return nil, fmt.Errorf("unknown verdict %q", s)
	}
	return func(f *Flow) bool { return f.Verdict == want }, nil
}

func reasons() []string {
	var words []string
	for r := abi.Undecided + 1; r < abi.Reasons; r++ {
		words = append(words, r.String())
	}
	return words
}

func parseReason(s string) (func(*Flow) bool, error) {
	var want abi.Reason
	if err := want.UnmarshalText([]byte(s)); err != nil {
		return nil, err
	}
	return func(f *Flow) bool { return f.Reason == want }, nil
}

func parseDirection(s string) (func(*Flow) bool, error) {
	var want abi.Direction
	if err := want.UnmarshalText([]byte(strings.ToLower(s))); err != nil {
		return nil, err
	}
	return func(f *Flow) bool { return f.Direction == want }, nil
}

func parseProtocol(s string) (func(*Flow) bool, error) {
	word := strings.ToLower(s)
	known := strings.HasPrefix(word, "proto-")
	for _, name := range protocols {
		known = known || name != "" && name == word
	}
	if !known {
		return nil, fmt.Errorf("unknown protocol %q", s)
	}
	return func(f *Flow) bool { return f.Protocol == word }, nil
}

func parseCrossing(s string) (func(*Flow) bool, error) {
	if s == "" {
		return nil, fmt.Errorf("the crossing's name is empty")
	}
	return func(f *Flow) bool { return f.Crossing == s }, nil
}

// parseType takes the names of Hubble's event types; agent/hubble says which is which.
func parseType(s string) (func(*Flow) bool, error) {
	switch strings.ToLower(s) {
	case "drop":
		return func(f *Flow) bool { return f.Verdict == abi.Deny }, nil
	case "trace":
		return func(f *Flow) bool { return f.Verdict == abi.Provisional }, nil
	case "policy-verdict":
		return func(f *Flow) bool { return f.Verdict == abi.Allow || f.Verdict == abi.Audit || f.Verdict.OfShadow() }, nil
	case "l7", "capture", "trace-sock":
		return func(*Flow) bool { return false }, nil
	}
	return nil, fmt.Errorf("unknown type %q", s)
}

func parseIPVersion(s string) (func(*Flow) bool, error) {
	six := false
	switch strings.ToLower(s) {
	case "v4", "4":
	case "v6", "6":
		six = true
	default:
		return nil, fmt.Errorf("%q is no IP version: v4 or v6", s)
	}
	return func(f *Flow) bool {
		a := f.Destination.Address
		if !a.IsValid() {
			a = f.Source.Address
		}
		return a.IsValid() && a.Is6() == six
	}, nil
}

func parseNode(s string) (func(*Flow) bool, error) {
	if _, err := path.Match(s, ""); s == "" || err != nil {
		return nil, fmt.Errorf("%q is no pattern of a node's name", s)
	}
	return func(f *Flow) bool { ok, _ := path.Match(s, f.Node); return ok }, nil
}

// port takes "443" and "tcp/443".
func port(s string) (func(*Flow, *Endpoint) bool, error) {
	protocol, number, ok := strings.Cut(s, "/")
	if !ok {
		protocol, number = "", s
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("%q is no port", s)
	}
	return func(f *Flow, e *Endpoint) bool {
		return e.Port == uint16(n) && (protocol == "" || f.Protocol == protocol)
	}, nil
}

// party takes what Label prints, and the words of the policy language. A claimed
// identity is nobody's: it matches only "unknown".
func party(s string) (func(*Flow, *Endpoint) bool, error) {
	kind, name, slash := strings.Cut(s, "/")
	match := func(e *Endpoint) bool { return e.Workload == s || (e.Reserved == s && s != "") }
	switch {
	case s == "" || slash && name == "":
		return nil, fmt.Errorf("%q names nobody", s)
	case s == "unknown":
		return func(_ *Flow, e *Endpoint) bool { return e.Claimed || e.Identity == 0 && len(e.Networks) == 0 }, nil
	case slash && kind == "workload":
		match = func(e *Endpoint) bool { return e.Workload == name }
	case slash && kind == "network":
		match = func(e *Endpoint) bool { return slices.Contains(e.Networks, name) }
	case slash && kind == "zone":
		match = func(e *Endpoint) bool { return e.Zone == name }
	case slash:
		match = func(e *Endpoint) bool { return e.Zone == kind && e.Workload == name }
	}
	return func(_ *Flow, e *Endpoint) bool { return !e.Claimed && match(e) }, nil
}

func zone(s string) (func(*Flow, *Endpoint) bool, error) {
	if s == "" {
		return nil, fmt.Errorf("the zone's name is empty")
	}
	return func(_ *Flow, e *Endpoint) bool { return !e.Claimed && e.Zone == s }, nil
}

func workload(s string) (func(*Flow, *Endpoint) bool, error) {
	if s == "" {
		return nil, fmt.Errorf("the workload's name is empty")
	}
	return func(_ *Flow, e *Endpoint) bool { return !e.Claimed && e.Workload == s }, nil
}

// pod takes what users of Hubble write: the beginning of a name, and where it is.
func pod(s string) (func(*Flow, *Endpoint) bool, error) {
	zone, prefix, ok := strings.Cut(s, "/")
	if !ok {
		zone, prefix = "", s
	}
	if zone == "" && prefix == "" {
		return nil, fmt.Errorf("%q names nobody", s)
	}
	return func(_ *Flow, e *Endpoint) bool {
		return !e.Claimed && e.Workload != "" && (zone == "" || e.Zone == zone) && strings.HasPrefix(e.Workload, prefix)
	}, nil
}

// identity takes a number, or names as party does.
func identity(s string) (func(*Flow, *Endpoint) bool, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return party(s)
	}
	return func(_ *Flow, e *Endpoint) bool { return !e.Claimed && uint64(e.Identity) == n }, nil
}

func label(s string) (func(*Flow, *Endpoint) bool, error) {
	selects, err := ParseSelector(s)
	if err != nil {
		return nil, err
	}
	return func(_ *Flow, e *Endpoint) bool { return selects(e.Labels()) }, nil
}

func within(s string) (func(*Flow, *Endpoint) bool, error) {
	prefix, err := netip.ParsePrefix(s)
	if err != nil {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, fmt.Errorf("%q is no address or CIDR", s)
		}
		prefix = netip.PrefixFrom(a, a.BitLen())
	}
	return func(_ *Flow, e *Endpoint) bool { return prefix.Contains(e.Address) }, nil
}
