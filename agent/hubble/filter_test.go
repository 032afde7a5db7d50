package hubble

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// denied is web at the database's door.
var denied = &flow.Flow{
	Time: time.Unix(1000, 5).UTC(), Node: "n1", Seq: 7, CPU: 1,
	Verdict: abi.Deny, Reason: abi.NoCrossingFor, Direction: abi.Egress, Hook: record.HookConnect, Protocol: "tcp", Crossing: "web-db",
	Source:      flow.Endpoint{Address: netip.MustParseAddr("10.0.1.2"), Port: 44312, Identity: 0x101, Workload: "web", Zone: "edge"},
	Destination: flow.Endpoint{Address: netip.MustParseAddr("10.0.3.2"), Port: 5432, Networks: []string{"lan"}},
}

func TestFlowInHubblesWords(t *testing.T) {
	want := &flowpb.Flow{
		Time: Flow(denied).Time, Uuid: Flow(denied).Uuid, Emitter: &flowpb.Emitter{Name: "Demarc"}, NodeName: "n1",
		Verdict: flowpb.Verdict_DROPPED, Type: flowpb.FlowType_L3_L4, EventType: &flowpb.CiliumEventType{Type: 1, SubType: 133},
		DropReasonDesc: flowpb.DropReason_POLICY_DENIED, TrafficDirection: flowpb.TrafficDirection_EGRESS, IsReply: wrapperspb.Bool(false),
		IP:             &flowpb.IP{Source: "10.0.1.2", Destination: "10.0.3.2", IpVersion: flowpb.IPVersion_IPv4},
		L4:             &flowpb.Layer4{Protocol: &flowpb.Layer4_TCP{TCP: &flowpb.TCP{SourcePort: 44312, DestinationPort: 5432}}},
		Source:         &flowpb.Endpoint{Identity: 0x101, Namespace: "edge", PodName: "web", Labels: []string{"demarc:workload=web", "demarc:zone=edge"}, Workloads: []*flowpb.Workload{{Name: "web", Kind: "Workload"}}},
		Destination:    &flowpb.Endpoint{Identity: 2, Labels: []string{"reserved:world", "demarc:network=lan"}},
		EgressDeniedBy: []*flowpb.Policy{{Name: "web-db", Kind: "Crossing"}}, PolicyLog: []string{"reason=no-crossing"}, Summary: "TCP no-crossing web-db",
	}
	if d := cmp.Diff(want, Flow(denied), protocmp.Transform()); d != "" {
		t.Errorf("denied (-want +got):\n%s", d)
	}
	if d := cmp.Diff(Flow(denied), Flow(denied), protocmp.Transform()); d != "" {
		t.Errorf("one flow has two forms: %s", d)
	}
	other := *denied
	if other.Seq++; Flow(&other).Uuid == want.Uuid {
		t.Error("two flows have one UUID")
	}

	for _, c := range []struct {
		name string
		end  flow.Endpoint
		want *flowpb.Endpoint
	}{
		{"OK claimed, which is nobody", flow.Endpoint{Identity: 5, Workload: "web", Zone: "edge", Claimed: true}, &flowpb.Endpoint{Labels: []string{"demarc:claims=edge/web"}}},
		{"OK unmanaged", flow.Endpoint{Identity: 1, Reserved: "unmanaged", Zone: "edge"}, &flowpb.Endpoint{Identity: 1, Namespace: "edge", Labels: []string{"reserved:host", "demarc:unmanaged", "demarc:zone=edge"}}},
		{"OK kernel is no world", flow.Endpoint{Identity: 2, Reserved: "kernel"}, &flowpb.Endpoint{Identity: 1, Labels: []string{"reserved:host", "demarc:kernel"}}},
		{"OK pending", flow.Endpoint{Identity: 3, Reserved: "pending"}, &flowpb.Endpoint{Identity: 5, Labels: []string{"reserved:init"}}},
		{"OK nothing known", flow.Endpoint{}, &flowpb.Endpoint{}},
		{"OK identity of another policy", flow.Endpoint{Identity: 77}, &flowpb.Endpoint{Identity: 77}},
	} {
		if d := cmp.Diff(c.want, endpoint(&c.end), protocmp.Transform()); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
	}
}

