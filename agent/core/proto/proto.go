// Package proto is what the core and the agent say to each other: a fixed set of
// bounded messages on a Unix stream socket.
//
// A frame is a 4-byte big-endian length and that many bytes of JSON, decoded
// strictly. Open descriptors travel beside the frame that names them
// (SCM_RIGHTS). The agent asks, the core answers; the core never speaks first.
// The first request on a connection must be Hello.
package proto

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"
)

// Version of the protocol. Both sides must speak the same one.
const Version = 5

// MaxFrame bounds a frame's JSON, in bytes. Images travel as descriptors.
const MaxFrame = 1 << 20

// Op names a request.
type Op string

const (
	OpHello    Op = "hello"    // answer: Welcome and Descriptors
	OpStatus   Op = "status"   // answer: Status
	OpApply    Op = "apply"    // with one descriptor, the image or an envelope around it, or the digest of what was previewed; answer: Status
	OpPrepare  Op = "prepare"  // with one descriptor, the same, which is verified before the answer and made ready behind it, because it will be applied; nothing comes into force
	OpPreview  Op = "preview"  // with one descriptor, the same, which is not applied, and Own; answer: Preview
	OpShadow   Op = "shadow"   // with one descriptor, the same, which is asked beside the one in force; answer: Status
	OpUnshadow Op = "unshadow" // end that; answer: Status
	OpConfirm  Op = "confirm"  // keep the change that waits for it; answer: Status
	OpRollback Op = "rollback" // back to the previous image; answer: Status
	OpImage    Op = "image"    // answer: one descriptor, the active image; refused if there is none
	OpShadowed Op = "shadowed" // the same for the image in shadow
	OpBind     Op = "bind"     // claim that a cgroup path belongs to a workload
	OpUnbind   Op = "unbind"   // withdraw a claim
	OpForget   Op = "forget"   // withdraw every claim that was not made on this connection
	OpAudit    Op = "audit"    // answer: Audit, and the files of the log, the oldest first

	OpQuarantine Op = "quarantine" // an identity keeps its forensic crossings only, for a time; answer: Status
	OpRelease    Op = "release"    // end that; answer: Status
)

// Request is one question.
type Request struct {
	Op       Op     `json:"op"`
	Version  int    `json:"version,omitempty"`  // OpHello
	Path     string `json:"path,omitempty"`     // OpBind, OpUnbind: below the managed root, "/lab/api-1"
	Identity uint32 `json:"identity,omitempty"` // OpBind, OpQuarantine, OpRelease
	Digest   string `json:"digest,omitempty"`   // OpApply: hex SHA-256 of the image that was previewed last, without envelope
	Own      Own    `json:"own,omitzero"`       // OpPreview: what is named first
	Within   int64  `json:"within,omitempty"`   // OpApply: ms until the kernel takes it back unless it is confirmed; 0 = for good

	Spare     int64  `json:"spare,omitempty"`     // OpApply: ms that live connections which the image cuts go on; 0 = they do not
	For       int64  `json:"for,omitempty"`       // OpQuarantine, OpShadow: ms
	Reason    string `json:"reason,omitempty"`    // OpQuarantine
	Automatic bool   `json:"automatic,omitempty"` // OpQuarantine: nobody ordered it
}

// Response is the answer. Error is empty on success; Hint says how to mend it.
type Response struct {
	Error   string   `json:"error,omitempty"`
	Hint    string   `json:"hint,omitempty"`
	Hello   *Hello   `json:"hello,omitempty"`
	Status  *Status  `json:"status,omitempty"`
	Preview *Preview `json:"preview,omitempty"`
	Audit   *Audit   `json:"audit,omitempty"`
}

// Audit is where the audit log ends.
type Audit struct {
	Seq  uint64 `json:"seq"`  // of the last record; 0 = there is none
	Hash string `json:"hash"` // hex, of its line
}

// Hello says what the core is. Its frame carries Descriptors in their order.
type Hello struct {
	Version    int    `json:"version"`
	ABI        int    `json:"abi"`
	CgroupRoot string `json:"cgroup_root"` // directory the managed tree starts at
}

// Descriptors are what the core hands to the agent: open maps, never paths or
// rights. All but the rings are read-only; the rings can only be consumed.
// Whoever receives them closes them.
type Descriptors struct {
	Denied   *os.File // ring of denials and alerts
	Allowed  *os.File // ring of allowed flows
	Signals  *os.File // ring of signals
	Counts   *os.File // abi.CountKey -> per-CPU uint64
	Rings    *os.File // ring number -> per-CPU record.RingState
	Faults   *os.File // record.Fault -> per-CPU uint64
	Bindings *os.File // cgroup id -> abi.Binding
	State    *os.File // 0 -> abi.State
}

// Generation is one image in the kernel.
type Generation struct {
	Slot     int       `json:"slot"`
	Epoch    uint32    `json:"epoch"`
	Name     string    `json:"name"`
	Version  uint64    `json:"version"`
	Digest   string    `json:"digest"`           // hex SHA-256 of the encoded image, without envelope
	Signer   string    `json:"signer,omitempty"` // id of the trusted key that signed it
	Mode     string    `json:"mode"`             // enforce, observe
	Since    time.Time `json:"since"`
	Bindings int       `json:"bindings"` // cgroups with a workload's identity when it was filled
}

