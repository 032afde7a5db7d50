package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// Scrapes is how long it took to get the agent's metrics.
type Scrapes struct {
	Machine Machine `json:"machine"`
	Flows   int     `json:"flows"` // active ones, in the kernel's table
	Cgroups int     `json:"cgroups"`
	Series  int     `json:"series"`
	Bytes   int     `json:"bytes"`
	Median  float64 `json:"median_ms"`
	Worst   float64 `json:"worst_ms"`
	Goals   []Goal  `json:"goals"`
}

// String is what `make bench-micro` prints.
func (s *Scrapes) String() string {
	b, _ := json.Marshal(s.Machine)
	return fmt.Sprintf("%s\n%d flows, %d cgroups; %d series, %d bytes; median %.1f ms, worst %.1f ms\n%s",
		b, s.Flows, s.Cgroups, s.Series, s.Bytes, s.Median, s.Worst, s.Goals[0])
}

var goalScrape = Goal{ID: "P22", What: "scrape of the metrics with 10,000 active flows, median", Unit: "ms", Must: 50, Aim: 20}

const scrapePolicy = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: scrape, version: 1}
trustDomain: bench.example
zones:
  app: {trust: 10}
workloads:
  web: {zone: app, match: [{cgroup: /lab/web}]}
networks:
  all: {zone: app, cidrs: [10.0.0.0/8]}
crossings:
  - {name: out, from: [workload/web], to: [network/all], ports: [udp/7000], log: none}
`

// TestScrape gets the metrics of a node that has 10,000 flows and 1,000 cgroups.
func TestScrape(t *testing.T) {
	const at, flows, cgroups = "127.0.0.1:9477", 10_000, 1000
	full := os.Getenv(repeatVariable) != ""
	times := 5
	if full {
		times = 100
	}
	lab := netlab.New(t)
	web, far := lab.Namespace("web"), lab.Namespace("far")
	web.Lead(netip.MustParsePrefix("10.70.0.0/16"), far) // where nobody has these addresses
	node := lab.Node(scrapePolicy, netlab.NodeOptions{Metrics: at})
	p := web.Probe(node.Cgroup("/lab/web"))
	for i := range cgroups {
		node.Cgroup(fmt.Sprintf("/lab/web/worker-%d", i))
	}
	p.Must(probe.Call{Op: "socket", New: "s", Domain: unix.AF_INET, Type: unix.SOCK_DGRAM})
	p.Do(probe.Call{Op: "flood", Socket: "s", Address: "10.70.0.0:7000", Data: []byte("x"), Size: flows})
	table, err := ebpf.LoadPinnedMap(filepath.Join(node.Dir(), "bpf/demarc/maps/flows"), nil)
	check(t, err)
	defer table.Close()
	outcome := Scrapes{Machine: describeMachine(), Cgroups: cgroups}
	key, value := make([]byte, table.KeySize()), make([]byte, table.ValueSize())
	for walk := table.Iterate(); walk.Next(&key, &value); {
		outcome.Flows++
	}
	if outcome.Flows < flows {
		t.Fatalf("%d flows are active, want %d", outcome.Flows, flows)
	}
	transport := &http.Transport{DialContext: func(_ context.Context, network, address string) (c net.Conn, err error) {
		err = node.Home().Do(func() error {
			c, err = net.Dial(network, address)
			return err
		})
		return c, err
	}}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	var took []float64
	for range times {
		start := time.Now()
		res, err := client.Get("http://" + at + "/metrics")
		check(t, err)
		b, err := io.ReadAll(res.Body)
		res.Body.Close()
		check(t, err)
		took = append(took, float64(time.Since(start).Microseconds())/1000)
		outcome.Bytes, outcome.Series = len(b), 0
		for line := range strings.Lines(string(b)) {
			if !strings.HasPrefix(line, "#") {
				outcome.Series++
			}
		}
		if want := fmt.Sprintf("demarc_bindings{workload=%q,zone=%q} %d\n", "web", "app", cgroups+1); !strings.Contains(string(b), want) {
			t.Fatalf("no line %q in\n%s", want, b)
		}
		if !strings.Contains(string(b), `reason="`+abi.ByCrossing.String()+`"`) {
			t.Fatalf("the flows are not counted:\n%s", b)
		}
	}
	slices.Sort(took)
	outcome.Median, outcome.Worst = took[len(took)/2], took[len(took)-1]
	outcome.Machine.After = loadAverage()
	outcome.Goals = []Goal{goalScrape.judge(outcome.Median, full)}
	fmt.Println(&outcome)
	if outcome.Goals[0].Outcome == Missed {
		t.Errorf("goal missed: %s", outcome.Goals[0])
	}
	writeJSON(t, &outcome)
}
