package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/flow"
)

type statusOptions struct {
	output  string
	wait    string
	timeout time.Duration
}

func newStatusCommand(env *environment) *cobra.Command {
	var o statusOptions
	c := &cobra.Command{
		Use:   "status",
		Short: "Show whether the policy is enforced",
		Long: `Show whether the policy is enforced, as the core finds it at this moment.

Exit code 0 means enforcing or observing without a problem; with --wait, that the
state was reached in time.`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return statusRun(c.Context(), env, o) },
	}
	outputFlag(c, &o.output, "text", "json")
	states := []string{string(proto.StateEnforcing), string(proto.StateObserving), string(proto.StateIdle), string(proto.StateDegraded)}
	c.Flags().Var(&choice{&o.wait, states}, "wait", "wait for a `state`: enforcing, observing, idle or degraded")
	complete(c, "wait", states...)
	c.Flags().DurationVar(&o.timeout, "timeout", time.Minute, "how long --wait waits")
	return c
}

func statusRun(ctx context.Context, env *environment, o statusOptions) error {
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	var s *api.Status
	if o.wait == "" {
		s, err = client.Status(ctx)
	} else {
		s, err = awaitState(ctx, client, proto.State(o.wait), o.timeout)
	}
	if s != nil {
		show := printStatus
		if o.output == "json" {
			show = func(w io.Writer, s *api.Status) error { return document(w, "json", s) }
		}
		if err := show(env.Stdout, s); err != nil {
			return err
		}
	}
	if err != nil {
		return err
	}
	healthy := (s.State == proto.StateEnforcing || s.State == proto.StateObserving) && len(s.Problems) == 0
	if o.wait == "" && !healthy {
		return exitError{code: exitFailed}
	}
	return nil
}

// awaitState asks until the state is reached. On a timeout it returns the last
// status, if any, and why it gave up.
func awaitState(ctx context.Context, client *api.Client, want proto.State, timeout time.Duration) (*api.Status, error) {
	deadline, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var last *api.Status
	var problem error
	for {
		s, err := client.Status(deadline)
		switch {
		case err == nil && s.State == want:
			return s, nil
		case err == nil:
			last, problem = s, nil
		case errors.Is(err, api.ErrPermission):
			return nil, err
		case deadline.Err() == nil:
			problem = err
		}
		select {
		case <-ctx.Done():
			return last, ctx.Err()
		case <-deadline.Done():
			if problem != nil {
				return last, fmt.Errorf("wait for %s: gave up after %s: %w", want, timeout, problem)
			}
			return last, fmt.Errorf("wait for %s: gave up after %s", want, timeout)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func printStatus(w io.Writer, s *api.Status) error {
	p := printer{w: w}
	p.row("State", "%s", s.State)
	if s.Policy != nil {
		p.row("Policy", "%s version %d, %s, since %s", s.Policy.Name, s.Policy.Version, s.Policy.Mode, s.Policy.Since.Local().Format(time.DateTime))
		p.row("", "%s, %s, digest %.12s", plural(s.Policy.Workloads, "workload"), plural(s.Policy.Crossings, "crossing"), s.Policy.Digest)
		if st := s.Core.Status; st != nil && st.Active != nil && st.Active.Signer != "" {
			p.row("", "signed by %.16s", st.Active.Signer)
		}
	} else if s.State == api.StateUnknown {
		p.row("Policy", "unknown; what was in force stays in force")
	} else {
		p.row("Policy", "none")
	}
	if s.Unconfirmed != nil {
		p.row("Unconfirmed", "%s, unless `demarc confirm` comes before", comesBack(s.Unconfirmed))
	}
	if s.Shadow != nil {
		p.row("Shadow", "%s", shadowText(s.Shadow))
	}
	if st := s.Core.Status; st != nil && st.Previous != nil {
		p.row("Rollback", "to %s version %d", st.Previous.Name, st.Previous.Version)
	}
	if st := s.Core.Status; st != nil {
		for _, q := range st.Quarantines {
			p.row("Quarantine", "%s", quarantineText(q))
		}
	}
	p.row("Node", "%s, agent %s", s.Node, s.Version)
	switch st := s.Core.Status; {
	case st != nil:
		attached := 0
		for _, l := range st.Links {
			if l.Attached {
				attached++
			}
		}
		p.row("Core", "connected since %s, %d of %d programs attached", s.Core.Since.Local().Format(time.DateTime), attached, len(st.Links))
	case s.Core.Connected:
		p.row("Core", "connected, no answer")
	default:
		p.row("Core", "not connected")
	}
	for _, r := range s.Rings {
		if !s.Core.Connected {
			break // only the kernel knows
		}
		p.row("Events", "%s: %d made, %d lost", r.Name, r.Made, r.Lost)
	}
	if i := s.Inventory; i != nil {
		p.row("Inventory", "%s: %s, %d bound", i.File, plural(i.Workloads, "workload"), i.Bound)
	}
	for _, problem := range s.Problems {
		p.row("Problem", "%s", problem)
	}
	for _, limit := range s.Limits {
		p.row("Limit", "%s", limit)
	}
	for _, what := range s.Blind {
		p.row("Not seen", "%s", what)
	}
	return p.err
}

// printer writes labelled rows; its first error stays.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) row(label, format string, args ...any) {
	if p.err != nil {
		return
	}
	if label != "" {
		label += ":"
	}
	// Names of files and cgroups end up here too: nothing may reach the terminal raw.
	_, p.err = fmt.Fprintf(p.w, "%-11s %s\n", label, flow.Escape(fmt.Sprintf(format, args...)))
}