// rich is a flow with what demarc itself never tells, so that every filter can hold.
func rich() *flowpb.Flow {
	f := Flow(denied)
	f.SourceNames, f.DestinationNames = []string{"web.example"}, []string{"db.example", "postgres.example"}
	f.SourceService, f.DestinationService = &flowpb.Service{Namespace: "shop", Name: "front"}, &flowpb.Service{Namespace: "shop", Name: "db"}
	f.Source.ClusterName, f.Destination.ClusterName = "c1", "c2"
	f.NodeLabels = []string{"k8s:disk=ssd"}
	f.GetL4().GetTCP().Flags = &flowpb.TCPFlags{SYN: true, ACK: true}
	f.Interface = &flowpb.NetworkInterface{Index: 3, Name: "eth0"}
	f.TraceContext = &flowpb.TraceContext{Parent: &flowpb.TraceParent{TraceId: "abc"}}
	f.IpTraceId = &flowpb.IPTraceID{TraceId: 9}
	f.IP.SourceXlated, f.IP.Encrypted = "192.0.2.1", true
	f.L7 = &flowpb.Layer7{Record: &flowpb.Layer7_Http{Http: &flowpb.HTTP{Code: 404, Method: "PUT", Url: "http://x.example/page/7?q=1", Headers: []*flowpb.HTTPHeader{{Key: "A", Value: "b"}}}}}
	return f
}

func filter(t *testing.T, text string) *flowpb.FlowFilter {
	t.Helper()
	f := &flowpb.FlowFilter{}
	if err := protojson.Unmarshal([]byte(text), f); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return f
}

