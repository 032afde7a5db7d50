package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	relaypb "github.com/cilium/cilium/api/v1/relay"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// hubbleClient is a client of an agent's Observer, as any of Hubble's clients.
func hubbleClient(t *testing.T, r *running) (observerpb.ObserverClient, *grpc.ClientConn) {
	t.Helper()
	c, err := grpc.NewClient("unix://"+r.config.Server, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return observerpb.NewObserverClient(c), c
}

// ask asks for flows and says each answer in short.
func ask(t *testing.T, c observerpb.ObserverClient, r *observerpb.GetFlowsRequest) (out []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	stream, err := c.GetFlows(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	for {
		m, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return out
		case err != nil:
			return append(out, status.Convert(err).Code().String()+": "+status.Convert(err).Message())
		case m.GetLostEvents() != nil:
			out = append(out, fmt.Sprintf("lost %d in %s", m.GetLostEvents().GetNumEventsLost(), m.GetLostEvents().GetSource()))
		default:
			f := m.GetFlow()
			out = append(out, fmt.Sprintf("%s %s/%s -> %s:%d", f.GetVerdict(), f.GetSource().GetNamespace(), f.GetSource().GetPodName(), f.GetDestination().GetPodName(), f.GetL4().GetTCP().GetDestinationPort()))
		}
	}
}

// seen is an agent that has seen an allowed flow, a denied one, and, after a loss of
// three, another denied one.
func seen(t *testing.T) *running {
	t.Helper()
	core := newStandIn()
	r := start(t, core, nil)
	img := compile(t, source)
	if _, err := r.client.Apply(t.Context(), img, 0); err != nil {
		t.Fatal(err)
	}
	id := ids(t, img)
	tuple := abi.Tuple{Proto: 6, SourcePort: 4000, DestinationPort: 8080}
	copy(tuple.Source[:], []byte{10: 0xff, 11: 0xff, 12: 10, 15: 1})
	copy(tuple.Destination[:], []byte{10: 0xff, 11: 0xff, 12: 10, 15: 2})
	e := record.Event{Kind: record.EventVerdict, Hook: record.HookEgress, Time: 1, Seq: 1, Epoch: 1, Subject: id["web"], Peer: id["api"], Proof: abi.ProofIdentity, Verdict: abi.Allow,
		Reason: abi.ByCrossing, Crossing: r.link.view().Names.Image.Crossings[0].Number, Tuple: tuple}
	core.emit(t, record.RingAllowed, e)
	e.Time, e.Peer, e.Proof, e.Verdict, e.Reason, e.Crossing, e.Tuple.DestinationPort = 2, 0, abi.ProofUnknown, abi.Deny, abi.NoCrossingFor, 0, 22
	core.emit(t, record.RingDenied, e)
	e.Time, e.Seq, e.Tuple.DestinationPort = 3, 5, 23
	core.emit(t, record.RingDenied, e)
	eventually(t, "three flows", func() bool {
		c := r.link.store.Counts()
		return c[record.RingDenied].Received == 2 && c[record.RingAllowed].Received == 1
	})
	return r
}

func TestObserver(t *testing.T) {
	r := seen(t)
	c, conn := hubbleClient(t, r)
	const yes, ssh, telnet = "FORWARDED edge/web -> api:8080", "DROPPED edge/web -> :22", "DROPPED edge/web -> :23"
	dropped := []*flowpb.FlowFilter{{Verdict: []flowpb.Verdict{flowpb.Verdict_DROPPED}}}
	port22 := []*flowpb.FlowFilter{{DestinationPort: []string{"22"}}}
	old, future := timestamppb.New(time.Unix(1, 0)), timestamppb.New(time.Now().Add(time.Hour))
	for _, q := range []struct {
		name string
		r    *observerpb.GetFlowsRequest
		want []string
	}{
		{"OK all", &observerpb.GetFlowsRequest{}, []string{yes, ssh, telnet}},
		{"OK last", &observerpb.GetFlowsRequest{Number: 2}, []string{ssh, telnet}},
		{"OK all of them by number", &observerpb.GetFlowsRequest{Number: ^uint64(0)}, []string{yes, ssh, telnet}},
		{"OK first", &observerpb.GetFlowsRequest{Number: 2, First: true}, []string{yes, ssh}},
		{"OK whitelist", &observerpb.GetFlowsRequest{Whitelist: dropped}, []string{ssh, telnet}},
		{"OK last of a whitelist", &observerpb.GetFlowsRequest{Number: 1, Whitelist: append(dropped, port22...)}, []string{telnet}},
		{"OK blacklist", &observerpb.GetFlowsRequest{Blacklist: port22}, []string{yes, telnet}},
		{"OK both", &observerpb.GetFlowsRequest{Whitelist: dropped, Blacklist: port22}, []string{telnet}},
		{"OK mask", &observerpb.GetFlowsRequest{Whitelist: port22, FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"verdict", "source.namespace"}}}, []string{"DROPPED edge/ -> :0"}},
		{"OK since", &observerpb.GetFlowsRequest{Since: old}, []string{yes, ssh, telnet}},
		{"OK since later", &observerpb.GetFlowsRequest{Since: future}, nil},
		{"OK until earlier", &observerpb.GetFlowsRequest{Until: old, Follow: true}, nil},
		{"bad since", &observerpb.GetFlowsRequest{Since: &timestamppb.Timestamp{Nanos: -1}}, []string{"InvalidArgument: since: proto: timestamp (nanos:-1) has out-of-range nanos"}},
		{"bad first", &observerpb.GetFlowsRequest{First: true, Follow: true}, []string{"InvalidArgument: first: it cannot go with follow"}},
		{"bad filter", &observerpb.GetFlowsRequest{Whitelist: []*flowpb.FlowFilter{{SourceIp: []string{"x"}}}}, []string{`InvalidArgument: whitelist filter 1: source_ip: "x" is no address or CIDR`}},
		{"bad mask", &observerpb.GetFlowsRequest{FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"x"}}}, []string{`InvalidArgument: field_mask: a flow has no field "x"`}},
		{"bad size", &observerpb.GetFlowsRequest{Whitelist: []*flowpb.FlowFilter{{SourceIp: []string{strings.Repeat("x", 2*maxMessage)}}}}, []string{fmt.Sprintf("ResourceExhausted: grpc: received message larger than max (%d vs. %d)", 2*maxMessage+8, maxMessage)}},
	} {
		got := ask(t, c, q.r)
		for i := range got { // protobuf's errors have either kind of space
			got[i] = strings.ReplaceAll(got[i], "\u00a0", " ")
		}
		if d := cmp.Diff(q.want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", q.name, d)
		}
	}

	nodes, err := c.GetNodes(t.Context(), &observerpb.GetNodesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want := &observerpb.GetNodesResponse{Nodes: []*observerpb.Node{{Name: "n1", Version: "dev", Address: "unix://" + r.config.Server, State: relaypb.NodeState_NODE_CONNECTED, Tls: &observerpb.TLS{}, NumFlows: 3, MaxFlows: 2 * 16384, SeenFlows: 3}}}
	if d := cmp.Diff(want, nodes, protocmp.Transform(), protocmp.IgnoreFields(&observerpb.Node{}, "uptime_ns", "max_flows")); d != "" || nodes.Nodes[0].UptimeNs == 0 {
		t.Errorf("nodes (-want +got):\n%s", d)
	}
	namespaces, err := c.GetNamespaces(t.Context(), &observerpb.GetNamespacesRequest{})
	if d := cmp.Diff(&observerpb.GetNamespacesResponse{Namespaces: []*observerpb.Namespace{{Namespace: "app"}, {Namespace: "edge"}}}, namespaces, protocmp.Transform()); err != nil || d != "" {
		t.Errorf("namespaces %v (-want +got):\n%s", err, d)
	}
	is, err := c.ServerStatus(t.Context(), &observerpb.ServerStatusRequest{})
	wantStatus := &observerpb.ServerStatusResponse{NumFlows: 3, SeenFlows: 3, Version: "dev", NumConnectedNodes: wrapperspb.UInt32(1), NumUnavailableNodes: wrapperspb.UInt32(0)}
	if d := cmp.Diff(wantStatus, is, protocmp.Transform(), protocmp.IgnoreFields(&observerpb.ServerStatusResponse{}, "uptime_ns", "flows_rate", "max_flows")); err != nil || d != "" || is.MaxFlows < 3 {
		t.Errorf("status %v (-want +got):\n%s", err, d)
	}
	health := healthpb.NewHealthClient(conn)
	if h, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "hubble.server.Observer"}); err != nil || h.Status != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", h, err)
	}
	if _, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "other"}); status.Code(err) != codes.NotFound {
		t.Errorf("health of another: %v", err)
	}
	if out := ask(t, c, &observerpb.GetFlowsRequest{Number: 1}); len(out) != 1 {
		t.Errorf("after bad requests: %q", out)
	}
}

