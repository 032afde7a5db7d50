package lateral_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/test/netlab"
	"github.com/demarc/demarc/test/probe"
)

// A day in the life of a host on which nothing is wrong, in seconds instead of
// hours, which puts all of it into one time of every detector:
//
//	prometheus (monitor) scrapes twelve machines, two of which are down
//	checker asks web, which is a proxy for api, which keeps a pool to db
//	ops (bastion) goes to twelve machines by ssh, as Ansible does
//	backup (management) copies a large file by ssh
//	somebody logs in to the host by ssh, and looks around
//	everybody asks DNS; updates come from a mirror; deploys replace every workload
//	api still calls a service that was taken away
type day struct {
	*lab
	keys    *keys
	dir     string
	servers map[string]*netlab.Process
	db      *netlab.Probe
}

const machines = 12

const dayCrossings = `  - {name: scrape, from: [workload/prometheus], to: [network/machines], ports: [tcp/9100], identity: none, log: all}
  - {name: check, from: [workload/checker], to: [workload/web], ports: [tcp/8080], log: all}
  - {name: web-api, from: [workload/web], to: [workload/api], ports: [tcp/8081], log: all}
  - {name: api-db, from: [workload/api], to: [workload/db], ports: [tcp/5432], log: all, limit: {connections: 1000/s}}
  - {name: ssh, from: [workload/ops, workload/backup], to: [network/machines], ports: [tcp/22], identity: none, log: all}
  - {name: login, from: [network/target], to: [workload/login], ports: [tcp/22], identity: none, limit: {connections: 10/s}, log: all}
  - {name: dns, from: [zone/edge], to: [network/target], ports: [udp/53], identity: none, log: all}
  - {name: mirror, from: [zone/edge], to: [network/everything], ports: [tcp/443], identity: none, log: all}
`

var dayWorkloads = []string{
	"prometheus monitor", "checker", "web proxy", "api", "ops bastion", "backup management", "login",
}

func newDay(t *testing.T) *day {
	d := &day{lab: &lab{t: t, lab: netlab.New(t)}, servers: map[string]*netlab.Process{}}
	d.dir = d.lab.lab.Dir()
	d.host = d.lab.lab.Namespace("host")
	d.targets = []*netlab.Namespace{d.lab.lab.Namespace("target")}
	for i := range machines {
		d.targets[0].Address(netip.PrefixFrom(d.address(i), 16))
	}
	d.targets[0].Echo(53)
	serveHTTP(t, d.targets[0], 443)
	for i := range machines - 2 { // the others are down for maintenance
		serveHTTPAt(t, d.targets[0], netip.AddrPortFrom(d.address(i), 9100))
	}
	d.node = d.lab.lab.Node(d.text(), netlab.NodeOptions{Home: d.host})
	d.dial()
	d.keys = newKeys(t, d.dir)
	d.keys.sshd(t, d.targets[0], d.lab.lab.Cgroup("target"), netip.MustParseAddrPort("0.0.0.0:22"))
	d.keys.sshdOf(t, d.host, d.node.Cgroup("/lab/login"), netip.AddrPortFrom(d.host.IP4, 22))
	return d
}

func (d *day) text() string {
	networks := fmt.Sprintf("  machines: {zone: outside, cidrs: [10.66.7.0/24]}\n  everything: {zone: outside, cidrs: [0.0.0.0/0]}\nworkloads:\n  db: {zone: data, match: [{cgroup: /lab/db}]}\n")
	return strings.Replace(d.policy(dayWorkloads, dayCrossings+"  - {name: db-mirror, from: [workload/db], to: [network/everything], ports: [tcp/443], identity: none, log: all}\n"), "workloads:\n", networks, 1)
}

func serveHTTP(t *testing.T, ns *netlab.Namespace, port uint16) {
	t.Helper()
	serveHTTPAt(t, ns, netip.AddrPortFrom(netip.IPv4Unspecified(), port))
}

func serveHTTPAt(t *testing.T, ns *netlab.Namespace, at netip.AddrPort) {
	t.Helper()
	serveTextAt(t, ns, at, "node_load1 0.21\nnode_load5 0.19\n")
}

