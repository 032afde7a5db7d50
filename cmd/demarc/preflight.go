package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

// check is one line of what "demarc-core preflight" says.
type check struct {
	Name    string `json:"name"`
	OK      bool   `json:"ok"`
	Tried   string `json:"tried"`
	Problem string `json:"problem,omitempty"`
	Limit   string `json:"limit,omitempty"`
	Means   string `json:"means,omitempty"`
	Fix     string `json:"fix,omitempty"`
}

// meanings say what it means that a check finds something missing; docs/operate.md
// has the same. Of a limit, the core says so itself.
var meanings = map[string]string{
	"privileges":       "nothing can be loaded",
	"trust":            "images could not be judged",
	"state":            "the policy would not survive a reboot",
	"keyring":          "no workload could prove itself, or others could in its name",
	"clock":            "windows and tags between hosts are off",
	"cgroup2":          "workloads could not be told apart",
	"cgroup namespace": "paths would name other cgroups than the policy means",
	"btf":              "programs cannot be fitted to this kernel",
	"pins":             "what is in force is not this version's, or not demarc's: it goes on, and this core keeps away",
	"read-only maps":   "the agent could get a writable descriptor of what it may only read",
	"devices":          "what passes no socket hook is not seen, and UDP proofs do not cross hosts",
	"programs":         "nothing can be enforced",
	"memory":           "workloads and flows that find no room are refused",
	"attach":           "some traffic would pass unseen",
	"other programs":   "they may refuse more, or rewrite addresses; `demarc status` names those that come and go",
	"walks":            "`apply` does not name the connections that it cuts, and old listeners cannot prove themselves",
	"refusals":         "refused callers wait until they give up",
	"ring buffer":      "nobody would hear what was denied",
	"guard":            "what root undoes is seen and put back, not prevented",
	"self-test":        "tables could not be proved before they decide",
}

type preflightOptions struct {
	config string
	output string
}

func newPreflightCommand(env *environment) *cobra.Command {
	var o preflightOptions
	c := &cobra.Command{
		Use:   "preflight",
		Short: "Check whether this machine can enforce a policy",
		Long: `Check whether this machine can enforce a policy, by trying everything that the
core needs. It leaves nothing behind. It needs root, like the core.`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return preflightRun(c.Context(), env, o) },
	}
	c.Flags().StringVar(&o.config, "config", "/etc/demarc/core.json", "core's configuration `file`")
	outputFlag(c, &o.output, "text", "json")
	return c
}

func preflightRun(ctx context.Context, env *environment, o preflightOptions) error {
	path, err := findCore()
	if err != nil {
		return err
	}
	core := exec.CommandContext(ctx, path, "preflight", "--config", o.config)
	var stdout, stderr bytes.Buffer
	core.Stdout, core.Stderr = &stdout, &stderr
	runErr := core.Run()
	var checks []check
	if err := json.Unmarshal(stdout.Bytes(), &checks); err != nil || len(checks) == 0 {
		return coreFailed(runErr, stderr.String())
	}
	for i := range checks {
		if c := &checks[i]; !c.OK || c.Limit != "" {
			c.Means = meanings[c.Name]
		}
	}
	if o.output == "json" {
		err = document(env.Stdout, o.output, checks)
	} else {
		err = printChecks(env, checks)
	}
	var failed *exec.ExitError
	if err == nil && runErr != nil && !errors.As(runErr, &failed) {
		err = fmt.Errorf("run %s: %w", path, runErr)
	}
	if err == nil && runErr != nil {
		return hintError{errors.New("enforcement would be refused on this machine"), "mend what is marked above"}
	}
	return err
}

func printChecks(env *environment, checks []check) error {
	rows := make([][]string, 0, len(checks))
	for _, c := range checks {
		result, fix := "ok", c.Fix
		switch {
		case !c.OK:
			result = "FAILED: " + c.Problem
		case c.Limit != "":
			result = "limit: " + c.Limit
		}
		rows = append(rows, []string{c.Name, c.Tried, result, c.Means, fix})
	}
	return table(env.Stdout, []string{"CHECK", "TRIED", "RESULT", "WHICH MEANS", "WHAT TO DO"}, rows)
}

// coreFailed says why the core gave no checks, in the core's words if it has any.
func coreFailed(runErr error, said string) error {
	message, hint, _ := strings.Cut(strings.TrimSpace(said), "\nhint: ")
	message = strings.TrimPrefix(message, "demarc-core: ")
	switch {
	case message == "" && runErr != nil:
		return fmt.Errorf("run demarc-core: %w", runErr)
	case message == "":
		return errors.New("run demarc-core: it made no checks")
	case hint != "":
		return hintError{errors.New(message), hint}
	}
	return errors.New(message)
}

// findCore looks for demarc-core beside this program, then in PATH.
func findCore() (string, error) {
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "demarc-core")
		if info, err := os.Stat(beside); err == nil && info.Mode().IsRegular() {
			return beside, nil
		}
	}
	path, err := exec.LookPath("demarc-core")
	if err != nil {
		return "", hintError{errors.New("demarc-core is not installed"), "install it beside this program or in PATH"}
	}
	return path, nil
}
