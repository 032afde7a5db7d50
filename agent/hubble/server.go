// Package hubble serves an agent's flows by Hubble's Observer API, so that its
// clients work with demarc.
package hubble

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	relaypb "github.com/cilium/cilium/api/v1/relay"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/demarc/demarc/agent/flow"
)

// Source is what a server takes its answers from.
type Source interface {
	// Flows answers a query; it returns the sink's error.
	Flows(context.Context, *flow.Query, flow.Sink) error
	// Tell is what the node says of itself.
	Tell() Node
}

// Node is one node and the flows it keeps.
type Node struct {
	Name    string
	Version string
	Address string // of the API, as a client dials it
	Uptime  time.Duration
	Kept    uint64   // flows in memory now
	Room    uint64   // flows that there is memory for
	Seen    uint64   // flows since the agent's start
	Rate    float64  // flows a second over the last minute
	Zones   []string // of the policy in force, sorted
}

// serviceName is what clients ask the health of.
const serviceName = "hubble.server.Observer"

// Register adds the Observer and its health to a gRPC server.
func Register(s *grpc.Server, source Source) {
	observerpb.RegisterObserverServer(s, &server{source: source})
	h := health.NewServer()
	h.SetServingStatus(serviceName, healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(s, h)
}

// server answers GetFlows, GetNodes, GetNamespaces and ServerStatus. Events of an
// agent's inside and of debugging are Cilium's own and stay unimplemented.
type server struct {
	observerpb.UnimplementedObserverServer
	source Source
}

// GetFlows streams flows.
func (s *server) GetFlows(r *observerpb.GetFlowsRequest, to grpc.ServerStreamingServer[observerpb.GetFlowsResponse]) error {
	q, err := query(r)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	keep, err := newMask(r.GetFieldMask())
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	match, err := selection(r.GetWhitelist(), r.GetBlacklist())
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	out := &sink{to: to, keep: keep, node: s.source.Tell().Name}
	if match != nil {
		q.Match = func(f *flow.Flow) bool {
			out.of, out.said = f, Flow(f)
			return match(out.said)
		}
	}
	if err := s.source.Flows(to.Context(), q, out); err != nil {
		return err
	}
	return to.Context().Err()
}

// query is what a request asks for, without its filters.
func query(r *observerpb.GetFlowsRequest) (*flow.Query, error) {
	q := &flow.Query{Last: -1, Follow: r.GetFollow()}
	number := int(min(r.GetNumber(), math.MaxInt32))
	for _, bound := range []struct {
		name string
		from *timestamppb.Timestamp
		to   *time.Time
	}{{"since", r.GetSince(), &q.Since}, {"until", r.GetUntil(), &q.Until}} {
		if bound.from == nil {
			continue
		}
		if err := bound.from.CheckValid(); err != nil {
			return nil, fmt.Errorf("%s: %w", bound.name, err)
		}
		*bound.to = bound.from.AsTime()
	}
	switch {
	case r.GetFirst() && q.Follow:
		return nil, errors.New("first: it cannot go with follow")
	case r.GetFirst():
		q.First = number
	case number == math.MaxInt32: // all of them
	case number > 0 || q.Follow && q.Since.IsZero():
		q.Last = number // 0 with follow: only what comes
	}
	return q, nil
}

// sink sends a query's answer to a client.
type sink struct {
	to   grpc.ServerStreamingServer[observerpb.GetFlowsResponse]
	keep mask
	node string

	of   *flow.Flow   // that the filter saw last
	said *flowpb.Flow // it, in Hubble's words
}

func (s *sink) Flow(f *flow.Flow) error {
	out := s.said
	if s.of != f || out == nil {
		out = Flow(f)
	}
	s.of, s.said = nil, nil
	at := out.Time
	if s.keep != nil {
		s.keep.apply(out)
	}
	return s.to.Send(&observerpb.GetFlowsResponse{ResponseTypes: &observerpb.GetFlowsResponse_Flow{Flow: out}, NodeName: s.node, Time: at})
}

// Lost tells where flows are missing. Hubble has no word for a journal; what is
// missing there was in its ring once.
func (s *sink) Lost(l flow.Loss) error {
	for _, r := range Lost(l, s.node, time.Now()) {
		if err := s.to.Send(r); err != nil {
			return err
		}
	}
	return nil
}

func (s *sink) Flush() error { return s.to.Context().Err() }

// Lost says a loss in Hubble's words, one for each place.
func Lost(l flow.Loss, node string, at time.Time) (out []*observerpb.GetFlowsResponse) {
	for _, place := range []struct {
		source flowpb.LostEventSource
		n      uint64
	}{
		{flowpb.LostEventSource_PERF_EVENT_RING_BUFFER, l.Kernel},
		{flowpb.LostEventSource_HUBBLE_RING_BUFFER, l.Agent},
		{flowpb.LostEventSource_OBSERVER_EVENTS_QUEUE, l.Journal},
	} {
		if place.n > 0 {
			lost := &flowpb.LostEvent{Source: place.source, NumEventsLost: place.n}
			out = append(out, &observerpb.GetFlowsResponse{ResponseTypes: &observerpb.GetFlowsResponse_LostEvents{LostEvents: lost}, NodeName: node, Time: timestamppb.New(at)})
		}
	}
	return out
}

// GetNodes tells of this node alone.
func (s *server) GetNodes(context.Context, *observerpb.GetNodesRequest) (*observerpb.GetNodesResponse, error) {
	n := s.source.Tell()
	return &observerpb.GetNodesResponse{Nodes: []*observerpb.Node{{
		Name: n.Name, Version: n.Version, Address: n.Address, State: relaypb.NodeState_NODE_CONNECTED, Tls: &observerpb.TLS{},
		UptimeNs: uint64(n.Uptime), NumFlows: n.Kept, MaxFlows: n.Room, SeenFlows: n.Seen,
	}}}, nil
}

// GetNamespaces lists the zones of the policy in force.
func (s *server) GetNamespaces(context.Context, *observerpb.GetNamespacesRequest) (*observerpb.GetNamespacesResponse, error) {
	out := &observerpb.GetNamespacesResponse{}
	for _, z := range s.source.Tell().Zones {
		out.Namespaces = append(out.Namespaces, &observerpb.Namespace{Namespace: z})
	}
	return out, nil
}

// ServerStatus counts flows.
func (s *server) ServerStatus(context.Context, *observerpb.ServerStatusRequest) (*observerpb.ServerStatusResponse, error) {
	n := s.source.Tell()
	return &observerpb.ServerStatusResponse{
		NumFlows: n.Kept, MaxFlows: n.Room, SeenFlows: n.Seen, UptimeNs: uint64(n.Uptime), Version: n.Version, FlowsRate: n.Rate,
		NumConnectedNodes: wrapperspb.UInt32(1), NumUnavailableNodes: wrapperspb.UInt32(0),
	}, nil
}
