package hubble

import (
	"encoding/binary"
	"encoding/hex"
	"hash/fnv"
	"strings"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
)

// Numbers that Hubble's clients know by name. The identities are Cilium's reserved
// ones, which demarc gives to no workload; its own reserved ones mean other things.
const (
	identityUnknown = 0
	identityHost    = 1
	identityWorld   = 2
	identityInit    = 5

	eventDrop          = 1
	eventTrace         = 4
	eventPolicyVerdict = 5

	traceToNetwork = 11 // of a flow that is being opened
)

// workloadKind is what demarc calls its workloads to Hubble's clients.
const workloadKind = "Workload"

// Flow says a flow in Hubble's words. A workload is a pod in the namespace of its
// zone; a denial is a drop, whatever else was decided a policy verdict, and what
// waits for the peer's proof a trace. What Hubble knows and demarc does not (TCP
// flags, anything above the transport) stays empty.
func Flow(f *flow.Flow) *flowpb.Flow {
	out := &flowpb.Flow{
		Time:      timestamppb.New(f.Time),
		Uuid:      uuid(f),
		Emitter:   &flowpb.Emitter{Name: "Demarc"},
		NodeName:  f.Node,
		Type:      flowpb.FlowType_L3_L4,
		Verdict:   verdict(f.Verdict),
		EventType: &flowpb.CiliumEventType{Type: eventPolicyVerdict},
		// The opener is the source of every flow that is told.
		IsReply:     wrapperspb.Bool(f.Reason == abi.ByReply),
		L4:          layer4(f),
		Source:      endpoint(&f.Source),
		Destination: endpoint(&f.Destination),
	}
	if a := f.Source.Address; a.IsValid() || f.Destination.Address.IsValid() {
		out.IP = &flowpb.IP{IpVersion: flowpb.IPVersion_IPv4}
		if a.Is6() || f.Destination.Address.Is6() {
			out.IP.IpVersion = flowpb.IPVersion_IPv6
		}
		if a.IsValid() {
			out.IP.Source = a.String()
		}
		if f.Destination.Address.IsValid() {
			out.IP.Destination = f.Destination.Address.String()
		}
	}
	var by []*flowpb.Policy
	if f.Crossing != "" {
		by = []*flowpb.Policy{{Name: f.Crossing, Kind: "Crossing"}}
	}
	denied := f.Verdict == abi.Deny || f.Verdict == abi.Audit || f.Verdict == abi.WouldDeny
	out.TrafficDirection = flowpb.TrafficDirection_EGRESS
	switch {
	case f.Direction == abi.Ingress && denied:
		out.TrafficDirection, out.IngressDeniedBy = flowpb.TrafficDirection_INGRESS, by
	case f.Direction == abi.Ingress:
		out.TrafficDirection, out.IngressAllowedBy = flowpb.TrafficDirection_INGRESS, by
	case denied:
		out.EgressDeniedBy = by
	default:
		out.EgressAllowedBy = by
	}
	switch f.Verdict {
	case abi.Deny:
		out.DropReasonDesc = dropReason(f.Reason)
		out.EventType = &flowpb.CiliumEventType{Type: eventDrop, SubType: int32(out.DropReasonDesc)}
	case abi.Provisional:
		out.EventType = &flowpb.CiliumEventType{Type: eventTrace, SubType: traceToNetwork}
		out.TraceObservationPoint = flowpb.TraceObservationPoint_TO_NETWORK
	}
	out.PolicyLog = []string{"reason=" + f.Reason.String()}
	out.Summary = summary(f)
	return out
}

// summary is what Hubble's clients show at a line's end: "TCP no-crossing".
func summary(f *flow.Flow) string {
	s := f.Reason.String()
	if f.Protocol != "" {
		s = strings.ToUpper(f.Protocol) + " " + s
	}
	if f.Crossing != "" {
		s += " " + f.Crossing
	}
	return s
}

