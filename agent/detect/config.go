package detect

import (
	"fmt"
	"os"
	"slices"
	"sort"
	"time"

	"github.com/demarc/demarc/internal/yamlfile"
)

// Mode says what is done about a finding of a technique.
type Mode string

const (
	Off       Mode = "off"       // it is not reported
	Advise    Mode = "advise"    // it is reported
	Automatic Mode = "automatic" // and the workload is quarantined, if enough speaks for it
)

// Config is the section `detect` of the agent's configuration. Every threshold has
// a source in docs/detection.md. Distinct means different ones within the time.
type Config struct {
	Mode       Mode            `yaml:"mode"`       // of techniques that modes does not name
	Modes      map[string]Mode `yaml:"modes"`      // by technique: T1046, T1021.004
	Quarantine Quarantine      `yaml:"quarantine"` // how automatic containment goes about it
	Log        Log             `yaml:"log"`
	Record     string          `yaml:"record"` // a file for every event that detectors are given; "" = none

	PortScan   Scan           `yaml:"portScan"`
	HostSweep  Scan           `yaml:"hostSweep"`
	SlowScan   SlowScan       `yaml:"slowScan"`
	Spread     Spread         `yaml:"spread"`
	FanOut     Scan           `yaml:"fanOut"` // distinct hosts on a port for administration
	NewEdge    NewEdge        `yaml:"newEdge"`
	Upward     Scan           `yaml:"upward"` // denied contacts with a more trusted zone
	BruteForce BruteForce     `yaml:"bruteForce"`
	Forgery    Scan           `yaml:"forgery"`  // stale proofs; any other bad proof is certain
	Metadata   MetadataConfig `yaml:"metadata"` // dial-outs to the cloud's metadata service
	Chain      ChainConfig    `yaml:"chain"`
	Relay      RelayConfig    `yaml:"relay"`
	Transfer   TransferConfig `yaml:"transfer"`
	DNS        DNSConfig      `yaml:"dns"`
	ICMP       ICMPConfig     `yaml:"icmp"`
	SSHPorts   []uint16       `yaml:"sshPorts"` // where an SSH banner is expected
}

// Quarantine bounds automatic containment.
type Quarantine struct {
	For     time.Duration `yaml:"for"`     // how long
	Limit   int           `yaml:"limit"`   // workloads within Within
	Within  time.Duration `yaml:"within"`  //
	Signals int           `yaml:"signals"` // independent ones that are needed where none is certain
}

// Log is a file of findings, one JSON object a line.
type Log struct {
	File string `yaml:"file"` // "" = none
	Form string `yaml:"form"` // json or ocsf
}

// Scan is a number of distinct things within a time.
type Scan struct {
	Count  int           `yaml:"count"`
	Within time.Duration `yaml:"within"`
}

// SlowScan is a threshold random walk over first contacts.
type SlowScan struct {
	Failures int           `yaml:"failures"` // net failed first contacts at which it is found
	Certain  int           `yaml:"certain"`  // at which its severity is medium
	Within   time.Duration `yaml:"within"`   // how long a contact is no first one again
}

// Spread is many workloads that fail together.
type Spread struct {
	Identities int           `yaml:"identities"` // distinct ones that failed somewhere
	Contacts   int           `yaml:"contacts"`   // distinct failed contacts, all together
	Within     time.Duration `yaml:"within"`
}

// NewEdge is a use of a crossing that nobody made of it before.
type NewEdge struct {
	Learn time.Duration `yaml:"learn"` // from a workload's first flow on, and after a change of the policy
	Drift int           `yaml:"drift"` // edges that one workload may learn a day
}

// BruteForce counts attempts to log in.
type BruteForce struct {
	Count    int           `yaml:"count"`    // connections to one service
	Total    int           `yaml:"total"`    // connections to any
	Within   time.Duration `yaml:"within"`   //
	Services []uint16      `yaml:"services"` // TCP ports on which somebody logs in
}

// MetadataConfig names the crossings that are meant to reach a metadata service.
type MetadataConfig struct {
	Declared []string `yaml:"declared"`
}

// ChainConfig is a number of hops of a remote session.
type ChainConfig struct {
	Note  int `yaml:"note"`  // hops that are noted
	Alert int `yaml:"alert"` // hops that are an alert
}

