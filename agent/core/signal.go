package core

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// observers are the programs that only observe: at tracepoints, so that none of them
// can change a verdict. They are not pinned and end with the core.
type observers struct {
	links []link.Link
	blind []string // what cannot be seen here, and why
}

// observed says what each program is for, where it cannot be had.
var observed = map[string]string{
	"sock_state": "contacts, failures, chains and listeners of TCP",
	"forked":     "which process goes back to which connection, over fork",
	"executed":   "programs with a connection as standard input, and changes of network namespace",
}

// neverSeen are signals that this version has no source for.
var neverSeen = []string{
	"relay, transfer, banner, dns, icmp, tun, migrate: no source in this version",
	"packet sockets are seen by their frames, not when they are made",
	"a chain is counted over the connections of this kernel only",
}

// observe loads and attaches what this kernel takes. What it does not is a limit of
// detection, and no error.
func observe(o *objects) *observers {
	all := &observers{blind: append([]string(nil), neverSeen...)}
	spec, err := loadSignal()
	if err != nil {
		all.blind = append(all.blind, fmt.Sprintf("read observers: %v", err))
		return all
	}
	programs := spec.Programs
	for _, name := range sortedKeys(programs) {
		spec.Programs = map[string]*ebpf.ProgramSpec{name: programs[name]}
		if err := all.attach(spec, name, o.Maps); err != nil {
			all.blind = append(all.blind, fmt.Sprintf("%s: %v", observed[name], err))
		}
	}
	return all
}

func (a *observers) attach(spec *ebpf.CollectionSpec, name string, maps map[string]*ebpf.Map) error {
	shared := map[string]*ebpf.Map{}
	for m := range spec.Maps {
		if kept(m) {
			shared[m] = maps[m]
		}
	}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared})
	if err != nil {
		return fmt.Errorf("load %w", err)
	}
	defer c.Close()
	l, err := link.AttachTracing(link.TracingOptions{Program: c.Programs[name], AttachType: spec.Programs[name].AttachType})
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	a.links = append(a.links, l)
	return nil
}

func (a *observers) close() {
	if a == nil {
		return
	}
	for _, l := range a.links {
		_ = l.Close()
	}
}

// blindness is what cannot be seen.
func (a *observers) blindness() []string {
	if a == nil {
		return nil
	}
	return a.blind
}
