package kubernetes_test

import (
	"net/netip"
	"slices"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/network-policy-api/apis/v1alpha2"

	"github.com/demarc/demarc/policy/kubernetes/facts"
)

// world is a cluster and its policies, judged slowly and one connection at a time, as
// the documentation of the API reads. It shares nothing with the importer but the
// types of the API.
type world struct {
	namespaces map[string]map[string]string
	nodes      map[string]facts.Node
	network    []networkingv1.NetworkPolicy
	cluster    []v1alpha2.ClusterNetworkPolicy
}

// peer is one end of a connection under the address that it uses.
type peer struct {
	pod     *facts.Pod // nil = no pod that policies can select
	address netip.Addr
}

// connection is a question.
type connection struct {
	from, to peer
	protocol string
	port     int32
}

// letter judges both ends: '.', 'E', 'I' or 'B'.
func (w *world) letter(c connection) byte {
	out := c.from.pod == nil || w.allows(c, c.from, c.to, true)
	in := c.to.pod == nil || w.allows(c, c.to, c.from, false)
	switch {
	case out && in:
		return '.'
	case out:
		return 'I'
	case in:
		return 'E'
	}
	return 'B'
}

// allows says whether the subject's policies allow the connection with the other.
func (w *world) allows(c connection, subject, other peer, egress bool) bool {
	if d := w.tier(v1alpha2.AdminTier, c, subject, other, egress); d != v1alpha2.ClusterNetworkPolicyRuleActionPass {
		return d == v1alpha2.ClusterNetworkPolicyRuleActionAccept
	}
	isolated, allowed := false, false
	for i := range w.network {
		p := &w.network[i]
		if p.Namespace != subject.pod.Namespace || !matches(&p.Spec.PodSelector, subject.pod.Labels) {
			continue
		}
		affects := slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeIngress) || len(p.Spec.PolicyTypes) == 0
		if egress {
			affects = slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeEgress) || len(p.Spec.PolicyTypes) == 0 && len(p.Spec.Egress) > 0
		}
		if !affects {
			continue
		}
		isolated = true
		if egress {
			for _, r := range p.Spec.Egress {
				allowed = allowed || w.networkPeers(p.Namespace, r.To, other) && networkPorts(r.Ports, c)
			}
		} else {
			for _, r := range p.Spec.Ingress {
				allowed = allowed || w.networkPeers(p.Namespace, r.From, other) && networkPorts(r.Ports, c)
			}
		}
	}
	if isolated {
		return allowed
	}
	return w.tier(v1alpha2.BaselineTier, c, subject, other, egress) != v1alpha2.ClusterNetworkPolicyRuleActionDeny
}

// tier returns what the cluster policies of a tier decide; Pass: nothing.
func (w *world) tier(tier v1alpha2.Tier, c connection, subject, other peer, egress bool) v1alpha2.ClusterNetworkPolicyRuleAction {
	var mine []v1alpha2.ClusterNetworkPolicy
	for _, p := range w.cluster {
		if p.Spec.Tier == tier && w.subject(p.Spec.Subject, subject.pod) {
			mine = append(mine, p)
		}
	}
	slices.SortStableFunc(mine, func(a, b v1alpha2.ClusterNetworkPolicy) int { return int(a.Spec.Priority - b.Spec.Priority) })
	for _, p := range mine {
		if egress {
			for _, r := range p.Spec.Egress {
				known, hit := true, false
				for _, t := range r.To {
					k, h := w.clusterPeer(t, other)
					known, hit = known && k, hit || h
				}
				if !known { // a field of a later version: Accept matches nothing, all else denies everything
					if r.Action != v1alpha2.ClusterNetworkPolicyRuleActionAccept {
						return v1alpha2.ClusterNetworkPolicyRuleActionDeny
					}
					continue
				}
				if hit && clusterPorts(r.Protocols, c) {
					return r.Action
				}
			}
			continue
		}
		for _, r := range p.Spec.Ingress {
			known, hit := true, false
			for _, f := range r.From {
				k, h := w.clusterPeer(v1alpha2.ClusterNetworkPolicyEgressPeer{Namespaces: f.Namespaces, Pods: f.Pods}, other)
				known, hit = known && k, hit || h
			}
			if !known {
				if r.Action != v1alpha2.ClusterNetworkPolicyRuleActionAccept {
					return v1alpha2.ClusterNetworkPolicyRuleActionDeny
				}
				continue
			}
			if hit && clusterPorts(r.Protocols, c) {
				return r.Action
			}
		}
	}
	return v1alpha2.ClusterNetworkPolicyRuleActionPass
}

func (w *world) subject(s v1alpha2.ClusterNetworkPolicySubject, pod *facts.Pod) bool {
	if s.Namespaces != nil {
		return matches(s.Namespaces, w.namespace(pod.Namespace))
	}
	return matches(&s.Pods.NamespaceSelector, w.namespace(pod.Namespace)) && matches(&s.Pods.PodSelector, pod.Labels)
}

