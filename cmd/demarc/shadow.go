package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/agent/api"
)

// shadowDefault is how long a policy is in shadow unless somebody says so.
const shadowDefault = time.Hour

func newShadowCommand(env *environment) *cobra.Command {
	return group("shadow", "What a policy in shadow would decide otherwise", newShadowShowCommand(env), newShadowStopCommand(env))
}

func newShadowShowCommand(env *environment) *cobra.Command {
	var o changeOptions
	c := &cobra.Command{
		Use:   "show",
		Short: "Show what the policy in shadow would decide otherwise",
		Long: `Show what the policy that "demarc apply --shadow" put beside the one in force would
decide otherwise about live traffic, by kind, what it would deny first. The same flow
by flow: demarc flows -f --verdict would-deny --verdict would-allow.

Exit code 0 means that nothing that passes would be denied, 1 that something would.`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return shadowShowRun(c.Context(), env, o) },
	}
	outputFlag(c, &o.output, "table", "json")
	return c
}

func shadowShowRun(ctx context.Context, env *environment, o changeOptions) error {
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	s, err := client.Differences(ctx)
	if err != nil {
		return fmt.Errorf("show shadow: %w", err)
	}
	if o.output == "json" {
		err = document(env.Stdout, o.output, s)
	} else {
		err = printShadow(env, s)
	}
	if err == nil && s.WouldDeny > 0 {
		return exitError{code: exitFailed}
	}
	return err
}

func printShadow(env *environment, s *api.Shadow) error {
	var rows [][]string
	for _, d := range s.Differences {
		rows = append(rows, []string{d.Verdict.String(), d.Direction.String(), d.From, d.To, d.Port, d.Reason.String(), d.Crossing,
			strconv.FormatUint(d.Flows, 10), d.First.UTC().Format(time.RFC3339), d.Last.UTC().Format(time.RFC3339)})
	}
	if len(rows) > 0 {
		if err := table(env.Stdout, []string{"VERDICT", "SIDE", "FROM", "TO", "PORT", "REASON", "CROSSING", "FLOWS", "FIRST", "LAST"}, rows); err != nil {
			return err
		}
	}
	if s.Unlisted > 0 {
		fmt.Fprintf(env.Stdout, "and %s of other kinds\n", plural(int(s.Unlisted), "verdict"))
	}
	_, err := fmt.Fprintln(env.Stdout, shadowText(s))
	return err
}

// shadowText says in one line what is in shadow.
func shadowText(s *api.Shadow) string {
	return fmt.Sprintf("%s version %d until %s: would newly deny %d and newly allow %d", s.Name, s.Version,
		s.Until.Local().Format(time.DateTime), s.WouldDeny, s.WouldAllow)
}

func newShadowStopCommand(env *environment) *cobra.Command {
	var o changeOptions
	c := &cobra.Command{
		Use:   "stop",
		Short: "End the shadow; what is in force stays in force",
		Args:  noArguments,
		RunE:  func(c *cobra.Command, _ []string) error { return shadowStopRun(c.Context(), env, o) },
	}
	outputFlag(c, &o.output, "text", "json")
	return c
}

func shadowStopRun(ctx context.Context, env *environment, o changeOptions) error {
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	s, err := client.Unshadow(ctx)
	if err != nil {
		return fmt.Errorf("stop shadow: %w", err)
	}
	return printChange(env, o.output, "the shadow has ended, in force is", s)
}

// applyShadow puts an image beside the one in force.
func applyShadow(ctx context.Context, env *environment, client *api.Client, img []byte, o applyOptions) error {
	cuts, err := preview(ctx, env, client, img)
	if err != nil {
		return fmt.Errorf("apply %s: %w", o.file, err)
	}
	cuts.printText(env.Stderr)
	s, err := client.Shadow(ctx, img, o.lasting)
	if err != nil {
		return fmt.Errorf("apply %s: %w", o.file, err)
	}
	if o.output == "json" {
		return document(env.Stdout, o.output, s)
	}
	if s.Shadow == nil {
		return fmt.Errorf("apply %s: the shadow has ended already", o.file)
	}
	_, err = fmt.Fprintf(env.Stdout, "in shadow %s\n`demarc shadow show` says what it would deny, `demarc shadow stop` ends it\n", shadowText(s.Shadow))
	return err
}
