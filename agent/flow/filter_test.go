package flow

import (
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"github.com/demarc/demarc/bpf/abi"
)

func TestFilterMatch(t *testing.T) {
	f := &Flow{
		Node: "n1", Verdict: abi.Deny, Reason: abi.NoCrossingFor, Direction: abi.Egress, Protocol: "tcp", Crossing: "api-db",
		Source:      Endpoint{Address: netip.MustParseAddr("10.0.1.2"), Port: 44312, Identity: 257, Workload: "web", Zone: "edge"},
		Destination: Endpoint{Address: netip.MustParseAddr("10.0.3.2"), Port: 5432, Networks: []string{"lan"}},
	}
	claimed := *f
	claimed.Source.Claimed = true
	unmanaged := *f
	unmanaged.Source = Endpoint{Reserved: "unmanaged", Zone: "edge", Identity: 1}
	for _, c := range []struct {
		name  string
		flow  *Flow
		query string
		want  bool
	}{
		{"OK nothing asked", f, "", true},
		{"OK verdict", f, "verdict=deny", true},
		{"OK other tools' verdict", f, "verdict=DROPPED", true},
		{"bad verdict", f, "verdict=allow", false},
		{"OK any of one field", f, "verdict=allow&verdict=deny", true},
		{"OK any of one field, other order", f, "verdict=deny&verdict=allow", true},
		{"bad all of several fields", f, "verdict=deny&port=80", false},
		{"OK all of several fields", f, "verdict=deny&port=80&port=5432&reason=no-crossing&direction=egress", true},
		{"bad negated", f, "not-verdict=deny", false},
		{"OK negated", f, "not-verdict=allow", true},
		{"bad one of two negated", f, "not-port=80&not-port=5432", false},
		{"bad negation beside a match", f, "from=web&not-to-zone=data&not-crossing=api-db", false},
		{"OK workload", f, "from=web", true},
		{"OK zone and workload", f, "from=edge/web", true},
		{"OK policy's word", f, "from=workload/web", true},
		{"OK zone's word", f, "from=zone/edge", true},
		{"bad other zone", f, "from=app/web", false},
		{"bad a claim is nobody", &claimed, "from=web", false},
		{"OK a claim is unknown", &claimed, "from=unknown", true},
		{"bad a claim's zone", &claimed, "from-zone=edge", false},
		{"OK unmanaged", &unmanaged, "from=unmanaged", true},
		{"OK network", f, "to=network/lan", true},
		{"bad network is known", f, "to=unknown", false},
		{"OK zone", f, "from-zone=edge", true},
		{"OK address", f, "from-ip=10.0.1.2", true},
		{"OK block", f, "to-ip=10.0.0.0/8", true},
		{"bad block", f, "to-ip=10.0.1.0/24", false},
		{"OK protocol and port", f, "port=tcp/5432", true},
		{"bad protocol of port", f, "port=udp/5432", false},
		{"OK protocol", f, "protocol=TCP", true},
		{"OK port of either side", f, "port=44312", true},
		{"OK source port", f, "from-port=44312", true},
		{"bad source port", f, "from-port=5432", false},
		{"OK destination port", f, "to-port=tcp/5432", true},
		{"bad neither side", f, "not-port=44312", false},
		{"OK address of either side", f, "ip=10.0.3.0/24", true},
		{"OK workload of either side", f, "workload=web", true},
		{"bad workload of one side", f, "to-workload=web", false},
		{"OK zone of either side", f, "zone=edge", true},
		{"OK namespace", f, "from-namespace=edge", true},
		{"OK pod", f, "pod=edge/we", true},
		{"OK pods of a zone", f, "from-pod=edge/", true},
		{"bad pod", f, "from-pod=app/web", false},
		{"OK identity's number", f, "from-identity=257", true},
		{"OK identity's name", f, "identity=edge/web", true},
		{"bad identity", f, "to-identity=257", false},
		{"OK label", f, "from-label=zone in (app,edge)", true},
		{"OK label of the world", f, "to-label=reserved:world", true},
		{"bad label", f, "label=zone=app", false},
		{"bad a claim's label", &claimed, "label=zone=edge", false},
		{"OK a claim's label", &claimed, "label=demarc:claims", true},
		{"OK type", f, "type=drop", true},
		{"bad type", f, "type=policy-verdict", false},
		{"OK IP version", f, "ip-version=v4", true},
		{"bad IP version", f, "ip-version=v6", false},
		{"OK node", f, "node-name=n*", true},
		{"bad node", f, "node-name=m*", false},
		{"OK Hubble's verdict", f, "verdict=DROPPED", true},
		{"bad Hubble's verdict", f, "verdict=TRANSLATED", false},
		{"bad protocol", f, "protocol=proto-89", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			values, err := url.ParseQuery(c.query)
			if err != nil {
				t.Fatal(err)
			}
			filter, err := ParseFilter(values)
			if err != nil {
				t.Fatal(err)
			}
			if len(values) != 0 {
				t.Errorf("not taken: %v", values)
			}
			if got := filter.Match(c.flow); got != c.want {
				t.Errorf("Match = %v, want %v", got, c.want)
			}
			again, err := ParseFilter(filter.Values())
			if err != nil || again.Match(c.flow) != c.want {
				t.Errorf("Values do not read back: %v, %v", filter.Values(), err)
			}
		})
	}
}

func TestFilterRefuses(t *testing.T) {
	for _, c := range []struct{ name, field, value, want string }{
		{"bad field", "verdicts", "deny", `unknown filter "verdicts"`},
		{"bad verdict", "verdict", "maybe", `unknown verdict "maybe"`},
		{"bad reason", "reason", "because", `unknown reason "because"`},
		{"bad direction", "direction", "up", `unknown direction "up"`},
		{"bad protocol", "protocol", "quic", `unknown protocol "quic"`},
		{"bad port", "port", "65536", `"65536" is no port`},
		{"bad address", "to-ip", "x", `"x" is no address or CIDR`},
		{"bad party", "from", "workload/", `"workload/" names nobody`},
		{"bad zone", "to-zone", "", "the zone's name is empty"},
		{"bad crossing", "crossing", "", "the crossing's name is empty"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var f Filter
			if err := f.Add(c.field, c.value, false); err == nil || err.Error() != c.want {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
	many := url.Values{"port": strings.Split(strings.Repeat("1,", maxConditions)+"1", ",")}
	if _, err := ParseFilter(many); err == nil {
		t.Error("an unbounded filter was taken")
	}
}
