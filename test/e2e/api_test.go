package e2e_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/test/netlab"
)

const (
	cliBody = `crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000], log: all}
`
	metricsAt = "127.0.0.1:9477"
)

// scrape gets a page of the agent's, from inside its namespace.
func scrape(t *testing.T, node *netlab.Node, page string) (status int, body string) {
	t.Helper()
	err := node.Home().Do(func() error {
		c, err := net.Dial("tcp", metricsAt)
		if err != nil {
			return err
		}
		defer c.Close()
		fmt.Fprintf(c, "GET %s HTTP/1.0\r\n\r\n", page)
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		status, body = res.StatusCode, string(b)
		return err
	})
	if err != nil {
		t.Fatalf("get %s: %v", page, err)
	}
	return status, body
}

// series are the samples of one metric by their labels.
func series(t *testing.T, text, name string) map[string]int {
	t.Helper()
	found := map[string]int{}
	for line := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || rest[0] != '{' && rest[0] != ' ' {
			continue
		}
		labels, value, _ := strings.Cut(strings.TrimSpace(rest), "} ")
		n, err := strconv.Atoi(value)
		if err != nil {
			t.Fatalf("sample %q: %v", line, err)
		}
		found[strings.TrimPrefix(labels, "{")] = n
	}
	return found
}

