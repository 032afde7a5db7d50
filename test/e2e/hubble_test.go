//go:build hubble

package e2e_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	observerpb "github.com/cilium/cilium/api/v1/observer"

	"github.com/demarc/demarc/test/netlab"
)

// hubble is the real command on an agent's socket.
type hubble struct {
	path, server, home string
}

func (h hubble) run(t *testing.T, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	c := exec.Command(h.path, args...)
	c.Env = []string{"HOME=" + h.home, "HUBBLE_SERVER=" + h.server, "TZ=UTC"}
	var out, problems strings.Builder
	c.Stdout, c.Stderr = &out, &problems
	if err := c.Run(); c.ProcessState == nil {
		t.Fatal(err)
	}
	return out.String(), problems.String(), c.ProcessState.ExitCode()
}

// TestHubble has Cilium's hubble command look at a node. What it shows with each of its
// filters, on an agent, must be what it shows by its own filters on a file that holds
// all that the agent knows, as `demarc flows -o jsonpb` writes it.
func TestHubble(t *testing.T) {
	path := os.Getenv("DEMARC_HUBBLE")
	if path == "" {
		t.Fatal("DEMARC_HUBBLE names no hubble command: run make test-hubble")
	}
	e := newEnds(t, cliBody, netlab.NodeOptions{})
	e.server.serve(7000)
	for range 3 {
		if !e.client.reaches(e.at4(7000)) {
			t.Fatal("the declared connection does not come about")
		}
	}
	for _, to := range e.both(7001) {
		e.client.reaches(to)
	}
	e.client.datagrams(e.at4(7000), 2)
	e.client.datagrams(e.at4(7001), 1)
	local := startActor(t, e.web, e.node.Cgroup("/local"))
	call[DialReply](local, "Dial", DialArgs{To: e.at4(7000).String(), Timeout: 50 * time.Millisecond})
	eventually(t, 10*time.Second, "all events arrive", func() bool { return len(e.node.Flows()) >= 12 })

	h := hubble{path, "unix://" + e.node.AgentSocket(), t.TempDir()}
	all, problems, status := e.node.Demarc("flows", "--all", "-o", "jsonpb")
	if status != 0 || problems != "" {
		t.Fatalf("flows -o jsonpb: %d %s", status, problems)
	}
	file := filepath.Join(h.home, "flows.jsonpb")
	if err := os.WriteFile(file, []byte(all), 0o600); err != nil {
		t.Fatal(err)
	}
	var flows []*observerpb.GetFlowsResponse
	for line := range strings.Lines(all) {
		r := &observerpb.GetFlowsResponse{}
		if err := json.Unmarshal([]byte(line), r); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		flows = append(flows, r)
	}

	// What each filter is tried with: something that holds for some flows where there is
	// such a thing, and something that does not.
	tries := map[string][]string{
		"uuid": {flows[3].GetFlow().GetUuid(), "none"}, "node-name": {"*", flows[0].GetNodeName(), "other"}, "node-label": {"a=b"},
		"from-cluster": {"c"}, "cluster": {"c"}, "to-cluster": {"c"}, "protocol": {"tcp", "udp", "icmp", "http"}, "tcp-flags": {"syn"},
		"type": {"drop", "policy-verdict", "trace", "trace:to-network", "l7", "1:133"}, "verdict": {"DROPPED", "FORWARDED", "AUDIT", "TRACED", "ERROR"},
		"drop-reason-desc": {"POLICY_DENIED", "AUTH_REQUIRED", "INVALID_IDENTITY"}, "http-status": {"404", "5+"}, "http-method": {"get"}, "http-path": {"/x"}, "http-url": {"x"},
		"http-header": {"a:b"}, "trace-id": {"x"}, "ip-trace-id": {"7"}, "from-fqdn": {"*.example"}, "fqdn": {"*.example"}, "to-fqdn": {"*.example"},
		"from-ip": {"10.66.0.1", "10.66.0.0/16", "192.0.2.1"}, "ip": {"10.66.0.2", "fd66::/64"}, "to-ip": {"10.66.0.2", e.db.IP6.String()}, "snat-ip": {"10.66.0.1"},
		"ip-version": {"v4", "v6", "none"}, "ipv4": {""}, "ipv6": {""}, "from-pod": {"app/web", "app/", "/w", "web"}, "pod": {"app/db", "/d"}, "to-pod": {"app/db", "x/"},
		"from-namespace": {"app", "edge"}, "namespace": {"app"}, "to-namespace": {"app", "edge"}, "from-all-namespaces": {""}, "all-namespaces": {""}, "to-all-namespaces": {""},
		"from-label": {"demarc:workload=web", "zone in (app,x)", "!zone", "reserved:host"}, "label": {"workload=db", "reserved:world"}, "to-label": {"demarc:workload=db", "k8s:workload=db", "reserved:world"},
		"from-service": {"a/b"}, "service": {"a/b"}, "to-service": {"a/b"}, "from-port": {"7000", fmt.Sprint(flows[0].GetFlow().GetL4().GetTCP().GetSourcePort())}, "port": {"7000", "7001"}, "to-port": {"7000", "7001", "1"},
		"from-workload": {"web", "db", "Workload/web"}, "workload": {"db"}, "to-workload": {"db"},
		"from-identity": {fmt.Sprint(flows[0].GetFlow().GetSource().GetIdentity()), "host", "world"}, "identity": {"world", "host"}, "to-identity": {"world", "1"},
		"traffic-direction": {"ingress", "egress"}, "cel-expression": {"_flow.l4.TCP.destination_port == 7001u", "'demarc:zone=app' in _flow.destination.labels"},
		"interface": {"eth0"}, "encrypted": {""}, "unencrypted": {""}, "reply": {""}, "not-reply": {""},
	}
	help, _, _ := h.run(t, "observe", "--help")
	_, filters, _ := strings.Cut(help, "Filters Flags:")
	filters, _, _ = strings.Cut(filters, "Raw-Filters Flags:")
	var names []string
	for _, m := range regexp.MustCompile(`(?m)--([a-z0-9-]+) filter`).FindAllStringSubmatch(filters, -1) {
		names = append(names, m[1])
	}
	if len(names) < 60 {
		t.Fatalf("only %d filters are in the help: %q", len(names), names)
	}
	compare := func(args ...string) (rows int) {
		t.Helper()
		live, problems, status := h.run(t, append([]string{"observe"}, args...)...)
		from, fileProblems, fileStatus := h.run(t, append([]string{"observe", "--input-file", file}, args...)...)
		if status != 0 || fileStatus != 0 {
			t.Errorf("observe %v: %d %s; from the file %d %s", args, status, problems, fileStatus, fileProblems)
		}
		if d := cmp.Diff(from, live); d != "" {
			t.Errorf("observe %v (-by hubble's own filters +by the agent):\n%s", args, d)
		}
		return strings.Count(live, "\n")
	}
	tried := 0
	for _, name := range names {
		if name == "not" {
			continue
		}
		values, ok := tries[name]
		if !ok {
			t.Errorf("hubble has a filter --%s that is not tried", name)
		}
		for _, v := range values {
			flag := "--" + name
			if v != "" {
				flag += "=" + v
			}
			yes, no := compare("--all", flag), compare("--all", "--not", flag)
			if yes+no != len(flows) {
				t.Errorf("%s: %d flows hold, %d do not, of %d", flag, yes, no, len(flows))
			}
			if yes > 0 {
				tried++
			}
		}
	}
	if tried < 40 {
		t.Errorf("only %d filters found anything", tried)
	}
	for _, args := range [][]string{
		{"--last", "3"}, {"--first", "3"}, {"--last", "2", "--verdict", "DROPPED"}, {"--all", "--verdict", "DROPPED", "--verdict", "AUDIT", "--protocol", "tcp", "--not", "--to-port", "7001"},
		{"--all", "-o", "jsonpb"}, {"--all", "-o", "dict"}, {"--all", "-o", "table"}, {"--all", "--print-node-name", "--print-policy-names", "--numeric"},
		{"--all", "--allowlist", `{"source_pod":["app/web"]}`, "--denylist", `{"destination_port":["7001"]}`},
	} {
		compare(args...)
	}

	// What a flow looks like to those who know it.
	out, _, _ := h.run(t, "observe", "--last", "1", "--to-port", "7001", "--protocol", "tcp", "--ipv4", "--print-policy-names")
	want := regexp.MustCompile(fmt.Sprintf(`^\w{3} +\d+ [\d:.]+: app/web(:\d+)? \(ID:%d\) -> 10\.66\.0\.2:7001 \(world\) Policy denied DROPPED \(TCP no-crossing\)\n$`, flows[0].GetFlow().GetSource().GetIdentity()))
	if !want.MatchString(out) {
		t.Errorf("observe: %q", out)
	}

	out, problems, status = h.run(t, "observe", "--last", "1", "-o", "jsonpb", "--field-mask", "verdict,source.pod_name")
	if status != 0 || !regexp.MustCompile(`^{"flow":{"verdict":"\w+","source":({"pod_name":"web"}|{})},"node_name":"[^"]+","time":"[^"]+"}\n$`).MatchString(out) {
		t.Errorf("field mask: %d %s%s", status, out, problems)
	}

	out, problems, status = h.run(t, "list", "nodes")
	if status != 0 || !strings.Contains(out, "Connected") || !strings.Contains(out, flows[0].GetNodeName()) {
		t.Errorf("list nodes: %d %s%s", status, out, problems)
	}
	out, problems, status = h.run(t, "list", "namespaces")
	if status != 0 || !slices.Contains(strings.Fields(out), "app") {
		t.Errorf("list namespaces: %d %s%s", status, out, problems)
	}
	out, problems, status = h.run(t, "status")
	if status != 0 || !strings.Contains(out, "Healthcheck (via "+h.server+"): Ok") || !strings.Contains(out, "Current/Max Flows: 12/") {
		t.Errorf("status: %d %s%s", status, out, problems)
	}
	_, problems, status = h.run(t, "observe", "--from-label", "a in b")
	if status != 1 || !strings.Contains(problems, `whitelist filter 1: source_label: "a in b": unable to parse requirement`) {
		t.Errorf("bad filter: %d %s", status, problems)
	}

	// It follows, and sees what happens meanwhile.
	c := exec.Command(h.path, "observe", "--follow", "--last", "1", "--to-port", "7001", "-o", "jsonpb")
	c.Env = []string{"HOME=" + h.home, "HUBBLE_SERVER=" + h.server}
	pipe, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Wait()
	defer c.Process.Kill()
	d := json.NewDecoder(pipe)
	for range 2 {
		r := &observerpb.GetFlowsResponse{}
		if err := d.Decode(r); err != nil || r.GetFlow() == nil {
			t.Fatalf("follow: %v", err)
		}
		e.client.reaches(e.at4(7001))
	}
}