// serveTextAt answers everything with a text, in a namespace.
func serveTextAt(t *testing.T, ns *netlab.Namespace, at netip.AddrPort, text string) {
	t.Helper()
	var l net.Listener
	if err := ns.Do(func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, text)
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
}

// deploy replaces every workload's processes, and then its cgroups' too.
func (d *day) deploy(version int) {
	d.t.Helper()
	for name, p := range d.servers {
		p.Signal(syscall.SIGTERM)
		p.Wait(30 * time.Second)
		delete(d.servers, name)
	}
	if d.db != nil {
		d.db.Kill()
	}
	cgroup := func(workload string) *netlab.Cgroup {
		return d.node.Cgroup(fmt.Sprintf("/lab/%s/v%d", workload, version))
	}
	d.db = d.host.Probe(cgroup("db"))
	d.db.Must(probe.Call{Op: "serve", Address: ":5432"})
	for name, port := range map[string]int{"api": 8081, "web": 8080} {
		dir := filepath.Join(d.dir, fmt.Sprintf("%s%d", name, version))
		if err := os.Mkdir(dir, 0o755); err != nil {
			d.t.Fatal(err)
		}
		location := "return 200 'fine\\n';"
		if name == "web" {
			location = fmt.Sprintf("proxy_pass http://%s:8081;", d.host.IP4)
		}
		conf := fmt.Sprintf(`daemon off; pid %[1]s/pid; error_log %[1]s/error.log; worker_processes 1; user root;
events { worker_connections 64; }
http { access_log off; client_body_temp_path %[1]s/a; proxy_temp_path %[1]s/b; fastcgi_temp_path %[1]s/c; uwsgi_temp_path %[1]s/d; scgi_temp_path %[1]s/e;
  server { listen %[2]d; location / { %[3]s } } }
`, dir, port, location)
		if err := os.WriteFile(dir+"/conf", []byte(conf), 0o644); err != nil {
			d.t.Fatal(err)
		}
		d.servers[name] = d.host.Start(cgroup(name), netlab.Command{Path: lookPath(d.t, "nginx"), Args: []string{"-p", dir, "-e", dir + "/error.log", "-c", dir + "/conf"}})
	}
	for _, path := range []string{":8081", ":8080"} {
		d.within("checker", "curl", "-s", "--retry", "40", "--retry-connrefused", "--retry-delay", "1", "-m", "40", "http://"+d.host.IP4.String()+path)
	}
}

// within runs a tool in a workload to its end, whatever comes of it.
func (d *day) within(workload, tool string, args ...string) {
	d.t.Helper()
	d.start(workload, tool, args...).Wait(time.Minute)
}

// hour is what happens in each.
func (d *day) hour() {
	d.t.Helper()
	var group sync.WaitGroup
	run := func(workload, tool string, args ...string) {
		p := d.start(workload, tool, args...)
		group.Go(func() { p.Wait(time.Minute) })
	}
	for i := range machines {
		run("prometheus", "curl", "-s", "-m", "2", fmt.Sprintf("http://%s:9100/metrics", d.address(i)))
	}
	for range 3 {
		run("checker", "curl", "-s", "-m", "2", fmt.Sprintf("http://%s:8080/", d.host.IP4))
	}
	for _, w := range []string{"api", "web", "checker"} {
		run(w, "sh", "-c", fmt.Sprintf("printf query | nc -u -w 1 %s 53", d.targets[0].IP4))
		run(w, "curl", "-s", "-m", "2", fmt.Sprintf("http://%s:443/packages", d.targets[0].IP4))
	}
	// A pool of connections, and a service that is no more.
	pool := d.host.Probe(d.node.Cgroup("/lab/api"))
	for i := range 20 {
		name := fmt.Sprintf("c%d", i)
		pool.Socket(name, "tcp4")
		pool.Connect(name, netip.AddrPortFrom(d.host.IP4, 5432).String())
		pool.Echoed(name, "select 1")
	}
	for range 5 {
		run("api", "nc", "-w", "1", d.targets[0].IP4.String(), "6379")
	}
	group.Wait()
	pool.Kill()
}

