package policy_test

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/policytest"
)

func TestExplain(t *testing.T) {
	const allow, deny = abi.Allow, abi.Deny
	for _, tt := range []struct {
		name     string
		from, to string
		port     string
		want     policy.Answer
		err      string
	}{
		{name: "OK workloads", from: "workload/web", to: "workload/api", port: "tcp/8080",
			want: policy.Answer{Allowed: true, Verdict: allow, Crossing: "web-api", Line: 23, Reason: "crossing web-api (shop.yaml:23) allows it", Egress: allow, Ingress: allow}},
		{name: "OK network", from: "network/anywhere", to: "workload/web", port: "tcp/443",
			want: policy.Answer{Allowed: true, Verdict: allow, Crossing: "public-web", Line: 22, Reason: "crossing public-web (shop.yaml:22) allows it", Egress: allow, Ingress: allow}},
		{name: "OK address", from: "192.0.2.7", to: "workload/bastion", port: "tcp/22",
			want: policy.Answer{Allowed: true, Verdict: allow, Crossing: "office-ssh", Line: 26, Reason: "crossing office-ssh (shop.yaml:26) allows it", Egress: allow, Ingress: allow}},
		{name: "OK window", from: "workload/bastion", to: "workload/postgres", port: "tcp/22",
			want: policy.Answer{Allowed: true, Verdict: allow, Crossing: "break-glass", Line: 25, Reason: "crossing break-glass (shop.yaml:25) allows it", Egress: allow, Ingress: allow}},
		{name: "OK unmanaged", from: "unmanaged", to: "2001:db8::1", port: "icmp/echo",
			want: policy.Answer{Allowed: true, Verdict: allow, Reason: "no workload is involved, and the policy lets unmanaged processes do it", Egress: allow, Ingress: allow}},
		{name: "OK unmanaged to public service by its address only", from: "unmanaged", to: "workload/web", port: "tcp/80",
			want: policy.Answer{Verdict: deny, Refuses: "ingress", Egress: allow, Ingress: deny,
				Reason: "no crossing lets workload/web accept unmanaged on tcp/80; nearest: public-web (shop.yaml:22) from network/anywhere"}},
		{name: "OK denied, another source", from: "workload/web", to: "workload/postgres", port: "tcp/5432",
			want: policy.Answer{Verdict: deny, Refuses: "both", Egress: deny, Ingress: deny,
				Reason: "no crossing lets workload/web reach workload/postgres on tcp/5432; nearest: api-db (shop.yaml:24) from workload/api"}},
		{name: "OK denied, another port", from: "workload/web", to: "workload/api", port: "tcp/9090",
			want: policy.Answer{Verdict: deny, Refuses: "both", Egress: deny, Ingress: deny,
				Reason: "no crossing lets workload/web reach workload/api on tcp/9090; nearest: web-api (shop.yaml:23) on tcp/8080"}},
		{name: "OK denied, another destination", from: "workload/web", to: "unmanaged", port: "tcp/8080",
			want: policy.Answer{Verdict: deny, Refuses: "egress", Egress: deny, Ingress: allow,
				Reason: "no crossing lets workload/web reach unmanaged on tcp/8080; nearest: web-api (shop.yaml:23) to workload/api"}},
		{name: "OK denied, nothing near", from: "workload/postgres", to: "workload/web", port: "udp/53",
			want: policy.Answer{Verdict: deny, Refuses: "both", Egress: deny, Ingress: deny,
				Reason: "no crossing lets workload/postgres reach workload/web on udp/53"}},
		{name: "OK denied, no proof", from: "192.0.2.7", to: "workload/api", port: "tcp/8080",
			want: policy.Answer{Verdict: deny, Refuses: "ingress", Egress: allow, Ingress: deny,
				Reason: "crossing web-api (shop.yaml:23) asks for a proven identity, and 192.0.2.7 proves none"}},
		{name: "bad workload", from: "workload/wep", to: "workload/api", port: "tcp/1", err: `from "workload/wep": the policy declares no such workload`},
		{name: "bad bare name", from: "workload/web", to: "api", port: "tcp/1", err: `to "api": did you mean workload/api?`},
		{name: "bad bare network", from: "office", to: "workload/api", port: "tcp/1", err: `from "office": did you mean network/office?`},
		{name: "bad nothing", from: "", to: "workload/api", port: "tcp/1", err: `from "": not workload/NAME, network/NAME, pod/NAMESPACE/NAME, an address or unmanaged`},
		{name: "bad zone", from: "zone/edge", to: "workload/api", port: "tcp/1",
			err: `from "zone/edge": a probe is about one end; name a workload/, a network/, an address or unmanaged`},
		{name: "bad both elsewhere", from: "network/office", to: "::1", port: "tcp/1",
			err: "from network/office to ::1: neither end is a workload or unmanaged, so nothing here judges it"},
		{name: "bad port range", from: "workload/web", to: "workload/api", port: "tcp/1-2",
			err: `port "tcp/1-2": a probe needs one port, as tcp/8080, udp/53, icmp/echo or other`},
		{name: "bad ICMP type", from: "workload/web", to: "workload/api", port: "icmp/256",
			err: `port "icmp/256": a probe needs one port, as tcp/8080, udp/53, icmp/echo or other`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := policytest.Shop().Explain(policy.Probe{From: tt.from, To: tt.to, Port: tt.port, At: policytest.Epoch})
			if err != nil && err.Error() != tt.err || err == nil && tt.err != "" {
				t.Fatalf("error %v, want %s", err, tt.err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("answer (-want +got):\n%s", diff)
			}
		})
	}
}

