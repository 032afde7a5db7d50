package detect

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/demarc/demarc/agent/flow"
)

// Severity is how much harm a finding may mean. The numbers are those of OCSF.
type Severity uint8

const (
	Info     Severity = 1
	Low      Severity = 2
	Medium   Severity = 3
	High     Severity = 4
	Critical Severity = 5
)

var severities = []string{1: "info", 2: "low", 3: "medium", 4: "high", 5: "critical"}

// Severities lists the words, mildest first.
func Severities() []string { return severities[1:] }

func (s Severity) String() string {
	if int(s) < len(severities) && severities[s] != "" {
		return severities[s]
	}
	return "severity(" + strconv.Itoa(int(s)) + ")"
}

// MarshalText implements encoding.TextMarshaler.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Severity) UnmarshalText(b []byte) error {
	for i, word := range severities {
		if word != "" && word == string(b) {
			*s = Severity(i)
			return nil
		}
	}
	return fmt.Errorf("unknown severity %q", b)
}

// Party is who a finding is about: a workload, or, where nothing was proved, an
// address.
type Party struct {
	Identity uint32     `json:"identity,omitempty" yaml:"identity,omitempty"`
	Workload string     `json:"workload,omitempty" yaml:"workload,omitempty"`
	Zone     string     `json:"zone,omitempty" yaml:"zone,omitempty"`
	Reserved string     `json:"reserved,omitempty" yaml:"reserved,omitempty"` // unmanaged, kernel, pending
	Address  netip.Addr `json:"address,omitzero" yaml:"address,omitempty"`
	Networks []string   `json:"networks,omitempty" yaml:"networks,omitempty"` // that contain the address, where nothing was proved
}

// Label is the party in one word.
func (p Party) Label() string {
	e := flow.Endpoint{Identity: p.Identity, Workload: p.Workload, Zone: p.Zone, Reserved: p.Reserved}
	switch {
	case p.Identity != 0 || p.Workload != "" || p.Reserved != "":
		return e.Label()
	case p.Address.IsValid():
		return p.Address.String()
	case len(p.Networks) > 0:
		return "network/" + strings.Join(p.Networks, ",")
	}
	return "unknown"
}

// Process is the process that did it, as far as it is known. A pid alone is no
// process: it is one together with its start time.
type Process struct {
	PID       uint32 `json:"pid" yaml:"pid"`
	StartTime uint64 `json:"start_time,omitempty" yaml:"start_time,omitempty"` // nanoseconds since boot; 0 = not known
	Comm      string `json:"comm,omitempty" yaml:"comm,omitempty"`
	Exe       string `json:"exe,omitempty" yaml:"exe,omitempty"`
	Cgroup    string `json:"cgroup,omitempty" yaml:"cgroup,omitempty"` // below the managed root
	UID       uint32 `json:"uid,omitempty" yaml:"uid,omitempty"`
}

// Finding is a suspected step of lateral movement, with what it rests on.
type Finding struct {
	ID         string    `json:"id" yaml:"id"`   // the same whenever the same events are looked at
	Key        string    `json:"key" yaml:"key"` // sightings with the same key are the same finding
	Detector   string    `json:"detector" yaml:"detector"`
	Technique  Technique `json:"technique" yaml:"technique"`
	Title      string    `json:"title" yaml:"title"`
	Severity   Severity  `json:"severity" yaml:"severity"`
	Confidence uint8     `json:"confidence" yaml:"confidence"`               // percent
	Certain    bool      `json:"certain,omitempty" yaml:"certain,omitempty"` // one event proves it, no threshold was involved
	Node       string    `json:"node,omitempty" yaml:"node,omitempty"`
	Subject    Party     `json:"subject" yaml:"subject"`
	Process    *Process  `json:"process,omitempty" yaml:"process,omitempty"`
	FirstSeen  time.Time `json:"first_seen" yaml:"first_seen"`
	LastSeen   time.Time `json:"last_seen" yaml:"last_seen"`
	Count      uint64    `json:"count" yaml:"count"` // sightings
	Evidence   []Event   `json:"evidence,omitempty" yaml:"evidence,omitempty"`
	Advice     string    `json:"advice" yaml:"advice"`
	// SuppressedBy is the declared role that explains it; such a finding is shown
	// only to who asks for it, alerts nobody and contains nothing.
	SuppressedBy string `json:"suppressed_by,omitempty" yaml:"suppressed_by,omitempty"`
	// Action is what was done about it, in words; "" = nothing was considered.
	Action string `json:"action,omitempty" yaml:"action,omitempty"`
}

// evidenceKept bounds the events of a finding: the first ones, and the newest.
const (
	evidenceFirst = 8
	evidenceKept  = 16
)

// add takes another sighting into a finding. The worse severity stays, with the
// newest title of its kind.
func (f *Finding) add(s *Finding) {
	f.Count += s.Count
	if s.LastSeen.After(f.LastSeen) {
		f.LastSeen = s.LastSeen
	}
	if s.Severity >= f.Severity {
		f.Severity, f.Title = s.Severity, s.Title
	}
	f.Confidence = max(f.Confidence, s.Confidence)
	f.Certain = f.Certain || s.Certain
	if f.Process == nil {
		f.Process = s.Process
	}
	if s.SuppressedBy == "" {
		f.SuppressedBy = "" // the role has ended: what was explained no longer is
	}
	// What led to a sighting is told once, with the first one.
	for _, e := range s.Evidence[max(0, len(s.Evidence)-1):] {
		if len(f.Evidence) == evidenceKept {
			copy(f.Evidence[evidenceFirst:], f.Evidence[evidenceFirst+1:])
			f.Evidence = f.Evidence[:evidenceKept-1]
		}
		f.Evidence = append(f.Evidence, e)
	}
}

// clone shares nothing that add changes.
func (f *Finding) clone() Finding {
	c := *f
	c.Evidence = append([]Event(nil), f.Evidence...)
	return c
}

// identify gives the finding an id that depends on nothing but its key, its node
// and its beginning.
func (f *Finding) identify() {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%s\x00%d", f.Node, f.Key, f.FirstSeen.UnixNano()))
	f.ID = hex.EncodeToString(sum[:5])
}