func TestFilters(t *testing.T) {
	f := rich()
	dns := rich()
	dns.L7 = &flowpb.Layer7{Record: &flowpb.Layer7_Dns{Dns: &flowpb.DNS{Query: "kube.local."}}}
	covered := map[string]bool{}
	for _, c := range []struct {
		filter string
		yes    bool
	}{
		{`{}`, true},
		{`{"uuid": ["` + f.Uuid + `"]}`, true}, {`{"uuid": ["x"]}`, false},
		{`{"source_ip": ["10.0.1.2"]}`, true}, {`{"source_ip": ["10.0.1.0/24", "::1"]}`, true}, {`{"source_ip": ["10.0.3.0/24"]}`, false},
		{`{"destination_ip": ["10.0.3.2"]}`, true}, {`{"destination_ip": ["10.0.1.2"]}`, false},
		{`{"source_ip_xlated": ["192.0.2.0/24"]}`, true}, {`{"source_ip_xlated": ["10.0.1.2"]}`, false},
		{`{"source_pod": ["edge/web"]}`, true}, {`{"source_pod": ["edge/"]}`, true}, {`{"source_pod": ["/we"]}`, true}, {`{"source_pod": ["web"]}`, false}, {`{"source_pod": ["app/web"]}`, false},
		{`{"destination_pod": ["edge/web"]}`, false}, {`{"destination_pod": ["/"]}`, false},
		{`{"source_fqdn": ["*.example"]}`, true}, {`{"source_fqdn": ["db.example"]}`, false},
		{`{"destination_fqdn": ["post*.example."]}`, true}, {`{"destination_fqdn": ["web.example"]}`, false},
		{`{"source_label": ["zone=edge"]}`, true}, {`{"source_label": ["demarc:zone in (app, edge)"]}`, true}, {`{"source_label": ["k8s:zone=edge"]}`, false}, {`{"source_label": ["zone=edge,workload!=web"]}`, false}, {`{"source_label": ["!reserved:world"]}`, true},
		{`{"destination_label": ["reserved:world"]}`, true}, {`{"destination_label": ["world"]}`, true}, {`{"destination_label": ["!world", "network notin (lan)"]}`, false},
		{`{"source_service": ["shop/fr"]}`, true}, {`{"source_service": ["shop/db"]}`, false}, {`{"destination_service": ["/db"]}`, true}, {`{"destination_service": ["db"]}`, false},
		{`{"source_workload": [{"name": "web"}]}`, true}, {`{"source_workload": [{"kind": "Workload"}]}`, true}, {`{"source_workload": [{"name": "web", "kind": "Pod"}]}`, false}, {`{"destination_workload": [{"name": "web"}]}`, false},
		{`{"source_cluster_name": ["c1"]}`, true}, {`{"source_cluster_name": ["c2"]}`, false}, {`{"destination_cluster_name": ["c2"]}`, true}, {`{"destination_cluster_name": ["c1"]}`, false},
		{`{"traffic_direction": ["EGRESS"]}`, true}, {`{"traffic_direction": ["INGRESS"]}`, false},
		{`{"verdict": ["FORWARDED", "DROPPED"]}`, true}, {`{"verdict": ["AUDIT"]}`, false},
		{`{"drop_reason_desc": ["POLICY_DENIED"]}`, true}, {`{"drop_reason_desc": ["INVALID_IDENTITY"]}`, false},
		{`{"interface": [{"name": "eth0"}]}`, true}, {`{"interface": [{"index": 3}]}`, true}, {`{"interface": [{"index": 4, "name": "eth0"}]}`, false},
		{`{"event_type": [{"type": 1}]}`, true}, {`{"event_type": [{"type": 1, "match_sub_type": true, "sub_type": 133}]}`, true}, {`{"event_type": [{"type": 1, "match_sub_type": true}]}`, false}, {`{"event_type": [{"type": 4}]}`, false},
		{`{"http_status_code": ["404"]}`, true}, {`{"http_status_code": ["5+", "40+"]}`, true}, {`{"http_status_code": ["200"]}`, false},
		{`{"protocol": ["tcp"]}`, true}, {`{"protocol": ["UDP", "http"]}`, true}, {`{"protocol": ["icmp"]}`, false},
		{`{"source_port": ["44312"]}`, true}, {`{"source_port": ["5432"]}`, false}, {`{"destination_port": ["80", "5432"]}`, true}, {`{"destination_port": ["44312"]}`, false},
		{`{"reply": [false]}`, true}, {`{"reply": [true]}`, false},
		{`{"dns_query": ["kube.*local"]}`, false},
		{`{"source_identity": [257]}`, true}, {`{"source_identity": [2]}`, false}, {`{"destination_identity": [2]}`, true}, {`{"destination_identity": [1]}`, false},
		{`{"http_method": ["put"]}`, true}, {`{"http_method": ["get"]}`, false},
		{`{"http_path": ["^/page/\\d+$"]}`, true}, {`{"http_path": ["x.example"]}`, false}, {`{"http_url": ["x\\.example/page"]}`, true}, {`{"http_url": ["^/page"]}`, false},
		{`{"http_header": [{"key": "A", "value": "b"}]}`, true}, {`{"http_header": [{"key": "A", "value": "c"}]}`, false},
		{`{"tcp_flags": [{"SYN": true}]}`, true}, {`{"tcp_flags": [{"SYN": true, "FIN": true}]}`, false},
		{`{"node_name": ["n*"]}`, true}, {`{"node_name": ["default/n1"]}`, true}, {`{"node_name": ["other/n1"]}`, false}, {`{"node_name": ["n2"]}`, false},
		{`{"node_labels": ["disk=ssd"]}`, true}, {`{"node_labels": ["disk=hdd"]}`, false},
		{`{"ip_version": ["IPv4"]}`, true}, {`{"ip_version": ["IPv6"]}`, false},
		{`{"trace_id": ["abc"]}`, true}, {`{"trace_id": ["x"]}`, false},
		{`{"ip_trace_id": ["9"]}`, true}, {`{"ip_trace_id": ["8"]}`, false},
		{`{"encrypted": [true]}`, true}, {`{"encrypted": [false]}`, false},
		{`{"source_pod": ["edge/"], "destination_port": ["80"]}`, false},
		{`{"experimental": {"cel_expression": ["_flow.l4.TCP.destination_port == 5432u && 'demarc:zone=edge' in _flow.source.labels"]}}`, true},
		{`{"experimental": {"cel_expression": ["_flow.verdict == Verdict.AUDIT"]}}`, false},
		// What costs too much does not hold.
		{`{"experimental": {"cel_expression": ["[1,2,3,4,5,6,7,8].all(a, [1,2,3,4,5,6,7,8].all(b, [1,2,3,4,5,6,7,8].all(c, [1,2,3,4,5,6,7,8].all(d, a+b+c+d > 0))))"]}}`, false},
	} {
		ff := filter(t, c.filter)
		p, err := selection([]*flowpb.FlowFilter{ff}, nil)
		if err != nil {
			t.Errorf("%s: %v", c.filter, err)
			continue
		}
		if got := p(f); got != c.yes {
			t.Errorf("%s: %v", c.filter, got)
		}
		not, err := selection(nil, []*flowpb.FlowFilter{ff})
		if err != nil || not(f) == c.yes {
			t.Errorf("not %s: %v, %v", c.filter, !c.yes, err)
		}
		ff.ProtoReflect().Range(func(fd protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
			covered[string(fd.Name())] = true
			return true
		})
	}
	if p, err := selection([]*flowpb.FlowFilter{filter(t, `{"dns_query": ["kube.*local"]}`)}, nil); err != nil || !p(dns) {
		t.Errorf("dns_query: %v", err)
	}
	fields := (&flowpb.FlowFilter{}).ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		if name := string(fields.Get(i).Name()); !covered[name] {
			t.Errorf("no case filters by %s", name)
		}
	}

	a, b := filter(t, `{"verdict": ["DROPPED"]}`), filter(t, `{"destination_port": ["5432"]}`)
	if p, err := selection([]*flowpb.FlowFilter{filter(t, `{"verdict": ["AUDIT"]}`), a}, []*flowpb.FlowFilter{b}); err != nil || p(f) {
		t.Errorf("allowed and denied: %v", err)
	}
	if p, err := selection(nil, nil); p != nil || err != nil {
		t.Errorf("no filter: %v", err)
	}
}