// What an operator sees of some connections: on the command line, with every
// filter, and in the metrics, exactly.
func TestCLI(t *testing.T) {
	e := newEnds(t, cliBody, netlab.NodeOptions{Metrics: metricsAt})
	e.server.serve(7000)
	local := startActor(t, e.web, e.node.Cgroup("/local"))
	for range 3 {
		if !e.client.reaches(e.at4(7000)) {
			t.Fatal("the declared connection does not come about")
		}
	}
	for _, to := range e.both(7001) {
		if e.client.reaches(to) {
			t.Error("an undeclared connection came about")
		}
	}
	if d := e.client.datagrams(e.at4(7000), 2); d.Answered != 2 {
		t.Errorf("declared datagrams: %+v", d)
	}
	if d := e.client.datagrams(e.at4(7001), 1); d.Sent != 0 {
		t.Errorf("undeclared datagram: %+v", d)
	}
	if r := call[DialReply](local, "Dial", DialArgs{To: e.at4(7000).String(), Timeout: 50 * time.Millisecond}); r.Error != "timeout" {
		t.Errorf("caller without a proof: %q", r.Error)
	}
	eventually(t, timeToAnswer, "all events arrive", func() bool { return len(e.node.Flows()) >= 12 })

	t.Run("flows", func(t *testing.T) {
		for _, c := range []struct {
			filters string
			want    int
		}{
			{"", 12},
			{"--verdict deny", 4},
			{"--verdict allow", 8},
			{"--verdict deny --protocol udp", 1},
			{"--verdict allow --protocol udp", 2},
			{"--reason no-crossing", 3},
			{"--reason tag-missing", 1},
			{"--reason no-crossing --reason tag-missing", 4},
			{"--not --reason no-crossing", 9},
			{"--from web", 11},
			{"--from app/web --to app/db", 8},
			{"--to db", 9},
			{"--from db", 0},
			{"--crossing web-db", 8},
			{"--crossing web-db --direction ingress", 4},
			{"--port 7000", 9},
			{"--port 7001", 3},
			{"--port 7001 --from web --verdict deny --protocol tcp", 2},
			{"--to-ip " + e.db.IP6.String(), 1},
			{"--to-ip 10.66.0.0/16", 11},
			{"--since 1h", 12},
			{"--until 1h", 0},
		} {
			if flows := e.node.Flows(strings.Fields(c.filters)...); len(flows) != c.want {
				t.Errorf("flows %s: %d, want %d", c.filters, len(flows), c.want)
				for _, f := range flows {
					t.Logf("  %s", netlab.Describe(f))
				}
			}
		}
		out, problems, status := e.node.Demarc("flows", "--last", "1", "--verdict", "deny", "--port", "7001", "--protocol", "udp")
		if status != 0 || problems != "" || strings.Count(out, "\n") != 1 ||
			!strings.Contains(out, "DENIED   app/web (10.66.0.1:") || !strings.Contains(out, "-> unknown (10.66.0.2:7001) udp  egress no-crossing") {
			t.Errorf("flows --last 1: %d\n%s%s", status, out, problems)
		}
		for _, bad := range [][]string{{"--verdict", "maybe"}, {"--port", "x"}, {"--last", "1", "--first", "1"}, {"extra"}} {
			if out, problems, status := e.node.Demarc(append([]string{"flows"}, bad...)...); status != 2 || out != "" || problems == "" {
				t.Errorf("flows %v: %d\n%s%s", bad, status, out, problems)
			}
		}
	})

	t.Run("metrics", func(t *testing.T) {
		status, text := scrape(t, e.node, "/metrics")
		if status != http.StatusOK {
			t.Fatalf("status %d", status)
		}
		sample := func(crossing, direction, dst, reason, src, verdict string) string {
			zone := func(workload string) string {
				if workload == "" {
					return ""
				}
				return "app"
			}
			return fmt.Sprintf("crossing=%q,direction=%q,dst_workload=%q,dst_zone=%q,reason=%q,src_workload=%q,src_zone=%q,verdict=%q",
				crossing, direction, dst, zone(dst), reason, src, zone(src), verdict)
		}
		want := map[string]int{
			sample("web-db", "egress", "db", "crossing", "web", "allow"):     4,
			sample("web-db", "ingress", "db", "crossing", "web", "allow"):    4,
			sample("web-db", "egress", "", "unproven", "web", "provisional"): 1,
			sample("", "egress", "", "no-crossing", "web", "deny"):           3,
			sample("", "ingress", "db", "tag-missing", "", "deny"):           1,
		}
		if diff := cmp.Diff(want, series(t, text, "demarc_verdicts_total")); diff != "" {
			t.Errorf("verdicts (-want +got):\n%s", diff)
		}
		rings := map[string]int{`ring="denied"`: 4, `ring="allowed"`: 8}
		// Signals are counted, too; how many there are is no matter of this test.
		but := func(all map[string]int) map[string]int {
			delete(all, `ring="signals"`)
			return all
		}
		for _, name := range []string{"demarc_ring_events_total", "demarc_agent_events_total"} {
			if diff := cmp.Diff(rings, but(series(t, text, name))); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
		}
		none := map[string]int{`ring="denied"`: 0, `ring="allowed"`: 0, `ring="signals"`: 0}
		if diff := cmp.Diff(none, series(t, text, "demarc_ring_lost_total")); diff != "" {
			t.Errorf("lost (-want +got):\n%s", diff)
		}
		// Unmanaged are the root, /lab and /local.
		bindings := map[string]int{`workload="unmanaged",zone=""`: 3, `workload="db",zone="app"`: 1, `workload="web",zone="app"`: 1}
		if diff := cmp.Diff(bindings, series(t, text, "demarc_bindings")); diff != "" {
			t.Errorf("bindings (-want +got):\n%s", diff)
		}
		for _, line := range []string{"demarc_enforcing 1\n", "demarc_core_connected 1\n"} {
			if !strings.Contains(text, line) {
				t.Errorf("no line %q", line)
			}
		}
	})

	t.Run("lists", func(t *testing.T) {
		var zones []api.Zone
		fromJSON(t, e.node, &zones, "zones", "-o", "json")
		wantZones := []api.Zone{{Name: "app", Trust: 10, Unmanaged: true, Workloads: []string{"db", "web"}, Bindings: 2}}
		if diff := cmp.Diff(wantZones, zones); diff != "" {
			t.Errorf("zones (-want +got):\n%s", diff)
		}
		var identities []api.Identity
		fromJSON(t, e.node, &identities, "identities", "-o", "json")
		found := map[string]api.Identity{}
		for _, i := range identities {
			i.Identity = 0
			found[i.Name()] = i
		}
		want := api.Identity{
			Workload: "web", Zone: "app", SPIFFE: "spiffe://lab.example/app/web", Selectors: []string{"cgroup /lab/web"},
			Bindings: 1, Cgroups: []string{"/lab/web"},
		}
		if diff := cmp.Diff(want, found["app/web"]); diff != "" {
			t.Errorf("identity of web (-want +got):\n%s", diff)
		}
		s := statusOf(t, e.node)
		if s.State != "enforcing" || s.Policy == nil || s.Policy.Name != "lab" || s.Policy.Version != 1 || s.Policy.Crossings != 1 ||
			s.Policy.Workloads != 2 || len(s.Problems) > 0 || len(s.Core.Status.Links) == 0 {
			t.Errorf("status %+v", s)
		}
	})
}

func fromJSON(t *testing.T, node *netlab.Node, to any, args ...string) {
	t.Helper()
	out, problems, status := node.Demarc(args...)
	if err := json.Unmarshal([]byte(out), to); status != 0 || err != nil {
		t.Fatalf("demarc %v: %d, %v\n%s%s", args, status, err, out, problems)
	}
}

