package kubernetes

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/network-policy-api/apis/v1alpha2"

	"github.com/demarc/demarc/policy/image"
)

// action is what a rule does with traffic that it matches.
type action uint8

const (
	deny   action = iota // for good
	accept               // for good
	pass                 // leaves it to the next tier
)

// rule is a rule of either API for one direction.
type rule struct {
	action action
	origin string // "NetworkPolicy shop/web"

	everyone bool   // matches whatever the peer is
	kinds    []bool // by kind: pods that it matches by their labels
	blocks   []block

	everyPort bool
	matches   []portMatch
}

// block is addresses that a rule matches.
type block struct {
	netip.Prefix
	except []netip.Prefix
}

// portMatch is one entry of a rule's ports: a span, or a name that the destination
// pod gives a number.
type portMatch struct {
	span  image.Span
	name  string
	proto image.Proto // of a name; 0 = any
}

// peer says whether the rule matches an address; the kind is that of the pod that
// has it, or -1.
func (r *rule) peer(kind int, address netip.Addr) bool {
	if r.everyone || kind >= 0 && r.kinds[kind] {
		return true
	}
	return slices.ContainsFunc(r.blocks, func(b block) bool {
		return b.Contains(address) && !slices.ContainsFunc(b.except, func(e netip.Prefix) bool { return e.Contains(address) })
	})
}

// ports are those that the rule matches toward a destination; nil is one that gives
// no port a name.
func (r *rule) ports(destination *kind) ports {
	if r.everyPort {
		return everyPort
	}
	var out []image.Span
	for _, m := range r.matches {
		switch {
		case m.name == "":
			out = append(out, m.span)
		case destination != nil:
			out = append(out, destination.named(m.name, m.proto)...)
		}
	}
	return normal(out)
}

// tier is where a policy stands in the order of judgement.
type tier uint8

const (
	admin tier = iota
	networkPolicy
	baseline
)

// boundary is one object of either API.
type boundary struct {
	tier     tier
	priority int32
	label    string
	subjects []bool    // by kind
	rules    [2][]rule // by image.Direction
	isolates [2]bool   // networkPolicy: what it selects accepts only what rules say
}

// reader makes boundaries of objects.
type reader struct {
	cluster  *cluster
	refused  Problems // no object that the API takes: nothing is imported
	reported Problems // what a boundary policy cannot say: it is isolated
}

// boundaries are all objects in the order of judgement. Of two cluster policies with
// one tier and priority the API leaves the order open; here it is that of their names.
func (r *reader) boundaries(o *Objects) []boundary {
	var out []boundary
	for i := range o.networkPolicies {
		out = append(out, r.networkPolicy(&o.networkPolicies[i]))
	}
	for i := range o.clusterPolicies {
		out = append(out, r.clusterPolicy(&o.clusterPolicies[i]))
	}
	slices.SortFunc(out, func(a, b boundary) int {
		return cmp.Or(cmp.Compare(a.tier, b.tier), cmp.Compare(a.priority, b.priority), strings.Compare(a.label, b.label))
	})
	return out
}

// refuse notes a value that the API server would not take either.
func (r *reader) refuse(at place, part, format string, args ...any) {
	r.refused = append(r.refused, Problem{File: at.file, Line: at.line(part), Object: at.label, Text: part[1:] + ": " + fmt.Sprintf(format, args...)})
}

// report notes what the policy cannot say.
func (r *reader) report(at place, part, format string, args ...any) {
	r.reported = append(r.reported, Problem{File: at.file, Line: at.line(part), Object: at.label, Text: part[1:] + ": " + fmt.Sprintf(format, args...)})
}

