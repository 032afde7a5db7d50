package detect

import (
	"strings"
	"time"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/internal/version"
)

// OCSF is a finding as a Detection Finding (class 2004) of the Open Cybersecurity
// Schema Framework 1.3. Times are milliseconds since 1970.
type OCSF struct {
	ActivityID   int            `json:"activity_id"` // 1 = create, 2 = update
	Activity     string         `json:"activity_name"`
	CategoryUID  int            `json:"category_uid"`
	Category     string         `json:"category_name"`
	ClassUID     int            `json:"class_uid"`
	Class        string         `json:"class_name"`
	TypeUID      int            `json:"type_uid"`
	Time         int64          `json:"time"`
	SeverityID   int            `json:"severity_id"`
	Severity     string         `json:"severity"`
	StatusID     int            `json:"status_id"` // 1 = new, 3 = suppressed
	Status       string         `json:"status"`
	Confidence   int            `json:"confidence_score"`
	ConfidenceID int            `json:"confidence_id"`
	IsAlert      bool           `json:"is_alert"`
	Message      string         `json:"message"`
	Count        uint64         `json:"count"`
	Metadata     ocsfMetadata   `json:"metadata"`
	Finding      ocsfInfo       `json:"finding_info"`
	Evidences    []ocsfEvidence `json:"evidences,omitempty"`
	Device       *ocsfDevice    `json:"device,omitempty"`
	Resources    []ocsfResource `json:"resources,omitempty"`
	Remediation  ocsfText       `json:"remediation"`
	Unmapped     map[string]any `json:"unmapped,omitempty"`
}

type ocsfMetadata struct {
	Version string      `json:"version"`
	Product ocsfProduct `json:"product"`
}

type ocsfProduct struct {
	Name    string `json:"name"`
	Vendor  string `json:"vendor_name"`
	Version string `json:"version"`
}

type ocsfInfo struct {
	UID       string       `json:"uid"`
	Title     string       `json:"title"`
	FirstSeen int64        `json:"first_seen_time"`
	LastSeen  int64        `json:"last_seen_time"`
	Created   int64        `json:"created_time"`
	Analytic  ocsfAnalytic `json:"analytic"`
	Attacks   []ocsfAttack `json:"attacks"`
	Types     []string     `json:"types,omitempty"`
}

type ocsfAnalytic struct {
	Name   string `json:"name"`
	UID    string `json:"uid"`
	TypeID int    `json:"type_id"` // 1 = rule, 2 = behavioral
	Type   string `json:"type"`
}

type ocsfAttack struct {
	Version      string     `json:"version"`
	Tactic       ocsfNamed  `json:"tactic"`
	Technique    ocsfNamed  `json:"technique"`
	SubTechnique *ocsfNamed `json:"sub_technique,omitempty"`
}

type ocsfNamed struct {
	UID  string `json:"uid"`
	Name string `json:"name"`
}

type ocsfEvidence struct {
	Time        int64           `json:"time,omitempty"`
	Actor       *ocsfActor      `json:"actor,omitempty"`
	Source      *ocsfEndpoint   `json:"src_endpoint,omitempty"`
	Destination *ocsfEndpoint   `json:"dst_endpoint,omitempty"`
	Connection  *ocsfConnection `json:"connection_info,omitempty"`
	Verdict     string          `json:"verdict,omitempty"`
	Data        any             `json:"data,omitempty"`
}

type ocsfActor struct {
	Process ocsfProcess `json:"process"`
}

type ocsfProcess struct {
	PID  uint32    `json:"pid"`
	Name string    `json:"name,omitempty"`
	File *ocsfFile `json:"file,omitempty"`
}

type ocsfFile struct {
	Path string `json:"path"`
	Name string `json:"name"`
	Type int    `json:"type_id"` // 1 = regular file
}

type ocsfEndpoint struct {
	IP   string `json:"ip,omitempty"`
	Port uint16 `json:"port,omitempty"`
	Name string `json:"name,omitempty"`
}

type ocsfConnection struct {
	Protocol    string `json:"protocol_name,omitempty"`
	DirectionID int    `json:"direction_id"` // 0 = unknown, 1 = inbound, 2 = outbound
}

type ocsfDevice struct {
	Hostname string `json:"hostname"`
	TypeID   int    `json:"type_id"` // 1 = server
}

type ocsfResource struct {
	Name string `json:"name"`
	Type string `json:"type"`
	UID  string `json:"uid,omitempty"`
}

type ocsfText struct {
	Description string `json:"desc"`
}

