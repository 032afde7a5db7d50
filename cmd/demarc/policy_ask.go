package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/identity"
	"github.com/demarc/demarc/policy"
)

type policyExplainOptions struct {
	file           string
	from, to, port string
	at             string // RFC 3339; empty = now
	batch          string // file of probes, - for standard input
	inventory      string // file that names pods; empty = none
	output         string // text or json
}

func newPolicyExplainCommand(env *environment) *cobra.Command {
	var o policyExplainOptions
	cmd := &cobra.Command{
		Use:   "explain POLICY (--from PEER --to PEER --port PORT [--at TIME] | --batch FILE)",
		Short: "Say whether a flow is allowed, and which crossing and line decide",
		Long: "A peer is workload/NAME, network/NAME, an address, unmanaged, or with --inventory pod/NAMESPACE/NAME. A network stands\n" +
			"for the first address of its first block. A batch is JSON lines {\"from\", \"to\", \"port\", \"at\"}, and each is answered by one\n" +
			"line of JSON: allowed, the end that refuses (egress, ingress or both), the crossing, the reason.",
		Example: "  demarc policy explain shop.yaml --from workload/web --to workload/api --port tcp/8080\n" +
			"  demarc policy explain shop.yaml --batch probes.jsonl\n" +
			"  demarc policy explain policy.yaml --inventory inventory.yaml --from pod/shop/api-1 --to pod/shop/db-0 --port tcp/5432",
		Args: oneArgument("policy"),
		RunE: func(_ *cobra.Command, args []string) error {
			o.file = args[0]
			return policyExplainRun(env, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.from, "from", "", "who opens the flow")
	f.StringVar(&o.to, "to", "", "who accepts it")
	f.StringVar(&o.port, "port", "", "protocol and port: tcp/443, udp/53, icmp/echo")
	f.StringVar(&o.at, "at", "", "when, as an RFC 3339 time (default: now)")
	f.StringVar(&o.batch, "batch", "", "file of probes, one JSON object a line; - is standard input")
	f.StringVar(&o.inventory, "inventory", "", "`file` that names pods and their addresses")
	outputFlag(cmd, &o.output, "text", "json")
	return cmd
}

func policyExplainRun(env *environment, o policyExplainOptions) error {
	if o.batch != "" {
		if o.from != "" || o.to != "" || o.port != "" || o.at != "" {
			return usagef("policy explain: --batch stands alone; the probes say from, to, port and at")
		}
		if o.batch == "-" && o.file == "-" {
			return usagef("policy explain: the policy and the probes cannot both be standard input")
		}
		return policyExplainBatch(env, o)
	}
	var missing []string
	for _, f := range []struct{ name, value string }{{"--from", o.from}, {"--to", o.to}, {"--port", o.port}} {
		if f.value == "" {
			missing = append(missing, f.name)
		}
	}
	if len(missing) > 0 {
		return usagef("policy explain: %s missing; or use --batch", strings.Join(missing, ", "))
	}
	probe := policy.Probe{From: o.from, To: o.to, Port: o.port}
	if o.at != "" {
		at, err := time.Parse(time.RFC3339, o.at)
		if err != nil {
			return usagef("--at %q is not an RFC 3339 time such as 2030-01-31T12:00:00Z", o.at)
		}
		probe.At = at
	}
	p, err := loadPolicy(env, o.file)
	if err != nil {
		return err
	}
	inv, err := loadInventory(o.inventory)
	if err != nil {
		return err
	}
	a, err := p.ExplainIn(inv, probe)
	if err != nil {
		return err
	}
	if o.output == "json" {
		return writeJSON(env.Stdout, a)
	}
	_, err = fmt.Fprintf(env.Stdout, "%s: %s\n  egress %s, ingress %s\n", a.Verdict, a.Reason, a.Egress, a.Ingress)
	return err
}

func policyExplainBatch(env *environment, o policyExplainOptions) error {
	p, err := loadPolicy(env, o.file)
	if err != nil {
		return err
	}
	inv, err := loadInventory(o.inventory)
	if err != nil {
		return err
	}
	in := env.Stdin
	if o.batch != "-" {
		f, err := os.Open(o.batch)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	return policy.ExplainBatch(p, inv, in, env.Stdout)
}

// loadInventory reads an inventory; without a file there is none.
func loadInventory(file string) (*identity.Inventory, error) {
	if file == "" {
		return nil, nil
	}
	src, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return identity.ParseInventory(file, src)
}

// maxFiles is more than a command line holds.
const maxFiles = 1 << 20

// policyArguments wants from low to high files.
func policyArguments(low, high int) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		switch {
		case len(args) >= low && len(args) <= high:
			return nil
		case low == high:
			return usagef("%s needs %d files, got %d", c.CommandPath(), low, len(args))
		}
		return usagef("%s needs a file", c.CommandPath())
	}
}

type policyDiffOptions struct {
	old, new string
	output   string // text or json
}

func newPolicyDiffCommand(env *environment) *cobra.Command {
	var o policyDiffOptions
	cmd := &cobra.Command{
		Use:   "diff OLD NEW",
		Short: "Compare what two policies mean",
		Long:  "Diff shows declarations and flows that change. Exit status: 0 they mean the same, 1 they differ, 2 one could not be read.",
		Args:  policyArguments(2, 2),
		RunE: func(_ *cobra.Command, args []string) error {
			o.old, o.new = args[0], args[1]
			return policyDiffRun(env, o)
		},
	}
	outputFlag(cmd, &o.output, "text", "json")
	return cmd
}

func policyDiffRun(env *environment, o policyDiffOptions) error {
	if o.old == "-" && o.new == "-" {
		return usagef("policy diff: only one of the policies can be standard input")
	}
	d, err := diffPolicies(env, o)
	if err == nil && o.output == "json" {
		err = writeJSON(env.Stdout, d)
	} else if err == nil {
		_, err = io.WriteString(env.Stdout, d.String())
	}
	switch {
	case err != nil:
		// Status 1 says that they differ, so what cannot be compared is status 2.
		env.report(err)
		return exitError{code: exitUsage}
	case !d.Empty():
		return exitError{code: exitFailed}
	}
	return nil
}

func diffPolicies(env *environment, o policyDiffOptions) (*policy.Difference, error) {
	old, err := loadPolicy(env, o.old)
	if err != nil {
		return nil, err
	}
	new, err := loadPolicy(env, o.new)
	if err != nil {
		return nil, err
	}
	return policy.Diff(old, new), nil
}

type policyTestOptions struct {
	files  []string
	output string // one of policy.SuiteFormats
}

func newPolicyTestCommand(env *environment) *cobra.Command {
	var o policyTestOptions
	cmd := &cobra.Command{
		Use:   "test FILE...",
		Short: "Run test suites: flows and what must become of them",
		Args:  policyArguments(1, maxFiles),
		RunE: func(_ *cobra.Command, args []string) error {
			o.files = args
			return policyTestRun(env, o)
		},
	}
	outputFlag(cmd, &o.output, policy.SuiteFormats...)
	return cmd
}

func policyTestRun(env *environment, o policyTestOptions) error {
	if o.output != "text" && len(o.files) > 1 {
		return usagef("policy test: -o %s takes one suite at a time", o.output)
	}
	failed := 0
	for _, file := range o.files {
		name, src, err := readSource(env, file)
		if err != nil {
			return err
		}
		result, err := policy.RunSuite(name, src, func(path string) (*policy.Policy, error) { return loadPolicy(env, path) })
		if err != nil {
			return err
		}
		if err := result.Write(env.Stdout, o.output); err != nil {
			return err
		}
		failed += result.Failed()
	}
	if failed > 0 {
		return fmt.Errorf("%s failed", plural(failed, "case"))
	}
	return nil
}

type policyFmtOptions struct {
	files        []string
	write, check bool
}

func newPolicyFmtCommand(env *environment) *cobra.Command {
	var o policyFmtOptions
	cmd := &cobra.Command{
		Use:   "fmt [-w | --check] FILE...",
		Short: "Format policies; comments stay",
		Args:  policyArguments(1, maxFiles),
		RunE: func(_ *cobra.Command, args []string) error {
			o.files = args
			return policyFmtRun(env, o)
		},
	}
	cmd.Flags().BoolVarP(&o.write, "write", "w", false, "write the files instead of standard output")
	cmd.Flags().BoolVar(&o.check, "check", false, "only name the files that would change, and fail if there are some")
	return cmd
}

func policyFmtRun(env *environment, o policyFmtOptions) error {
	switch {
	case o.write && o.check:
		return usagef("policy fmt: -w and --check exclude each other")
	case o.write && slices.Contains(o.files, "-"):
		return usagef("policy fmt: -w cannot write standard input")
	case !o.write && !o.check && len(o.files) > 1:
		return usagef("policy fmt: several files need -w or --check")
	}
	changed := 0
	for _, file := range o.files {
		name, src, err := readSource(env, file)
		if err != nil {
			return err
		}
		out, err := policy.Format(name, src)
		if err != nil {
			return err
		}
		same := string(out) == string(src)
		switch {
		case o.check && !same:
			changed++
			fmt.Fprintln(env.Stdout, name)
		case o.write && !same:
			if err := rewrite(file, out); err != nil {
				return err
			}
		case !o.write && !o.check:
			if _, err := env.Stdout.Write(out); err != nil {
				return err
			}
		}
	}
	if changed > 0 {
		return fmt.Errorf("%s not formatted; run demarc policy fmt -w", plural(changed, "file"))
	}
	return nil
}

// rewrite replaces a file and keeps its mode.
func rewrite(path string, content []byte) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	return replaceFile(filepath.Clean(path), content, st.Mode().Perm())
}
