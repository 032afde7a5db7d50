// Package exporter shows the agent's counters to Prometheus.
package exporter

import (
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
)

// Source is what the exporter reads at each scrape.
type Source interface {
	// Snapshot never waits for the core. What cannot be read is left out.
	Snapshot() Snapshot
}

// Snapshot is everything that is exported, at one moment.
type Snapshot struct {
	Connected bool
	Enforcing bool   // every link is attached and an enforcing policy decides
	State     string // one of States
	Policy    *Policy
	Core      *Core     // while its status is known
	Verdicts  []Verdict // each combination of names once
	Maps      []Map     // that can be read
	Bindings  []Bindings
	// Quarantined workloads, each once.
	Quarantined []Party
	Rings       []Ring // while the core is connected
	Faults      *[record.Faults]uint64
	Inventory   *Inventory
	Journal     *Journal // nil without one

	Received   [record.Rings]uint64 // events that the agent read
	Missed     [record.Rings]uint64 // gaps in their numbers
	ReadErrors uint64               // times that the kernel's counters could not be read

	Findings map[detect.Series]uint64 // each once for every severity that it reached
	Unseen   uint64                   // events that no detector looked at
	Applies  Applies
}

// States are the words for the state of enforcement; a snapshot's is one of them.
var States = []string{"idle", "enforcing", "observing", "degraded", "unknown"}

// Core is what the trusted core says of itself.
type Core struct {
	Programs, Attached int
	Problems, Limits   int
	Drifts             uint64    // things found changed since it started
	Proved             time.Time // when the canary last proved that the kernel enforces; zero = never
	Unconfirmed        time.Time // when an unconfirmed change ends; zero = there is none
	Shadow             bool      // another policy is asked beside the one in force
	Keys               []Key
}

// Key is a tag key, by its epoch: 0 to 15.
type Key struct {
	Epoch       uint8
	From, Until time.Time // zero = without a bound
	Sending     bool
}

// Map is how full a map of the kernel is.
type Map struct {
	Name         string
	Entries, Max int
}

// Applies counts what became of images that this agent was asked to apply.
type Applies struct {
	Applied, Refused uint64
	// How long the last one took: the comparison with what it declares, and the core.
	// Zero = there was none.
	Check, Core time.Duration
}

// Policy is the image in force.
type Policy struct {
	Name, Digest, Mode string
	Version            uint64
	Generation         uint32
	Applied            time.Time
	Expires            time.Time // zero = never
	Grants             []Grant   // crossings that end, each name once
}

// Grant is a crossing that ends by itself.
type Grant struct {
	Crossing string
	Until    time.Time
}

// Party is one side of a flow by its declared names; both are empty for a peer
// that proved nothing.
type Party struct{ Zone, Workload string }

// Verdict is a number of equal verdicts.
type Verdict struct {
	Direction           abi.Direction
	Verdict             abi.Verdict
	Reason              abi.Reason
	Crossing            string
	Source, Destination Party
	Count               uint64
}

// Bindings is how many cgroups have an identity.
type Bindings struct {
	Party
	Count int
}

// Ring is what the kernel counts of an event ring.
type Ring struct {
	Name       string
	Made, Lost uint64
}

// Inventory is what became of the inventory file.
type Inventory struct{ Workloads, Bound, Problems int }

// Journal is the flows on disk: those written since there is a journal, and those that
// found no room since the agent started.
type Journal struct {
	Bytes, Max       int64
	Written, Dropped uint64
}
