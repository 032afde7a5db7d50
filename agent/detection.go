package agent

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/agent/flow"
)

// detection is the task that runs the detectors on what the kernel reports, keeps
// what they find and acts on it.
type detection struct {
	link    *link
	engine  *detect.Engine
	contain *detect.Containment
	found   *detect.Findings
	file    *findingsFile // nil without a state directory
	sink    *findingsLog  // nil unless configured
	record  *recording    // nil unless configured
	log     *zap.Logger
	ready   chan struct{}
	events  *events
	names   *flow.Names // that the engine knows

	mu      sync.Mutex
	lost    uint64 // events that the detectors did not get to see
	problem string // with the files; "" = none
}

func newDetection(c *Config, l *link, r *flow.Resolver, log *zap.Logger) *detection {
	config := c.Detect
	if config == nil {
		config = detect.DefaultConfig()
	}
	contain := &detect.Containment{Config: config, Quarantine: func(workload string, lasting time.Duration, reason string) error {
		return l.quarantine(workload, lasting, reason, true)
	}}
	d := &detection{
		link: l, events: newEvents(l, r), engine: detect.NewEngine(config), contain: contain,
		found: detect.NewFindings(), log: log, ready: make(chan struct{}),
	}
	d.events.plain = d.engine.Plain
	return d
}

func (d *detection) String() string { return "detection" }

// Ready is closed once events are looked at.
func (d *detection) Ready() <-chan struct{} { return d.ready }

// Run looks at events until ctx ends.
func (d *detection) Run(ctx context.Context) error {
	if d.file != nil {
		d.note(d.file.load(d.found))
		defer d.file.close()
	}
	if d.record != nil {
		d.events.plain = nil // it is of everything
	}
	close(d.ready)
	for {
		e, err := d.events.Next(ctx)
		switch {
		case errors.Is(err, io.EOF) || ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		}
		d.follow()
		if d.record != nil {
			if err := d.record.add(e); err != nil {
				d.note(err)
				d.record, d.events.plain = nil, d.engine.Plain // it ends there
			}
		}
		d.see(e)
		if s := e.Signal; s != nil && s.Kind == detect.Lost {
			d.mu.Lock()
			d.lost += s.Count
			d.mu.Unlock()
		}
	}
}

// follow tells the engine of another policy.
func (d *detection) follow() {
	names, _ := d.link.book.Current()
	if names == nil || names == d.names {
		return
	}
	d.names = names
	p := detect.PolicyOf(names.Image)
	d.engine.SetPolicy(p)
	d.events.forget()
	d.contain.Policy = p
}

// see gives an event to the detectors and acts on what they find.
func (d *detection) see(e detect.Event) {
	for _, s := range d.engine.See(e) {
		f, change := d.found.Add(s)
		if change == detect.Nothing && !d.acts(&f) {
			continue
		}
		if action := d.contain.Consider(&f); action != "" {
			if changed, ok := d.found.Act(f.Key, action); ok {
				f, change = changed, max(change, detect.Grown)
			}
		}
		if change == detect.Nothing {
			continue
		}
		if change >= detect.Worse {
			d.log.Info("finding", zap.String("id", f.ID), zap.String("technique", f.Technique.ID), zap.Stringer("severity", f.Severity),
				zap.String("title", f.Title), zap.String("suppressed_by", f.SuppressedBy), zap.String("action", f.Action))
		}
		var err error
		if d.file != nil {
			err = d.file.write(&f)
		}
		if d.sink != nil {
			err = errors.Join(err, d.sink.write(&f))
		}
		d.note(err)
	}
}

// acts says whether another sighting of a finding may lead to an action: it may be
// what was missing for one.
func (d *detection) acts(f *detect.Finding) bool {
	return f.Severity >= detect.Medium && f.SuppressedBy == "" && f.Count < 1024 && d.contain.Automatic(f)
}

// note keeps a problem with the files, for the status; nil clears it.
func (d *detection) note(err error) {
	problem := ""
	if err != nil {
		problem = "findings: " + err.Error()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if problem != "" && problem != d.problem {
		d.log.Warn("keep findings", zap.Error(err))
	}
	d.problem = problem
}

// status returns the problem with the files, and how many events were not looked at.
func (d *detection) status() (problem string, lost uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.problem, d.lost
}

// catchUp waits until the detectors have seen what was received before, but not for
// long: what happens all the time is never all seen.
func (d *detection) catchUp(ctx context.Context) {
	const longest = 2 * time.Second
	for end := time.Now().Add(longest); !d.events.drained() && time.Now().Before(end) && ctx.Err() == nil; {
		time.Sleep(time.Millisecond)
	}
}
