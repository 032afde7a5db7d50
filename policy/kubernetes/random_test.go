package kubernetes_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"
	"sigs.k8s.io/network-policy-api/apis/v1alpha2"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/identity"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/kubernetes"
	"github.com/demarc/demarc/policy/kubernetes/facts"
)

func TestMain(m *testing.M) {
	flag.Parse()
	set := false
	flag.Visit(func(f *flag.Flag) { set = set || f.Name == "rapid.checks" })
	if !set {
		// The same clusters each time: `make test` fails for what was changed. `make test-netpol`
		// asks for a number, and goes on looking.
		flag.Set("rapid.checks", "300")
		flag.Set("rapid.seed", "7")
	}
	flag.Set("rapid.nofailfile", "true")
	os.Exit(m.Run())
}

// draw makes random things of small sets, so that they meet.
type draw struct{ *rapid.T }

func (d draw) n(low, high int) int { return rapid.IntRange(low, high).Draw(d.T, "n") }
func (d draw) chance(of int) bool  { return d.n(1, of) == 1 }

func pick[E any](d draw, from ...E) E { return from[d.n(0, len(from)-1)] }

var (
	labelKeys   = []string{"app", "tier"}
	labelValues = []string{"a", "b", "c"}
	// Edges of every range that policies name, and their neighbours.
	portNumbers = []int32{1, 79, 80, 81, 443, 8080, 65535}
	portNames   = []string{"http", "dns", "metrics"}
	cidrs       = []string{"10.0.0.0/8", "10.0.1.0/24", "10.0.1.0/30", "10.0.2.1/32", "0.0.0.0/0", "192.0.2.0/24", "10.9.0.1/32", "::/0", "fd00:1::/64", "fd00:2::1/128"}
)

func (d draw) labels() map[string]string {
	out := map[string]string{}
	for _, k := range labelKeys {
		if d.chance(2) {
			out[k] = pick(d, labelValues...)
		}
	}
	return out
}

func (d draw) selector() metav1.LabelSelector {
	var s metav1.LabelSelector
	keys := append([]string{"kubernetes.io/metadata.name"}, labelKeys...)
	values := append([]string{"n0", "n1"}, labelValues...)
	if d.chance(3) {
		s.MatchLabels = map[string]string{pick(d, labelKeys...): pick(d, labelValues...)}
	}
	for range d.n(0, 2) {
		e := metav1.LabelSelectorRequirement{Key: pick(d, keys...)}
		e.Operator = pick(d, metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist)
		if e.Operator == metav1.LabelSelectorOpIn || e.Operator == metav1.LabelSelectorOpNotIn {
			e.Values = []string{pick(d, values...)}
			if d.chance(2) {
				e.Values = append(e.Values, pick(d, values...))
			}
		}
		s.MatchExpressions = append(s.MatchExpressions, e)
	}
	return s
}

func (d draw) selectorOr() *metav1.LabelSelector {
	s := d.selector()
	return &s
}

// cluster makes pods of a few kinds in a few namespaces, some with two addresses, some
// in a node's network, and hosts outside.
func (d draw) cluster() *facts.Cluster {
	c := &facts.Cluster{Namespaces: map[string]map[string]string{}, Nodes: map[string]facts.Node{}}
	for i := range d.n(0, 2) {
		c.Nodes[fmt.Sprintf("node-%d", i)] = facts.Node{Labels: d.labels(), IPs: []string{fmt.Sprintf("10.9.0.%d", i+1)}}
	}
	namespaces := d.n(1, 3)
	for n := range namespaces {
		c.Namespaces[fmt.Sprintf("n%d", n)] = d.labels()
		for i := range d.n(1, 4) {
			p := &facts.Pod{Namespace: fmt.Sprintf("n%d", n), Name: fmt.Sprintf("p%d", i), Labels: d.labels(), IP: fmt.Sprintf("10.0.%d.%d", n, i+1)}
			for j := range d.n(0, 2) {
				p.Ports = append(p.Ports, facts.Port{Name: portNames[j], Protocol: pick(d, "TCP", "UDP", "SCTP"), Port: uint16(pick(d, portNumbers...))})
			}
			if d.chance(8) && len(c.Nodes) > 0 {
				p.HostNetwork, p.IP = true, "10.9.0.1"
			}
			c.Pods = append(c.Pods, p)
		}
	}
	for i, address := range []string{"192.0.2.7", "10.0.1.200", "203.0.113.1", "10.9.0.2", "fd00:1::99"} {
		c.Pods = append(c.Pods, &facts.Pod{Name: fmt.Sprintf("host-%d", i), IP: address, External: true})
	}
	return c
}