// TestObserverFollows has a client follow, and a loss on the way.
func TestObserverFollows(t *testing.T) {
	r := seen(t)
	c, _ := hubbleClient(t, r)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stream, err := c.GetFlows(ctx, &observerpb.GetFlowsRequest{Number: 1, Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := stream.Recv(); err != nil || m.GetFlow().GetL4().GetTCP().GetDestinationPort() != 23 || m.GetNodeName() != "n1" {
		t.Fatalf("first: %v, %v", m, err)
	}
	e := record.Event{Kind: record.EventVerdict, Time: 4, Seq: 10, Verdict: abi.Deny, Reason: abi.NoCrossingFor} // 6 to 9 are lost
	r.core.emit(t, record.RingDenied, e)
	m, err := stream.Recv()
	if err != nil || m.GetLostEvents().GetNumEventsLost() != 4 || m.GetLostEvents().GetSource() != flowpb.LostEventSource_PERF_EVENT_RING_BUFFER {
		t.Fatalf("lost: %v, %v", m, err)
	}
	if m, err = stream.Recv(); err != nil || m.GetFlow().GetVerdict() != flowpb.Verdict_DROPPED {
		t.Fatalf("after: %v, %v", m, err)
	}
	// The agent's end ends the stream.
	go r.stop()
	for err == nil {
		_, err = stream.Recv()
	}
	if errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded {
		t.Errorf("the stream went on: %v", err)
	}
}
