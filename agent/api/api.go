// Package api is what the agent says on its socket, and a client for it.
//
// It is HTTP/1.1 on a Unix socket. Answers are JSON; flows are JSON lines; images
// travel as they are. An error is an Error with a status code of 400 and above.
// HTTP/2 on the same socket is gRPC: Hubble's Observer, in agent/hubble.
package api

import (
	"time"

	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
)

// Paths of the API.
const (
	PathStatus     = "/v1/status"          // GET: Status
	PathFlows      = "/v1/flows"           // GET: lines of Line
	PathFindings   = "/v1/findings"        // GET: lines of detect.Finding
	PathIdentities = "/v1/identities"      // GET: []Identity
	PathZones      = "/v1/zones"           // GET: []Zone
	PathPolicy     = "/v1/policy"          // GET: the active image; POST: apply the image in the body, Status; ?previewed=DIGEST: the one that was previewed last, without a body; ?within=60s: unless it is confirmed; ?grandfather=10m: what it cuts goes on so long
	PathPreview    = "/v1/policy/preview"  // POST: the image in the body is only looked at, Preview; ?own=LOCAL,REMOTE, up to proto.MaxOwn times: this connection is named first
	PathShadow     = "/v1/policy/shadow"   // POST ?for=1h: the image in the body is asked beside the one in force, Status; GET: Shadow, with its differences
	PathUnshadow   = "/v1/policy/unshadow" // POST: end that, Status
	PathConfirm    = "/v1/policy/confirm"  // POST: Status
	PathRollback   = "/v1/policy/rollback" // POST: Status
	PathQuarantine = "/v1/quarantine"      // POST ?workload=NAME&for=1h&reason=TEXT: Status
	PathRelease    = "/v1/release"         // POST ?workload=NAME: Status
	PathAudit      = "/v1/audit"           // GET: the lines of the core's audit log; AuditSeq and AuditHash say where it ends
	PathMetrics    = "/v1/metrics"         // GET: what Prometheus scrapes
)

// Expression is a parameter of PathFlows beside the filters: CEL on the flow in Hubble's
// form, which is called _flow there.
const Expression = "cel-expression"

// Headers of the answer to PathAudit: number and hash (hex) of the last record.
const (
	AuditSeq  = "Demarc-Audit-Seq"
	AuditHash = "Demarc-Audit-Hash"
)

// DefaultServer is where the agent listens unless told otherwise.
const DefaultServer = "unix:///run/demarc-agent/agent.sock"

// Error is an answer that says no.
type Error struct {
	Message string `json:"error"`
	Hint    string `json:"hint,omitempty"`
	Code    int    `json:"-"` // HTTP status
}

func (e *Error) Error() string { return e.Message }

// Status is what the agent knows of itself and of the core.
type Status struct {
	Node    string      `json:"node"`
	Version string      `json:"version"`
	State   proto.State `json:"state"` // of enforcement, as the core found it just now; "unknown" while the core is away
	Core    Core        `json:"core"`
	Policy  *Policy     `json:"policy,omitempty"`
	// Unconfirmed is set while the policy is in force for a time only.
	Unconfirmed *proto.Unconfirmed `json:"unconfirmed,omitempty"`
	// Shadow is set while another policy is asked beside it; without its differences.
	Shadow    *Shadow    `json:"shadow,omitempty"`
	Rings     []Ring     `json:"rings"`
	Inventory *Inventory `json:"inventory,omitempty"`
	Journal   *Journal   `json:"journal,omitempty"`
	Problems  []string   `json:"problems,omitempty"`
	Limits    []string   `json:"limits,omitempty"` // what this host's kernel cannot do; no problem by itself
	Blind     []string   `json:"blind,omitempty"`  // what detection does not see here, or did not
}

// StateUnknown is the state while the core does not answer.
const StateUnknown proto.State = "unknown"

// Core is the trusted core as the agent sees it.
type Core struct {
	Connected bool          `json:"connected"`
	Since     time.Time     `json:"since,omitzero"` // of the connection
	Problem   string        `json:"problem,omitempty"`
	Root      string        `json:"cgroup_root,omitempty"` // directory that the managed tree starts at
	Status    *proto.Status `json:"status,omitempty"`
}

// Policy is the image in force.
type Policy struct {
	Name      string    `json:"name"`
	Version   uint64    `json:"version"`
	Digest    string    `json:"digest"` // hex SHA-256 of the encoded image
	Mode      string    `json:"mode"`
	Since     time.Time `json:"since"`
	Workloads int       `json:"workloads"`
	Crossings int       `json:"crossings"`
}

