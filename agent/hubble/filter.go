package hubble

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	flowpb "github.com/cilium/cilium/api/v1/flow"

	"github.com/demarc/demarc/agent/flow"
)

// predicate says whether a flow is one of those asked for.
type predicate func(*flowpb.Flow) bool

// Bounds of what one request may ask of each flow.
const (
	maxFilters = 64  // filters of a list
	maxValues  = 256 // values of one field
	maxText    = 512 // bytes of one value
)

// selection makes the predicate of a request: of the allowed filters any, all fields
// of a filter, of a field's values any; and none of the denied filters.
func selection(allow, deny []*flowpb.FlowFilter) (predicate, error) {
	allowed, err := anyFilter("whitelist", allow)
	if err != nil {
		return nil, err
	}
	denied, err := anyFilter("blacklist", deny)
	if err != nil {
		return nil, err
	}
	switch {
	case allowed == nil && denied == nil:
		return nil, nil
	case denied == nil:
		return allowed, nil
	case allowed == nil:
		return func(f *flowpb.Flow) bool { return !denied(f) }, nil
	}
	return func(f *flowpb.Flow) bool { return allowed(f) && !denied(f) }, nil
}

// anyFilter is nil for an empty list.
func anyFilter(list string, filters []*flowpb.FlowFilter) (predicate, error) {
	if len(filters) == 0 {
		return nil, nil
	}
	if len(filters) > maxFilters {
		return nil, fmt.Errorf("%s: %d filters, at most %d are taken", list, len(filters), maxFilters)
	}
	all := make([]predicate, len(filters))
	for i, f := range filters {
		var err error
		if all[i], err = allFields(f); err != nil {
			return nil, fmt.Errorf("%s filter %d: %w", list, i+1, err)
		}
	}
	return func(f *flowpb.Flow) bool {
		return slices.ContainsFunc(all, func(p predicate) bool { return p(f) })
	}, nil
}

// builder collects the fields of one filter, and the first thing that is wrong.
type builder struct {
	fields []predicate
	err    error
}

func allFields(f *flowpb.FlowFilter) (predicate, error) {
	b := &builder{}
	texts(b, "uuid", f.GetUuid(), (*flowpb.Flow).GetUuid)
	eventTypes(b, f.GetEventType())
	oneOf(b, "verdict", f.GetVerdict(), (*flowpb.Flow).GetVerdict)
	oneOf(b, "drop_reason_desc", f.GetDropReasonDesc(), (*flowpb.Flow).GetDropReasonDesc)
	oneOf(b, "traffic_direction", f.GetTrafficDirection(), (*flowpb.Flow).GetTrafficDirection)
	oneOf(b, "ip_version", f.GetIpVersion(), func(f *flowpb.Flow) flowpb.IPVersion { return f.GetIP().GetIpVersion() })
	oneOf(b, "encrypted", f.GetEncrypted(), func(f *flowpb.Flow) bool { return f.GetIP().GetEncrypted() })
	oneOf(b, "ip_trace_id", f.GetIpTraceId(), func(f *flowpb.Flow) uint64 { return f.GetIpTraceId().GetTraceId() })
	replies(b, f.GetReply())
	protocols(b, f.GetProtocol())
	for _, s := range []struct {
		name       string
		ips        []string
		pods       []string
		names      []string
		labels     []string
		services   []string
		workloads  []*flowpb.Workload
		clusters   []string
		ports      []string
		identities []uint32

		end     func(*flowpb.Flow) *flowpb.Endpoint
		service func(*flowpb.Flow) *flowpb.Service
		ip      func(*flowpb.Flow) string
		fqdns   func(*flowpb.Flow) []string
		port    func(*flowpb.Flow) (uint32, bool)
	}{
		{"source", f.GetSourceIp(), f.GetSourcePod(), f.GetSourceFqdn(), f.GetSourceLabel(), f.GetSourceService(), f.GetSourceWorkload(),
			f.GetSourceClusterName(), f.GetSourcePort(), f.GetSourceIdentity(),
			(*flowpb.Flow).GetSource, (*flowpb.Flow).GetSourceService, func(f *flowpb.Flow) string { return f.GetIP().GetSource() },
			(*flowpb.Flow).GetSourceNames, sourcePort},
		{"destination", f.GetDestinationIp(), f.GetDestinationPod(), f.GetDestinationFqdn(), f.GetDestinationLabel(), f.GetDestinationService(), f.GetDestinationWorkload(),
			f.GetDestinationClusterName(), f.GetDestinationPort(), f.GetDestinationIdentity(),
			(*flowpb.Flow).GetDestination, (*flowpb.Flow).GetDestinationService, func(f *flowpb.Flow) string { return f.GetIP().GetDestination() },
			(*flowpb.Flow).GetDestinationNames, destinationPort},
	} {
		addresses(b, s.name+"_ip", s.ips, s.ip)
		named(b, s.name+"_pod", s.pods, func(f *flowpb.Flow) (string, string) { e := s.end(f); return e.GetNamespace(), e.GetPodName() })
		named(b, s.name+"_service", s.services, func(f *flowpb.Flow) (string, string) { e := s.service(f); return e.GetNamespace(), e.GetName() })
		domains(b, s.name+"_fqdn", s.names, s.fqdns)
		labelled(b, s.name+"_label", s.labels, func(f *flowpb.Flow) []string { return s.end(f).GetLabels() })
		workloads(b, s.name+"_workload", s.workloads, s.end)
		texts(b, s.name+"_cluster_name", s.clusters, func(f *flowpb.Flow) string { return s.end(f).GetClusterName() })
		ports(b, s.name+"_port", s.ports, s.port)
		oneOf(b, s.name+"_identity", s.identities, func(f *flowpb.Flow) uint32 { return s.end(f).GetIdentity() })
	}
	addresses(b, "source_ip_xlated", f.GetSourceIpXlated(), func(f *flowpb.Flow) string { return f.GetIP().GetSourceXlated() })
	nodes(b, f.GetNodeName())
	labelled(b, "node_labels", f.GetNodeLabels(), (*flowpb.Flow).GetNodeLabels)
	tcpFlags(b, f.GetTcpFlags())
	interfaces(b, f.GetInterface())
	texts(b, "trace_id", f.GetTraceId(), func(f *flowpb.Flow) string { return f.GetTraceContext().GetParent().GetTraceId() })
	layer7(b, f)
	expressions(b, f.GetExperimental().GetCelExpression())
	if b.err != nil {
		return nil, b.err
	}
	return func(f *flowpb.Flow) bool {
		for _, p := range b.fields {
			if !p(f) {
				return false
			}
		}
		return true
	}, nil
}