func (r *reader) networkPolicy(p *placed[networkingv1.NetworkPolicy]) boundary {
	spec := &p.object.Spec
	b := boundary{tier: networkPolicy, label: p.label}
	namespace := p.object.Namespace
	b.subjects = r.pods(p.place, ".spec.podSelector", namespace, nil, &spec.PodSelector)
	for i, t := range spec.PolicyTypes {
		switch t {
		case networkingv1.PolicyTypeIngress:
			b.isolates[image.Ingress] = true
		case networkingv1.PolicyTypeEgress:
			b.isolates[image.Egress] = true
		default:
			r.refuse(p.place, fmt.Sprintf(".spec.policyTypes[%d]", i), "%q is neither Ingress nor Egress", t)
		}
	}
	if len(spec.PolicyTypes) == 0 {
		b.isolates = [2]bool{image.Ingress: true, image.Egress: len(spec.Egress) > 0}
	}
	for i := range spec.Ingress {
		part := fmt.Sprintf(".spec.ingress[%d]", i)
		b.rules[image.Ingress] = append(b.rules[image.Ingress], r.networkRule(p.place, part, namespace, "from", spec.Ingress[i].From, spec.Ingress[i].Ports))
	}
	for i := range spec.Egress {
		part := fmt.Sprintf(".spec.egress[%d]", i)
		b.rules[image.Egress] = append(b.rules[image.Egress], r.networkRule(p.place, part, namespace, "to", spec.Egress[i].To, spec.Egress[i].Ports))
	}
	return b
}

func (r *reader) networkRule(at place, part, namespace, side string, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) rule {
	out := rule{action: accept, origin: at.label, everyone: len(peers) == 0, everyPort: len(ports) == 0, kinds: make([]bool, len(r.cluster.kinds))}
	for i, p := range peers {
		here := fmt.Sprintf("%s.%s[%d]", part, side, i)
		switch {
		case p.IPBlock != nil && (p.PodSelector != nil || p.NamespaceSelector != nil):
			r.refuse(at, here, "ipBlock stands beside a selector; write an item for each")
		case p.IPBlock != nil:
			b := block{Prefix: r.cidr(at, here+".ipBlock.cidr", p.IPBlock.CIDR)}
			for j, e := range p.IPBlock.Except {
				except := r.cidr(at, fmt.Sprintf("%s.ipBlock.except[%d]", here, j), e)
				if b.IsValid() && except.IsValid() && (!b.Contains(except.Addr()) || except.Bits() <= b.Bits()) {
					r.refuse(at, fmt.Sprintf("%s.ipBlock.except[%d]", here, j), "%s is not a part of %s", e, p.IPBlock.CIDR)
				}
				b.except = append(b.except, except)
			}
			out.blocks = append(out.blocks, b)
		case p.PodSelector == nil && p.NamespaceSelector == nil:
			r.refuse(at, here, "the peer is empty; name a podSelector, a namespaceSelector or an ipBlock")
		default:
			out.add(r.pods(at, here, namespace, p.NamespaceSelector, p.PodSelector))
		}
	}
	for i, p := range ports {
		out.matches = append(out.matches, r.networkPort(at, fmt.Sprintf("%s.ports[%d]", part, i), p))
	}
	return out
}

func (out *rule) add(kinds []bool) {
	for k, is := range kinds {
		out.kinds[k] = out.kinds[k] || is
	}
}

func (r *reader) networkPort(at place, part string, p networkingv1.NetworkPolicyPort) portMatch {
	proto := image.TCP
	if p.Protocol != nil {
		known := false
		if proto, known = protocols[string(*p.Protocol)]; !known {
			r.refuse(at, part+".protocol", "%q is none of %s, %s and %s", *p.Protocol, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP)
		}
	}
	switch {
	case p.Port == nil:
		if p.EndPort != nil {
			r.refuse(at, part+".endPort", "there is no port that begins the range")
		}
		return portMatch{span: whole(proto)}
	case p.Port.Type == intstr.String:
		if p.EndPort != nil {
			r.refuse(at, part+".endPort", "a named port begins no range")
		}
		if p.Port.StrVal == "" {
			r.refuse(at, part+".port", "the name is empty")
		}
		return portMatch{name: p.Port.StrVal, proto: proto}
	}
	last := p.Port.IntVal
	if p.EndPort != nil {
		last = *p.EndPort
	}
	return portMatch{span: r.span(at, part, proto, p.Port.IntVal, last)}
}

func (r *reader) span(at place, part string, proto image.Proto, low, high int32) image.Span {
	if low < 1 || high > 65535 || low > high {
		r.refuse(at, part, "%d to %d is no range of ports from 1 to 65535", low, high)
		return image.Span{Proto: proto, Low: 1, High: 1}
	}
	return image.Span{Proto: proto, Low: uint16(low), High: uint16(high)}
}

