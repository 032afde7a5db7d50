// Package identity finds out which workload a group of processes belongs to, where
// its cgroup path alone does not tell.
package identity

import (
	"fmt"
	"path"
	"regexp"
	"strings"

	"github.com/demarc/demarc/internal/yamlfile"
	"github.com/demarc/demarc/policy/image"
)

// Inventory names the pods and containers of a node, for the file provider and for
// questions about addresses.
type Inventory struct {
	Namespaces map[string]Namespace `yaml:"namespaces"`
	Nodes      map[string]Node      `yaml:"nodes"`
	Workloads  []Workload           `yaml:"workloads"`
	// Partial says that others may run whom it does not name yet: nobody loses a name
	// for not being in it.
	Partial bool `yaml:"-"`
}

// Node is a Kubernetes node: a host with addresses of its own.
type Node struct {
	Labels map[string]string `yaml:"labels"`
	IPs    Addresses         `yaml:"ips"`
}

// Namespace is a Kubernetes namespace.
type Namespace struct {
	Labels map[string]string `yaml:"labels"`
}

// Workload is one pod (it has a namespace) or one container (it has none).
type Workload struct {
	Namespace      string            `yaml:"namespace"`
	Name           string            `yaml:"name"`
	Labels         map[string]string `yaml:"labels"`
	ServiceAccount string            `yaml:"serviceAccount"` // of a pod
	Image          string            `yaml:"image"`          // of a container
	Cgroup         string            `yaml:"cgroup"`         // below the managed root, "/lab/api-1"; "" = runs elsewhere
	IPs            Addresses         `yaml:"ips"`
	Ports          []Port            `yaml:"ports"`
	Node           string            `yaml:"node"`        // that a pod runs on; "" = not told
	HostNetwork    bool              `yaml:"hostNetwork"` // a pod in its node's network namespace
}

// Port is a declared port of a pod.
type Port struct {
	Name     string `yaml:"name"`
	Protocol string `yaml:"protocol"` // TCP (when empty), UDP or SCTP
	Port     uint16 `yaml:"port"`
}

// Key is what messages call a workload: "shop/api-1" or "api-1".
func (w Workload) Key() string { return path.Join(w.Namespace, w.Name) }