func (b *builder) fail(field string, format string, args ...any) {
	if b.err == nil {
		b.err = fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...))
	}
}

func (b *builder) add(p predicate) { b.fields = append(b.fields, p) }

// bounded says whether there is something to do, and not too much of it.
func bounded[T any](b *builder, field string, values []T) bool {
	if len(values) > maxValues {
		b.fail(field, "%d values, at most %d are taken", len(values), maxValues)
	}
	for _, v := range values {
		if s, ok := any(v).(string); ok && len(s) > maxText {
			b.fail(field, "a value of %d bytes, at most %d are taken", len(s), maxText)
		}
	}
	return len(values) > 0 && b.err == nil
}

func oneOf[T comparable](b *builder, field string, values []T, of func(*flowpb.Flow) T) {
	if bounded(b, field, values) {
		b.add(func(f *flowpb.Flow) bool { return slices.Contains(values, of(f)) })
	}
}

// texts is oneOf for names, of which an empty one would match what has none.
func texts(b *builder, field string, values []string, of func(*flowpb.Flow) string) {
	if slices.Contains(values, "") {
		b.fail(field, "an empty value")
	}
	oneOf(b, field, values, of)
}

func eventTypes(b *builder, types []*flowpb.EventTypeFilter) {
	if !bounded(b, "event_type", types) {
		return
	}
	b.add(func(f *flowpb.Flow) bool {
		is := f.GetEventType()
		return is != nil && slices.ContainsFunc(types, func(t *flowpb.EventTypeFilter) bool {
			return (t.GetType() == 0 || t.GetType() == is.GetType()) && (!t.GetMatchSubType() || t.GetSubType() == is.GetSubType())
		})
	})
}

func replies(b *builder, values []bool) {
	if bounded(b, "reply", values) {
		b.add(func(f *flowpb.Flow) bool {
			return f.GetIsReply() != nil && slices.Contains(values, f.GetIsReply().GetValue())
		})
	}
}

func protocols(b *builder, values []string) {
	if !bounded(b, "protocol", values) {
		return
	}
	var is []predicate
	for _, v := range values {
		p, ok := protocolOf[strings.ToLower(v)]
		if !ok {
			b.fail("protocol", "unknown protocol %q", v)
			return
		}
		is = append(is, p)
	}
	b.add(func(f *flowpb.Flow) bool { return slices.ContainsFunc(is, func(p predicate) bool { return p(f) }) })
}

