// Package agent is the unprivileged side of demarc on a node: it reads what the
// kernel reports, names it, shows it, and asks the trusted core for changes.
//
// It holds no right that could change a verdict. What it does wrong can lose events
// or mislabel what the inventory names, and nothing else.
package agent

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/demarc/demarc/agent/coreclient"
	"github.com/demarc/demarc/agent/journal"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/exporter"
	"github.com/demarc/demarc/identity"
	"github.com/demarc/demarc/identity/cri"
	"github.com/demarc/demarc/identity/kubernetes"
)

// Agent is a configured agent. Make one with New.
type Agent struct {
	config  *Config
	log     *zap.Logger
	service *service
	tasks   []Task
}

// New prepares an agent. It reads the inventory, whose errors the user should mend
// before anything starts, and starts nothing yet.
func New(c *Config, log *zap.Logger) (*Agent, error) {
	dial := func(ctx context.Context) (core, error) {
		if err := safePlace(c.Core); err != nil {
			return nil, err
		}
		return coreclient.Dial(ctx, c.Core)
	}
	return build(c, log, newLink(dial, openMaps, log))
}

func build(c *Config, log *zap.Logger, l *link) (*Agent, error) {
	a := &Agent{config: c, log: log, tasks: []Task{l}}
	a.service = &service{node: c.Node, server: c.Server, since: time.Now(), link: l, cgroups: &cgroups{}, log: log}
	s := a.service
	if c.Inventory != "" {
		file := identity.NewFile(c.Inventory)
		if err := file.Load(); err != nil {
			return nil, err
		}
		s.binder = newBinder(l, file, log)
		a.tasks = append(a.tasks, file, s.binder)
	}
	if c.Runtime != "" {
		runtime := cri.New(c.Runtime, s.managed)
		s.binder = newBinder(l, runtime, log)
		a.tasks = append(a.tasks, runtime, s.binder)
	}
	if c.Kubernetes != nil {
		pods := kubernetes.New(*c.Kubernetes, func() string { return l.view().Root })
		s.binder = newBinder(l, pods, log)
		a.tasks = append(a.tasks, pods, s.binder)
	}
	s.detection = newDetection(c, l, s.resolver(), log)
	if c.State != "" {
		s.detection.file = newFindingsFile(c.State)
	}
	if c.Detect != nil && c.Detect.Log.File != "" {
		var err error
		if s.detection.sink, err = openFindingsLog(c.Detect.Log); err != nil {
			return nil, err
		}
	}
	if c.Detect != nil && c.Detect.Record != "" {
		var err error
		if s.detection.record, err = openRecording(c.Detect.Record); err != nil {
			return nil, err
		}
	}
	a.tasks = append(a.tasks, s.detection)
	s.metrics = &metrics{link: l, binder: s.binder, detection: s.detection}
	if c.Metrics != "" {
		server, err := exporter.NewServer(c.Metrics, c.WebConfig, s.metrics)
		if err != nil {
			return nil, err
		}
		a.tasks = append(a.tasks, server)
	}
	a.tasks = append(a.tasks, newServer(c.Server, s.routes(), s, log))
	return a, nil
}

// Run works until ctx ends; ready is called once everything is up. The core may be
// away then, and come and go: the agent stays.
func (a *Agent) Run(ctx context.Context, ready func()) error {
	if err := a.openJournal(); err != nil {
		return err
	}
	return runTasks(ctx, ready, a.tasks...)
}

// openJournal opens the journal, if there is one, before anything is read that belongs
// in it. Where it ends is where the reading of the rings goes on, so that what came
// between is known to be lost.
func (a *Agent) openJournal() error {
	if a.config.Journal == "" {
		return nil
	}
	l := a.service.link
	j, err := journal.Open(journal.Options{
		Dir: a.config.Journal, MaxSize: a.config.JournalSize, Store: l.store, Resolver: a.service.resolver(), Log: a.log,
	})
	if err != nil {
		return err
	}
	a.service.journal, a.service.metrics.journal, l.born = j, j, j.Born
	for ring := range record.Rings {
		id, places := j.Resume(ring)
		for _, p := range places {
			l.resume[ring].Resume(p.CPU, p.Seq)
		}
		l.resumed[ring] = id
	}
	// Before the link, which closes the store at its end; and so the first to be ready.
	a.tasks = append([]Task{j}, a.tasks...)
	return nil
}
