package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/test/netlab"
)

// resident is the resident memory of a process, in kB.
func resident(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// 5,000 containers of a workload come and go, 250 at a time, and some of each
// generation are refused something. In the end the agent shows as many series as before, and
// is no larger.
func TestContainersComeAndGo(t *testing.T) {
	const each, generations = 250, 20
	e := newEnds(t, cliBody, netlab.NodeOptions{Metrics: metricsAt})
	count := func() (n int, body string) {
		t.Helper()
		status, body := scrape(t, e.node, "/metrics")
		if status != 200 {
			t.Fatalf("metrics: %d", status)
		}
		for line := range strings.Lines(body) {
			if strings.HasPrefix(line, "demarc_") {
				n++
			}
		}
		return n, body
	}
	bound := func(n int) {
		t.Helper()
		want := fmt.Sprintf("demarc_bindings{workload=%q,zone=%q} %d\n", "web", "app", n)
		eventually(t, 30*time.Second, want, func() bool {
			_, body := count()
			return strings.Contains(body, want)
		})
	}
	generation := func(g int) {
		t.Helper()
		var dirs []string
		for i := range each {
			dir := filepath.Join(e.node.Root().Dir(), fmt.Sprintf("lab/web/c-%d-%d", g, i))
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			dirs = append(dirs, dir)
		}
		if g%10 == 0 {
			bound(each + 1)
			a := startActor(t, e.web, e.node.Cgroup(fmt.Sprintf("/lab/web/c-%d-0", g)))
			if d := a.datagrams(e.at4(7001), 1); d.Sent != 0 {
				t.Errorf("undeclared datagram: %+v", d)
			}
			a.stop()
		}
		for _, dir := range dirs {
			eventually(t, 10*time.Second, "cgroup is empty", func() bool { return os.Remove(dir) == nil })
		}
	}
	for g := range 4 { // what is allocated once
		generation(g)
	}
	bound(1)
	series, _ := count()
	before := resident(t, e.node.Agent.PID())
	for g := 4; g < generations; g++ {
		generation(g)
	}
	bound(1)
	after := resident(t, e.node.Agent.PID())
	n, _ := count()
	t.Logf("%d series before, %d after; %d kB resident before, %d after", series, n, before, after)
	if n != series {
		t.Errorf("%d series, %d before", n, series)
	}
	if after > before+before/4 {
		t.Errorf("%d kB resident, %d before", after, before)
	}
}