var protocolOf = map[string]predicate{
	"tcp":  func(f *flowpb.Flow) bool { return f.GetL4().GetTCP() != nil },
	"udp":  func(f *flowpb.Flow) bool { return f.GetL4().GetUDP() != nil },
	"sctp": func(f *flowpb.Flow) bool { return f.GetL4().GetSCTP() != nil },
	"icmp": func(f *flowpb.Flow) bool {
		return f.GetL4().GetICMPv4() != nil || f.GetL4().GetICMPv6() != nil
	},
	"icmpv4": func(f *flowpb.Flow) bool { return f.GetL4().GetICMPv4() != nil },
	"icmpv6": func(f *flowpb.Flow) bool { return f.GetL4().GetICMPv6() != nil },
	"igmp":   func(f *flowpb.Flow) bool { return f.GetL4().GetIGMP() != nil },
	"vrrp":   func(f *flowpb.Flow) bool { return f.GetL4().GetVRRP() != nil },
	"dns":    func(f *flowpb.Flow) bool { return f.GetL7().GetDns() != nil },
	"http":   func(f *flowpb.Flow) bool { return f.GetL7().GetHttp() != nil },
}

func addresses(b *builder, field string, values []string, of func(*flowpb.Flow) string) {
	if !bounded(b, field, values) {
		return
	}
	var within []netip.Prefix
	for _, v := range values {
		prefix, err := netip.ParsePrefix(v)
		if err != nil {
			a, err := netip.ParseAddr(v)
			if err != nil {
				b.fail(field, "%q is no address or CIDR", v)
				return
			}
			prefix = netip.PrefixFrom(a, a.BitLen())
		}
		within = append(within, prefix)
	}
	b.add(func(f *flowpb.Flow) bool {
		a, err := netip.ParseAddr(of(f))
		return err == nil && slices.ContainsFunc(within, func(p netip.Prefix) bool { return p.Contains(a) })
	})
}

// named takes NAMESPACE/PREFIX, NAMESPACE/, /PREFIX, and PREFIX in namespace default.
func named(b *builder, field string, values []string, of func(*flowpb.Flow) (namespace, name string)) {
	if slices.Contains(values, "") {
		b.fail(field, "an empty value")
	}
	if !bounded(b, field, values) {
		return
	}
	type wanted struct{ namespace, prefix string }
	var all []wanted
	for _, v := range values {
		namespace, prefix, ok := strings.Cut(v, "/")
		if !ok {
			namespace, prefix = "default", v
		}
		all = append(all, wanted{namespace, prefix})
	}
	b.add(func(f *flowpb.Flow) bool {
		namespace, name := of(f)
		return (namespace != "" || name != "") && slices.ContainsFunc(all, func(w wanted) bool {
			return (w.namespace == "" || w.namespace == namespace) && strings.HasPrefix(name, w.prefix)
		})
	})
}

// labelled takes label selectors; see flow.ParseSelector.
func labelled(b *builder, field string, values []string, of func(*flowpb.Flow) []string) {
	if !bounded(b, field, values) {
		return
	}
	var all []func([]string) bool
	for _, v := range values {
		s, err := flow.ParseSelector(v)
		if err != nil {
			b.fail(field, "%q: %v", v, err)
			return
		}
		all = append(all, s)
	}
	b.add(func(f *flowpb.Flow) bool {
		has := of(f)
		return slices.ContainsFunc(all, func(s func([]string) bool) bool { return s(has) })
	})
}

func workloads(b *builder, field string, values []*flowpb.Workload, end func(*flowpb.Flow) *flowpb.Endpoint) {
	if !bounded(b, field, values) {
		return
	}
	b.add(func(f *flowpb.Flow) bool {
		return slices.ContainsFunc(end(f).GetWorkloads(), func(is *flowpb.Workload) bool {
			return slices.ContainsFunc(values, func(v *flowpb.Workload) bool {
				return (v.GetName() == "" || v.GetName() == is.GetName()) && (v.GetKind() == "" || v.GetKind() == is.GetKind())
			})
		})
	})
}

func ports(b *builder, field string, values []string, of func(*flowpb.Flow) (uint32, bool)) {
	if !bounded(b, field, values) {
		return
	}
	var all []uint32
	for _, v := range values {
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil {
			b.fail(field, "%q is no port", v)
			return
		}
		all = append(all, uint32(n))
	}
	b.add(func(f *flowpb.Flow) bool { p, ok := of(f); return ok && slices.Contains(all, p) })
}

