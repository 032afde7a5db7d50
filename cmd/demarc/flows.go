package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/flow"
)

// defaultLast is how many flows are shown when nothing else says how many.
const defaultLast = 20

type flowsOptions struct {
	filter     flow.Filter
	cel        url.Values // expressions, as parameters
	not        bool       // the next filter is negated
	follow     bool
	last       int
	first      int
	since      string
	until      string
	all        bool
	output     string
	timeFormat string
	color      string
	noColor    bool
	numeric    bool // identities as numbers, no names
	nodeName   bool // tell the node in compact, dict and table
	reconnect  bool
	silent     bool // nothing on standard error but what ends the command
	debug      bool
}

func newFlowsCommand(env *environment) *cobra.Command {
	var o flowsOptions
	c := &cobra.Command{
		Use:     "flows",
		Aliases: []string{"observe"},
		Short:   "Show what was let through and what was refused, and why",
		Long: `Show what was let through and what was refused, and why.

Without -f the last 20 kept flows are shown. Filters of different kinds must all
hold; of filters of one kind given several times, any. --not reverses the next
filter. Lost flows are never passed over: "lost N flows" tells on standard error,
a line {"lost":N} with -o json, lost_events with -o jsonpb, which is the form that
hubble observe --input-file reads.

Words are those of hubble observe where it has them: a zone is a namespace, and a
workload a pod in it.`,
		Example: `  demarc flows -f --verdict deny
  demarc flows --since 10m --from edge/web --to data/postgres
  demarc flows --all --not --reason crossing -o json
  demarc flows --label demarc:zone=edge -o jsonpb | hubble observe --input-file -`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			query, err := o.query(c.Flags())
			if err != nil {
				return err
			}
			return flowsRun(c.Context(), env, &o, query)
		},
	}
	flags := c.Flags()
	flags.BoolVarP(&o.follow, "follow", "f", false, "go on with new flows as they come")
	flags.IntVar(&o.last, "last", defaultLast, "show the newest `N` of the kept flows; 0 = only new ones, with -f")
	flags.IntVar(&o.first, "first", 0, "end after `N` flows")
	flags.StringVar(&o.since, "since", "", "only from a `TIME` (RFC 3339) or a duration ago on")
	flags.StringVar(&o.until, "until", "", "only up to a `TIME` (RFC 3339) or a duration ago")
	flags.BoolVar(&o.all, "all", false, "show all kept flows")
	flags.Var(&notFlag{&o.not}, "not", "reverse the next filter")
	flags.Lookup("not").NoOptDefVal = "true"
	outputFlag(c, &o.output, "compact", "table", "wide", "dict", "json", "jsonpb")
	o.timeFormat = "compact"
	flags.Var(&choice{&o.timeFormat, timeFormatNames()}, "time-format", "how times are shown")
	complete(c, "time-format", timeFormatNames()...)
	o.color = "auto"
	flags.Var(&choice{&o.color, []string{"auto", "always", "never"}}, "color", "auto, always or never")
	complete(c, "color", "auto", "always", "never")
	flags.BoolVar(&o.noColor, "no-color", false, "like --color never")
	flags.BoolVar(&o.numeric, "numeric", false, "identities and addresses as numbers, without names")
	flags.BoolVar(&o.nodeName, "print-node-name", false, "tell the node of each flow")
	flags.BoolVar(&o.reconnect, "reconnect", false, "with -f: when the agent goes away, wait for it and go on from there")
	flags.BoolVarP(&o.silent, "silent-errors", "s", false, "do not tell losses and lost connections on standard error")
	flags.BoolVarP(&o.debug, "debug", "D", false, "tell on standard error what the agent is asked")
	flags.BoolP("ipv4", "4", false, "like --ip-version v4")
	flags.BoolP("ipv6", "6", false, "like --ip-version v6")
	flags.Var(&expressionFlag{&o}, api.Expression, "CEL on the flow as -o jsonpb shows it, like '_flow.l4.TCP.destination_port > 1023u'")
	for _, f := range flow.Fields {
		value := &filterFlag{&o, f.Name}
		flags.VarP(value, f.Name, shorthands[f.Name], f.Help)
		switch {
		case f.Words != nil:
			complete(c, f.Name, f.Words...)
		default:
			mustRegister(c, f.Name, completeFromAgent(env, f.Name))
		}
		if f.Name == "direction" {
			flags.Var(value, "traffic-direction", "like --direction")
			complete(c, "traffic-direction", f.Words...)
		}
	}
	return c
}

// shorthands are Hubble's.
var shorthands = map[string]string{"type": "t", "namespace": "n", "label": "l"}

// query checks how the options go together, and says them to the agent.
func (o *flowsOptions) query(flags *pflag.FlagSet) (url.Values, error) {
	if o.not {
		return nil, usagef("--not at the end reverses nothing: put it before a filter")
	}
	if o.last < 0 || o.first < 0 {
		return nil, usagef("--last and --first count from 0")
	}
	for name, version := range map[string]string{"ipv4": "v4", "ipv6": "v6"} {
		if set, err := flags.GetBool(name); err == nil && set {
			if err := o.filter.Add("ip-version", version, false); err != nil {
				return nil, usageError{err}
			}
		}
	}
	if o.reconnect && !o.follow {
		return nil, usagef("--reconnect is of use with -f only")
	}
	chosen := 0
	for _, name := range []string{"last", "first", "all"} {
		if flags.Changed(name) && !(name == "last" && o.last == 0) {
			chosen++
		}
	}
	if chosen > 1 {
		return nil, usagef("--last, --first and --all exclude each other")
	}
	v := o.filter.Values()
	maps.Copy(v, o.cel)
	if o.first > 0 {
		v.Set("first", strconv.Itoa(o.first))
	}
	if flags.Changed("last") || !o.all && o.first == 0 && o.since == "" && o.until == "" {
		v.Set("last", strconv.Itoa(o.last))
	}
	if o.follow {
		v.Set("follow", "true")
	}
	now := time.Now()
	for name, value := range map[string]string{"since": o.since, "until": o.until} {
		if value == "" {
			continue
		}
		at, err := moment(name, value, now)
		if err != nil {
			return nil, err
		}
		v.Set(name, at.Format(time.RFC3339Nano))
	}
	return v, nil
}