// uuid is the same for the same event wherever it is asked for: of the node's name,
// the event's time, CPU, number and ring. Its form is that of RFC 9562, version 8.
func uuid(f *flow.Flow) string {
	h := fnv.New128a()
	var b [21]byte
	binary.BigEndian.PutUint64(b[0:], uint64(f.Time.UnixNano()))
	binary.BigEndian.PutUint64(b[8:], f.Seq)
	binary.BigEndian.PutUint32(b[16:], f.CPU)
	b[20] = byte(flow.Ring(f.Verdict))
	h.Write(b[:])
	h.Write([]byte(f.Node))
	var sum [16]byte
	h.Sum(sum[:0])
	sum[6] = sum[6]&0x0f | 0x80
	sum[8] = sum[8]&0x3f | 0x80
	var text [36]byte
	hex.Encode(text[0:8], sum[0:4])
	hex.Encode(text[9:13], sum[4:6])
	hex.Encode(text[14:18], sum[6:8])
	hex.Encode(text[19:23], sum[8:10])
	hex.Encode(text[24:36], sum[10:16])
	text[8], text[13], text[18], text[23] = '-', '-', '-', '-'
	return string(text[:])
}

func verdict(v abi.Verdict) flowpb.Verdict {
	switch v {
	case abi.Allow:
		return flowpb.Verdict_FORWARDED
	case abi.Provisional:
		return flowpb.Verdict_TRACED
	case abi.Audit, abi.WouldDeny, abi.WouldAllow:
		return flowpb.Verdict_AUDIT
	}
	return flowpb.Verdict_DROPPED
}

// dropReason is the nearest of Hubble's reasons. What was refused because the policy
// does not declare it is POLICY_DENIED; the policy log has demarc's own word.
func dropReason(r abi.Reason) flowpb.DropReason {
	switch r {
	case abi.Malformed, abi.IPOptions:
		return flowpb.DropReason_INVALID_PACKET_DROPPED
	case abi.Fragment:
		return flowpb.DropReason_IP_FRAGMENTATION_NOT_SUPPORTED
	case abi.Protocol:
		return flowpb.DropReason_UNKNOWN_L4_PROTOCOL
	case abi.ICMPType:
		return flowpb.DropReason_UNKNOWN_ICMPV4_TYPE
	case abi.Spoof:
		return flowpb.DropReason_INVALID_SOURCE_IP
	case abi.OverLimit, abi.UnprovenLimit:
		return flowpb.DropReason_DROP_RATE_LIMITED
	case abi.MapFull:
		return flowpb.DropReason_CT_MAP_INSERTION_FAILED
	case abi.TagMissing:
		return flowpb.DropReason_AUTH_REQUIRED
	case abi.TagMalformed, abi.TagBadMAC, abi.TagWrongEpoch, abi.TagBadIdentity, abi.TagStale, abi.TagUnbound, abi.TagReplayed:
		return flowpb.DropReason_INVALID_IDENTITY
	}
	return flowpb.DropReason_POLICY_DENIED
}

func layer4(f *flow.Flow) *flowpb.Layer4 {
	from, to := uint32(f.Source.Port), uint32(f.Destination.Port)
	switch f.Protocol {
	case "tcp":
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_TCP{TCP: &flowpb.TCP{SourcePort: from, DestinationPort: to}}}
	case "udp", "udplite":
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_UDP{UDP: &flowpb.UDP{SourcePort: from, DestinationPort: to}}}
	case "sctp":
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_SCTP{SCTP: &flowpb.SCTP{SourcePort: from, DestinationPort: to}}}
	case "icmp": // a source port is the identifier of an echo; of others the type is not told
		icmp := &flowpb.ICMPv4{}
		if from != 0 {
			icmp.Type = 8
		}
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_ICMPv4{ICMPv4: icmp}}
	case "icmp6":
		icmp := &flowpb.ICMPv6{}
		if from != 0 {
			icmp.Type = 128
		}
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_ICMPv6{ICMPv6: icmp}}
	case "igmp":
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_IGMP{IGMP: &flowpb.IGMP{}}}
	}
	return nil
}

// endpoint is one side. An identity that was claimed with a bad proof is nobody's,
// and shows as a label only.
func endpoint(e *flow.Endpoint) *flowpb.Endpoint {
	out := &flowpb.Endpoint{Identity: identityUnknown, Labels: e.Labels()}
	switch {
	case e.Claimed:
	case e.Workload != "":
		out.Identity, out.Namespace, out.PodName = e.Identity, e.Zone, e.Workload
		out.Workloads = []*flowpb.Workload{{Name: e.Workload, Kind: workloadKind}}
	case e.Reserved == "pending":
		out.Identity = identityInit
	case e.Reserved != "": // processes of the host itself
		out.Identity, out.Namespace = identityHost, e.Zone
	case e.Identity != 0:
		out.Identity = e.Identity
	case e.Address.IsValid():
		out.Identity = identityWorld
	}
	return out
}
