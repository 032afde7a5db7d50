package core

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/core/audit"
	"github.com/demarc/demarc/agent/core/proto"
)

// told is what records say, shortly.
func told(records []audit.Record) (all []string) {
	for _, r := range records {
		line := r.What + " by " + r.Who
		if r.Policy != "" {
			line += fmt.Sprintf(" %s %d", r.Policy, r.Version)
		}
		if r.Detail != "" {
			line += ": " + r.Detail
		}
		all = append(all, line)
	}
	return all
}

// Everything that changes what is enforced is in the log, with who wanted it, before
// it happens and with how it ended.
func TestAuditTellsChanges(t *testing.T) {
	m := newMachine(t)
	c := still(m.start())
	serve(t, c)
	client := dial(t, c)
	_, d, err := client.Hello()
	must(t, err)
	d.Close()
	_, err = c.Apply(shop(t, version(7)), 0)
	must(t, err)
	_, err = c.Apply(shop(t, version(8)), 0)
	must(t, err)
	if _, err := c.Apply(shop(t, version(6)), 0); err == nil {
		t.Error("an older version was applied")
	}
	_, err = client.Rollback()
	must(t, err)
	must(t, c.Close())
	c = m.start()
	me := fmt.Sprintf("user 0, process %d", os.Getpid())
	want := []string{
		"start by core: adopted false",
		"keys by core: key of epoch 1 loaded, fingerprint " + printOf(t, c), "keys by core: sending with the key of epoch 1",
		"connected by " + me,
		"apply by core shop 7", "applied by core shop 7: slot 0, epoch 1",
		"apply by core shop 8", "applied by core shop 8: slot 1, epoch 2",
		"refused by core shop 6: apply: image has version 6, and version 8 was in force already",
		"rollback by " + me + " shop 7", "applied by " + me + " shop 7: slot 2, epoch 3",
		"stop by core shop 7",
		"start by core: adopted true",
		"keys by core: key of epoch 1 loaded, fingerprint " + printOf(t, c),
	}
	if diff := cmp.Diff(want, told(journalOf(t, c))); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func printOf(t *testing.T, c *Core) string {
	t.Helper()
	return fmt.Sprintf("%x", c.keys.entries[1].print[:4])
}

// On a full disk what is in force stays, and nothing changes that nobody could read
// of later. (I14)
func TestI14AuditDiskFull(t *testing.T) {
	m := newMachine(t)
	c := enforcing(t, m, shop(t, version(7)))
	good := c.journal.file
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	must(t, err)
	defer full.Close()
	c.journal.file = full
	_, err = c.Apply(shop(t, version(8)), 0)
	var refused *proto.Refused
	if !errors.As(err, &refused) || !strings.Contains(err.Error(), "nothing is changed without a record of it") || !strings.Contains(err.Error(), "no space left on device") {
		t.Errorf("apply: %v", err)
	}
	must(t, c.links.open[hook{program: "egress"}].Detach())
	c.upkeep() // what is broken is mended all the same
	c.upkeep()
	s := c.Status()
	if s.State != proto.StateDegraded || s.Active.Version != 7 || !strings.Contains(strings.Join(s.Problems, "; "), "audit log: write audit log: ") {
		t.Errorf("status: %v, version %d, %v", s.State, s.Active.Version, s.Problems)
	}
	if err := c.prove(); err != nil {
		t.Errorf("the canary: %v", err)
	}
	c.journal.file = good
	if s, err := c.Apply(shop(t, version(8)), 0); err != nil || s.State != proto.StateEnforcing {
		t.Errorf("apply with room again: %+v, %v", s, err)
	}
	all := told(journalOf(t, c))
	if got := all[len(all)-2]; !strings.HasPrefix(got, "apply by core shop 8: 4 records before this one could not be written") {
		t.Errorf("the audit log says %q", got)
	}
}

// Whoever writes to the log, cuts it short or takes it away, while a core runs or
// between two, leaves a break in the chain for good, and the core says so.
func TestAuditTamper(t *testing.T) {
	log := func(c *Core) string { return c.journal.path() }
	tests := []struct {
		name   string
		do     func(t *testing.T, c *Core)
		told   string // while the core runs, by the next record
		later  string // by the next start
		broken string // what a verification finds; "" = nothing
	}{
		{"cut short", func(t *testing.T, c *Core) {
			b, err := os.ReadFile(log(c))
			must(t, err)
			lines := strings.SplitAfter(string(b), "\n")
			must(t, os.WriteFile(log(c), []byte(strings.Join(lines[:len(lines)-3], "")), 0o600))
		}, "the audit log was changed by somebody else: it had ", "audit log ends with record ", " follows record "},
		{"removed", func(t *testing.T, c *Core) { must(t, os.Remove(log(c))) },
			"the audit log is gone, or another file is in its place: a new one was begun", "audit log ends with record 0, but ", " are missing before it"},
		{"one word changed", func(t *testing.T, c *Core) {
			b, err := os.ReadFile(log(c))
			must(t, err)
			must(t, os.WriteFile(log(c), []byte(strings.Replace(string(b), "adopted false", "adopted FALSE", 1)), 0o600))
		}, "the audit log was changed by somebody else", "", "audit.log:1: its hash does not match its content"},
		{"something added", func(t *testing.T, c *Core) {
			f, err := os.OpenFile(log(c), os.O_WRONLY|os.O_APPEND, 0)
			must(t, err)
			defer f.Close()
			_, err = f.WriteString("nothing to see\n")
			must(t, err)
		}, "the audit log was changed by somebody else", "last line of ", "not an audit record"},
		{"end in the kernel", func(t *testing.T, c *Core) { must(t, c.journal.kernel.Put(uint32(0), audit.Head{Seq: 99})) },
			"the audit log's end was changed in the kernel: it was put back", "but record 99 was written", ""},
		// The core never acknowledged such a record: a start cuts it off.
		{"half a record", func(t *testing.T, c *Core) {
			f, err := os.OpenFile(log(c), os.O_WRONLY|os.O_APPEND, 0)
			must(t, err)
			defer f.Close()
			_, err = f.WriteString(`{"seq":`)
			must(t, err)
		}, "the audit log was changed by somebody else", "", "not an audit record"},
	}
	for _, tt := range tests {
		t.Run(tt.name+" while it runs", func(t *testing.T) {
			m := newMachine(t)
			c := enforcing(t, m, shop(t, nil))
			tt.do(t, c)
			c.upkeep()
			records, _, err := readJournal(t, c)
			if tt.broken == "" {
				must(t, err)
				if got := told(records[len(records)-1:])[0]; !strings.Contains(got, tt.told) {
					t.Errorf("the audit log says %q", got)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.broken) {
				t.Errorf("verified as %v, want %s", err, tt.broken)
			}
			b, err := os.ReadFile(log(c))
			must(t, err)
			if !strings.Contains(string(b), strings.ReplaceAll(tt.told, `"`, `\"`)) {
				t.Errorf("the audit log says:\n%s", b)
			}
		})
		t.Run(tt.name+" between two cores", func(t *testing.T) {
			m := newMachine(t)
			c := enforcing(t, m, shop(t, nil))
			closed := &Core{journal: &journal{dir: c.journal.dir, kernel: twin(t, c.journal.kernel)}}
			c.Close()
			tt.do(t, closed)
			c = still(m.start())
			problems := strings.Join(c.Status().Problems, "; ")
			if tt.later == "" && problems != "" || !strings.Contains(problems, tt.later) {
				t.Errorf("problems %q, want %s", problems, tt.later)
			}
			_, _, err := readJournal(t, c)
			switch {
			case tt.name == "half a record":
				must(t, err)
			case err == nil:
				t.Error("it is taken for whole")
			}
		})
	}
}

// A core that ended between a record and telling the kernel goes on without a break.
func TestAuditInterrupted(t *testing.T) {
	m := newMachine(t)
	c := enforcing(t, m, shop(t, nil))
	before := c.journal.head
	must(t, c.record("core", "one more", nil, ""))
	must(t, c.journal.kernel.Put(uint32(0), before))
	c.journal.close() // as if it were killed
	c.journal = nil
	c.Close()
	c = m.start()
	if s := c.Status(); s.State != proto.StateEnforcing {
		t.Errorf("%v, %v", s.State, s.Problems)
	}
	journalOf(t, c)
}

// The log does not grow without end, and the chain goes over its files. What is let
// go of is said.
func TestAuditRotates(t *testing.T) {
	m := newMachine(t)
	c := still(m.start())
	for i := range auditFiles + 3 {
		must(t, c.record("core", "something", nil, "number %d", i))
		c.journal.wrote.Size = auditBytes // as if it were full
	}
	must(t, c.record("core", "something", nil, "the last"))
	if n := len(c.journal.older()); n != auditFiles {
		t.Errorf("%d full files are kept", n)
	}
	records, sum, err := readJournal(t, c)
	must(t, err)
	if sum.First <= 1 || !sum.EndIsProven || records[len(records)-1].Detail != "the last" {
		t.Errorf("%+v, %v", sum, told(records))
	}
	c.Close()
	c = still(m.start())
	journalOf(t, c)
	// Whoever takes more away than was said is found out.
	must(t, os.Remove(c.journal.older()[auditFiles-1]))
	if _, _, err := readJournal(t, c); err == nil || !strings.Contains(err.Error(), "are missing before it") {
		t.Errorf("verified as %v", err)
	}
	// And a file that was never ours is not touched.
	strange := filepath.Join(m.config.StateDir, "audit-mine.log")
	must(t, os.WriteFile(strange, []byte("mine"), 0o600))
	c.journal.wrote.Size = auditBytes
	must(t, c.record("core", "something", nil, ""))
	if _, err := os.Lstat(strange); err != nil {
		t.Error(err)
	}
}

// Peers cannot push out what is in the log by asking for nonsense.
func TestAuditFlood(t *testing.T) {
	m := newMachine(t)
	c := still(m.start())
	before := len(journalOf(t, c))
	for range 2 * auditSpare {
		if _, err := c.apply([]byte("nonsense"), change{}, "user 7"); err == nil {
			t.Fatal("nonsense was applied")
		}
	}
	if n := len(journalOf(t, c)) - before; n != auditSpare {
		t.Errorf("%d of %d are recorded, want %d", n, 2*auditSpare, auditSpare)
	}
	c.upkeep()
	_, _ = c.apply([]byte("nonsense"), change{}, "user 7")
	all := told(journalOf(t, c))
	if got := all[len(all)-1]; !strings.HasSuffix(got, fmt.Sprintf("; %d more before this one were not recorded", auditSpare)) {
		t.Errorf("the last says %q", got)
	}
}
