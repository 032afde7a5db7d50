package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/envelope"
	"github.com/demarc/demarc/policy/image"
)

type applyOptions struct {
	file   string
	output string
	within time.Duration
	now    bool
	dryRun bool

	spare   time.Duration // live connections that it would cut go on
	shadow  bool
	lasting time.Duration // of the shadow
}

// trialDefault is how long a change waits for its confirmation when a person makes
// it.
const trialDefault = time.Minute

func newApplyCommand(env *environment) *cobra.Command {
	var o applyOptions
	c := &cobra.Command{
		Use:   "apply FILE|IMAGE",
		Short: "Put a policy in force",
		Long: `Put a policy in force: a policy file, which is checked and built first, or an
image that "demarc policy build" made, signed or not. "-" reads from standard
input. What cannot be applied changes nothing.

With --confirm-within the kernel itself takes the change back when the time is
over, whatever has become of demarc by then, unless "demarc confirm" came before.
On a terminal that is the default, with one minute, and the command asks; --now
applies for good. In scripts a change is for good unless --confirm-within is given.

First it names the live TCP connections that the change would cut, those through
which this very command was called before all others: those that a process above it
holds, as sshd, and the one that SSH_CONNECTION names. A change that would cut one
of these is refused unless it is confirmed later, or --now says that it is meant.
Where neither shows by what it was called, as in tmux, it says so.

With --grandfather these connections go on for a time and are cut then, by the kernel
itself; new ones of the same kind are refused at once.

With --shadow nothing comes into force: live traffic is judged by the policy beside
the one in force, for a time, and what it would decide otherwise is told: by demarc
shadow show, demarc flows and demarc_verdicts_total. To apply it ends that.`,
		Example: `  demarc apply shop.yaml
  demarc apply shop.yaml --dry-run
  demarc apply shop.yaml --grandfather 30m
  demarc apply shop.yaml --shadow --for 24h
  demarc apply shop.img --confirm-within 5m && ./smoke-test && demarc confirm`,
		Args: oneArgument("file"),
		RunE: func(c *cobra.Command, args []string) error {
			o.file = args[0]
			if o.now && c.Flags().Changed("confirm-within") {
				return usagef("--now and --confirm-within exclude each other")
			}
			if c.Flags().Changed("confirm-within") && o.within <= 0 {
				return usagef("--confirm-within: %v is no time to confirm anything in; use --now to apply for good", o.within)
			}
			switch trial := o.now || o.dryRun || o.spare != 0 || c.Flags().Changed("confirm-within"); {
			case o.shadow && trial:
				return usagef("--shadow puts nothing in force: leave out --now, --confirm-within, --grandfather and --dry-run")
			case !o.shadow && c.Flags().Changed("for"):
				return usagef("--for says how long --shadow lasts; --confirm-within 60s takes a change back")
			case c.Flags().Changed("grandfather") && o.spare <= 0:
				return usagef("--grandfather: %v is no time for anything to go on", o.spare)
			case o.lasting <= 0:
				return usagef("--for: %v is no time to see anything in", o.lasting)
			}
			return applyRun(c.Context(), env, o)
		},
	}
	c.Flags().DurationVar(&o.within, "confirm-within", 0, "take the change back after this time unless it is confirmed")
	c.Flags().BoolVar(&o.now, "now", false, "apply for good, without a question")
	c.Flags().BoolVar(&o.dryRun, "dry-run", false, "only name the connections that the change would cut")
	c.Flags().DurationVar(&o.spare, "grandfather", 0, "let live connections that the change cuts go on for this time")
	c.Flags().BoolVar(&o.shadow, "shadow", false, "put nothing in force, but tell what would be decided otherwise")
	c.Flags().DurationVar(&o.lasting, "for", shadowDefault, "how long --shadow lasts")
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
	if o.shadow {
		return applyShadow(ctx, env, client, img, o)
	}
	asks := env.Interactive && o.output == "text" && o.file != "-" && !o.now
	if asks && o.within == 0 {
		o.within = trialDefault
	}
	cuts, err := preview(ctx, env, client, img)
	if err != nil {
		return fmt.Errorf("apply %s: %w", o.file, err)
	}
	switch {
	case o.dryRun:
		return cuts.print(env, o.output)
	case cuts.own() && o.within == 0 && o.spare == 0 && !o.now:
		cuts.printText(env.Stderr)
		return hintError{fmt.Errorf("apply %s: it would cut the session that this command runs in", o.file),
			"--confirm-within 60s takes it back unless you confirm it; --now applies it all the same"}
	}
	cuts.printText(env.Stderr)
	if o.spare > 0 && cuts.Total > 0 {
		fmt.Fprintf(env.Stderr, "they go on until %s\n", time.Now().Add(o.spare).Local().Format(time.TimeOnly))
	}
	s, err := client.ApplyPreviewed(ctx, img, o.within, o.spare)
	if err != nil {
		return fmt.Errorf("apply %s: %w", o.file, err)
	}
	if err := printChange(env, o.output, "applied", s); err != nil || s.Unconfirmed == nil {
		return err
	}
	if !asks {
		if o.output == "text" {
			fmt.Fprintf(env.Stderr, "unconfirmed: %s; `demarc confirm` keeps it\n", comesBack(s.Unconfirmed))
		}
		return nil
	}
	return ask(ctx, env, client, s.Unconfirmed)
}

