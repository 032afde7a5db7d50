package learn

import (
	"path"
	"regexp"
	"strings"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/image"
)

// kind says what is known of the process at one end. The zero value is nothing.
type kind uint8

const (
	declared   kind = iota + 1 // a workload of the base; the name is its
	unit                       // a system unit; the name is a selector
	container                  // a container's cgroup; the name is its path
	cgroup                     // any other cgroup; the name is its path
	pods                       // pods of one owner; the name is NAMESPACE/OWNER
	called                     // a container outside of pods; the name is its
	imaged                     // one without a name; the name is its image's
	session                    // somebody who is logged in
	unmanaged                  // a local process whose cgroup is not known
	kernelSide                 // the kernel's own sockets
)

// place is one end of a flow that can be told from others. The zero value is a peer
// of which only an address is known.
type place struct {
	kind kind
	name string
}

func (p place) String() string {
	switch p.kind {
	case 0:
		return "unknown"
	case declared:
		return "workload " + p.name
	case session, unmanaged, kernelSide:
		return p.name
	case unit:
		return "unit " + p.name
	case pods:
		return "pods " + p.name
	case called:
		return "container " + p.name
	case imaged:
		return "image " + p.name
	}
	return "cgroup " + p.name
}

// place finds out who the judged side of a flow is.
func (l *Learner) place(e flow.Endpoint) place {
	if p := l.named(e); p.kind == declared || p.kind == kernelSide {
		return p
	}
	if e.Cgroup == "" || e.Cgroup == "/" {
		return place{unmanaged, "a process of no unit, container or cgroup"}
	}
	p := placeOf(e.Cgroup)
	if b := l.options.Base; b != nil {
		if name := selected(b, e, p); name != "" {
			return place{declared, name}
		}
	}
	return l.meet(e, p)
}

// named is who an endpoint proved to be.
func (l *Learner) named(e flow.Endpoint) place {
	switch {
	case e.Claimed:
		return place{}
	case e.Workload != "":
		if b := l.options.Base; b == nil || !declares(b, e.Workload) {
			l.unnamed = e.Label()
		}
		return place{declared, e.Workload}
	case e.Reserved == "kernel":
		return place{kernelSide, "the kernel"}
	case e.Reserved != "":
		return place{unmanaged, e.Reserved}
	}
	return place{}
}

func declares(p *policy.Policy, workload string) bool {
	for _, w := range p.Workloads {
		if w.Name == workload {
			return true
		}
	}
	return false
}

// placeOf reads a path below the managed root as systemd and container runtimes make
// them.
func placeOf(path string) place {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	if at := containerAt(parts); at > 0 {
		return place{container, "/" + strings.Join(parts[:at], "/")}
	}
	switch part := unitIn(path); {
	case strings.HasPrefix(part, "session-") && unitType(part) == ".scope", strings.HasPrefix(part, "user@"):
		return place{session, "session " + part}
	case unitType(part) != "":
		return place{unit, instances(part)}
	}
	return place{cgroup, "/" + strings.Join(parts, "/")}
}

func unitType(name string) string {
	for _, t := range []string{".service", ".scope", ".socket", ".mount", ".swap"} {
		if strings.HasSuffix(name, t) && len(name) > len(t) {
			return t
		}
	}
	return ""
}

// instances is the pattern of all instances of a template, or the name itself.
func instances(name string) string {
	prefix, rest, ok := strings.Cut(name, "@")
	if !ok || prefix == "" {
		return name
	}
	dot := strings.LastIndexByte(rest, '.')
	if dot <= 0 {
		return name
	}
	return prefix + "@*" + rest[dot:]
}

// Container runtimes name a cgroup by the container's id, or a pod's by its uid.
var (
	containerScope = regexp.MustCompile(`^(docker|libpod|crio|cri-containerd|containerd|nerdctl)-[0-9a-f]{12,64}\.scope$`)
	containerID    = regexp.MustCompile(`^[0-9a-f]{64}$`)
	pod            = regexp.MustCompile(`^(kubepods[a-z-]*-)?pod[0-9a-f]{8}[-_][0-9a-f-_]{27}(\.slice)?$`)
)

// containerAt is how many parts of a path are that of a pod or a container; 0 = it is
// none. All containers of a pod are one workload.
func containerAt(parts []string) int {
	for i, part := range parts {
		if pod.MatchString(part) || containerScope.MatchString(part) || containerID.MatchString(part) {
			return i + 1
		}
	}
	return 0
}

// Selected is the workload of a policy whose selector finds the judged side of a flow,
// as far as the flow tells, or "".
func Selected(p *policy.Policy, e flow.Endpoint) string {
	if e.Cgroup == "" || e.Cgroup == "/" {
		return ""
	}
	return selected(p, e, placeOf(e.Cgroup))
}

// selected is Selected for an endpoint at a place.
func selected(p *policy.Policy, e flow.Endpoint, at place) string {
	cgroupPath := e.Cgroup
	for _, w := range p.Workloads {
		for _, s := range w.Match {
			switch s.Kind {
			case image.SelectCgroup:
				if cgroupPath == s.Path || strings.HasPrefix(cgroupPath, s.Path+"/") {
					return w.Name
				}
			case image.SelectUnit:
				if at.kind == unit && (at.name == s.Path || glob(s.Path, path.Base(unitIn(cgroupPath)))) {
					return w.Name
				}
			default:
				if finds(s, e) {
					return w.Name
				}
			}
		}
	}
	return ""
}

// unitIn is the part of a path that is the unit.
func unitIn(cgroupPath string) string {
	for _, part := range strings.Split(strings.Trim(cgroupPath, "/"), "/") {
		if !strings.HasSuffix(part, ".slice") {
			return part
		}
	}
	return ""
}

func glob(pattern, name string) bool {
	prefix, suffix, ok := strings.Cut(pattern, "*")
	if !ok {
		return pattern == name
	}
	return len(name) >= len(prefix)+len(suffix) && strings.HasPrefix(name, prefix) && strings.HasSuffix(name, suffix)
}

// word makes a policy's name of a place's: "postgresql@*.service" is "postgresql".
func (p place) word() string {
	name := p.name
	switch p.kind {
	case unit:
		name, _, _ = strings.Cut(strings.TrimSuffix(name, unitType(name)), "@")
	case container:
		name = path.Base(name)
		kind := "container"
		if pod.MatchString(name) {
			kind = "pod"
			name = name[strings.LastIndex(name, "pod")+3:]
		} else {
			name = strings.TrimSuffix(name, ".scope")
			name = name[strings.LastIndexByte(name, '-')+1:]
		}
		name = kind + "-" + name[:min(len(name), 12)]
	case called:
	case imaged:
		name, _, _ = strings.Cut(path.Base(name), "@")
		name, _, _ = strings.Cut(name, ":")
	default:
		name = path.Base(name)
	}
	return clean(name)
}

// clean makes a name of a policy's alphabet.
func clean(s string) string {
	var b strings.Builder
	for _, c := range []byte(strings.ToLower(s)) {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' {
			b.WriteByte(c)
		} else {
			b.WriteByte('-')
		}
	}
	s = strings.Trim(b.String()[:min(b.Len(), 40)], "-")
	if s == "" {
		return "workload"
	}
	return s
}