func (d draw) networkPolicy(i, namespaces int) networkingv1.NetworkPolicy {
	p := networkingv1.NetworkPolicy{TypeMeta: metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"}}
	p.Name, p.Namespace = fmt.Sprintf("np-%d", i), fmt.Sprintf("n%d", d.n(0, namespaces-1))
	if d.chance(2) {
		p.Spec.PodSelector = d.selector()
	}
	p.Spec.PolicyTypes = pick(d, nil, []networkingv1.PolicyType{"Ingress"}, []networkingv1.PolicyType{"Egress"}, []networkingv1.PolicyType{"Ingress", "Egress"})
	for range d.n(0, 2) {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: d.networkPeers(), Ports: d.networkPorts()})
	}
	for range d.n(0, 2) {
		p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: d.networkPeers(), Ports: d.networkPorts()})
	}
	return p
}

func (d draw) networkPeers() []networkingv1.NetworkPolicyPeer {
	var out []networkingv1.NetworkPolicyPeer
	for range d.n(0, 2) {
		var p networkingv1.NetworkPolicyPeer
		switch d.n(0, 3) {
		case 0:
			p.PodSelector = d.selectorOr()
		case 1:
			p.NamespaceSelector = d.selectorOr()
		case 2:
			p.PodSelector, p.NamespaceSelector = d.selectorOr(), d.selectorOr()
		case 3:
			block := netip.MustParsePrefix(pick(d, cidrs...))
			p.IPBlock = &networkingv1.IPBlock{CIDR: block.String()}
			for _, c := range cidrs {
				if e := netip.MustParsePrefix(c); block.Contains(e.Addr()) && e.Bits() > block.Bits() && d.chance(4) {
					p.IPBlock.Except = append(p.IPBlock.Except, c)
				}
			}
		}
		out = append(out, p)
	}
	return out
}

func (d draw) networkPorts() []networkingv1.NetworkPolicyPort {
	var out []networkingv1.NetworkPolicyPort
	for range d.n(0, 2) {
		var p networkingv1.NetworkPolicyPort
		if d.chance(2) {
			protocol := pick(d, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP)
			p.Protocol = &protocol
		}
		switch d.n(0, 3) {
		case 0:
			port := intstr.FromString(pick(d, portNames...))
			p.Port = &port
		case 1:
			low, high := pick(d, portNumbers...), pick(d, portNumbers...)
			port, end := intstr.FromInt32(min(low, high)), max(low, high)
			p.Port, p.EndPort = &port, &end
		case 2:
			port := intstr.FromInt32(pick(d, portNumbers...))
			p.Port = &port
		}
		out = append(out, p)
	}
	return out
}

