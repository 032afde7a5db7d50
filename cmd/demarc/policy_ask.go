package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/policy"
)

type policyExplainOptions struct {
	file           string
	from, to, port string
	at             string // RFC 3339; empty = now
	batch          string // file of probes, - for standard input
	output         string // text or json
}

func newPolicyExplainCommand(env *environment) *cobra.Command {
	var o policyExplainOptions
	cmd := &cobra.Command{
		Use:   "explain POLICY (--from PEER --to PEER --port PORT [--at TIME] | --batch FILE)",
		Short: "Say whether a flow is allowed, and which crossing and line decide",
		Long: "A peer is workload/NAME, network/NAME, an address or unmanaged. A network stands for the first address of its first\n" +
			"block. A batch is JSON lines {\"from\", \"to\", \"port\", \"at\"}, and each is answered by one line of JSON.",
		Example: "  demarc policy explain shop.yaml --from workload/web --to workload/api --port tcp/8080\n" +
			"  demarc policy explain shop.yaml --batch probes.jsonl",
		Args: usageArgs(cobra.ExactArgs(1)),
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
	f.StringVarP(&o.output, "output", "o", "text", "form of the answer: text or json")
	return cmd
}

func policyExplainRun(env *environment, o policyExplainOptions) error {
	if err := oneOf("output", o.output, "text", "json"); err != nil {
		return err
	}
	if o.batch != "" {
		if o.from != "" || o.to != "" || o.port != "" || o.at != "" {
			return usageError{errors.New("policy explain: --batch stands alone; the probes say from, to, port and at")}
		}
		if o.batch == "-" && o.file == "-" {
			return usageError{errors.New("policy explain: the policy and the probes cannot both be standard input")}
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
		return usageError{fmt.Errorf("policy explain: %s missing; or use --batch", strings.Join(missing, ", "))}
	}
	probe := policy.Probe{From: o.from, To: o.to, Port: o.port}
	if o.at != "" {
		at, err := time.Parse(time.RFC3339, o.at)
		if err != nil {
			return usageError{fmt.Errorf("--at %q is not an RFC 3339 time such as 2030-01-31T12:00:00Z", o.at)}
		}
		probe.At = at
	}
	p, err := loadPolicy(env, o.file)
	if err != nil {
		return err
	}
	a, err := p.Explain(probe)
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
	in := env.Stdin
	if o.batch != "-" {
		f, err := os.Open(o.batch)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	return policy.ExplainBatch(p, in, env.Stdout)
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
		Args:  usageArgs(cobra.ExactArgs(2)),
		RunE: func(_ *cobra.Command, args []string) error {
			o.old, o.new = args[0], args[1]
			return policyDiffRun(env, o)
		},
	}
	cmd.Flags().StringVarP(&o.output, "output", "o", "text", "form of the difference: text or json")
	return cmd
}

func policyDiffRun(env *environment, o policyDiffOptions) error {
	if err := oneOf("output", o.output, "text", "json"); err != nil {
		return err
	}
	if o.old == "-" && o.new == "-" {
		return usageError{errors.New("policy diff: only one of the policies can be standard input")}
	}
	// Status 1 says that they differ, so what cannot be compared is status 2.
	old, err := loadPolicy(env, o.old)
	if err != nil {
		return usageError{err}
	}
	new, err := loadPolicy(env, o.new)
	if err != nil {
		return usageError{err}
	}
	d := policy.Diff(old, new)
	if o.output == "json" {
		err = writeJSON(env.Stdout, d)
	} else {
		_, err = io.WriteString(env.Stdout, d.String())
	}
	if err != nil {
		return usageError{err}
	}
	if !d.Empty() {
		return errors.New("the policies differ")
	}
	return nil
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
		Args:  usageArgs(cobra.MinimumNArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			o.files = args
			return policyTestRun(env, o)
		},
	}
	cmd.Flags().StringVarP(&o.output, "output", "o", "text", "form of the result: "+strings.Join(policy.SuiteFormats, ", "))
	return cmd
}

func policyTestRun(env *environment, o policyTestOptions) error {
	if err := oneOf("output", o.output, policy.SuiteFormats...); err != nil {
		return err
	}
	if o.output != "text" && len(o.files) > 1 {
		return usageError{fmt.Errorf("policy test: -o %s takes one suite at a time", o.output)}
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
		Args:  usageArgs(cobra.MinimumNArgs(1)),
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
		return usageError{errors.New("policy fmt: -w and --check exclude each other")}
	case o.write && slices.Contains(o.files, "-"):
		return usageError{errors.New("policy fmt: -w cannot write standard input")}
	case !o.write && !o.check && len(o.files) > 1:
		return usageError{errors.New("policy fmt: several files need -w or --check")}
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