func (w *world) namespace(name string) map[string]string {
	l := map[string]string{"kubernetes.io/metadata.name": name}
	for k, v := range w.namespaces[name] {
		l[k] = v
	}
	return l
}

func (w *world) networkPeers(namespace string, peers []networkingv1.NetworkPolicyPeer, other peer) bool {
	if len(peers) == 0 {
		return true
	}
	for _, p := range peers {
		if p.IPBlock != nil {
			inside := netip.MustParsePrefix(p.IPBlock.CIDR).Contains(other.address)
			for _, e := range p.IPBlock.Except {
				if netip.MustParsePrefix(e).Contains(other.address) {
					inside = false
				}
			}
			if inside {
				return true
			}
			continue
		}
		if other.pod == nil {
			continue
		}
		if p.NamespaceSelector == nil && other.pod.Namespace != namespace {
			continue
		}
		if p.NamespaceSelector != nil && !matches(p.NamespaceSelector, w.namespace(other.pod.Namespace)) {
			continue
		}
		if p.PodSelector == nil || matches(p.PodSelector, other.pod.Labels) {
			return true
		}
	}
	return false
}

func networkPorts(ports []networkingv1.NetworkPolicyPort, c connection) bool {
	if len(ports) == 0 {
		return true
	}
	for _, p := range ports {
		protocol := "TCP"
		if p.Protocol != nil {
			protocol = string(*p.Protocol)
		}
		if protocol != c.protocol {
			continue
		}
		switch {
		case p.Port == nil:
			return true
		case p.Port.Type == intstr.String:
			if namedPort(p.Port.StrVal, c) {
				return true
			}
		case p.EndPort == nil:
			if p.Port.IntVal == c.port {
				return true
			}
		default:
			if p.Port.IntVal <= c.port && c.port <= *p.EndPort {
				return true
			}
		}
	}
	return false
}

// namedPort says whether the destination pod gives its port that name.
func namedPort(name string, c connection) bool {
	if c.to.pod == nil {
		return false
	}
	return slices.ContainsFunc(c.to.pod.Ports, func(p facts.Port) bool {
		return p.Name == name && p.Protocol == c.protocol && int32(p.Port) == c.port
	})
}

func (w *world) clusterPeer(p v1alpha2.ClusterNetworkPolicyEgressPeer, other peer) (known, hit bool) {
	switch {
	case p.Namespaces != nil:
		return true, other.pod != nil && matches(p.Namespaces, w.namespace(other.pod.Namespace))
	case p.Pods != nil:
		return true, other.pod != nil && matches(&p.Pods.NamespaceSelector, w.namespace(other.pod.Namespace)) && matches(&p.Pods.PodSelector, other.pod.Labels)
	case p.Nodes != nil:
		for _, n := range w.nodes {
			if matches(p.Nodes, n.Labels) && slices.Contains(n.IPs, other.address.String()) {
				return true, true
			}
		}
		return true, false
	case p.Networks != nil:
		for _, n := range p.Networks {
			if netip.MustParsePrefix(string(n)).Contains(other.address) {
				return true, true
			}
		}
		return true, false
	case p.DomainNames != nil:
		return true, false // cannot be expressed
	}
	return false, false
}

func clusterPorts(protocols []v1alpha2.ClusterNetworkPolicyProtocol, c connection) bool {
	if len(protocols) == 0 {
		return true
	}
	port := func(protocol string, p *v1alpha2.Port) bool {
		if c.protocol != protocol {
			return false
		}
		if p == nil {
			return true
		}
		if p.Range != nil {
			return p.Range.Start <= c.port && c.port <= p.Range.End
		}
		return p.Number == c.port
	}
	for _, p := range protocols {
		if p.TCP != nil && port("TCP", p.TCP.DestinationPort) ||
			p.UDP != nil && port("UDP", p.UDP.DestinationPort) ||
			p.SCTP != nil && port("SCTP", p.SCTP.DestinationPort) ||
			p.DestinationNamedPort != "" && namedPort(p.DestinationNamedPort, c) {
			return true
		}
	}
	return false
}

// matches is a label selector, written out.
func matches(s *metav1.LabelSelector, labels map[string]string) bool {
	for k, v := range s.MatchLabels {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	for _, e := range s.MatchExpressions {
		have, ok := labels[e.Key]
		in := ok && slices.Contains(e.Values, have)
		switch e.Operator {
		case metav1.LabelSelectorOpIn:
			if !in {
				return false
			}
		case metav1.LabelSelectorOpNotIn:
			if in {
				return false
			}
		case metav1.LabelSelectorOpExists:
			if !ok {
				return false
			}
		case metav1.LabelSelectorOpDoesNotExist:
			if ok {
				return false
			}
		}
	}
	return true
}