// comesBack says what happens without a confirmation.
func comesBack(u *proto.Unconfirmed) string {
	what := "it only observes"
	if f := u.Fallback; f != nil {
		what = fmt.Sprintf("version %d comes back", f.Version)
	}
	return fmt.Sprintf("%s at %s", what, u.Until.Local().Format(time.TimeOnly))
}

// ask lets a person decide. Somebody whom the change has cut off cannot answer, and
// the kernel does not wait for it.
func ask(ctx context.Context, env *environment, client *api.Client, u *proto.Unconfirmed) error {
	fmt.Fprintf(env.Stdout, "Without your word %s. Keep the change? [y/N] ", comesBack(u))
	answers := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(env.Stdin).ReadString('\n')
		answers <- strings.ToLower(strings.TrimSpace(line))
	}()
	timeout := time.NewTimer(time.Until(u.Until))
	defer timeout.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timeout.C:
		return fmt.Errorf("not confirmed: %s", comesBack(u))
	case answer := <-answers:
		if answer == "y" || answer == "yes" {
			return confirmRun(ctx, env, changeOptions{output: "text"})
		}
	}
	s, err := client.Rollback(ctx)
	if err != nil {
		return fmt.Errorf("take the change back: %w", err)
	}
	if err := printChange(env, "text", "took the change back, in force is", s); err != nil {
		return err
	}
	return exitError{code: exitFailed}
}

// changeOptions are those of commands that change what is in force.
type changeOptions struct{ output string }

func newConfirmCommand(env *environment) *cobra.Command {
	var o changeOptions
	c := &cobra.Command{
		Use:   "confirm",
		Short: "Keep the change that was applied with --confirm-within",
		Args:  noArguments,
		RunE:  func(c *cobra.Command, _ []string) error { return confirmRun(c.Context(), env, o) },
	}
	outputFlag(c, &o.output, "text", "json")
	return c
}

func confirmRun(ctx context.Context, env *environment, o changeOptions) error {
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	s, err := client.Confirm(ctx)
	if err != nil {
		return fmt.Errorf("confirm: %w", err)
	}
	return printChange(env, o.output, "confirmed", s)
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

func newRollbackCommand(env *environment) *cobra.Command {
	var o changeOptions
	c := &cobra.Command{
		Use:   "rollback",
		Short: "Put the previous policy in force again",
		Long: `Put the previous policy in force again; the present one becomes the previous. A
change that waits to be confirmed is taken back at once.`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return rollbackRun(c.Context(), env, o) },
	}
	outputFlag(c, &o.output, "text", "json")
	return c
}

func rollbackRun(ctx context.Context, env *environment, o changeOptions) error {
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