// Nothing of that day is more than worth a look: at most one finding, none above low.
func TestBenignDay(t *testing.T) {
	d := newDay(t)
	hours := 3
	if all {
		hours = 24
	}
	d.deploy(0)
	for hour := range hours {
		d.hour()
		switch hour % 24 {
		case 0:
			file := filepath.Join(d.dir, "dump")
			if err := os.WriteFile(file, bytes.Repeat([]byte("backup\n"), 2<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			d.within("backup", "sh", append([]string{"-c", `file=$1; shift; exec ssh "$@" <"$file"`, "sh", file}, d.keys.ssh("user", netip.AddrPortFrom(d.address(0), 22), "cat >/dev/null")...)...)
			p := d.targets[0].Start(d.lab.lab.Cgroup("target"), netlab.Command{Path: lookPath(t, "ssh"),
				Args: d.keys.ssh("user", netip.AddrPortFrom(d.host.IP4, 22), "uptime; ls /; ps ax | wc -l; curl -s -m 2 http://"+d.targets[0].IP4.String()+":443/packages >/dev/null; echo looked around")})
			if status := p.Wait(time.Minute); status != 0 || !strings.Contains(p.Output(), "looked around") {
				t.Errorf("ssh: %d: %s", status, p.Output())
			}
		case 1:
			var group sync.WaitGroup
			for i := range machines {
				p := d.start("ops", "ssh", d.keys.ssh("user", netip.AddrPortFrom(d.address(i), 22), "uname -a")...)
				group.Go(func() {
					if status := p.Wait(time.Minute); status != 0 {
						t.Errorf("ssh: %d: %s", status, p.Output())
					}
				})
			}
			group.Wait()
		case 2, 14:
			d.deploy(hour + 1)
			d.node.Apply(d.text())
		}
	}
	found := d.findings(detect.Filter{})
	suppressed := d.findings(detect.Filter{Suppressed: true})
	t.Logf("a day of %d hours, live: %d findings, %d with those that a role explains:\n%s", hours, len(found), len(suppressed), describe(suppressed))
	judge(t, "live", found)
	if len(suppressed) == len(found) {
		t.Error("the bastion's fan-out was not found at all: the detectors do not see this day")
	}
	d.replay(hours)
}

func judge(t *testing.T, what string, found []detect.Finding) {
	t.Helper()
	bad := len(found) > 1
	for _, f := range found {
		bad = bad || f.Severity > detect.Low
	}
	if bad {
		t.Errorf("%s: more than one finding, or one above low:\n%s", what, describe(found))
	}
}

// replay runs the detectors on what was recorded, with its times stretched to two
// whole days of the same.
func (d *day) replay(hours int) {
	d.t.Helper()
	flows := d.node.Flows()
	if len(flows) < 50*hours {
		d.t.Errorf("%d flows in %d hours", len(flows), hours)
	}
	first, last := flows[0].Time, flows[len(flows)-1].Time
	stretch := float64(24*time.Hour) / float64(last.Sub(first)+time.Second)
	file := filepath.Join(d.dir, "day.jsonl")
	w, err := os.Create(file)
	if err != nil {
		d.t.Fatal(err)
	}
	out := json.NewEncoder(w)
	for days := range 2 {
		for _, f := range flows {
			f.Time = first.Add(time.Duration(days)*24*time.Hour + time.Duration(stretch*float64(f.Time.Sub(first))))
			f.Epoch = 1
			if err := out.Encode(detect.Event{Flow: &f}); err != nil {
				d.t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		d.t.Fatal(err)
	}
	policy := filepath.Join(d.dir, "day.yaml")
	if err := os.WriteFile(policy, []byte(d.text()), 0o600); err != nil {
		d.t.Fatal(err)
	}
	text, problems, status := d.node.Demarc("findings", "--from", file, "--policy", policy, "-o", "json")
	var found []detect.Finding
	if err := json.Unmarshal([]byte(text), &found); err != nil || status != 0 {
		d.t.Fatalf("demarc findings: %d, %v\n%s", status, err, problems)
	}
	d.t.Logf("the same, stretched to two days: %d findings\n%s", len(found), describe(found))
	judge(d.t, "stretched", found)
}