func TestExplainClosedWindow(t *testing.T) {
	got, err := policytest.Shop().Explain(policy.Probe{
		From: "workload/bastion", To: "workload/postgres", Port: "tcp/22", At: policytest.Epoch.Add(time.Hour),
	})
	if err != nil {
		t.Fatal(err)
	}
	want := policy.Answer{Refuses: "both", Reason: "crossing break-glass (shop.yaml:25) declares it, but only until 2027-01-15T09:00:00Z"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("answer (-want +got):\n%s", diff)
	}
}

func TestExplainBatch(t *testing.T) {
	in := `{"from":"workload/web","to":"workload/api","port":"tcp/8080"}

{"from":"workload/web","to":"workload/postgres","port":"tcp/5432","at":"2027-01-15T08:00:00Z"}
{"from":"workload/web"
{"from":"workload/web","to":"workload/api","port":"tcp/8080","colour":"red"}
{"from":"workload/api","to":"workload/postgres","port":"tcp/5432"}
`
	want := `{"verdict":"allow","crossing":"web-api","line":23,"reason":"crossing web-api (shop.yaml:23) allows it","egress":"allow","ingress":"allow","allowed":true}
{"verdict":"deny","crossing":"","reason":"no crossing lets workload/web reach workload/postgres on tcp/5432; nearest: api-db (shop.yaml:24) from workload/api","egress":"deny","ingress":"deny","allowed":false,"refuses":"both"}
{"error":"line 4: unexpected EOF"}
{"error":"line 5: json: unknown field \"colour\""}
{"verdict":"allow","crossing":"api-db","line":24,"reason":"crossing api-db (shop.yaml:24) allows it","egress":"allow","ingress":"allow","allowed":true}
`
	var out bytes.Buffer
	err := policy.ExplainBatch(policytest.Shop(), nil, strings.NewReader(in), &out)
	if err == nil || err.Error() != "read probes: bad line 4, 5" {
		t.Errorf("error: %v", err)
	}
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("output (-want +got):\n%s", diff)
	}
}

func TestExplainBatchLongLine(t *testing.T) {
	in := `{"from":"workload/web","to":"workload/api","port":"tcp/8080"}` + "\n" + strings.Repeat("x", 2<<20)
	var out bytes.Buffer
	err := policy.ExplainBatch(policytest.Shop(), nil, strings.NewReader(in), &out)
	if err == nil || err.Error() != "read probes: line 2 is longer than 1048576 bytes" {
		t.Errorf("error: %v", err)
	}
	if n := strings.Count(out.String(), "\n"); n != 1 {
		t.Errorf("%d answers, want 1", n)
	}
}
