package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/demarc/demarc/internal/version"
)

// newDocsCommand writes what packages ship beside the program. It is hidden: packagers
// use it by `make docs`.
func newDocsCommand(env *environment) *cobra.Command {
	man := &cobra.Command{
		Use: "man DIR", Short: "Write a manual page for each command", Args: oneArgument("directory"),
		RunE: func(c *cobra.Command, args []string) error { return writeManual(env, c.Root(), args[0]) },
	}
	completions := &cobra.Command{
		Use: "completions DIR", Short: "Write a completion script for each shell", Args: oneArgument("directory"),
		RunE: func(c *cobra.Command, args []string) error { return writeCompletions(c.Root(), args[0]) },
	}
	c := group("docs", "Write manual pages and completion scripts", man, completions)
	c.Hidden = true
	return c
}

func writeManual(env *environment, root *cobra.Command, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write manual: %w", err)
	}
	date := time.Now()
	if epoch := env.Getenv("SOURCE_DATE_EPOCH"); epoch != "" { // so that builds can be reproduced
		seconds, err := strconv.ParseInt(epoch, 10, 64)
		if err != nil {
			return usagef("SOURCE_DATE_EPOCH: %q is no number of seconds", epoch)
		}
		date = time.Unix(seconds, 0)
	}
	date = date.UTC()
	root.DisableAutoGenTag = true
	header := &doc.GenManHeader{Section: "1", Source: "demarc " + version.String(), Manual: "demarc", Date: &date}
	if err := doc.GenManTree(root, header, dir); err != nil {
		return fmt.Errorf("write manual: %w", err)
	}
	return nil
}

func writeCompletions(root *cobra.Command, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write completions: %w", err)
	}
	for file, write := range map[string]func(string) error{
		"demarc":      func(f string) error { return root.GenBashCompletionFileV2(f, true) }, // bash looks for the command's name
		"_demarc":     root.GenZshCompletionFile,
		"demarc.fish": func(f string) error { return root.GenFishCompletionFile(f, true) },
	} {
		if err := write(filepath.Join(dir, file)); err != nil {
			return fmt.Errorf("write completions: %w", err)
		}
	}
	return nil
}