// Shadow is a policy that live traffic is judged by beside the one in force, and what
// it would have decided otherwise since it came there or the agent was started.
type Shadow struct {
	Name        string       `json:"name"`
	Version     uint64       `json:"version"`
	Digest      string       `json:"digest"`
	Since       time.Time    `json:"since"`
	Until       time.Time    `json:"until"`
	WouldDeny   uint64       `json:"would_deny"`  // verdicts on what passes
	WouldAllow  uint64       `json:"would_allow"` // verdicts on what is denied
	Differences []Difference `json:"differences,omitempty"`
	Unlisted    uint64       `json:"unlisted,omitempty"` // verdicts of kinds beyond those that are told apart
}

// Difference is a kind of flow that a policy in shadow would decide otherwise.
type Difference struct {
	Verdict   abi.Verdict   `json:"verdict"` // would-deny, would-allow
	Reason    abi.Reason    `json:"reason"`
	Direction abi.Direction `json:"direction"` // the side that was judged: egress = From
	From      string        `json:"from"`
	To        string        `json:"to"`
	Port      string        `json:"port"`
	Crossing  string        `json:"crossing,omitempty"`
	Flows     uint64        `json:"flows"`
	First     time.Time     `json:"first"`
	Last      time.Time     `json:"last"`
}

// Ring is one event ring: Made = Received + Lost + what is on its way, counted
// from the rings' creation for Made and Lost, from the agent's start for the others.
type Ring struct {
	Name     string `json:"name"` // denied, allowed
	Made     uint64 `json:"made"`
	Lost     uint64 `json:"lost"`
	Received uint64 `json:"received"`
	Missed   uint64 `json:"missed"` // gaps that the agent saw in the events' numbers
}

// Journal is where flows are kept on disk.
type Journal struct {
	Dir      string `json:"dir"`
	Bytes    int64  `json:"bytes"`
	MaxBytes int64  `json:"max_bytes"`
	Flows    uint64 `json:"flows"`   // written since there is a journal here
	Dropped  uint64 `json:"dropped"` // found no room on disk since the agent's start
}

// Inventory is the file of the `file` provider and what came of it.
type Inventory struct {
	File      string    `json:"file"`
	Read      time.Time `json:"read,omitzero"` // when the content in use was read
	Workloads int       `json:"workloads"`
	Bound     int       `json:"bound"`
	Problems  []string  `json:"problems,omitempty"` // the file's, or why a workload is not bound
}

// Line is one line of a stream of flows: a flow, or a loss of some.
type Line struct {
	*flow.Flow
	Lost  uint64     `json:"lost,omitempty"` // flows that are missing here
	Where *flow.Loss `json:"where,omitempty"`
}

// Identity is one identity of the active image.
type Identity struct {
	Identity  uint32   `json:"identity" yaml:"identity"`
	Workload  string   `json:"workload,omitempty" yaml:"workload,omitempty"`
	Zone      string   `json:"zone,omitempty" yaml:"zone,omitempty"`
	Reserved  string   `json:"reserved,omitempty" yaml:"reserved,omitempty"` // unmanaged, pending
	SPIFFE    string   `json:"spiffe,omitempty" yaml:"spiffe,omitempty"`
	Roles     []string `json:"roles,omitempty" yaml:"roles,omitempty"`
	Selectors []string `json:"selectors,omitempty" yaml:"selectors,omitempty"`
	// Quarantined is until when it has its forensic crossings only.
	Quarantined *time.Time `json:"quarantined,omitempty" yaml:"quarantined,omitempty"`
	Bindings    int        `json:"bindings" yaml:"bindings"`                   // cgroups that have it
	Cgroups     []string   `json:"cgroups,omitempty" yaml:"cgroups,omitempty"` // their paths, the topmost ones, at most 16
}

// Name is the identity in one word.
func (i Identity) Name() string {
	if i.Reserved != "" {
		return i.Reserved
	}
	return i.Zone + "/" + i.Workload
}

// Zone is one zone of the active image.
type Zone struct {
	Name      string   `json:"name" yaml:"name"`
	Trust     uint16   `json:"trust" yaml:"trust"`
	Unmanaged bool     `json:"unmanaged,omitempty" yaml:"unmanaged,omitempty"` // unmanaged processes are here
	Workloads []string `json:"workloads,omitempty" yaml:"workloads,omitempty"`
	Networks  []string `json:"networks,omitempty" yaml:"networks,omitempty"`
	Bindings  int      `json:"bindings" yaml:"bindings"` // cgroups of its workloads
}
