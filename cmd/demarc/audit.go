package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/agent/auditlog"
	"github.com/demarc/demarc/agent/core/audit"
	"github.com/demarc/demarc/agent/flow"
)

func newAuditCommand(env *environment) *cobra.Command {
	return group("audit", "Show and verify the log of every change to what is enforced", newAuditShowCommand(env), newAuditVerifyCommand(env))
}

type auditOptions struct {
	file   string // "" = the agent is asked
	output string
	since  string
}

func (o *auditOptions) fileFlag(c *cobra.Command) {
	c.Flags().StringVar(&o.file, "file", "", "read a `FILE` and the full ones beside it, such as /var/lib/demarc/audit.log, without an agent")
}

func newAuditShowCommand(env *environment) *cobra.Command {
	var o auditOptions
	c := &cobra.Command{
		Use: "show", Short: "Show what was changed, when and by whom, and what the core found changed", Args: noArguments,
		Long: `Show what was changed, when and by whom, and what the core found changed.

The records are shown as far as their chain is unbroken; exit code 1 means that it
breaks, and where.`,
		RunE: func(c *cobra.Command, _ []string) error { return auditShowRun(c.Context(), env, o) },
	}
	outputFlag(c, &o.output, "table", "json")
	c.Flags().StringVar(&o.since, "since", "", "only from a `TIME` (RFC 3339) or a duration ago on")
	o.fileFlag(c)
	return c
}

func auditShowRun(ctx context.Context, env *environment, o auditOptions) error {
	var since time.Time
	if o.since != "" {
		var err error
		if since, err = moment("since", o.since, time.Now()); err != nil {
			return err
		}
	}
	records := []audit.Record{}
	_, _, broken := auditRead(ctx, env, o, func(r audit.Record) {
		if !r.Time.Before(since) {
			records = append(records, r)
		}
	})
	row := func(r audit.Record) []string {
		policy := ""
		if r.Policy != "" {
			policy = fmt.Sprintf("%s version %d", r.Policy, r.Version)
		}
		detail := r.Detail
		if r.Removed > 0 {
			detail = fmt.Sprintf("records up to %d are not kept any more", r.Removed)
		}
		return []string{strconv.FormatUint(r.Seq, 10), r.Time.Local().Format(time.DateTime), flow.Escape(r.What), flow.Escape(r.Who), flow.Escape(policy), flow.Escape(detail)}
	}
	if err := list(env, o.output, []string{"RECORD", "TIME", "WHAT", "WHO", "POLICY", "DETAIL"}, records, row); err != nil {
		return err
	}
	return broken
}

func newAuditVerifyCommand(env *environment) *cobra.Command {
	var o auditOptions
	c := &cobra.Command{
		Use: "verify", Short: "Check that nothing in the audit log was changed, taken out or cut off", Args: noArguments,
		Long: `Check that nothing in the audit log was changed, taken out or cut off.

Exit code 1 means that the chain breaks; the line where it does is named. Asked of
the agent, the end is compared with what the core keeps in the kernel; of a file
alone nobody can tell whether its last records were cut off.`,
		RunE: func(c *cobra.Command, _ []string) error { return auditVerifyRun(c.Context(), env, o) },
	}
	outputFlag(c, &o.output, "text", "json")
	o.fileFlag(c)
	return c
}

func auditVerifyRun(ctx context.Context, env *environment, o auditOptions) error {
	sum, head, err := auditRead(ctx, env, o, func(audit.Record) {})
	if err != nil {
		return err
	}
	if o.output == "json" {
		return document(env.Stdout, "json", sum)
	}
	end := "ends as the kernel says"
	if head == nil {
		end = "its end is not proven: demarc audit verify without --file asks the kernel"
	}
	_, err = fmt.Fprintf(env.Stdout, "audit log: ok, records %d to %d, %s\n", sum.First, sum.Last, end)
	return err
}

// auditRead reads the log from the agent or from files, and says where it has to end,
// if anybody knows.
func auditRead(ctx context.Context, env *environment, o auditOptions, each func(audit.Record)) (auditlog.Summary, *audit.Head, error) {
	if o.file != "" {
		files, err := auditFiles(o.file)
		if err != nil {
			return auditlog.Summary{}, nil, err
		}
		defer func() {
			for _, f := range files {
				f.Reader.(io.Closer).Close()
			}
		}()
		sum, err := auditlog.Read(files, nil, each)
		return sum, nil, err
	}
	client, err := env.client()
	if err != nil {
		return auditlog.Summary{}, nil, err
	}
	defer client.Close()
	log, head, err := client.Audit(ctx)
	if err != nil {
		return auditlog.Summary{}, nil, err
	}
	defer log.Close()
	sum, err := auditlog.Read([]auditlog.File{{Name: "audit log", Reader: log}}, head, each)
	return sum, head, err
}

// auditFiles opens a file and, if it is the newest of a log, the full ones beside it.
func auditFiles(file string) (files []auditlog.File, err error) {
	names := []string{file}
	if filepath.Base(file) == "audit.log" {
		older, err := filepath.Glob(filepath.Join(filepath.Dir(file), "audit-*.log"))
		if err != nil {
			return nil, err
		}
		slices.SortFunc(older, cmp.Compare[string])
		names = append(older, file)
	}
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			for _, open := range files {
				open.Reader.(io.Closer).Close()
			}
			return nil, fmt.Errorf("read audit log: %w", err)
		}
		files = append(files, auditlog.File{Name: name, Reader: f})
	}
	return files, nil
}
