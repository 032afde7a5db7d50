package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"regexp"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/envelope"
	"github.com/demarc/demarc/policy/image"
)

type applyOptions struct {
	file   string
	output string
}

func newApplyCommand(env *environment) *cobra.Command {
	var o applyOptions
	c := &cobra.Command{
		Use:   "apply FILE|IMAGE",
		Short: "Put a policy in force",
		Long: `Put a policy in force: a policy file, which is checked and built first, or an
image that "demarc policy build" made, signed or not. "-" reads from standard input. What cannot
be applied changes nothing.`,
		Args: oneArgument("file"),
		RunE: func(c *cobra.Command, args []string) error {
			o.file = args[0]
			return applyRun(c.Context(), env, o)
		},
	}
	outputFlag(c, &o.output, "text", "json")
	return c
}

func applyRun(ctx context.Context, env *environment, o applyOptions) error {
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	img, err := loadImage(env, o.file)
	if err != nil {
		return err
	}
	s, err := client.Apply(ctx, img)
	if err != nil {
		return fmt.Errorf("apply %s: %w", o.file, err)
	}
	return printChange(env, o.output, "applied", s)
}

// signedStart is how an envelope begins; no policy does.
var signedStart = regexp.MustCompile(`^\s*\{\s*"(payload|payloadType|signatures)"`)

// isImage says whether something is an image, bare or in an envelope.
func isImage(b []byte) bool { return bytes.HasPrefix(b, []byte(image.Magic)) || signedStart.Match(b) }

// loadImage reads a policy or an image, and returns an image as it was read.
func loadImage(env *environment, file string) ([]byte, error) {
	src, err := readInput(env, file)
	if err != nil {
		return nil, err
	}
	if isImage(src) {
		return src, nil
	}
	p, err := policy.Parse(file, src)
	if err != nil {
		return nil, err
	}
	return policy.Build(p)
}

// readInput reads a file, or standard input for "-".
func readInput(env *environment, file string) ([]byte, error) {
	if file != "-" {
		return policy.ReadFileUpTo(file, envelope.MaxSize)
	}
	b, err := io.ReadAll(io.LimitReader(env.Stdin, envelope.MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read standard input: %w", err)
	}
	return b, nil
}

type rollbackOptions struct{ output string }

func newRollbackCommand(env *environment) *cobra.Command {
	var o rollbackOptions
	c := &cobra.Command{
		Use:   "rollback",
		Short: "Put the previous policy in force again",
		Args:  noArguments,
		RunE:  func(c *cobra.Command, _ []string) error { return rollbackRun(c.Context(), env, o) },
	}
	outputFlag(c, &o.output, "text", "json")
	return c
}

func rollbackRun(ctx context.Context, env *environment, o rollbackOptions) error {
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	s, err := client.Rollback(ctx)
	if err != nil {
		return fmt.Errorf("roll back: %w", err)
	}
	return printChange(env, o.output, "rolled back to", s)
}

// printChange says what is in force after a change.
func printChange(env *environment, form, verb string, s *api.Status) error {
	if form == "json" {
		return document(env.Stdout, form, s)
	}
	name := "no policy"
	if p := s.Policy; p != nil {
		name = fmt.Sprintf("%s version %d (%s, %s)", p.Name, p.Version, plural(p.Workloads, "workload"), plural(p.Crossings, "crossing"))
	}
	if _, err := fmt.Fprintf(env.Stdout, "%s %s: %s\n", verb, name, s.State); err != nil {
		return err
	}
	for _, p := range s.Problems {
		fmt.Fprintf(env.Stderr, "problem: %s\n", p)
	}
	return nil
}