// Link is one attached program.
type Link struct {
	Name     string `json:"name"`
	Attached bool   `json:"attached"` // seen in the kernel just now
	Program  string `json:"program"`  // tag of the attached program
	Problem  string `json:"problem,omitempty"`
}

// State of enforcement, in one word.
type State string

const (
	StateIdle      State = "idle"      // no policy was ever applied: nothing is attached
	StateEnforcing State = "enforcing" // every link is attached and a generation decides
	StateObserving State = "observing" // the same, and the policy only observes
	StateDegraded  State = "degraded"  // something that should hold does not; Problems says what
)

// Status is what the core found when it was asked.
type Status struct {
	State       State        `json:"state"`
	Problems    []string     `json:"problems,omitempty"`
	Limits      []string     `json:"limits,omitempty"` // what this machine cannot enforce, and was not asked to
	Active      *Generation  `json:"active,omitempty"`
	Previous    *Generation  `json:"previous,omitempty"`    // what rollback would return to; Slot and Epoch are 0
	Unconfirmed *Unconfirmed `json:"unconfirmed,omitempty"` // the change that waits to be confirmed
	Shadow      *Shadow      `json:"shadow,omitempty"`      // what is asked beside Active
	Links       []Link       `json:"links,omitempty"`
	Claims      int          `json:"claims"` // paths bound by the agent
	Quarantines []Quarantine `json:"quarantines,omitempty"`
	Blind       []string     `json:"blind,omitempty"` // programs that observe which this kernel does not take, and why
	Keys        []TagKey     `json:"keys,omitempty"`
	Proved      time.Time    `json:"proved,omitzero"` // when the canary last proved that the kernel enforces
	Drifts      uint64       `json:"drifts"`          // things found changed since this core started, each look at each counted
}

// Quarantine is an identity that has only its forensic crossings.
type Quarantine struct {
	Identity  uint32    `json:"identity"`
	Workload  string    `json:"workload,omitempty"` // "" = none of the policy in force
	Since     time.Time `json:"since"`
	Until     time.Time `json:"until"`
	Reason    string    `json:"reason"`
	By        string    `json:"by"`
	Automatic bool      `json:"automatic,omitempty"` // nobody ordered it
}

// TagKey is a key of the keyring, without the key.
type TagKey struct {
	Epoch   uint8     `json:"epoch"`
	From    time.Time `json:"from,omitzero"`  // it is sent with; zero = always
	Until   time.Time `json:"until,omitzero"` // tags are good; zero = for ever
	Sending bool      `json:"sending,omitempty"`
}

// Unconfirmed is a change that ends by itself.
type Unconfirmed struct {
	Until    time.Time   `json:"until"`
	Fallback *Generation `json:"fallback,omitempty"` // what comes back then; none = the first policy, which is then only observed
}

// Shadow is an image that live traffic is judged by beside the one in force.
type Shadow struct {
	Generation
	Until time.Time `json:"until"`
}

// MaxOwn bounds the connections that somebody calls his own.
const MaxOwn = 16

// Own are connections through which somebody may be asking; places that are left are zero.
type Own [MaxOwn]Ends

// Ends are the two ends of a TCP connection.
type Ends struct {
	Local  netip.AddrPort `json:"local"`
	Remote netip.AddrPort `json:"remote"`
}

// Holds says whether a connection is among them, seen from either end.
func (o *Own) Holds(e Ends) bool {
	return slices.Contains(o[:], e) || slices.Contains(o[:], Ends{e.Remote, e.Local})
}

// UnmarshalJSON is strict, too: an array would drop what is too much for it.
func (o *Own) UnmarshalJSON(b []byte) error {
	var all []Ends
	if err := Unmarshal(b, &all); err != nil {
		return errors.Unwrap(err) // who called says once more what was being done
	}
	if len(all) > MaxOwn {
		return fmt.Errorf("%d connections of one's own, at most %d", len(all), MaxOwn)
	}
	*o = Own{}
	copy(o[:], all)
	return nil
}

// Preview is what an image would do to live TCP connections.
type Preview struct {
	Cuts  []Cut `json:"cuts,omitempty"` // those of Own, then the oldest ones
	Total int   `json:"total"`
}

// Cut is a connection that would be cut.
type Cut struct {
	Ends           // this host's first
	PID     uint32 `json:"pid"` // of a process that holds it
	Process string `json:"process"`
	Subject uint32 `json:"subject"`           // identity of this end under the image
	Peer    uint32 `json:"peer,omitempty"`    // what the other end proved
	Inbound bool   `json:"inbound,omitempty"` // the other end opened it; false if that is not known
	Reason  string `json:"reason"`
}

// Places lists where each descriptor goes, in the order of the wire.
func (d *Descriptors) Places() []**os.File {
	return []**os.File{&d.Denied, &d.Allowed, &d.Signals, &d.Counts, &d.Rings, &d.Faults, &d.Bindings, &d.State}
}

// Files lists the descriptors in the order of the wire.
func (d *Descriptors) Files() []*os.File {
	var files []*os.File
	for _, place := range d.Places() {
		files = append(files, *place)
	}
	return files
}

// Close closes all of them.
func (d *Descriptors) Close() { CloseFiles(d.Files()) }
