package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/learn"
)

type learnOptions struct {
	from        []string
	base        string
	out         string
	since       string
	watch       time.Duration
	name        string
	trustDomain string
	start       bool
}

func newPolicyLearnCommand(env *environment) *cobra.Command {
	var o learnOptions
	c := &cobra.Command{
		Use:   "learn [--from FILE...] [--base POLICY] [-o FILE]",
		Short: "Propose a policy that allows what was seen",
		Long: `Propose the smallest policy that allows the flows that were seen: those that the
agent keeps, or those in files that "demarc flows -o json" wrote.

Workloads are proposed from units, pods, containers and cgroups, limits from observed rates,
and each crossing says what it was learned from. What failed a proof, was denied, got
no answer or looks like a scan is not proposed but listed at the end. Review it.

--start prints the policy to begin with: under it everything is told and nothing is
refused. With --base, a policy stays as it is and gets what it lacks; then the exit
code is 0 if that is nothing and 1 otherwise.`,
		Example: `  demarc policy learn --start -o observe.yaml
  demarc apply observe.yaml
  demarc policy learn -o policy.yaml
  demarc policy learn --from monday.json --from tuesday.json --base policy.yaml -o wider.yaml`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return learnRun(c.Context(), env, &o) },
	}
	flags := c.Flags()
	flags.StringArrayVar(&o.from, "from", nil, "`FILE` of flows, as demarc flows -o json writes them; - is standard input; may be repeated")
	flags.StringVar(&o.base, "base", "", "`POLICY` to add to")
	flags.StringVarP(&o.out, "output", "o", "", "write to `FILE` instead of standard output")
	flags.StringVar(&o.since, "since", "", "only from a `TIME` (RFC 3339) or a duration ago on; without --from")
	flags.DurationVar(&o.watch, "watch", 0, "go on with new flows for a `TIME` like 10m; without --from")
	flags.StringVar(&o.name, "name", "learned", "the policy's name; without --base")
	flags.StringVar(&o.trustDomain, "trust-domain", "learned.example", "the policy's trust domain; without --base")
	flags.BoolVar(&o.start, "start", false, "print the policy that learning starts with")
	return c
}

func learnRun(ctx context.Context, env *environment, o *learnOptions) error {
	switch {
	case o.start && (len(o.from) > 0 || o.base != "" || o.watch != 0 || o.since != ""):
		return usagef("--start goes with --trust-domain and -o only")
	case len(o.from) > 0 && (o.watch != 0 || o.since != ""):
		return usagef("--watch and --since ask the agent: leave out --from")
	case o.watch < 0:
		return usagef("--watch is not negative")
	case o.start:
		return learnWrite(env, o.out, learn.Start(o.trustDomain))
	}
	options := learn.Options{Name: o.name, TrustDomain: o.trustDomain}
	if o.base != "" {
		base, err := loadPolicy(env, o.base)
		if err != nil {
			return err
		}
		if err := learn.Extendable(base.Source); err != nil {
			return hintError{fmt.Errorf("%s: %w", o.base, err), "or learn without --base, and compare with demarc policy diff"}
		}
		options.Base = base
	}
	if len(o.from) == 0 {
		return learnLive(ctx, env, o, &options)
	}
	return learnFiles(env, o, options)
}

func learnFiles(env *environment, o *learnOptions, options learn.Options) error {
	l := learn.New(options)
	for _, file := range o.from {
		if err := flowFile(env, file, func(line *api.Line) { learnLine(l, line) }); err != nil {
			return err
		}
	}
	return learned(env, o, l)
}

func learnLine(l *learn.Learner, line *api.Line) {
	if line.Flow != nil {
		l.Add(line.Flow)
	} else {
		l.Lost(line.Lost)
	}
}

// learnLive takes the flows that the agent keeps, and those that come.
func learnLive(ctx context.Context, env *environment, o *learnOptions, options *learn.Options) error {
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	s, err := client.Status(ctx)
	if err != nil {
		return err
	}
	if s.Policy != nil {
		options.Version = s.Policy.Version + 1 // the host refuses an older one
	}
	query := url.Values{}
	if o.since != "" {
		at, err := moment("since", o.since, time.Now())
		if err != nil {
			return err
		}
		query.Set("since", at.Format(time.RFC3339Nano))
	}
	until := ctx
	if o.watch > 0 {
		query.Set("follow", "true")
		var cancel context.CancelFunc
		until, cancel = context.WithTimeout(ctx, o.watch)
		defer cancel()
	}
	l := learn.New(*options)
	for line, err := range client.Flows(until, query) {
		if err != nil {
			if o.watch > 0 && until.Err() != nil && ctx.Err() == nil {
				break // the time is over
			}
			return err
		}
		learnLine(l, &line)
	}
	return learned(env, o, l)
}

// learned writes what is proposed, and says on standard error what that is.
func learned(env *environment, o *learnOptions, l *learn.Learner) error {
	p, err := l.Propose()
	say := func(format string, args ...any) { fmt.Fprintf(env.Stderr, format+"\n", args...) }
	if errors.Is(err, learn.ErrNothing) {
		for _, r := range p.Refused {
			say("not proposed: %s", r)
		}
		return hintError{err, "let the host do its work under the policy of demarc policy learn --start"}
	}
	var problems policy.Errors
	if errors.As(err, &problems) {
		return fmt.Errorf("%s; please report this", problems[0].Msg)
	}
	if err != nil {
		return err
	}
	if err := learnWrite(env, o.out, p.Text); err != nil {
		return err
	}
	if p.Lost > 0 {
		say("%s lost before they could be learned", plural(int(p.Lost), "flow"))
	}
	if o.base == "" {
		if len(p.Refused) > 0 {
			say("not proposed: %s, listed at the end of the policy", plural(len(p.Refused), "other kind"))
		}
		return nil
	}
	for _, r := range p.Refused {
		say("not proposed: %s", r)
	}
	for _, a := range p.Added {
		say("adds %s", a)
	}
	if len(p.Added) > 0 {
		return exitError{code: exitFailed}
	}
	say("%s allows all that can be proposed", o.base)
	return nil
}

func learnWrite(env *environment, file string, text []byte) error {
	if file == "" {
		_, err := env.Stdout.Write(text)
		return err
	}
	return replaceFile(file, text, 0o644)
}