func (d draw) clusterPolicy(i int) v1alpha2.ClusterNetworkPolicy {
	p := v1alpha2.ClusterNetworkPolicy{TypeMeta: metav1.TypeMeta{APIVersion: "policy.networking.k8s.io/v1alpha2", Kind: "ClusterNetworkPolicy"}}
	p.Name = fmt.Sprintf("cnp-%d", i)
	p.Spec.Tier = pick(d, v1alpha2.AdminTier, v1alpha2.BaselineTier)
	p.Spec.Priority = int32(i*7%5*10 + i) // no two alike, and not in the order of names
	if d.chance(2) {
		p.Spec.Subject.Namespaces = d.selectorOr()
	} else {
		p.Spec.Subject.Pods = &v1alpha2.NamespacedPod{NamespaceSelector: d.selector(), PodSelector: d.selector()}
	}
	action := func() v1alpha2.ClusterNetworkPolicyRuleAction {
		return pick(d, v1alpha2.ClusterNetworkPolicyRuleActionAccept, v1alpha2.ClusterNetworkPolicyRuleActionDeny, v1alpha2.ClusterNetworkPolicyRuleActionPass)
	}
	for range d.n(0, 3) {
		r := v1alpha2.ClusterNetworkPolicyIngressRule{Action: action(), Protocols: d.protocols()}
		for range d.n(1, 2) {
			e := d.clusterPeer(false, r.Action)
			r.From = append(r.From, v1alpha2.ClusterNetworkPolicyIngressPeer{Namespaces: e.Namespaces, Pods: e.Pods})
		}
		p.Spec.Ingress = append(p.Spec.Ingress, r)
	}
	for range d.n(0, 3) {
		r := v1alpha2.ClusterNetworkPolicyEgressRule{Action: action(), Protocols: d.protocols()}
		for range d.n(1, 2) {
			r.To = append(r.To, d.clusterPeer(true, r.Action))
		}
		p.Spec.Egress = append(p.Spec.Egress, r)
	}
	return p
}

func (d draw) clusterPeer(egress bool, action v1alpha2.ClusterNetworkPolicyRuleAction) (p v1alpha2.ClusterNetworkPolicyEgressPeer) {
	kinds := 1
	if egress {
		kinds = 3
	}
	if d.chance(20) {
		if action == v1alpha2.ClusterNetworkPolicyRuleActionAccept && egress && d.chance(2) {
			p.DomainNames = []v1alpha2.DomainName{"example.com"}
		}
		return p // or a kind of a later version
	}
	switch d.n(0, kinds) {
	case 0:
		p.Namespaces = d.selectorOr()
	case 1:
		p.Pods = &v1alpha2.NamespacedPod{NamespaceSelector: d.selector(), PodSelector: d.selector()}
	case 2:
		p.Nodes = d.selectorOr()
	case 3:
		for range d.n(1, 2) {
			if c := v1alpha2.CIDR(pick(d, cidrs...)); !slices.Contains(p.Networks, c) {
				p.Networks = append(p.Networks, c)
			}
		}
	}
	return p
}

func (d draw) protocols() []v1alpha2.ClusterNetworkPolicyProtocol {
	var out []v1alpha2.ClusterNetworkPolicyProtocol
	for range d.n(0, 2) {
		var p v1alpha2.ClusterNetworkPolicyProtocol
		var port *v1alpha2.Port
		switch low, high := pick(d, portNumbers...), pick(d, portNumbers...); d.n(0, 2) {
		case 0:
			port = &v1alpha2.Port{Number: low}
		case 1:
			if low != high {
				port = &v1alpha2.Port{Range: &v1alpha2.PortRange{Start: min(low, high), End: max(low, high)}}
			}
		}
		switch d.n(0, 3) {
		case 0:
			p.TCP = &v1alpha2.ClusterNetworkPolicyProtocolTCP{DestinationPort: port}
		case 1:
			p.UDP = &v1alpha2.ClusterNetworkPolicyProtocolUDP{DestinationPort: port}
		case 2:
			p.SCTP = &v1alpha2.ClusterNetworkPolicyProtocolSCTP{DestinationPort: port}
		case 3:
			p.DestinationNamedPort = pick(d, portNames...)
		}
		out = append(out, p)
	}
	return out
}