func TestBadFilters(t *testing.T) {
	many := strings.TrimSuffix(strings.Repeat(`"1",`, maxValues+1), ",")
	for _, c := range []struct{ name, filter, want string }{
		{"bad address", `{"source_ip": ["10.0.0.300"]}`, `source_ip: "10.0.0.300" is no address or CIDR`},
		{"bad port", `{"destination_port": ["http"]}`, `destination_port: "http" is no port`},
		{"bad port, too large", `{"source_port": ["65536"]}`, `source_port: "65536" is no port`},
		{"bad protocol", `{"protocol": ["quic"]}`, `protocol: unknown protocol "quic"`},
		{"bad pod", `{"source_pod": [""]}`, "source_pod: an empty value"},
		{"bad cluster", `{"source_cluster_name": [""]}`, "source_cluster_name: an empty value"},
		{"bad label", `{"source_label": ["zone in edge"]}`, `source_label: "zone in edge": unable to parse requirement: found 'edge' expected: '('`},
		{"bad node", `{"node_name": ["a/b/c"]}`, `node_name: "a/b/c" is no pattern of a name`},
		{"bad name", `{"source_fqdn": ["a b"]}`, `source_fqdn: "a b" is no pattern of a name`},
		{"bad expression", `{"dns_query": ["("]}`, "dns_query: error parsing regexp: missing closing ): `(`"},
		{"bad bomb", `{"http_url": ["((a{1000}){1000}){1000}"]}`, "http_url: error parsing regexp: invalid repeat count: `{1000}`"},
		{"bad status", `{"http_status_code": ["900"]}`, `http_status_code: "900" is no code and no prefix like 4+`},
		{"bad layers", `{"http_method": ["GET"], "event_type": [{"type": 4}]}`, "event_type: filters of HTTP need events of type l7"},
		{"bad number of values", `{"source_port": [` + many + `]}`, "source_port: 257 values, at most 256 are taken"},
		{"bad length", `{"uuid": ["` + strings.Repeat("a", maxText+1) + `"]}`, "uuid: a value of 513 bytes, at most 512 are taken"},
		{"bad CEL", `{"experimental": {"cel_expression": ["_flow.x ="]}}`, "cel_expression: ERROR: <input>:1:9: Syntax error: token recognition error at: '='"},
		{"bad CEL field", `{"experimental": {"cel_expression": ["_flow.x == 1"]}}`, "cel_expression: ERROR: <input>:1:6: undefined field 'x'"},
		{"bad CEL type", `{"experimental": {"cel_expression": ["1 + 1"]}}`, "cel_expression: it says int, and must say bool"},
	} {
		_, err := selection([]*flowpb.FlowFilter{{}, filter(t, c.filter)}, nil)
		if err == nil || err.Error() != "whitelist filter 2: "+c.want {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	if _, err := selection(nil, make([]*flowpb.FlowFilter, maxFilters+1)); err == nil || err.Error() != "blacklist: 65 filters, at most 64 are taken" {
		t.Errorf("bad number of filters: %v", err)
	}
}

func TestMask(t *testing.T) {
	m, err := newMask(&fieldmaskpb.FieldMask{Paths: []string{"verdict", "source.pod_name", "source.identity", "l4.TCP.destination_port", "IP", "IP.source"}})
	if err != nil {
		t.Fatal(err)
	}
	got := rich()
	m.apply(got)
	want := &flowpb.Flow{
		Verdict: flowpb.Verdict_DROPPED, Source: &flowpb.Endpoint{PodName: "web", Identity: 0x101},
		L4: &flowpb.Layer4{Protocol: &flowpb.Layer4_TCP{TCP: &flowpb.TCP{DestinationPort: 5432}}}, IP: rich().IP,
	}
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	for _, c := range []struct{ name, path, want string }{
		{"bad field", "verdct", `field_mask: a flow has no field "verdct"`},
		{"bad field below", "source.pod", `field_mask: a flow has no field "source.pod"`},
		{"bad path into a list", "source.workloads.name", `field_mask: a flow has no field "source.workloads.name"`},
	} {
		if _, err := newMask(&fieldmaskpb.FieldMask{Paths: []string{c.path}}); err == nil || err.Error() != c.want {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

// FuzzFilter gives any bytes that are a filter to the builder, and a flow to what it
// builds.
func FuzzFilter(f *testing.F) {
	for _, text := range []string{`{"source_label": ["a in (b,c),!d"]}`, `{"node_name": ["a*/b"]}`, `{"http_path": ["(a|b)*"]}`, `{"source_ip": ["10.0.0.0/8"]}`} {
		ff := &flowpb.FlowFilter{}
		if err := protojson.Unmarshal([]byte(text), ff); err != nil {
			f.Fatal(err)
		}
		b, err := proto.Marshal(ff)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	flows := []*flowpb.Flow{rich(), Flow(denied), {}}
	f.Fuzz(func(t *testing.T, b []byte) {
		ff := &flowpb.FlowFilter{}
		if proto.Unmarshal(b, ff) != nil {
			return
		}
		p, err := selection([]*flowpb.FlowFilter{ff}, nil)
		if err != nil {
			if strings.ContainsRune(err.Error(), '\n') {
				t.Errorf("more than one line: %v", err)
			}
			return
		}
		for _, f := range flows {
			p(f)
		}
	})
}
