package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/policy/envelope"
	"github.com/demarc/demarc/policy/image"
	"github.com/demarc/demarc/policy/simulate"
)

type simulateOptions struct {
	file   string
	from   []string
	since  string
	at     string
	output string
}

func newPolicySimulateCommand(env *environment) *cobra.Command {
	var o simulateOptions
	c := &cobra.Command{
		Use:   "simulate POLICY|IMAGE [--from FILE... | --since TIME]",
		Short: "Judge recorded flows by a policy that is not in force",
		Long: `Judge recorded flows by a policy that is not in force, and show those whose verdict
would be another one: those that the agent keeps, in its journal too with --since, or
those in files that "demarc flows -o json" wrote. Nothing is changed.

Who was at an end is found by the selectors of the policy, so that a policy can be
tried that names what was unmanaged before. Limits are not simulated, and windows are
judged as they are now, or at the time --at. Flows that were not recorded are not
judged: crossings with "log: none" have none.

Exit status: 0 nothing that passed would be denied, 1 something would, 2 there was
nothing to judge or it could not be read.`,
		Example: `  demarc policy simulate shop.yaml --since 24h
  demarc policy simulate shop.yaml --from monday.json --from tuesday.json
  demarc flows --all -o json | demarc policy simulate shop.img --from - -o json`,
		Args: oneArgument("policy"),
		RunE: func(c *cobra.Command, args []string) error {
			o.file = args[0]
			return simulateRun(c.Context(), env, &o)
		},
	}
	flags := c.Flags()
	flags.StringArrayVar(&o.from, "from", nil, "`FILE` of flows, as demarc flows -o json writes them; - is standard input; may be repeated")
	flags.StringVar(&o.since, "since", "", "only from a `TIME` (RFC 3339) or a duration ago on; without --from")
	flags.StringVar(&o.at, "at", "", "judge windows at this `TIME` (RFC 3339) instead of now")
	outputFlag(c, &o.output, "table", "json")
	return c
}

func simulateRun(ctx context.Context, env *environment, o *simulateOptions) error {
	if len(o.from) > 0 && o.since != "" {
		return usagef("--since asks the agent: leave out --from")
	}
	if o.file == "-" && slices.Contains(o.from, "-") {
		return usagef("policy simulate: only one of policy and flows can be standard input")
	}
	now := time.Now()
	if o.at != "" {
		at, err := time.Parse(time.RFC3339, o.at)
		if err != nil {
			return usagef("--at: %q is no time like 2026-01-31T12:00:00Z", o.at)
		}
		now = at
	}
	result, err := simulated(ctx, env, o, now)
	if err == nil && o.output == "json" {
		err = writeJSON(env.Stdout, result)
	} else if err == nil {
		err = printSimulation(env, result)
	}
	switch {
	case errors.Is(err, api.ErrNotRunning), errors.Is(err, api.ErrPermission), errors.As(err, new(usageError)):
		return err
	case err != nil:
		// Status 1 says that something would be denied, so this is status 2.
		env.report(err)
		return exitError{code: exitUsage}
	case result.NewlyDenied > 0:
		return exitError{code: exitFailed}
	}
	return nil
}

func simulated(ctx context.Context, env *environment, o *simulateOptions, now time.Time) (*simulate.Result, error) {
	encoded, err := loadImage(env, o.file)
	if err != nil {
		return nil, err
	}
	body, _, err := envelope.Open(encoded)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.file, err)
	}
	img, err := image.Decode(body)
	if err == nil {
		err = image.Verify(img)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.file, err)
	}
	s, err := simulate.New(img, now)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.file, err)
	}
	n := uint64(0)
	take := func(line *api.Line) {
		if line.Flow == nil {
			s.Lost(line.Lost)
			return
		}
		n++
		s.Add(line.Flow)
	}
	if len(o.from) == 0 {
		err = keptFlows(ctx, env, o.since, take)
	}
	for _, file := range o.from {
		if err == nil {
			err = flowFile(env, file, take)
		}
	}
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, hintError{errors.New("there are no flows to judge"), "demarc flows --all shows what the agent keeps; --since 24h reads its journal"}
	}
	return s.Result(), nil
}

// keptFlows takes what the agent has, and its journal if a time is asked for.
func keptFlows(ctx context.Context, env *environment, since string, take func(*api.Line)) error {
	query := url.Values{}
	if since != "" {
		at, err := moment("since", since, time.Now())
		if err != nil {
			return err
		}
		query.Set("since", at.Format(time.RFC3339Nano))
	}
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	for line, err := range client.Flows(ctx, query) {
		if err != nil {
			return err
		}
		take(&line)
	}
	return nil
}

func printSimulation(env *environment, r *simulate.Result) error {
	var rows [][]string
	change := func(was, would fmt.Stringer) string {
		if was.String() == would.String() {
			return was.String()
		}
		return was.String() + " -> " + would.String()
	}
	for _, c := range r.Changes {
		crossing := c.WouldCrossing
		if crossing == "" && c.WasCrossing != "" {
			crossing = "was " + c.WasCrossing
		}
		rows = append(rows, []string{change(c.Was, c.Would), c.From, c.To, c.Port, change(c.WasReason, c.WouldReason), crossing,
			strconv.FormatUint(c.Flows, 10), c.First.UTC().Format(time.RFC3339), c.Last.UTC().Format(time.RFC3339)})
	}
	if len(rows) > 0 {
		if err := table(env.Stdout, []string{"VERDICT", "FROM", "TO", "PORT", "REASON", "CROSSING", "FLOWS", "FIRST", "LAST"}, rows); err != nil {
			return err
		}
	}
	if r.NotListed > 0 {
		fmt.Fprintf(env.Stdout, "and %s of other kinds\n", plural(int(r.NotListed), "change"))
	}
	if r.Lost > 0 {
		fmt.Fprintf(env.Stderr, "%s lost before they were recorded: what they were is not in here\n", plural(int(r.Lost), "flow"))
	}
	if len(r.NotJudged) > 0 {
		var why []string
		for _, reason := range slices.Sorted(maps.Keys(r.NotJudged)) {
			why = append(why, fmt.Sprintf("%d %s", r.NotJudged[reason], reason))
		}
		fmt.Fprintf(env.Stderr, "not judged, because no policy decides: %s\n", strings.Join(why, ", "))
	}
	_, err := fmt.Fprintf(env.Stdout, "%s version %d: of %s, %d would newly be denied and %d newly pass\n",
		r.Policy, r.Version, plural(int(r.Conversations), "conversation"), r.NewlyDenied, r.NewlyPassed)
	return err
}