func (r *reader) clusterPolicy(p *placed[v1alpha2.ClusterNetworkPolicy]) boundary {
	spec := &p.object.Spec
	b := boundary{label: p.label, priority: spec.Priority}
	switch spec.Tier {
	case v1alpha2.AdminTier:
		b.tier = admin
	case v1alpha2.BaselineTier:
		b.tier = baseline
	default:
		r.refuse(p.place, ".spec.tier", "%q is neither Admin nor Baseline", spec.Tier)
	}
	if spec.Priority < 0 || spec.Priority > 1000 {
		r.refuse(p.place, ".spec.priority", "%d is not from 0 to 1000", spec.Priority)
	}
	switch s := spec.Subject; {
	case s.Namespaces != nil && s.Pods == nil:
		b.subjects = r.pods(p.place, ".spec.subject.namespaces", "", s.Namespaces, nil)
	case s.Pods != nil && s.Namespaces == nil:
		b.subjects = r.pods(p.place, ".spec.subject.pods", "", &s.Pods.NamespaceSelector, &s.Pods.PodSelector)
	default:
		r.refuse(p.place, ".spec.subject", "name exactly one of namespaces and pods")
		b.subjects = make([]bool, len(r.cluster.kinds))
	}
	for i := range spec.Ingress {
		x := &spec.Ingress[i]
		peers := make([]v1alpha2.ClusterNetworkPolicyEgressPeer, 0, len(x.From))
		for _, f := range x.From {
			peers = append(peers, v1alpha2.ClusterNetworkPolicyEgressPeer{Namespaces: f.Namespaces, Pods: f.Pods})
		}
		b.rules[image.Ingress] = append(b.rules[image.Ingress], r.clusterRule(p.place, fmt.Sprintf(".spec.ingress[%d]", i), "from", x.Action, peers, x.Protocols))
	}
	for i := range spec.Egress {
		x := &spec.Egress[i]
		b.rules[image.Egress] = append(b.rules[image.Egress], r.clusterRule(p.place, fmt.Sprintf(".spec.egress[%d]", i), "to", x.Action, x.To, x.Protocols))
	}
	return b
}

func (r *reader) clusterRule(at place, part, side string, act v1alpha2.ClusterNetworkPolicyRuleAction, peers []v1alpha2.ClusterNetworkPolicyEgressPeer, protocols []v1alpha2.ClusterNetworkPolicyProtocol) rule {
	out := rule{origin: at.label, everyPort: len(protocols) == 0, kinds: make([]bool, len(r.cluster.kinds))}
	switch act {
	case v1alpha2.ClusterNetworkPolicyRuleActionAccept:
		out.action = accept
	case v1alpha2.ClusterNetworkPolicyRuleActionDeny:
	case v1alpha2.ClusterNetworkPolicyRuleActionPass:
		out.action = pass
	default:
		r.refuse(at, part+".action", "%q is none of Accept, Deny and Pass", act)
	}
	if len(peers) == 0 {
		r.refuse(at, part, "%s names nobody", side)
	}
	closed := false // a part is of a version that this importer does not know
	for i, p := range peers {
		here := fmt.Sprintf("%s.%s[%d]", part, side, i)
		set := 0
		for _, is := range [...]bool{p.Namespaces != nil, p.Pods != nil, p.Nodes != nil, p.Networks != nil, p.DomainNames != nil} {
			if is {
				set++
			}
		}
		switch {
		case set == 0:
			closed = true
			r.report(at, here, "the peer names nothing that is known; the rule %s", failClosed(out.action))
		case set > 1:
			r.refuse(at, here, "the peer has more than one kind; write an item for each")
		case p.Namespaces != nil:
			out.add(r.pods(at, here+".namespaces", "", p.Namespaces, nil))
		case p.Pods != nil:
			out.add(r.pods(at, here+".pods", "", &p.Pods.NamespaceSelector, &p.Pods.PodSelector))
		case p.Nodes != nil:
			for _, b := range r.nodes(at, here+".nodes", p.Nodes) {
				out.blocks = append(out.blocks, block{Prefix: b})
			}
		case p.Networks != nil:
			for j, n := range p.Networks {
				out.blocks = append(out.blocks, block{Prefix: r.cidr(at, fmt.Sprintf("%s.networks[%d]", here, j), string(n))})
			}
		case out.action == accept:
			r.report(at, here, "domainNames cannot be expressed, since the names' addresses change: %s admitted", noneOf(p.DomainNames))
		default:
			closed = true
			r.report(at, here, "domainNames are for Accept rules only; the rule denies everything")
		}
	}
	for i, p := range protocols {
		m, known := r.protocol(at, fmt.Sprintf("%s.protocols[%d]", part, i), out.action, p)
		closed = closed || !known
		out.matches = append(out.matches, m)
	}
	if closed {
		return rule{action: deny, origin: at.label, everyone: out.action != accept, everyPort: true, kinds: make([]bool, len(r.cluster.kinds))}
	}
	return out
}