// TestRandom imports random objects for random clusters, and asks about every pair of
// ends: the policy must say what the API says.
func TestRandom(t *testing.T) {
	cells := 0
	rapid.Check(t, func(rt *rapid.T) {
		d := draw{rt}
		cluster := d.cluster()
		w := &world{namespaces: cluster.Namespaces, nodes: cluster.Nodes}
		for i := range d.n(0, 4) {
			w.network = append(w.network, d.networkPolicy(i, len(cluster.Namespaces)))
		}
		for i := range d.n(0, 4) {
			w.cluster = append(w.cluster, d.clusterPolicy(i))
		}
		second := map[string]string{} // addresses of the other family
		dual := d.chance(2)
		for i, p := range cluster.Pods {
			if dual && !p.External && !p.HostNetwork && d.n(1, 3) > 1 {
				second[p.Key()] = fmt.Sprintf("fd00:%d::%x", i%3, i+1)
			}
		}
		group := pick(d, kubernetes.ByPod, kubernetes.ByPod, kubernetes.ByReplica)
		cells += checkWorld(rt, w, cluster, second, group, d.chance(10))
	})
	t.Logf("%d cells", cells)
}

func checkWorld(t *rapid.T, w *world, cluster *facts.Cluster, second map[string]string, group kubernetes.Grouping, build bool) int {
	text, err := cluster.Inventory(func(p *facts.Pod) string { return "/pods/" + p.Key() })
	if err != nil {
		t.Fatal(err)
	}
	inv, err := identity.ParseInventory("inventory.yaml", text)
	if err != nil {
		t.Fatal(err)
	}
	subjects := 0
	for i := range inv.Workloads {
		if a := second[inv.Workloads[i].Key()]; a != "" {
			inv.Workloads[i].IPs = append(inv.Workloads[i].IPs, netip.MustParseAddr(a))
		}
		if !inv.Workloads[i].HostNetwork {
			subjects++
		}
	}
	if subjects == 0 {
		return 0
	}
	source := w.objects(t)
	objects := &kubernetes.Objects{}
	if err := objects.Read("objects.yaml", source); err != nil {
		t.Fatalf("%v\n%s", err, source)
	}
	got, err := kubernetes.Import(inv, objects, kubernetes.Options{Name: "random", Version: 1, TrustDomain: "random.example", NAT: "none", Group: group})
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, source, text)
	}
	if build {
		if _, err := policy.Build(got.Policy); err != nil {
			t.Fatal(err)
		}
	}

	// Each end once for each of its addresses.
	type end struct {
		peer
		name string // for a probe
		id   image.ID
	}
	var ends []end
	owners := owners(got.Policy)
	for _, p := range cluster.Pods {
		e := end{peer: peer{pod: p, address: netip.MustParseAddr(p.IP)}, name: "pod/" + p.Key(), id: owners["/pods/"+p.Key()]}
		if p.External || p.HostNetwork {
			e.pod = nil
		}
		if p.External {
			e.name = p.IP
		}
		ends = append(ends, e)
		if a := second[p.Key()]; a != "" {
			e.address = netip.MustParseAddr(a)
			ends = append(ends, e)
		}
	}
	var in strings.Builder
	var asked []connection
	var want []byte
	wire := newWire(got.Policy)
	for _, from := range ends {
		for _, to := range ends {
			if from.name == to.name || from.address.BitLen() != to.address.BitLen() || from.address == to.address ||
				from.pod == nil && to.pod == nil {
				continue
			}
			for _, protocol := range []string{"TCP", "UDP", "SCTP"} {
				for _, port := range portNumbers {
					c := connection{from.peer, to.peer, protocol, port}
					letter := w.letter(c)
					span := image.Port{Proto: map[string]image.Proto{"TCP": image.TCP, "UDP": image.UDP, "SCTP": image.SCTP}[protocol], Number: uint16(port)}
					if live := wire.passes(from.id, to.id, from.address, to.address, span); live != (letter == '.') {
						t.Fatalf("%s (%s) to %s (%s), %s/%d: with the proofs that travel %v, the API says %c\n%s\n%s\n%s",
							from.name, from.address, to.name, to.address, protocol, port, live, letter, source, text, got.Source)
					}
					// A probe meets under the first common family.
					if from.address.Is6() && second[strings.TrimPrefix(from.name, "pod/")] != "" && second[strings.TrimPrefix(to.name, "pod/")] != "" {
						continue
					}
					asked, want = append(asked, c), append(want, letter)
					fmt.Fprintf(&in, "{\"from\":%q,\"to\":%q,\"port\":\"%s/%d\"}\n", from.name, to.name, strings.ToLower(protocol), port)
				}
			}
		}
	}
	var out strings.Builder
	if err := policy.ExplainBatch(got.Policy, inv, strings.NewReader(in.String()), &out); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	for i, c := range asked {
		var a struct {
			Allowed bool
			Refuses string
		}
		if err := json.Unmarshal([]byte(lines[i]), &a); err != nil {
			t.Fatal(err)
		}
		if letter := map[string]byte{"": '.', "egress": 'E', "ingress": 'I', "both": 'B'}[a.Refuses]; letter != want[i] {
			t.Fatalf("%v to %v, %s/%d: %c, the API says %c\n%s\n%s\n%s\n%s", c.from.address, c.to.address, c.protocol, c.port, letter, want[i], lines[i], source, text, got.Source)
		}
	}
	return len(asked)
}

