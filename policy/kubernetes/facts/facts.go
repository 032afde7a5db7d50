// Package facts holds clusters, policy objects and who may then connect to whom: what
// the conformance tests and the unit tests of public implementations assert.
//
// A case has steps. Each changes objects, labels or pods, and tells for every pair of
// ends whether a connection passes, and else which end refuses it.
package facts

import (
	"bytes"
	"embed"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

//go:embed *.json
var files embed.FS

// Case is one cluster and what becomes of it.
type Case struct {
	ID         string                       `json:"id"`
	Title      string                       `json:"title"`
	Source     json.RawMessage              `json:"source"` // the public repository and file that assert it
	Features   []string                     `json:"features"`
	Note       string                       `json:"note"`
	Namespaces map[string]map[string]string `json:"namespaces"`
	Pods       []*Pod                       `json:"pods"`
	Nodes      map[string]Node              `json:"nodes"`
	Steps      []Step                       `json:"steps"`
}

// Pod is a pod, or a host outside of the cluster.
type Pod struct {
	Namespace   string            `json:"ns"`
	Name        string            `json:"name"`
	Labels      map[string]string `json:"labels"`
	IP          string            `json:"ip"`
	Ports       []Port            `json:"ports"`
	HostNetwork bool              `json:"hostNetwork"`
	External    bool              `json:"external"`
}

// Key is what tables call the pod.
func (p *Pod) Key() string {
	if p.Namespace == "" {
		return p.Name
	}
	return p.Namespace + "/" + p.Name
}

// Port is a port that a pod serves.
type Port struct {
	Name     string `json:"name,omitempty"`
	Protocol string `json:"protocol"`
	Port     uint16 `json:"port"`
}

// Node is a host of the cluster.
type Node struct {
	Labels map[string]string `json:"labels"`
	IPs    []string          `json:"ips"`
}

// Step is some changes, and what must hold after them.
type Step struct {
	Changes []Change `json:"changes"`
	Order   []string `json:"order"` // columns of the tables
	Expect  []struct {
		Probes []string          `json:"probes"` // "TCP/80"
		Table  map[string]string `json:"table"`  // by client; a letter for each server
	} `json:"expect"`
	Asserted []Asserted `json:"asserted"`
}

// Asserted is what the source itself asserts; the tables hold the same.
type Asserted struct {
	From, To, Protocol string
	Port               uint16
	Allow              bool
}

// Change is one change of a cluster.
type Change struct {
	Op        string            `json:"op"`
	Object    json.RawMessage   `json:"object"`
	Kind      string            `json:"kind"`
	Namespace string            `json:"namespace"`
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels"`
	PodObject json.RawMessage   `json:"pod"` // a pod, or the name of one
}

// Probe is one cell of a table.
type Probe struct {
	From, To *Pod
	Protocol string // TCP, UDP, SCTP
	Port     uint16
	Want     byte // '.' passes, 'E' the client's end refuses, 'I' the server's, 'B' both
}

func (p Probe) String() string {
	return fmt.Sprintf("%s to %s %s/%d", p.From.Key(), p.To.Key(), p.Protocol, p.Port)
}

// Load reads the cases of this package, or all of a directory.
func Load(dir string) ([]Case, error) {
	var out []Case
	read := func(name string, src []byte) error {
		var file struct {
			Meta  json.RawMessage
			Cases []Case
		}
		d := json.NewDecoder(bytes.NewReader(src))
		d.DisallowUnknownFields()
		if err := d.Decode(&file); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		out = append(out, file.Cases...)
		return nil
	}
	if dir == "" {
		entries, err := files.ReadDir(".")
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			src, err := files.ReadFile(e.Name())
			if err == nil {
				err = read(e.Name(), src)
			}
			if err != nil {
				return nil, err
			}
		}
		return out, nil
	}
	names, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil || len(names) == 0 {
		return nil, fmt.Errorf("%s: no facts there", dir)
	}
	for _, name := range names {
		src, err := os.ReadFile(name)
		if err == nil {
			err = read(name, src)
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// Cluster is a case as it is after some of its steps.
type Cluster struct {
	Namespaces map[string]map[string]string
	Pods       []*Pod
	Nodes      map[string]Node
	objects    map[string]json.RawMessage // by kind, namespace and name
}

// Start is the cluster before the first step.
func (c *Case) Start() *Cluster {
	return &Cluster{
		Namespaces: maps.Clone(c.Namespaces), Pods: slices.Clone(c.Pods), Nodes: c.Nodes, objects: map[string]json.RawMessage{},
	}
}

func objectKey(kind, namespace, name string) string { return kind + " " + namespace + "/" + name }

// Apply makes the changes of a step.
func (c *Cluster) Apply(s *Step) error {
	for _, change := range s.Changes {
		if err := c.change(&change); err != nil {
			return fmt.Errorf("%s: %w", change.Op, err)
		}
	}
	return nil
}

func (c *Cluster) change(x *Change) error {
	pod := func() (*Pod, error) {
		var key string
		if err := json.Unmarshal(x.PodObject, &key); err != nil {
			key = objectKey("", x.Namespace, x.Name)[1:]
		}
		i := slices.IndexFunc(c.Pods, func(p *Pod) bool { return p.Key() == key })
		if i < 0 {
			return nil, fmt.Errorf("no pod %s", key)
		}
		return c.Pods[i], nil
	}
	switch x.Op {
	case "create", "update":
		var o struct {
			Kind     string
			Metadata struct{ Namespace, Name string }
		}
		if err := json.Unmarshal(x.Object, &o); err != nil {
			return err
		}
		c.objects[objectKey(o.Kind, o.Metadata.Namespace, o.Metadata.Name)] = x.Object
	case "delete":
		key := objectKey(x.Kind, x.Namespace, x.Name)
		if c.objects[key] == nil {
			return fmt.Errorf("no %s", key)
		}
		delete(c.objects, key)
	case "create-namespace", "set-namespace-labels":
		name := x.Namespace
		if name == "" {
			name = x.Name
		}
		c.Namespaces[name] = x.Labels
	case "delete-namespace":
		name := x.Namespace
		if name == "" {
			name = x.Name
		}
		delete(c.Namespaces, name)
		c.Pods = slices.DeleteFunc(c.Pods, func(p *Pod) bool { return p.Namespace == name })
		maps.DeleteFunc(c.objects, func(key string, _ json.RawMessage) bool { return strings.Contains(key, " "+name+"/") })
	case "create-pod":
		p := &Pod{}
		if err := json.Unmarshal(x.PodObject, p); err != nil {
			return err
		}
		c.Pods = append(c.Pods, p)
	case "set-pod-labels":
		p, err := pod()
		if err != nil {
			return err
		}
		changed := *p
		changed.Labels = x.Labels
		c.Pods[slices.Index(c.Pods, p)] = &changed
	case "delete-pod":
		p, err := pod()
		if err != nil {
			return err
		}
		c.Pods = slices.DeleteFunc(c.Pods, func(o *Pod) bool { return o == p })
	default:
		return fmt.Errorf("unknown operation")
	}
	return nil
}

// Objects are all objects, one JSON document after the other.
func (c *Cluster) Objects() []byte {
	var out bytes.Buffer
	for _, key := range slices.Sorted(maps.Keys(c.objects)) {
		out.WriteString("---\n")
		out.Write(c.objects[key])
		out.WriteString("\n")
	}
	return out.Bytes()
}

// Inventory is the cluster as an inventory. cgroup says where a pod runs.
func (c *Cluster) Inventory(cgroup func(*Pod) string) ([]byte, error) {
	type labeled struct {
		Labels map[string]string `json:"labels"`
	}
	type workload struct {
		Namespace   string            `json:"namespace"`
		Name        string            `json:"name"`
		Labels      map[string]string `json:"labels"`
		Cgroup      string            `json:"cgroup,omitempty"`
		IPs         []string          `json:"ips"`
		Ports       []Port            `json:"ports"`
		HostNetwork bool              `json:"hostNetwork"`
	}
	inv := struct {
		Namespaces map[string]labeled `json:"namespaces"`
		Nodes      map[string]Node    `json:"nodes"`
		Workloads  []workload         `json:"workloads"`
	}{map[string]labeled{}, map[string]Node{}, []workload{}}
	maps.Copy(inv.Nodes, c.Nodes)
	for name, l := range c.Namespaces {
		inv.Namespaces[name] = labeled{l}
	}
	for _, p := range c.Pods {
		if p.External {
			continue
		}
		w := workload{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels, IPs: []string{p.IP}, Ports: p.Ports, HostNetwork: p.HostNetwork}
		if !p.HostNetwork {
			w.Cgroup = cgroup(p)
		}
		inv.Workloads = append(inv.Workloads, w)
	}
	return json.MarshalIndent(inv, "", " ")
}

// Probes are the cells of a step's tables.
func (c *Cluster) Probes(s *Step) ([]Probe, error) {
	byKey := map[string]*Pod{}
	for _, p := range c.Pods {
		byKey[p.Key()] = p
	}
	var out []Probe
	for _, e := range s.Expect {
		for _, port := range e.Probes {
			protocol, number, _ := strings.Cut(port, "/")
			var n uint16
			if _, err := fmt.Sscanf(number, "%d", &n); err != nil {
				return nil, fmt.Errorf("probe %q: %w", port, err)
			}
			for _, from := range slices.Sorted(maps.Keys(e.Table)) {
				for i, to := range s.Order {
					want := e.Table[from][i]
					if want == '-' {
						continue
					}
					p := Probe{From: byKey[from], To: byKey[to], Protocol: protocol, Port: n, Want: want}
					if p.From == nil || p.To == nil {
						return nil, fmt.Errorf("table: no pod %s or %s", from, to)
					}
					out = append(out, p)
				}
			}
		}
	}
	return out, nil
}