// A follower sees what happens as it happens, also across a restart of the core.
func TestCLIFollow(t *testing.T) {
	e := newEnds(t, cliBody, netlab.NodeOptions{})
	follow := func(port uint16) flow.Flow {
		t.Helper()
		lines := make(chan string, 1)
		go func() {
			out, _, _ := e.node.Demarc("flows", "--follow", "--last", "0", "--first", "1", "-o", "json", "--port", strconv.Itoa(int(port)))
			lines <- out
		}()
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
			e.client.datagrams(e.at4(port), 1)
			select {
			case line := <-lines:
				var f flow.Flow
				if err := json.Unmarshal([]byte(line), &f); err != nil {
					t.Fatalf("%v in %q", err, line)
				}
				return f
			case <-time.After(20 * time.Millisecond):
			}
		}
		t.Fatal("the follower saw nothing")
		return flow.Flow{}
	}
	if f := follow(7001); f.Reason.String() != "no-crossing" || f.Source.Label() != "app/web" {
		t.Errorf("followed %s", netlab.Describe(f))
	}
	e.node.RestartCore()
	e.node.AwaitAgent()
	if f := follow(7002); f.Reason.String() != "no-crossing" || f.Destination.Port != 7002 {
		t.Errorf("followed after a restart %s", netlab.Describe(f))
	}
}

// What cannot be applied changes nothing and says why, and a missing agent is told
// apart from a refusal.
func TestCLIRefusals(t *testing.T) {
	e := newEnds(t, cliBody, netlab.NodeOptions{})
	e.server.serve(7000)
	e.apply(cliBody + "  - {name: second, from: [workload/web], to: [workload/db], ports: [tcp/7001]}\n")
	before := statusOf(t, e.node)
	write := func(name, content string) string {
		t.Helper()
		file := filepath.Join(e.lab.Dir(), name)
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return file
	}
	image := string(e.node.Image(document(3, webAndDB+cliBody)))
	flipped := []byte(image)
	flipped[len(flipped)/2] ^= 1
	for _, c := range []struct {
		name, file, says string
	}{
		{"unknown workload", write("a.yaml", document(3, webAndDB+strings.ReplaceAll(cliBody, "workload/db", "workload/dv"))), "a.yaml:11:47: no workload named"},
		{"unknown key", write("b.yaml", document(3, webAndDB+cliBody+"crosings: []\n")), "b.yaml:12:1: unknown key"},
		{"not YAML", write("c.yaml", "{"), "c.yaml:1:"},
		{"empty", write("d.yaml", ""), "d.yaml: document is empty"},
		{"older version", write("e.yaml", document(1, webAndDB+cliBody)), "version 2 was in force"},
		{"same version, other content", write("f.yaml", document(2, webAndDB+cliBody)), "version 2 was in force"},
		{"cut image", write("g.image", image[:len(image)-1]), "image"},
		{"changed image", write("h.image", string(flipped)), "image"},
		{"no file", filepath.Join(e.lab.Dir(), "nothing"), "nothing"},
	} {
		out, problems, status := e.node.Demarc("apply", c.file)
		if status != 1 || out != "" || !strings.Contains(problems, c.says) {
			t.Errorf("%s: %d, want 1 and %q\n%s%s", c.name, status, c.says, out, problems)
		}
		after := statusOf(t, e.node)
		if diff := cmp.Diff(before.Policy, after.Policy); diff != "" || after.State != "enforcing" {
			t.Errorf("%s: the policy in force is another one, or not enforced (%s):\n%s", c.name, after.State, diff)
		}
		if !e.client.reaches(e.at4(7000)) || e.client.reaches(e.at4(7002)) {
			t.Errorf("%s: verdicts have changed", c.name)
		}
	}
	if out, problems, status := e.node.Demarc("apply", write("good.image", image)); status != 0 {
		t.Errorf("the image itself: %d\n%s%s", status, out, problems)
	}

	e.node.StopCore()
	out, problems, status := e.node.Demarc("apply", write("later.yaml", document(4, webAndDB+cliBody)))
	if status != 1 || !strings.Contains(problems, "start demarc-core") {
		t.Errorf("apply without core: %d\n%s%s", status, out, problems)
	}
	if _, _, status := e.node.Demarc("status"); status != 1 {
		t.Errorf("status without core: %d", status)
	}
	e.node.StopAgent()
	for _, args := range [][]string{{"status"}, {"flows"}, {"identities"}, {"zones"}, {"rollback"}, {"apply", write("none.yaml", document(5, webAndDB+cliBody))}} {
		if out, problems, status := e.node.Demarc(args...); status != 3 || out != "" || !strings.Contains(problems, "hint:") {
			t.Errorf("demarc %v without agent: %d\n%s%s", args, status, out, problems)
		}
	}
	if !e.client.reaches(e.at4(7000)) || e.client.reaches(e.at4(7002)) {
		t.Error("verdicts have changed without the daemons")
	}
}