// name is a DNS-1123 subdomain, as Kubernetes has for pods and namespaces; container
// engines also allow upper case and underscores.
var name = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$`)

// ParseInventory reads an inventory strictly. The file's name is for messages; every
// error says where in the file it is. An empty document is refused, since a file
// that is just being written looks like one: say "workloads: []" instead.
func ParseInventory(file string, src []byte) (*Inventory, error) {
	inv := &Inventory{}
	if len(strings.TrimSpace(string(src))) == 0 {
		return nil, &yamlfile.Error{File: file, Msg: "the inventory is empty", Hint: "write `workloads: []` if no workload is meant"}
	}
	f, err := yamlfile.Decode(file, src, inv)
	if err != nil {
		return nil, err
	}
	for namespace := range inv.Namespaces {
		if !validName(namespace) {
			return nil, f.Errorf("$.namespaces", "use letters, digits, '-', '_' and '.'", "namespace %q is no name", namespace)
		}
	}
	for node := range inv.Nodes {
		if !validName(node) {
			return nil, f.Errorf("$.nodes", "use letters, digits, '-', '_' and '.'", "node %q is no name", node)
		}
	}
	c := checker{file: f, nodes: inv.Nodes, seen: map[string]int{}, cgroups: map[string]string{}}
	for i, w := range inv.Workloads {
		if err := c.workload(fmt.Sprintf("$.workloads[%d]", i), i, w); err != nil {
			return nil, err
		}
	}
	if err := c.nesting(inv.Workloads); err != nil {
		return nil, err
	}
	return inv, nil
}

func validName(s string) bool { return len(s) <= 253 && name.MatchString(s) }

type checker struct {
	file    *yamlfile.File
	nodes   map[string]Node
	seen    map[string]int    // key -> index
	cgroups map[string]string // path -> key
}

func (c *checker) workload(at string, i int, w Workload) error {
	key := w.Key()
	if !validName(w.Name) {
		return c.file.Errorf(at+".name", "give every workload a name of letters, digits, '-', '_' and '.'", "workload name %q is no name", w.Name)
	}
	if w.Namespace != "" && !validName(w.Namespace) {
		return c.file.Errorf(at+".namespace", "use letters, digits, '-', '_' and '.'", "namespace %q is no name", w.Namespace)
	}
	if first, ok := c.seen[key]; ok {
		return c.file.Errorf(at, "remove one of them", "workload %s is already number %d of this list", key, first+1)
	}
	c.seen[key] = i
	if w.Cgroup != "" {
		if hint := cgroupProblem(w.Cgroup); hint != "" {
			return c.file.Errorf(at+".cgroup", hint, "cgroup %q is no path below the managed root", w.Cgroup)
		}
		if owner, ok := c.cgroups[w.Cgroup]; ok {
			return c.file.Errorf(at+".cgroup", "give each workload a cgroup of its own", "cgroup %s already belongs to %s", w.Cgroup, owner)
		}
		c.cgroups[w.Cgroup] = key
	}
	if _, known := c.nodes[w.Node]; w.Node != "" && !known {
		return c.file.Errorf(at+".node", "list it under nodes, with its addresses", "%s runs on node %q, which the inventory does not know", key, w.Node)
	}
	if w.HostNetwork && w.Namespace == "" {
		return c.file.Errorf(at, "give the pod its namespace", "%s has hostNetwork, and only pods have that", key)
	}
	for j, p := range w.Ports {
		switch p.Protocol {
		case "", "TCP", "UDP", "SCTP":
		default:
			return c.file.Errorf(fmt.Sprintf("%s.ports[%d].protocol", at, j), "use TCP, UDP or SCTP", "unknown protocol %q", p.Protocol)
		}
		if p.Port == 0 {
			return c.file.Errorf(fmt.Sprintf("%s.ports[%d]", at, j), "", "port of %s is missing or 0", key)
		}
	}
	return nil
}

// nesting refuses cgroups inside one another: processes there would belong to two
// workloads.
func (c *checker) nesting(workloads []Workload) error {
	for i, w := range workloads {
		for dir := path.Dir(w.Cgroup); w.Cgroup != "" && dir != "/"; dir = path.Dir(dir) {
			if owner, ok := c.cgroups[dir]; ok {
				return c.file.Errorf(fmt.Sprintf("$.workloads[%d].cgroup", i), "give each workload a cgroup of its own, beside the others",
					"cgroup %s lies inside %s of %s", w.Cgroup, dir, owner)
			}
		}
	}
	return nil
}

// cgroupProblem says what is wrong with a cgroup path, or "".
func cgroupProblem(p string) string {
	switch {
	case !strings.HasPrefix(p, "/") || p == "/":
		return "start with '/' and name a group below the root, like /lab/api-1"
	case path.Clean(p) != p:
		return "write it as " + path.Clean(p)
	case len(p) > image.MaxPath:
		return fmt.Sprintf("it has %d bytes, at most %d are possible", len(p), image.MaxPath)
	}
	for _, b := range []byte(p) {
		if b < 0x20 || b > 0x7e {
			return "use printable ASCII"
		}
	}
	return ""
}

// Matches reports whether a selector of an image finds a workload. Kubernetes
// selectors find pods, container selectors find containers, and a selector that
// asks for nothing finds nothing.
func (w Workload) Matches(s image.Selector) bool {
	switch s.Kind {
	case image.SelectKubernetes:
		if w.Namespace == "" || s.Namespace == "" && s.ServiceAccount == "" && len(s.Labels) == 0 {
			return false
		}
	case image.SelectContainer:
		if w.Namespace != "" || s.Name == "" && s.Image == "" && len(s.Labels) == 0 {
			return false
		}
	default:
		return false
	}
	asked := func(want, have string) bool { return want == "" || want == have }
	if !asked(s.Namespace, w.Namespace) || !asked(s.ServiceAccount, w.ServiceAccount) || !asked(s.Name, w.Name) || !asked(s.Image, w.Image) {
		return false
	}
	for _, l := range s.Labels {
		if have, ok := w.Labels[l.Key]; !ok || have != l.Value {
			return false
		}
	}
	return true
}