func (w *world) objects(t *rapid.T) []byte {
	var out []byte
	add := func(v any) {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		out = append(append(append(out, "---\n"...), b...), '\n')
	}
	for _, p := range w.network {
		add(p)
	}
	for _, p := range w.cluster {
		add(p)
	}
	return out
}

// owners are the identities by the cgroups that find them.
func owners(p *policy.Policy) map[string]image.ID {
	out := map[string]image.ID{}
	ids := p.IDs()
	for i := range p.Workloads {
		for _, s := range p.Workloads[i].Match {
			out[s.Path] = ids[p.Workloads[i].Name]
		}
	}
	return out
}

// wire judges as two hosts do, each of which knows of the other only what travels.
type wire struct {
	evaluator *policy.Evaluator
	proves    map[image.ID][]image.Span // ports on which a caller proves itself
}

func newWire(p *policy.Policy) *wire {
	w := &wire{p.Evaluator(), map[image.ID][]image.Span{}}
	ids := p.IDs()
	for _, c := range p.Crossings {
		if !c.Side.HoldsAt(image.Egress) || !slices.ContainsFunc(c.To, func(t policy.Term) bool { return t.Kind == image.TermWorkload || t.Kind == image.TermZone }) {
			continue
		}
		for _, t := range c.From {
			for _, x := range p.Workloads {
				if t.Kind == image.TermWorkload && t.Name == x.Name || t.Kind == image.TermZone && t.Name == x.Zone {
					w.proves[ids[x.Name]] = append(w.proves[ids[x.Name]], c.Ports...)
				}
			}
		}
	}
	return w
}

// passes says whether a connection is made. A caller proves itself on ports where some
// crossing asks it to, and is answered with a proof only then.
func (w *wire) passes(from, to image.ID, source, target netip.Addr, port image.Port) bool {
	proves := from != image.None && to != image.None && slices.ContainsFunc(w.proves[from], func(s image.Span) bool {
		return s.Proto == port.Proto && s.Low <= port.Number && port.Number <= s.High
	})
	ask := func(subject, other image.ID, address netip.Addr, d abi.Direction) bool {
		if subject == image.None {
			return true
		}
		q := policy.Query{Subject: subject, Direction: d, Port: port, Address: address, Proof: abi.ProofNone}
		if proves {
			q.Proof, q.Peer = abi.ProofIdentity, other
		}
		return w.evaluator.Evaluate(q).Verdict == abi.Allow
	}
	return ask(from, to, target, abi.Egress) && ask(to, from, source, abi.Ingress)
}
