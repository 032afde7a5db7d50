package kubernetes

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	strictjson "sigs.k8s.io/json"
	"sigs.k8s.io/network-policy-api/apis/v1alpha2"
	"sigs.k8s.io/yaml"

	"github.com/demarc/demarc/internal/yamlfile"
)

// Objects are the policies of a cluster, each with its place. Read fills them.
type Objects struct {
	networkPolicies []placed[networkingv1.NetworkPolicy]
	clusterPolicies []placed[v1alpha2.ClusterNetworkPolicy]
	seen            map[string]place // by kind, namespace and name
}

// placed is an object and where it was read.
type placed[T any] struct {
	object T
	place
}

// place is an object in a file, and can find the lines of its parts.
type place struct {
	file   string
	source []byte // the document that holds it
	before int    // lines of the file before the document
	path   string // of the object in the document: "$" or "$.items[2]"
	label  string // "NetworkPolicy shop/web"
}

// line returns the line of a part, such as ".spec.egress[0]".
func (p place) line(part string) int {
	line, _ := yamlfile.Locate(p.source, p.path+part)
	return p.before + line
}

// Problem is something in an object that is no good, or that a boundary policy
// cannot say.
type Problem struct {
	File   string
	Line   int    // from 1
	Object string // "NetworkPolicy shop/web", "" = not known
	Text   string
	Hint   string // how to mend it; may be empty
}

func (p Problem) String() string {
	text := p.Text
	if p.Object != "" {
		text = p.Object + ": " + text
	}
	if p.Hint != "" {
		text += "\nhint: " + p.Hint
	}
	return fmt.Sprintf("%s:%d: %s", p.File, p.Line, text)
}

// Problems is an error that has several causes, each with its place.
type Problems []Problem

func (p Problems) Error() string {
	lines := make([]string, 0, len(p))
	for _, one := range p {
		lines = append(lines, one.String())
	}
	return strings.Join(lines, "\n")
}

// MaxSource bounds the size of one file of objects, in bytes.
const MaxSource = 64 << 20

// Read adds the objects of one file: YAML with any number of documents, or JSON,
// and lists of either. Decoding is strict. An object of another kind is an error.
func (o *Objects) Read(file string, src []byte) error {
	if len(src) > MaxSource {
		return fmt.Errorf("%s: %d bytes, at most %d are read", file, len(src), MaxSource)
	}
	var problems Problems
	for _, d := range documents(src) {
		at := place{file: file, source: d.source, before: d.before, path: "$"}
		body, err := yaml.YAMLToJSONStrict(d.source)
		if err != nil {
			problems = append(problems, Problem{File: file, Line: d.before + errorLine(err), Text: "not YAML: " + oneLine(err)})
			continue
		}
		if bytes.Equal(bytes.TrimSpace(body), []byte("null")) {
			continue
		}
		problems = append(problems, o.object(at, body)...)
	}
	if len(problems) > 0 {
		return problems
	}
	return nil
}

// document is one YAML document of a file.
type document struct {
	source []byte
	before int // lines before it
}

// documents parts a file at lines that begin with "---". No block of a Kubernetes
// object stands so far to the left.
func documents(src []byte) []document {
	var out []document
	start, startLine, line := 0, 0, 0
	for at := 0; at < len(src); line++ {
		end := len(src)
		if i := bytes.IndexByte(src[at:], '\n'); i >= 0 {
			end = at + i + 1
		}
		text := bytes.TrimRight(src[at:end], "\r\n")
		if bytes.HasPrefix(text, []byte("---")) && (len(text) == 3 || text[3] == ' ' || text[3] == '\t') {
			out = append(out, document{src[start:at], startLine})
			start, startLine = at, line
		}
		at = end
	}
	return append(out, document{src[start:], startLine})
}

// errorLine finds "line N" in a message of the YAML library.
func errorLine(err error) int {
	var n int
	if _, after, found := strings.Cut(err.Error(), "line "); found {
		fmt.Sscanf(after, "%d", &n)
	}
	return max(n, 1)
}

func oneLine(err error) string {
	return strings.Join(strings.Fields(strings.TrimPrefix(err.Error(), "yaml: ")), " ")
}

// header is what tells kinds apart.
type header struct {
	APIVersion string                           `json:"apiVersion"`
	Kind       string                           `json:"kind"`
	Metadata   struct{ Namespace, Name string } `json:"metadata"`
	Items      []json.RawMessage                `json:"items"`
}