func failClosed(a action) string {
	if a == accept {
		return "admits nothing"
	}
	return "denies everything"
}

func noneOf(names []v1alpha2.DomainName) string {
	if len(names) == 1 {
		return string(names[0]) + " is not"
	}
	return fmt.Sprintf("%s and %d more are not", names[0], len(names)-1)
}

func (r *reader) protocol(at place, part string, act action, p v1alpha2.ClusterNetworkPolicyProtocol) (m portMatch, known bool) {
	var proto image.Proto
	var port *v1alpha2.Port
	set := 0
	if p.TCP != nil {
		proto, port, set = image.TCP, p.TCP.DestinationPort, set+1
	}
	if p.UDP != nil {
		proto, port, set = image.UDP, p.UDP.DestinationPort, set+1
	}
	if p.SCTP != nil {
		proto, port, set = image.SCTP, p.SCTP.DestinationPort, set+1
	}
	if p.DestinationNamedPort != "" {
		m, set = portMatch{name: p.DestinationNamedPort}, set+1
	}
	switch {
	case set > 1:
		r.refuse(at, part, "the item has more than one protocol; write an item for each")
		return m, true
	case set == 1 && proto == 0:
		return m, true
	case set == 1 && port == nil:
		return portMatch{span: whole(proto)}, true
	case set == 1 && port.Number != 0 && port.Range == nil:
		return portMatch{span: r.span(at, part, proto, port.Number, port.Number)}, true
	case set == 1 && port.Number == 0 && port.Range != nil:
		return portMatch{span: r.span(at, part, proto, port.Range.Start, port.Range.End)}, true
	case set == 1 && port.Range != nil:
		r.refuse(at, part, "the port has a number and a range")
		return m, true
	}
	r.report(at, part, "the item names nothing that is known; the rule %s", failClosed(act))
	return m, false
}

// pods are the kinds that both selectors match. Without a selector of namespaces it is
// the one namespace; a nil selector of pods matches all.
func (r *reader) pods(at place, part, namespace string, namespaces, pods *metav1.LabelSelector) []bool {
	out := make([]bool, len(r.cluster.kinds))
	inNamespace := func(name string) bool { return name == namespace }
	if namespaces != nil {
		s := r.selector(at, part, namespaces)
		inNamespace = func(name string) bool { return s.Matches(r.cluster.namespaces[name]) }
	}
	chosen := labels.Everything()
	if pods != nil {
		chosen = r.selector(at, part, pods)
	}
	for i := range r.cluster.kinds {
		k := &r.cluster.kinds[i]
		out[i] = inNamespace(k.namespace) && chosen.Matches(k.labels)
	}
	return out
}

// nodes are the addresses of the nodes that a selector matches.
func (r *reader) nodes(at place, part string, nodes *metav1.LabelSelector) []netip.Prefix {
	s := r.selector(at, part, nodes)
	var out []netip.Prefix
	for _, name := range slices.Sorted(maps.Keys(r.cluster.nodes)) {
		if n := r.cluster.nodes[name]; s.Matches(labels.Set(n.Labels)) {
			out = append(out, addressBlocks(n.IPs)...)
		}
	}
	return out
}

func (r *reader) selector(at place, part string, s *metav1.LabelSelector) labels.Selector {
	out, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		r.refuse(at, part, "%s", err)
		return labels.Nothing()
	}
	return out
}

func (r *reader) cidr(at place, part, text string) netip.Prefix {
	p, err := netip.ParsePrefix(text)
	if err != nil || p.Addr().Is4In6() {
		r.refuse(at, part, "%q is no block of addresses such as 10.0.0.0/8", text)
		return netip.Prefix{}
	}
	return p.Masked()
}
