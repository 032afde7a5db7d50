package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
)

type quarantineOptions struct {
	changeOptions
	lasting time.Duration
	reason  string
}

func newQuarantineCommand(env *environment) *cobra.Command {
	var o quarantineOptions
	c := &cobra.Command{
		Use:   "quarantine WORKLOAD",
		Short: "Leave a workload its forensic crossings only, for a time",
		Long: `Leave a workload its forensic crossings only, for a time.

Its other live connections are cut. The kernel ends it by itself when the time is
over, also if no part of demarc runs by then. A crossing is forensic if the policy
says forensic: true. A workload with the role management is never quarantined.`,
		Example:           "  demarc quarantine api --for 1h --reason \"ticket 4711: scans the data zone\"",
		Args:              oneArgument("WORKLOAD"),
		ValidArgsFunction: completeFromAgent(env, "workload"),
		RunE: func(c *cobra.Command, args []string) error {
			if o.lasting <= 0 {
				return usagef("say for how long: --for 1h")
			}
			if o.reason == "" {
				return usagef("say why: --reason \"ticket 4711\"")
			}
			return quarantineRun(c.Context(), env, args[0], o)
		},
	}
	c.Flags().DurationVar(&o.lasting, "for", 0, "how long, for example 1h")
	c.Flags().StringVar(&o.reason, "reason", "", "why, for the audit log and `demarc status`")
	outputFlag(c, &o.output, "text", "json")
	return c
}

func quarantineRun(ctx context.Context, env *environment, workload string, o quarantineOptions) error {
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	s, err := client.Quarantine(ctx, workload, o.lasting, o.reason)
	if err != nil {
		return fmt.Errorf("quarantine %s: %w", workload, err)
	}
	return printQuarantines(env, o.output, s)
}

func newReleaseCommand(env *environment) *cobra.Command {
	var o changeOptions
	c := &cobra.Command{
		Use:               "release WORKLOAD",
		Short:             "End a workload's quarantine",
		Args:              oneArgument("WORKLOAD"),
		ValidArgsFunction: completeFromAgent(env, "workload"),
		RunE: func(c *cobra.Command, args []string) error {
			return releaseRun(c.Context(), env, args[0], o)
		},
	}
	outputFlag(c, &o.output, "text", "json")
	return c
}

func releaseRun(ctx context.Context, env *environment, workload string, o changeOptions) error {
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	s, err := client.Release(ctx, workload)
	if err != nil {
		return fmt.Errorf("release %s: %w", workload, err)
	}
	return printQuarantines(env, o.output, s)
}

// printQuarantines says who is quarantined now.
func printQuarantines(env *environment, form string, s *api.Status) error {
	if form == "json" {
		return document(env.Stdout, form, s)
	}
	p := printer{w: env.Stdout}
	if s.Core.Status == nil || len(s.Core.Status.Quarantines) == 0 {
		p.row("Quarantine", "nobody")
		return p.err
	}
	for _, q := range s.Core.Status.Quarantines {
		p.row("Quarantine", "%s", quarantineText(q))
	}
	return p.err
}

func quarantineText(q proto.Quarantine) string {
	name := q.Workload
	if name == "" {
		name = fmt.Sprintf("identity %d", q.Identity)
	}
	how := ""
	if q.Automatic {
		how = " (automatic)"
	}
	return fmt.Sprintf("%s until %s%s: %s", name, q.Until.Local().Format(time.DateTime), how, q.Reason)
}
