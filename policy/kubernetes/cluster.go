package kubernetes

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/demarc/demarc/identity"
	"github.com/demarc/demarc/policy/image"
)

// cluster is an inventory as the API sees it.
type cluster struct {
	namespaces map[string]labels.Set
	nodes      map[string]identity.Node
	pods       []pod // that have a network of their own, by namespace and name
	kinds      []kind
}

// pod is a pod that policies can select. Pods in their node's network never are:
// the API knows them only by the node's addresses.
type pod struct {
	namespace, name string
	cgroup          string // "" = not on a host of this inventory
	addresses       []netip.Addr
	kind            int
}

func (p *pod) key() string { return p.namespace + "/" + p.name }

// kind is all that selectors, named ports and the node tell about a pod. Pods of one
// kind differ only by their addresses.
type kind struct {
	namespace string
	labels    labels.Set
	ports     []named
	node      string
}

// named is a port of a pod that policies can name.
type named struct {
	name  string
	proto image.Proto
	port  uint16
}

// nameLabel is on every namespace: the API server sets it and nobody can take it away.
const nameLabel = "kubernetes.io/metadata.name"

func newCluster(inv *identity.Inventory) *cluster {
	c := &cluster{namespaces: map[string]labels.Set{}, nodes: inv.Nodes}
	for name, n := range inv.Namespaces {
		c.namespace(name, n.Labels)
	}
	index := map[string]int{}
	for _, w := range inv.Workloads {
		if w.Namespace == "" || w.HostNetwork {
			continue
		}
		if c.namespaces[w.Namespace] == nil {
			c.namespace(w.Namespace, nil)
		}
		k := kind{namespace: w.Namespace, labels: w.Labels, node: w.Node}
		for _, p := range w.Ports {
			if p.Name != "" {
				k.ports = append(k.ports, named{p.Name, protocols[orTCP(p.Protocol)], p.Port})
			}
		}
		slices.SortFunc(k.ports, func(a, b named) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
		key := k.key()
		if _, seen := index[key]; !seen {
			index[key] = len(c.kinds)
			c.kinds = append(c.kinds, k)
		}
		p := pod{namespace: w.Namespace, name: w.Name, cgroup: w.Cgroup, kind: index[key]}
		for _, a := range w.IPs {
			p.addresses = append(p.addresses, a.Unmap())
		}
		c.pods = append(c.pods, p)
	}
	slices.SortFunc(c.pods, func(a, b pod) int {
		if a.namespace != b.namespace {
			return strings.Compare(a.namespace, b.namespace)
		}
		return strings.Compare(a.name, b.name)
	})
	return c
}

func (c *cluster) namespace(name string, has map[string]string) {
	all := labels.Set{nameLabel: name}
	maps.Copy(all, has)
	c.namespaces[name] = all
}

func (k *kind) key() string {
	return fmt.Sprintf("%q %q %v %q", k.namespace, labels.FormatLabels(k.labels), k.ports, k.node)
}

// named are the ports of the kind with a name; proto 0 asks for any protocol.
func (k *kind) named(name string, proto image.Proto) ports {
	var out []image.Span
	for _, p := range k.ports {
		if p.name == name && (proto == 0 || p.proto == proto) {
			out = append(out, image.Span{Proto: p.proto, Low: p.port, High: p.port})
		}
	}
	return normal(out)
}

var protocols = map[string]image.Proto{"TCP": image.TCP, "UDP": image.UDP, "SCTP": image.SCTP}

func orTCP(protocol string) string {
	if protocol == "" {
		return "TCP"
	}
	return protocol
}

// addressBlocks are the addresses of a node as blocks.
func addressBlocks(all []netip.Addr) []netip.Prefix {
	var out []netip.Prefix
	for _, a := range all {
		a = a.Unmap()
		out = append(out, netip.PrefixFrom(a, a.BitLen()))
	}
	return out
}
