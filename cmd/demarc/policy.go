package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/policy"
)

// newPolicyCommand groups everything that can be done with a policy without a
// host: none of it talks to an agent or needs a privilege.
func newPolicyCommand(env *environment) *cobra.Command {
	return group("policy", "Check, compile, explain and compare policies",
		newPolicyCheckCommand(env), newPolicyBuildCommand(env), newPolicyExplainCommand(env), newPolicyDiffCommand(env),
		newPolicyTestCommand(env), newPolicyFmtCommand(env), newPolicySchemaCommand(env),
		newPolicyImportCommand(env), newPolicyLearnCommand(env), newPolicySimulateCommand(env),
	)
}

// stdinName is what messages call a policy that came by standard input.
const stdinName = "<stdin>"

// readSource reads a file, or standard input for "-".
func readSource(env *environment, path string) (name string, src []byte, err error) {
	if path != "-" {
		src, err = policy.ReadFile(path)
		return path, src, err
	}
	src, err = policy.ReadAll(env.Stdin)
	if err != nil {
		return "", nil, fmt.Errorf("read standard input: %w", err)
	}
	return stdinName, src, nil
}

// loadPolicy reads and parses a policy.
func loadPolicy(env *environment, path string) (*policy.Policy, error) {
	name, src, err := readSource(env, path)
	if err != nil {
		return nil, err
	}
	return policy.Parse(name, src)
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// plural counts things in words.
func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

type policyCheckOptions struct {
	file   string
	output string // text or json
}

func newPolicyCheckCommand(env *environment) *cobra.Command {
	var o policyCheckOptions
	cmd := &cobra.Command{
		Use:   "check FILE",
		Short: "Check a policy completely: syntax, references, trust rules, assertions, compilation",
		Long: "Check reads a policy (- is standard input), reports every problem with its place, and otherwise compiles it,\n" +
			"proves its assertions and compares the compiled image with the meaning of the policy. Nothing is written.",
		Args: oneArgument("policy"),
		RunE: func(_ *cobra.Command, args []string) error {
			o.file = args[0]
			return policyCheckRun(env, o)
		},
	}
	outputFlag(cmd, &o.output, "text", "json")
	return cmd
}

// checkResult is what `policy check -o json` prints.
type checkResult struct {
	File      string         `json:"file"`
	OK        bool           `json:"ok"`
	Name      string         `json:"name,omitempty"`
	Version   uint64         `json:"version,omitempty"`
	Workloads int            `json:"workloads"`
	Crossings int            `json:"crossings"`
	Problems  []checkProblem `json:"problems"`
}

type checkProblem struct {
	Line    int    `json:"line,omitempty"`
	Column  int    `json:"column,omitempty"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
}

func policyCheckRun(env *environment, o policyCheckOptions) error {
	p, err := loadPolicy(env, o.file)
	if err == nil {
		_, err = policy.Build(p)
	}
	if o.output == "json" {
		r := checkResult{File: o.file, OK: err == nil, Problems: problems(err)}
		if p != nil {
			r.Name, r.Version, r.Workloads, r.Crossings = p.Name, p.Version, len(p.Workloads), len(p.Crossings)
		}
		if werr := writeJSON(env.Stdout, r); werr != nil {
			return werr
		}
		if err != nil {
			return fmt.Errorf("%s: %s", o.file, plural(len(r.Problems), "problem"))
		}
		return nil
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(env.Stdout, "%s version %d: %s, %s: ok\n", p.Name, p.Version, plural(len(p.Workloads), "workload"), plural(len(p.Crossings), "crossing"))
	return err
}

// problems lists what an error of Parse or Build says.
func problems(err error) []checkProblem {
	out := []checkProblem{}
	var all policy.Errors
	switch {
	case err == nil:
	case errors.As(err, &all):
		for _, e := range all {
			out = append(out, checkProblem{Line: e.Pos.Line, Column: e.Pos.Column, Message: e.Msg, Hint: e.Hint})
		}
	default:
		out = append(out, checkProblem{Message: err.Error()})
	}
	return out
}

type policyBuildOptions struct {
	file   string
	output string
	sign   []string // private key files
}

func newPolicyBuildCommand(env *environment) *cobra.Command {
	var o policyBuildOptions
	cmd := &cobra.Command{
		Use:   "build FILE -o IMAGE",
		Short: "Compile a policy to an image",
		Long: "Build compiles a policy, proves its assertions, decodes the result and compares it with the meaning of the policy.\n" +
			"The same policy gives the same bytes everywhere. The image appears whole or not at all; -o - writes to standard output.\n" +
			"With --sign the image is in an envelope with a signature of each key. When it ends is a matter of the policy: metadata.notAfter.",
		Args: oneArgument("policy"),
		RunE: func(_ *cobra.Command, args []string) error {
			o.file = args[0]
			return policyBuildRun(env, o)
		},
	}
	cmd.Flags().StringVarP(&o.output, "output", "o", "", "file to write the image to")
	cmd.Flags().StringArrayVar(&o.sign, "sign", nil, "sign the image with this private key `file`; may be repeated")
	return cmd
}

func policyBuildRun(env *environment, o policyBuildOptions) error {
	if o.output == "" {
		return usagef("policy build: name the image with -o FILE")
	}
	p, err := loadPolicy(env, o.file)
	if err != nil {
		return err
	}
	img, err := policy.Build(p)
	if err != nil {
		return err
	}
	signed := ""
	if len(o.sign) > 0 {
		if img, signed, err = sign(img, o.sign); err != nil {
			return err
		}
		signed = ", signed by " + signed
	}
	if o.output == "-" {
		_, err = env.Stdout.Write(img)
		return err
	}
	if err := replaceFile(o.output, img, 0o644); err != nil {
		return err
	}
	_, err = fmt.Fprintf(env.Stdout, "%s version %d: wrote %s, %d bytes%s\n", p.Name, p.Version, o.output, len(img), signed)
	return err
}

// replaceFile writes a file beside its place and renames it there, so that a
// reader sees the old content or the new, and a crash leaves one of them.
func replaceFile(path string, content []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(f.Name()) // fails once it is renamed
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

func newPolicySchemaCommand(env *environment) *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the JSON Schema of the policy language, for editors",
		Args:  noArguments,
		RunE: func(*cobra.Command, []string) error {
			_, err := env.Stdout.Write(policy.Schema())
			return err
		},
	}
}