// RelayConfig is a process that hands on what it receives.
type RelayConfig struct {
	Bytes  uint64        `yaml:"bytes"`  // that it sent on and got back, at least
	Unlike float64       `yaml:"unlike"` // share of all bytes that one side alone may have
	Times  int           `yaml:"times"`  // so often within; a time is some seconds, or a process's life
	Exact  float64       `yaml:"exact"`  // share up to which once is enough
	Typed  uint64        `yaml:"typed"`  // small messages that it handed on one way, at least, in so many times
	Within time.Duration `yaml:"within"`
}

// TransferConfig is a file on an edge for administration.
type TransferConfig struct {
	Bytes  uint64  `yaml:"bytes"`  // in one direction, at least
	OneWay float64 `yaml:"oneWay"` // share of all bytes that goes that way
	Factor float64 `yaml:"factor"` // times what the edge usually carries
}

// DNSConfig bounds what names a workload asks for.
type DNSConfig struct {
	Name   int           `yaml:"name"`   // bytes of a name
	Label  int           `yaml:"label"`  // bytes of a label
	Count  int           `yaml:"count"`  // long names, or distinct ones, within
	Within time.Duration `yaml:"within"` //
}

// ICMPConfig bounds echo.
type ICMPConfig struct {
	Payload int           `yaml:"payload"` // bytes
	Count   int           `yaml:"count"`   // such packets within
	Within  time.Duration `yaml:"within"`
}

// DefaultConfig is what holds where the configuration says nothing.
func DefaultConfig() *Config {
	return &Config{
		Mode:       Advise,
		Quarantine: Quarantine{For: time.Hour, Limit: 2, Within: time.Hour, Signals: 2},
		Log:        Log{Form: "json"},
		PortScan:   Scan{15, 5 * time.Minute},
		HostSweep:  Scan{25, 5 * time.Minute},
		SlowScan:   SlowScan{Failures: 4, Certain: 10, Within: 24 * time.Hour},
		Spread:     Spread{Identities: 4, Contacts: 8, Within: time.Hour},
		FanOut:     Scan{10, 24 * time.Hour},
		NewEdge:    NewEdge{Learn: 24 * time.Hour, Drift: 32},
		Upward:     Scan{3, 5 * time.Minute},
		BruteForce: BruteForce{Count: 10, Total: 30, Within: 15 * time.Second, Services: []uint16{21, 22, 23, 3389, 5900}},
		Forgery:    Scan{3, 5 * time.Minute},
		Chain:      ChainConfig{Note: 2, Alert: 3},
		Relay:      RelayConfig{Bytes: 4096, Unlike: 0.05, Times: 3, Exact: 0.01, Typed: 60, Within: 10 * time.Minute},
		Transfer:   TransferConfig{Bytes: 8 << 20, OneWay: 0.9, Factor: 8},
		DNS:        DNSConfig{Name: 52, Label: 30, Count: 100, Within: 5 * time.Minute},
		ICMP:       ICMPConfig{Payload: 64, Count: 10, Within: time.Minute},
		SSHPorts:   []uint16{22},
	}
}

// mostCounted bounds what a threshold can make the agent remember of one party.
const mostCounted = 256

// Problem is a setting that makes no sense, with its path below `detect`.
type Problem struct{ Path, Hint, Message string }

