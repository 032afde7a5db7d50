package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/agent/api"
)

// newRootCommand is the whole command line.
func newRootCommand(env *environment) *cobra.Command {
	root := &cobra.Command{
		Use:   "demarc",
		Short: "Enforce declared crossings between workloads",
		Long: `demarc gives every workload of a host an identity, lets through only the
crossings that a policy declares, and shows what tried to go elsewhere.

Exit codes: 0 good, 1 failed or refused, 2 usage, 3 agent not running,
4 no permission, 130 interrupted; probe has its own.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          noArguments,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	server := cmp.Or(env.Getenv("DEMARC_SERVER"), api.DefaultServer)
	root.PersistentFlags().StringVar(&env.server, "server", server, "agent's `socket` (or DEMARC_SERVER)")
	root.AddCommand(
		newApplyCommand(env), newConfirmCommand(env), newRollbackCommand(env), newShadowCommand(env), newQuarantineCommand(env), newReleaseCommand(env), newStatusCommand(env), newFlowsCommand(env), newTopCommand(env), newFindingsCommand(env),
		newIdentitiesCommand(env), newZonesCommand(env), newImageCommand(env), newPolicyCommand(env),
		newKeysCommand(env), newPreflightCommand(env), newAuditCommand(env), newProbeCommand(env), newProbeCallerCommand(env),
		newVersionCommand(env), newBugreportCommand(env), newDocsCommand(env), newEnterCommand(env),
	)
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	return root
}

// noArguments refuses arguments as a usage error; at the root and in groups those
// are misspelt commands.
func noArguments(c *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case c.HasSubCommands():
		return unknownCommand(c, args[0])
	}
	return usagef("%s takes no arguments, got %q", c.CommandPath(), args[0])
}

func unknownCommand(c *cobra.Command, name string) error {
	c.SuggestionsMinimumDistance = 2 // edits
	msg := fmt.Sprintf("unknown command %q of %s", name, c.CommandPath())
	if near := c.SuggestionsFor(name); len(near) > 0 {
		msg += fmt.Sprintf(", did you mean %s?", strings.Join(near, " or "))
	}
	return usagef("%s", msg)
}

// oneArgument wants exactly one, which is called what in messages.
func oneArgument(what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usagef("%s needs one %s, got %d arguments", c.CommandPath(), what, len(args))
		}
		return nil
	}
}

// group is a command that only holds others.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use: use, Short: short, Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return usagef("%s needs a command", c.CommandPath()) },
	}
	c.AddCommand(commands...)
	return c
}

// outputFlag adds -o with its values; the first one is the default.
func outputFlag(c *cobra.Command, to *string, values ...string) {
	c.Flags().VarP(&choice{to, values}, "output", "o", "output form: "+strings.Join(values, ", "))
	*to = values[0]
	complete(c, "output", values...)
}

// choice is a flag that takes one of a few words.
type choice struct {
	value *string
	words []string
}

func (c *choice) Set(s string) error {
	if !slices.Contains(c.words, s) {
		return fmt.Errorf("use one of %s", strings.Join(c.words, ", "))
	}
	*c.value = s
	return nil
}

func (c *choice) String() string { return *c.value }
func (c *choice) Type() string   { return "FORM" }

// complete offers fixed values for a flag.
func complete(c *cobra.Command, flag string, values ...string) {
	// Only a flag that does not exist is an error.
	if err := c.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err)
	}
}
