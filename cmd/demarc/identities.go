package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/agent/api"
)

// listForms are the output forms of every list.
var listForms = []string{"table", "wide", "json", "yaml"}

func newIdentitiesCommand(env *environment) *cobra.Command {
	var form string
	c := &cobra.Command{
		Use: "identities", Short: "List the identities of the policy in force, and what is bound to them", Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return identitiesRun(c.Context(), env, form) },
	}
	outputFlag(c, &form, listForms...)
	return c
}

func identitiesRun(ctx context.Context, env *environment, form string) error {
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	identities, err := client.Identities(ctx)
	if err != nil {
		return fmt.Errorf("list identities: %w", err)
	}
	heading := []string{"IDENTITY", "NAME", "BINDINGS", "CGROUPS"}
	if form == "wide" {
		heading = append(heading, "ROLES", "QUARANTINED", "SELECTORS", "SPIFFE")
	}
	row := func(i api.Identity) []string {
		cgroups := strings.Join(i.Cgroups, ",")
		if form != "wide" && len(i.Cgroups) > 2 {
			cgroups = fmt.Sprintf("%s and %d more", strings.Join(i.Cgroups[:2], ","), len(i.Cgroups)-2)
		}
		cells := []string{strconv.FormatUint(uint64(i.Identity), 10), i.Name(), strconv.Itoa(i.Bindings), cgroups}
		if form == "wide" {
			quarantined := ""
			if i.Quarantined != nil {
				quarantined = "until " + i.Quarantined.Local().Format(time.DateTime)
			}
			cells = append(cells, strings.Join(i.Roles, ","), quarantined, strings.Join(i.Selectors, "; "), i.SPIFFE)
		}
		return cells
	}
	return list(env, form, heading, identities, row)
}

func newZonesCommand(env *environment) *cobra.Command {
	var form string
	c := &cobra.Command{
		Use: "zones", Short: "List the trust zones of the policy in force", Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return zonesRun(c.Context(), env, form) },
	}
	outputFlag(c, &form, listForms...)
	return c
}

func zonesRun(ctx context.Context, env *environment, form string) error {
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	zones, err := client.Zones(ctx)
	if err != nil {
		return fmt.Errorf("list zones: %w", err)
	}
	heading := []string{"ZONE", "TRUST", "WORKLOADS", "NETWORKS", "BINDINGS"}
	if form == "wide" {
		heading = append(heading, "UNMANAGED")
	}
	row := func(z api.Zone) []string {
		cells := []string{z.Name, strconv.Itoa(int(z.Trust)), strconv.Itoa(len(z.Workloads)), strconv.Itoa(len(z.Networks)), strconv.Itoa(z.Bindings)}
		if form == "wide" {
			cells[2], cells[3] = strings.Join(z.Workloads, ","), strings.Join(z.Networks, ",")
			unmanaged := ""
			if z.Unmanaged {
				unmanaged = "yes"
			}
			cells = append(cells, unmanaged)
		}
		return cells
	}
	return list(env, form, heading, zones, row)
}

// list writes items in one of listForms.
func list[T any](env *environment, form string, heading []string, items []T, row func(T) []string) error {
	if form == "json" || form == "yaml" {
		return document(env.Stdout, form, items)
	}
	rows := make([][]string, 0, len(items))
	for _, item := range items {
		rows = append(rows, row(item))
	}
	return table(env.Stdout, heading, rows)
}