// OCSF says a finding in that schema.
func (f *Finding) OCSF() OCSF {
	o := OCSF{
		ActivityID: 1, Activity: "Create", CategoryUID: 2, Category: "Findings", ClassUID: 2004, Class: "Detection Finding", TypeUID: 200401,
		Time: f.LastSeen.UnixMilli(), SeverityID: int(f.Severity), StatusID: 1, Status: "New",
		Confidence: int(f.Confidence), ConfidenceID: 1 + int(min(f.Confidence, 99))/34, IsAlert: f.SuppressedBy == "",
		Message: f.Title, Count: f.Count,
		Metadata: ocsfMetadata{Version: "1.3.0", Product: ocsfProduct{Name: "demarc", Vendor: "demarc", Version: version.String()}},
		Finding: ocsfInfo{
			UID: f.ID, Title: f.Title, FirstSeen: f.FirstSeen.UnixMilli(), LastSeen: f.LastSeen.UnixMilli(), Created: f.FirstSeen.UnixMilli(),
			Analytic: ocsfAnalytic{Name: f.Detector, UID: f.Detector, TypeID: 2, Type: "Behavioral"}, Attacks: []ocsfAttack{f.Technique.ocsf()},
		},
		Remediation: ocsfText{f.Advice},
		Resources:   []ocsfResource{{Name: f.Subject.Label(), Type: "workload"}},
	}
	o.Severity = map[Severity]string{Info: "Informational", Low: "Low", Medium: "Medium", High: "High", Critical: "Critical"}[f.Severity]
	if f.Count > 1 {
		o.ActivityID, o.Activity, o.TypeUID = 2, "Update", 200402
	}
	if f.Certain {
		o.Finding.Analytic.TypeID, o.Finding.Analytic.Type = 1, "Rule"
	}
	if f.SuppressedBy != "" {
		o.StatusID, o.Status = 3, "Suppressed"
	}
	if f.Node != "" {
		o.Device = &ocsfDevice{f.Node, 1}
	}
	for key, value := range map[string]string{"key": f.Key, "suppressed_by": f.SuppressedBy, "action": f.Action} {
		if value != "" {
			if o.Unmapped == nil {
				o.Unmapped = map[string]any{}
			}
			o.Unmapped[key] = value
		}
	}
	if f.Process != nil {
		o.Evidences = append(o.Evidences, ocsfEvidence{Actor: f.Process.ocsf()})
	}
	for _, e := range f.Evidence {
		o.Evidences = append(o.Evidences, e.ocsf())
	}
	return o
}

func (t Technique) ocsf() ocsfAttack {
	id, name, _ := strings.Cut(t.Tactic, " ")
	a := ocsfAttack{Version: "16.1", Tactic: ocsfNamed{id, name}, Technique: ocsfNamed{t.ID, t.Name}}
	if parent, _, sub := strings.Cut(t.ID, "."); sub {
		whole, part, _ := strings.Cut(t.Name, ": ")
		a.Technique, a.SubTechnique = ocsfNamed{parent, whole}, &ocsfNamed{t.ID, part}
	}
	return a
}

func (p *Process) ocsf() *ocsfActor {
	a := &ocsfActor{ocsfProcess{PID: p.PID, Name: p.Comm}}
	if p.Exe != "" {
		a.Process.File = &ocsfFile{Path: p.Exe, Name: p.Exe[strings.LastIndexByte(p.Exe, '/')+1:], Type: 1}
	}
	return a
}

func (e Event) ocsf() ocsfEvidence {
	if f := e.Flow; f != nil {
		o := ocsfEvidence{Time: milli(f.Time), Source: endpointOCSF(&f.Source), Destination: endpointOCSF(&f.Destination), Verdict: f.Verdict.String() + " " + f.Reason.String()}
		o.Connection = &ocsfConnection{f.Protocol, 2 - int(f.Direction)}
		if f.PID != 0 {
			o.Actor = (&Process{PID: f.PID, Comm: f.Comm}).ocsf()
		}
		return o
	}
	s := e.Signal
	o := ocsfEvidence{Time: milli(s.Time), Destination: endpointOCSF(&s.Peer), Data: s}
	if s.PID != 0 {
		o.Actor = (&Process{PID: s.PID, Comm: s.Comm, Exe: s.Exe}).ocsf()
	}
	return o
}

func milli(t time.Time) int64 { return t.UnixMilli() }

func endpointOCSF(e *flow.Endpoint) *ocsfEndpoint {
	o := ocsfEndpoint{Port: e.Port}
	if e.Address.IsValid() {
		o.IP = e.Address.String()
	}
	if label := e.Label(); label != "unknown" {
		o.Name = label
	}
	return &o
}
