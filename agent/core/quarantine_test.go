package core

import (
	"testing"
	"time"

	"github.com/demarc/demarc/policy"
)

// TestBlastLimit: without anybody's order no more workloads are quarantined at once
// than quarantine_automatic says, whoever asks, and none that manages the host. A
// person's orders neither count nor are refused.
func TestBlastLimit(t *testing.T) {
	const (
		full    = "2 workloads are quarantined without anybody's order already"
		manages = "workload bastion has the role management"
	)
	m := newMachine(t)
	m.config.Blast = 2
	b := shop(t, func(p *policy.Policy) {
		for i := range p.Workloads {
			if p.Workloads[i].Name == "bastion" {
				p.Workloads[i].Roles = []policy.Role{{Name: managementRole}}
			}
		}
	})
	c := still(m.start())
	if _, err := c.Apply(b, 0); err != nil {
		t.Fatal(err)
	}
	// over lets a quarantine's time pass, as the kernel sees it.
	over := func(name string) {
		q := c.quarantines[id(t, b, name)]
		q.Boot = 1
		c.quarantines[id(t, b, name)] = q
		must(t, c.enforceQuarantines())
	}
	for i, step := range []struct {
		workload  string
		automatic bool
		err       string
		before    func()
	}{
		{workload: "bastion", automatic: true, err: manages},
		{workload: "web", automatic: true},
		{workload: "api", automatic: true},
		{workload: "postgres", automatic: true, err: full},
		{workload: "web", automatic: true}, // once more is no more
		{workload: "postgres"},             // somebody's order
		{workload: "pod", automatic: true, err: full},
		{workload: "pod", automatic: true, err: full, before: func() { c.Close(); c = still(m.start()) }},
		{workload: "pod", automatic: true, before: func() { over("api") }},
		{workload: "api", automatic: true, err: full},
		{workload: "api", automatic: true, before: func() {
			if _, err := c.release(id(t, b, "web"), "test"); err != nil {
				t.Fatal(err)
			}
		}},
		{workload: "web", automatic: true, err: full},
		{workload: "api"}, // what was a machine's is a person's now
		{workload: "web", automatic: true},
		{workload: "bastion", err: manages},
		{workload: "api", automatic: true, err: "0 workloads are quarantined without anybody's order already", before: func() {
			for _, name := range []string{"web", "api", "pod", "postgres"} {
				if _, err := c.release(id(t, b, name), "test"); err != nil {
					t.Fatal(err)
				}
			}
			c.config.Blast = 0
		}},
	} {
		if step.before != nil {
			step.before()
		}
		_, err := c.quarantine(id(t, b, step.workload), time.Hour, "a test", step.automatic, "test")
		if step.err == "" && err != nil || step.err != "" && !refusedWith(err, step.err) {
			t.Errorf("step %d, %s, automatic %v: %v, want %q", i, step.workload, step.automatic, err, step.err)
		}
		// The kernel has what the status says.
		found, err := c.kernelQuarantines()
		must(t, err)
		machines, all := 0, c.Status().Quarantines
		for _, q := range all {
			if _, there := found[q.Identity]; !there {
				t.Errorf("step %d: %s is not quarantined in the kernel", i, q.Workload)
			}
			if q.Automatic {
				machines++
			}
		}
		if len(found) != len(all) || machines > 2 {
			t.Errorf("step %d: %d in the kernel, %d in the status, %d of them without anybody's order", i, len(found), len(all), machines)
		}
	}
}
