package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/internal/version"
)

func newVersionCommand(env *environment) *cobra.Command {
	var form string
	c := &cobra.Command{
		Use: "version", Short: "Print the version", Args: noArguments,
		RunE: func(*cobra.Command, []string) error {
			v := version.Get()
			if form == "json" {
				return document(env.Stdout, form, v)
			}
			_, err := fmt.Fprintf(env.Stdout, "demarc %s (%s, %s)\n", v.Version, v.Go, v.Platform)
			return err
		},
	}
	outputFlag(c, &form, "text", "json")
	return c
}
