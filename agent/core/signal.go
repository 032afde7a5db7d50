package core

import (
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
)

// observers are the programs that only observe: none of them can change a verdict,
// by its kind or because it returns 1 in every case. They are not pinned and end with
// the core.
type observers struct {
	links  map[string]link.Link
	inside *ebpf.Map  // who looks into packets: egress calls it for few, which may pass
	survey *link.Iter // over all files; nil = it cannot be had
	blind  []string   // what cannot be seen here, and why
}

// observe loads and attaches what this kernel takes, at tracepoints and at the managed
// root. What it does not is a limit of detection, and no error. Without packets no
// packet is looked at.
func observe(o *objects, dir string, packets bool, types *btf.Cache) *observers {
	all := &observers{links: map[string]link.Link{}, inside: o.Maps["observers"]}
	all.sealPackets() // one of a core that crashed may still look
	spec, err := loadSignal()
	if err != nil {
		all.blind = append(all.blind, fmt.Sprintf("read observers: %v", err))
		return all
	}
	if !packets {
		delete(spec.Programs, "payload")
		all.blind = append(all.blind, `payload: the configuration says "observe_packets": false`)
	}
	shared := maps.Clone(o.Maps)
	maps.DeleteFunc(shared, func(name string, _ *ebpf.Map) bool { return spec.Maps[name] == nil || !kept(name) })
	c, errs := load(spec, shared, types)
	defer c.Close()
	for _, name := range sortedKeys(spec.Programs) {
		err := errors.Join(errs[""], errs[name])
		if err != nil {
			err = fmt.Errorf("load %w", err)
		} else {
			err = all.attach(c.Programs[name], spec.Programs[name], dir)
		}
		if err != nil {
			all.blind = append(all.blind, fmt.Sprintf("%s: %v", name, err))
		}
	}
	return all
}

func (a *observers) attach(p *ebpf.Program, spec *ebpf.ProgramSpec, dir string) (err error) {
	var l link.Link
	if spec.AttachType == ebpf.AttachTraceIter {
		a.survey, err = link.AttachIter(link.IterOptions{Program: p})
	} else if spec.Name == "payload" {
		err = a.inside.Put(uint32(0), p)
	} else if l, err = attachProgram(p, spec, dir, 0); err == nil {
		a.links[spec.Name] = l
	}
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	return nil
}

// surveyEvery is after how many looks of the upkeep a round is made.
const surveyEvery = 5

// look makes a round over all files, in which what lasts is seen. It takes a fraction
// of a microsecond for each.
func (a *observers) look() error {
	if a.survey == nil {
		return nil
	}
	_, err := walk(a.survey)
	return err
}

// resumed says for how long, at most, nobody observed before: a former core's observers
// ended after its last round.
func (a *observers) resumed(o *objects) error {
	var last uint64
	if err := o.Maps["surveyed_at"].Lookup(uint32(0), &last); err != nil {
		return fmt.Errorf("read when the last round was: %w", err)
	}
	if now := uint64(bootTime()); last != 0 && now > last {
		a.blind = append(a.blind, fmt.Sprintf("what tasks and connections did for at most %v until %s, when no core ran",
			time.Duration(now-last).Round(100*time.Millisecond), time.Now().UTC().Format(time.RFC3339)))
	}
	return nil
}

// owns says whether a program at a hook is one of these.
func (a *observers) owns(id ebpf.ProgramID) bool {
	for _, l := range a.links {
		if info, err := l.Info(); err == nil && info.Program == id {
			return true
		}
	}
	return false
}

// sealPackets lets nobody look into packets.
func (a *observers) sealPackets() {
	_ = a.inside.Delete(uint32(0)) // there may be nobody
}

func (a *observers) close() {
	if a == nil {
		return
	}
	a.sealPackets()
	closeAll(a.links)
	if a.survey != nil {
		_ = a.survey.Close()
	}
}

// blindness is what cannot be seen.
func (a *observers) blindness() []string {
	if a == nil {
		return nil
	}
	return a.blind
}
