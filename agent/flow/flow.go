package flow

import (
	"bytes"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/policy/image"
)

// Flow is one verdict on a conversation, in words. Strings that come from the
// kernel hold no control characters.
type Flow struct {
	Time        time.Time     `json:"time"`
	Node        string        `json:"node,omitempty"`
	Verdict     abi.Verdict   `json:"verdict"`
	Reason      abi.Reason    `json:"reason"`
	Direction   abi.Direction `json:"direction"` // the side that was judged: egress = Source
	Hook        record.Hook   `json:"hook"`
	Protocol    string        `json:"protocol,omitempty"` // "tcp", "udp", "icmp", ..., "proto-89"
	Source      Endpoint      `json:"source"`             // who opened the conversation
	Destination Endpoint      `json:"destination"`
	Crossing    string        `json:"crossing,omitempty"`
	Line        uint32        `json:"line,omitempty"` // of the crossing in the policy's source
	Proof       abi.Proof     `json:"proof"`          // what was known of the peer
	PID         uint32        `json:"pid,omitempty"`
	Comm        string        `json:"comm,omitempty"`
	CPU         uint32        `json:"cpu"`
	Seq         uint64        `json:"seq"` // of the event, for each CPU and ring
	Epoch       uint32        `json:"epoch"`
}

// Endpoint is one side of a flow.
type Endpoint struct {
	Address  netip.Addr `json:"address,omitzero"`
	Port     uint16     `json:"port,omitempty"` // ICMP echo: the identifier, at the source
	Identity uint32     `json:"identity,omitempty"`
	Workload string     `json:"workload,omitempty"`
	Zone     string     `json:"zone,omitempty"`
	Reserved string     `json:"reserved,omitempty"` // unmanaged, kernel, pending
	Claimed  bool       `json:"claimed,omitempty"`  // the identity was claimed with a bad proof: do not believe it
	Networks []string   `json:"networks,omitempty"` // that contain the address; only where nothing was proved; shared between flows
	Cgroup   string     `json:"cgroup,omitempty"`   // path below the managed root; only of the judged side

	// What the inventory calls the cgroup; of a pod's containers all of it may be known.
	// It names, and proves nothing.
	Pod       string            `json:"pod,omitempty"` // NAMESPACE/NAME
	Container string            `json:"container,omitempty"`
	Image     string            `json:"image,omitempty"`     // of the container
	PodLabels map[string]string `json:"podLabels,omitempty"` // those of StableLabels that the pod has; shared between flows
}

// StableLabels are the labels that say what a pod is, and that outlive it: those which
// flows carry, in the order in which they are believed.
var StableLabels = []string{"app.kubernetes.io/name", "app", "k8s-app"}

// Container is what an inventory calls a cgroup. The zero value is nothing.
type Container struct {
	Pod    string // NAMESPACE/NAME; "" = in none
	Name   string // "" = not told
	Image  string
	Labels map[string]string // of the pod; must not change
}

// Inert escapes what a flow of another process may hold, so that its strings are as
// harmless as those of this one's. What is so already stays as it is.
func (f *Flow) Inert() {
	for _, s := range []*string{&f.Node, &f.Protocol, &f.Crossing, &f.Comm,
		&f.Source.Workload, &f.Source.Zone, &f.Source.Reserved, &f.Source.Cgroup, &f.Source.Pod, &f.Source.Container, &f.Source.Image,
		&f.Destination.Workload, &f.Destination.Zone, &f.Destination.Reserved, &f.Destination.Cgroup, &f.Destination.Pod, &f.Destination.Container, &f.Destination.Image} {
		*s = inert(*s)
	}
	for _, e := range []*Endpoint{&f.Source, &f.Destination} {
		e.Networks = slices.Clone(e.Networks)
		for i := range e.Networks {
			e.Networks[i] = inert(e.Networks[i])
		}
		if e.PodLabels != nil {
			all := make(map[string]string, len(e.PodLabels))
			for k, v := range e.PodLabels {
				all[inert(k)] = inert(v)
			}
			e.PodLabels = all
		}
	}
}