func sourcePort(f *flowpb.Flow) (uint32, bool) {
	from, _, ok := portsOf(f)
	return from, ok
}

func destinationPort(f *flowpb.Flow) (uint32, bool) {
	_, to, ok := portsOf(f)
	return to, ok
}

func portsOf(f *flowpb.Flow) (from, to uint32, ok bool) {
	type ported interface {
		GetSourcePort() uint32
		GetDestinationPort() uint32
	}
	var p ported
	switch l4 := f.GetL4().GetProtocol().(type) {
	case *flowpb.Layer4_TCP:
		p = l4.TCP
	case *flowpb.Layer4_UDP:
		p = l4.UDP
	case *flowpb.Layer4_SCTP:
		p = l4.SCTP
	default:
		return 0, 0, false
	}
	return p.GetSourcePort(), p.GetDestinationPort(), true
}

// clusterName is the cluster of a node whose name names none; Hubble's default.
const clusterName = "default"

// nodes takes patterns NODE and CLUSTER/NODE; a * stands for anything without a slash.
func nodes(b *builder, values []string) {
	pattern := domainPattern(b, "node_name", values, func(v string) (string, bool) {
		cluster, node, ok := strings.Cut(v, "/")
		if !ok {
			cluster, node = "", v
		}
		c, okCluster := domainExpression(cluster)
		n, okNode := domainExpression(node)
		return c + "/" + n, okCluster && okNode && v != ""
	})
	if pattern != nil {
		b.add(func(f *flowpb.Flow) bool {
			name := f.GetNodeName()
			if !strings.Contains(name, "/") {
				name = clusterName + "/" + name
			}
			return pattern.MatchString(strings.ToLower(name))
		})
	}
}

// domains takes names in which a * stands for anything.
func domains(b *builder, field string, values []string, of func(*flowpb.Flow) []string) {
	pattern := domainPattern(b, field, values, func(v string) (string, bool) {
		e, ok := domainExpression(v)
		return e, ok && v != ""
	})
	if pattern != nil {
		b.add(func(f *flowpb.Flow) bool { return slices.ContainsFunc(of(f), pattern.MatchString) })
	}
}

func domainPattern(b *builder, field string, values []string, expression func(string) (string, bool)) *regexp.Regexp {
	if !bounded(b, field, values) {
		return nil
	}
	var all []string
	for _, v := range values {
		e, ok := expression(v)
		if !ok {
			b.fail(field, "%q is no pattern of a name", v)
			return nil
		}
		all = append(all, e)
	}
	pattern, err := regexp.Compile(`\A(?:` + strings.Join(all, "|") + `)\z`)
	if err != nil {
		b.fail(field, "too much to match: %v", err)
	}
	return pattern
}

// domainExpression is a name's pattern as a regular expression; an empty one matches
// every name.
func domainExpression(v string) (string, bool) {
	v = strings.ToLower(strings.TrimSuffix(strings.TrimSpace(v), "."))
	if v == "" {
		v = "*"
	}
	for _, r := range v {
		if !strings.ContainsRune("-._*0123456789abcdefghijklmnopqrstuvwxyz", r) {
			return "", false
		}
	}
	return strings.NewReplacer(".", `\.`, "*", `[-._0-9a-z]*`).Replace(v), !strings.HasSuffix(v, ".")
}

func tcpFlags(b *builder, values []*flowpb.TCPFlags) {
	if !bounded(b, "tcp_flags", values) {
		return
	}
	bits := func(f *flowpb.TCPFlags) (set [9]bool) {
		return [9]bool{f.GetFIN(), f.GetSYN(), f.GetRST(), f.GetPSH(), f.GetACK(), f.GetURG(), f.GetECE(), f.GetCWR(), f.GetNS()}
	}
	b.add(func(f *flowpb.Flow) bool {
		flags := f.GetL4().GetTCP().GetFlags()
		has := bits(flags)
		return flags != nil && slices.ContainsFunc(values, func(v *flowpb.TCPFlags) bool {
			for i, wanted := range bits(v) {
				if wanted && !has[i] {
					return false
				}
			}
			return true
		})
	})
}

func interfaces(b *builder, values []*flowpb.NetworkInterface) {
	if !bounded(b, "interface", values) {
		return
	}
	b.add(func(f *flowpb.Flow) bool {
		is := f.GetInterface()
		return is != nil && slices.ContainsFunc(values, func(v *flowpb.NetworkInterface) bool {
			return (v.GetIndex() == 0 || v.GetIndex() == is.GetIndex()) && (v.GetName() == "" || v.GetName() == is.GetName())
		})
	})
}