// moment is the time that a flag names, itself or as how long ago it was.
func moment(flag, value string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(value); err == nil {
		return now.Add(-d), nil
	}
	at, err := time.Parse(time.RFC3339Nano, value)
	if err != nil {
		return at, usagef("--%s: %q is no time like 2026-01-31T12:00:00Z and no duration like 10m", flag, value)
	}
	return at, nil
}

func flowsRun(ctx context.Context, env *environment, o *flowsOptions, query url.Values) error {
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	out := newFlowPrinter(env, o)
	ask := func() error {
		if o.debug {
			fmt.Fprintf(env.Stderr, "asking %s for flows: %s\n", env.server, query.Encode())
		}
		return out.stream(client.FlowLines(ctx, query))
	}
	err = ask()
	for o.reconnect && ctx.Err() == nil && !errors.As(err, new(writeError)) && !out.done(o.first) {
		if refused := new(api.Error); errors.As(err, &refused) && refused.Code < 500 {
			break
		}
		if !o.silent {
			why := "the agent ended the stream"
			if err != nil {
				why = err.Error()
			}
			fmt.Fprintf(env.Stderr, "connecting again: %s\n", why)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(reconnectAfter):
		}
		query.Del("last")
		if o.first > 0 {
			query.Set("first", strconv.Itoa(o.first-out.shown))
		}
		// From where it broke off; what the agent no longer has is lost with its memory,
		// unless it keeps a journal.
		query.Set("since", out.newest.Add(1).Format(time.RFC3339Nano))
		if out.newest.IsZero() {
			query.Set("since", time.Now().Format(time.RFC3339Nano))
		}
		err = ask()
	}
	return err
}

// reconnectAfter is how long a lost agent is left alone.
const reconnectAfter = time.Second

// filterFlag is one kind of filter as a flag that may be given several times.
type filterFlag struct {
	options *flowsOptions
	field   string
}

func (f *filterFlag) Set(s string) error {
	not := f.options.not
	f.options.not = false
	return f.options.filter.Add(f.field, s, not)
}

func (f *filterFlag) String() string { return "" }
func (f *filterFlag) Type() string   { return "VALUE" }

// expressionFlag is --cel-expression.
type expressionFlag struct{ options *flowsOptions }

func (f *expressionFlag) Set(s string) error {
	name := api.Expression
	if f.options.not {
		name = flow.Negated + name
	}
	f.options.not = false
	if f.options.cel == nil {
		f.options.cel = url.Values{}
	}
	f.options.cel.Add(name, s)
	return nil
}

func (f *expressionFlag) String() string { return "" }
func (f *expressionFlag) Type() string   { return "CEL" }

// notFlag is --not. It takes no value.
type notFlag struct{ not *bool }

func (n *notFlag) Set(string) error {
	if *n.not {
		return fmt.Errorf("given twice before a filter")
	}
	*n.not = true
	return nil
}

func (n *notFlag) String() string { return "" }
func (n *notFlag) Type() string   { return "bool" }

func mustRegister(c *cobra.Command, flag string, f cobra.CompletionFunc) {
	// Only a flag that does not exist is an error.
	if err := c.RegisterFlagCompletionFunc(flag, f); err != nil {
		panic(err)
	}
}

// completionTimeout bounds how long the shell waits for the agent's words.
const completionTimeout = 500 * time.Millisecond

// completeFromAgent offers the words of the policy in force; none without an agent.
func completeFromAgent(env *environment, field string) cobra.CompletionFunc {
	return func(c *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		ctx, cancel := context.WithTimeout(context.Background(), completionTimeout)
		defer cancel()
		client, err := env.client()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer client.Close()
		words, err := policyWords(ctx, client, field)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return words, cobra.ShellCompDirectiveNoFileComp
	}
}

func policyWords(ctx context.Context, client *api.Client, field string) ([]string, error) {
	var words []string
	switch field {
	case "crossing":
		names, err := crossingNames(ctx, client)
		if err != nil {
			return nil, err
		}
		words = names
	case "from-zone", "to-zone", "zone", "from-namespace", "to-namespace", "namespace":
		zones, err := client.Zones(ctx)
		if err != nil {
			return nil, err
		}
		for _, z := range zones {
			words = append(words, z.Name)
		}
	case "from-workload", "to-workload", "workload":
		identities, err := client.Identities(ctx)
		if err != nil {
			return nil, err
		}
		for _, i := range identities {
			if i.Workload != "" {
				words = append(words, i.Workload)
			}
		}
	case "from", "to", "from-identity", "to-identity", "identity", "from-pod", "to-pod", "pod":
		identities, err := client.Identities(ctx)
		if err != nil {
			return nil, err
		}
		for _, i := range identities {
			words = append(words, i.Name())
		}
	}
	slices.Sort(words)
	return words, nil
}