// inert is Escape that leaves backslashes: it may be done again.
func inert(s string) string {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			return strings.ReplaceAll(Escape(s), `\x5c`, `\`)
		}
	}
	return s
}

// Label is the endpoint in one word: "edge/web", "unmanaged", "network/anywhere",
// "claims edge/web", or "unknown".
func (e Endpoint) Label() string {
	label := e.Reserved
	switch {
	case e.Workload != "":
		label = e.Zone + "/" + e.Workload
	case label == "" && e.Identity != 0:
		label = "identity-" + strconv.FormatUint(uint64(e.Identity), 10)
	case label == "" && len(e.Networks) > 0:
		return "network/" + strings.Join(e.Networks, ",")
	case label == "":
		return "unknown"
	}
	if e.Claimed {
		return "claims " + label
	}
	return label
}

// Place is address and port as far as they are known: "10.0.0.1:80", "[::1]:80",
// "10.0.0.1", or "".
func (e Endpoint) Place() string {
	switch {
	case !e.Address.IsValid():
		return ""
	case e.Port == 0:
		return e.Address.String()
	}
	return netip.AddrPortFrom(e.Address, e.Port).String()
}

// ReservedName names a reserved identity, or returns "".
func ReservedName(id uint32) string {
	switch image.ID(id) {
	case image.Unmanaged:
		return "unmanaged"
	case image.Kernel:
		return "kernel"
	case image.Pending:
		return "pending"
	}
	return ""
}

// protocols by IANA number; UDP-Lite and IGMP are no words of the policy language,
// but they are what users see in captures.
var protocols = [256]string{
	image.ICMP: "icmp", 2: "igmp", image.TCP: "tcp", image.UDP: "udp", 47: "gre", 50: "esp", 51: "ah",
	image.ICMP6: "icmp6", image.SCTP: "sctp", 136: "udplite",
}

// ProtocolName names an IP protocol; 0, which no packet carries here, is "".
func ProtocolName(p uint8) string {
	if name := protocols[p]; name != "" || p == 0 {
		return name
	}
	return "proto-" + strconv.Itoa(int(p))
}

// Resolver turns events into flows.
type Resolver struct {
	Node   string
	Book   *Book
	Cgroup func(id uint64) string // path of a cgroup, or ""; may be nil
	// Container says who is in the cgroup at a path, with nothing in it that could move
	// a cursor; may be nil.
	Container func(path string) Container
	Wall      func(boot uint64) time.Time // wall clock for CLOCK_BOOTTIME nanoseconds
}

// Flow says an event in words.
func (r *Resolver) Flow(e *record.Event) Flow {
	var f Flow
	r.Resolve(e, &f)
	return f
}

// Resolve is Flow into a flow that may be used again and again. It allocates nothing
// for what is named by a policy.
func (r *Resolver) Resolve(e *record.Event, f *Flow) {
	// Field by field: a literal would be made aside, and copied.
	*f = Flow{}
	f.Time, f.Node = r.Wall(e.Time), r.Node
	f.Verdict, f.Reason, f.Direction, f.Hook, f.Proof = e.Verdict, e.Reason, e.Direction, e.Hook, e.Proof
	f.Protocol = ProtocolName(e.Tuple.Proto)
	f.PID, f.Comm, f.CPU, f.Seq, f.Epoch = e.PID, printable(e.Comm[:]), e.CPU, e.Seq, e.Epoch
	epoch := e.Epoch
	if e.Verdict.OfShadow() {
		epoch = ofShadow
	}
	f.Source.Address, f.Source.Port = address(e.Tuple.Source), e.Tuple.SourcePort
	f.Destination.Address, f.Destination.Port = address(e.Tuple.Destination), e.Tuple.DestinationPort
	subject, peer := &f.Source, &f.Destination
	if e.Direction == abi.Ingress {
		subject, peer = peer, subject
	}
	r.identify(subject, epoch, e.Subject)
	if r.Cgroup != nil && e.Cgroup != 0 {
		path := r.Cgroup(e.Cgroup)
		subject.Cgroup = Escape(path)
		if r.Container != nil && path != "" {
			c := r.Container(path)
			subject.Pod, subject.Container, subject.Image, subject.PodLabels = c.Pod, c.Name, c.Image, c.Labels
		}
	}
	switch e.Proof {
	case abi.ProofIdentity:
		r.identify(peer, epoch, e.Peer)
	case abi.ProofBad:
		r.identify(peer, epoch, e.Peer)
		peer.Claimed = e.Peer != 0
	}
	if e.Proof != abi.ProofIdentity {
		peer.Networks = r.Book.Networks(epoch, peer.Address)
	}
	if e.Crossing == 0 {
		return
	}
	if c := r.Book.Crossing(epoch, e.Crossing); c != nil {
		f.Crossing, f.Line = c.Name, c.Line
	} else {
		f.Crossing = "crossing-" + strconv.FormatUint(uint64(e.Crossing), 10)
	}
}

func (r *Resolver) identify(at *Endpoint, epoch, id uint32) {
	at.Identity = id
	if at.Reserved = ReservedName(id); at.Reserved != "" {
		if at.Reserved == "unmanaged" {
			at.Zone = r.Book.UnmanagedZone(epoch)
		}
		return
	}
	at.Workload, at.Zone, _ = r.Book.Workload(epoch, id)
}

// address of a tuple; a socket without one yet has 16 zero bytes.
func address(b [16]byte) netip.Addr {
	if b == ([16]byte{}) {
		return netip.Addr{}
	}
	return netip.AddrFrom16(b).Unmap()
}

// printable is a NUL-terminated kernel string made safe for terminals and logs.
func printable(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	if len(b) == 0 {
		return ""
	}
	return Escape(string(b))
}

// Escape writes everything but printable ASCII and a single backslash as \xNN, so
// that a process name can move no cursor and start no line.
func Escape(s string) string {
	const hex = "0123456789abcdef"
	clean := func(c byte) bool { return c >= 0x20 && c < 0x7f && c != '\\' }
	for i := 0; ; i++ {
		if i == len(s) {
			return s
		}
		if !clean(s[i]) {
			break
		}
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if clean(s[i]) {
			b.WriteByte(s[i])
			continue
		}
		b.WriteString(`\x`)
		b.WriteByte(hex[s[i]>>4])
		b.WriteByte(hex[s[i]&15])
	}
	return b.String()
}