// Check says what of a configuration makes no sense: nil, or the first *Problem.
func (c *Config) Check() *Problem {
	modes := []Mode{Off, Advise, Automatic}
	if !slices.Contains(modes, c.Mode) {
		return &Problem{"mode", "use off, advise or automatic", fmt.Sprintf("unknown mode %q", c.Mode)}
	}
	names := make([]string, 0, len(c.Modes))
	for name := range c.Modes {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		if !slices.ContainsFunc(Techniques, func(t Technique) bool { return t.ID == name }) {
			return &Problem{"modes", "docs/detection.md lists them", fmt.Sprintf("no detector reports technique %q", name)}
		}
		if !slices.Contains(modes, c.Modes[name]) {
			return &Problem{"modes", "use off, advise or automatic", fmt.Sprintf("unknown mode %q of %s", c.Modes[name], name)}
		}
	}
	if c.Log.Form != "json" && c.Log.Form != "ocsf" {
		return &Problem{"log.form", "use json or ocsf", fmt.Sprintf("unknown form %q", c.Log.Form)}
	}
	counts := []struct {
		path  string
		value int
	}{
		{"quarantine.limit", c.Quarantine.Limit}, {"quarantine.signals", c.Quarantine.Signals},
		{"portScan.count", c.PortScan.Count}, {"hostSweep.count", c.HostSweep.Count}, {"slowScan.failures", c.SlowScan.Failures},
		{"slowScan.certain", c.SlowScan.Certain}, {"spread.identities", c.Spread.Identities}, {"spread.contacts", c.Spread.Contacts},
		{"fanOut.count", c.FanOut.Count}, {"newEdge.drift", c.NewEdge.Drift}, {"upward.count", c.Upward.Count},
		{"bruteForce.count", c.BruteForce.Count}, {"bruteForce.total", c.BruteForce.Total}, {"forgery.count", c.Forgery.Count},
		{"chain.note", c.Chain.Note}, {"chain.alert", c.Chain.Alert}, {"dns.name", c.DNS.Name}, {"dns.label", c.DNS.Label},
		{"dns.count", c.DNS.Count}, {"icmp.count", c.ICMP.Count}, {"relay.times", c.Relay.Times},
	}
	for _, n := range counts {
		if n.value < 1 || n.value > mostCounted {
			return &Problem{n.path, fmt.Sprintf("use 1 to %d", mostCounted), fmt.Sprintf("%d is out of bounds", n.value)}
		}
	}
	for _, d := range []struct {
		path  string
		value time.Duration
	}{
		{"quarantine.for", c.Quarantine.For}, {"quarantine.within", c.Quarantine.Within}, {"portScan.within", c.PortScan.Within},
		{"hostSweep.within", c.HostSweep.Within}, {"slowScan.within", c.SlowScan.Within}, {"spread.within", c.Spread.Within},
		{"fanOut.within", c.FanOut.Within}, {"newEdge.learn", c.NewEdge.Learn}, {"upward.within", c.Upward.Within},
		{"bruteForce.within", c.BruteForce.Within}, {"forgery.within", c.Forgery.Within}, {"dns.within", c.DNS.Within}, {"icmp.within", c.ICMP.Within},
		{"relay.within", c.Relay.Within},
	} {
		if d.value <= 0 || d.value > 30*24*time.Hour {
			return &Problem{d.path, "use a duration such as 5m, at most 720h", fmt.Sprintf("%s is out of bounds", d.value)}
		}
	}
	switch {
	case c.Relay.Unlike <= 0 || c.Relay.Unlike > 0.5:
		return &Problem{"relay.unlike", "use more than 0, at most 0.5", fmt.Sprintf("%g is out of bounds", c.Relay.Unlike)}
	case c.Relay.Exact < 0 || c.Relay.Exact > c.Relay.Unlike:
		return &Problem{"relay.exact", "use at least 0, at most relay.unlike", fmt.Sprintf("%g is out of bounds", c.Relay.Exact)}
	case c.Transfer.OneWay <= 0.5 || c.Transfer.OneWay > 1:
		return &Problem{"transfer.oneWay", "use more than 0.5, at most 1", fmt.Sprintf("%g is out of bounds", c.Transfer.OneWay)}
	case c.Transfer.Factor < 1:
		return &Problem{"transfer.factor", "use at least 1", fmt.Sprintf("%g is out of bounds", c.Transfer.Factor)}
	case c.Transfer.Bytes == 0:
		return &Problem{"transfer.bytes", "for example 8388608", "every transfer would be a finding"}
	case c.ICMP.Payload < 1:
		return &Problem{"icmp.payload", "for example 64", "every ping would be a finding"}
	}
	return nil
}

// ReadConfig reads a file that holds what the agent's configuration has below
// `detect`.
func ReadConfig(file string) (*Config, error) {
	src, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read thresholds: %w", err)
	}
	c := DefaultConfig()
	f, err := yamlfile.Decode(file, src, c)
	if err != nil {
		return nil, err
	}
	if p := c.Check(); p != nil {
		return nil, f.Errorf("$."+p.Path, p.Hint, "%s", p.Message)
	}
	return c, nil
}

// mode of a technique; a sub-technique without one of its own has its parent's.
func (c *Config) mode(t Technique) Mode {
	for _, id := range []string{t.ID, t.ID[:min(len(t.ID), len("T0000"))]} {
		if m, ok := c.Modes[id]; ok {
			return m
		}
	}
	return c.Mode
}