const (
	networkPolicyAPI = "networking.k8s.io/v1"
	clusterPolicyAPI = "policy.networking.k8s.io/v1alpha2"
)

func (o *Objects) object(at place, body []byte) Problems {
	var h header
	if err := json.Unmarshal(body, &h); err != nil {
		return Problems{{File: at.file, Line: at.line(""), Text: "not a Kubernetes object: " + oneLine(err)}}
	}
	switch h.APIVersion + " " + h.Kind {
	case "v1 List", networkPolicyAPI + " NetworkPolicyList", clusterPolicyAPI + " ClusterNetworkPolicyList":
		var out Problems
		for i, item := range h.Items {
			in := at
			in.path = fmt.Sprintf("%s.items[%d]", at.path, i)
			out = append(out, o.object(in, item)...)
		}
		return out
	case networkPolicyAPI + " NetworkPolicy":
		if h.Metadata.Namespace == "" {
			h.Metadata.Namespace = "default"
		}
		at.label = "NetworkPolicy " + h.Metadata.Namespace + "/" + h.Metadata.Name
	case clusterPolicyAPI + " ClusterNetworkPolicy":
		at.label = "ClusterNetworkPolicy " + h.Metadata.Name
	default:
		p := Problem{File: at.file, Line: at.line(".kind"), Text: fmt.Sprintf("%s of %s is not imported", orUnknown(h.Kind, "an object without kind"), orUnknown(h.APIVersion, "no apiVersion"))}
		p.Hint = "import NetworkPolicy of " + networkPolicyAPI + " and ClusterNetworkPolicy of " + clusterPolicyAPI
		if strings.HasSuffix(h.Kind, "AdminNetworkPolicy") {
			p.Hint = "rewrite it as a ClusterNetworkPolicy of " + clusterPolicyAPI
		}
		return Problems{p}
	}
	if h.Metadata.Name == "" {
		return Problems{{File: at.file, Line: at.line(".metadata"), Object: strings.TrimSuffix(at.label, "/"), Text: "it has no name"}}
	}
	if first, twice := o.seen[at.label]; twice {
		return Problems{{File: at.file, Line: at.line(".metadata.name"), Object: at.label, Text: fmt.Sprintf("it is already at %s:%d", first.file, first.line(".metadata.name")), Hint: "remove one of them"}}
	}
	if o.seen == nil {
		o.seen = map[string]place{}
	}
	o.seen[at.label] = at
	if h.Kind == "NetworkPolicy" {
		p := placed[networkingv1.NetworkPolicy]{place: at}
		problems := at.decode(withoutStatus(body), &p.object)
		p.object.Namespace = h.Metadata.Namespace
		o.networkPolicies = append(o.networkPolicies, p)
		return problems
	}
	p := placed[v1alpha2.ClusterNetworkPolicy]{place: at}
	problems := at.decode(withoutStatus(body), &p.object)
	o.clusterPolicies = append(o.clusterPolicies, p)
	return problems
}

func orUnknown(s, unknown string) string {
	if s == "" {
		return unknown
	}
	return s
}

// withoutStatus drops what the cluster wrote into an object about itself. It decides
// nothing, and older clusters write a status that the type no longer has.
func withoutStatus(body []byte) []byte {
	var fields map[string]json.RawMessage
	if json.Unmarshal(body, &fields) != nil {
		return body
	}
	delete(fields, "status")
	out, err := json.Marshal(fields)
	if err != nil {
		return body
	}
	return out
}

func (p place) decode(body []byte, out any) Problems {
	strict, err := strictjson.UnmarshalStrict(body, out)
	if err != nil {
		return Problems{{File: p.file, Line: p.line(""), Object: p.label, Text: oneLine(err)}}
	}
	var problems Problems
	for _, e := range strict {
		problems = append(problems, Problem{File: p.file, Line: p.line("." + fieldIn(e)), Object: p.label, Text: oneLine(e), Hint: "check the spelling; unknown fields are never ignored"})
	}
	return problems
}

// fieldIn is the field that a strict decoding error names in quotes.
func fieldIn(err error) string {
	_, after, _ := strings.Cut(err.Error(), `"`)
	field, _, _ := strings.Cut(after, `"`)
	return field
}
