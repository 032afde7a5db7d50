package e2e_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/test/netlab"
)

// learning is a host whose processes do many things while all is told and nothing
// refused:
//
//	client -> nginx.service -> api@1.service -> postgresql@15-main.service
//	cron.service -> postgresql, pings it     nginx, api -> resolver (of another host)
//	/machine/worker -> itself, on loopback
type learning struct {
	t                           *testing.T
	lab                         *netlab.Lab
	node                        *netlab.Node
	nginx, api, db, cron, work  *actor
	outside                     *actor
	webNS, apiNS, dbNS, otherNS *netlab.Namespace
}

func newLearning(t *testing.T) *learning {
	lab := netlab.New(t)
	l := &learning{t: t, lab: lab, webNS: lab.Namespace("web"), apiNS: lab.Namespace("api"), dbNS: lab.Namespace("db"), otherNS: lab.Namespace("other")}
	l.otherNS.Echo(53)
	l.webNS.Sysctl("ipv4/ping_group_range", "0 2147483647")
	l.node = lab.Node("", netlab.NodeOptions{})
	if err := os.Chmod(filepath.Dir(l.node.Root().Dir()), 0o755); err != nil {
		t.Fatal(err)
	}
	start := l.file("observe.yaml")
	l.demarc(0, "policy", "learn", "--start", "--trust-domain", "shop.example", "-o", start)
	l.demarc(0, "apply", start)
	l.restart()
	return l
}

// restart makes every process anew, as the host's services would be: listeners that
// are older than the first policy cannot prove themselves on every kernel.
func (l *learning) restart() {
	for _, a := range []*actor{l.nginx, l.api, l.db, l.cron, l.work, l.outside} {
		if a != nil {
			a.stop()
		}
	}
	at := func(ns *netlab.Namespace, path string) *actor { return startActor(l.t, ns, l.node.Cgroup(path)) }
	l.nginx, l.api = at(l.webNS, "/system.slice/nginx.service"), at(l.apiNS, "/system.slice/system-api.slice/api@1.service")
	l.db = at(l.dbNS, "/system.slice/system-postgresql.slice/postgresql@15-main.service")
	l.cron, l.work = at(l.webNS, "/system.slice/cron.service"), at(l.webNS, "/machine/worker")
	l.outside = startActor(l.t, l.otherNS, l.lab.Cgroup("outside"))
	l.nginx.serve(8080)
	l.api.serve(9090)
	l.db.serve(5432)
	l.work.serve(6000)
}

func (l *learning) file(name string) string { return filepath.Join(l.lab.Dir(), name) }

func (l *learning) demarc(want int, args ...string) (out, problems string) {
	l.t.Helper()
	out, problems, status := l.node.Demarc(args...)
	if status != want {
		l.t.Fatalf("demarc %v: %d, want %d\n%s%s", args, status, want, out, problems)
	}
	return out, problems
}

// traffic does everything that is to be learned, and says what of it failed.
func (l *learning) traffic() (failed []string) {
	l.t.Helper()
	try := func(what string, ok bool) {
		if !ok {
			failed = append(failed, what)
		}
	}
	both := func(ns *netlab.Namespace, port uint16) []netip.AddrPort {
		return []netip.AddrPort{netip.AddrPortFrom(ns.IP4, port), netip.AddrPortFrom(ns.IP6, port)}
	}
	answered := func(a *actor, to netip.AddrPort) bool { return a.datagrams(to, 3).Answered == 3 }
	for i := range 2 {
		try("client to nginx", l.outside.reaches(both(l.webNS, 8080)[i]))
		try("client to nginx by udp", answered(l.outside, both(l.webNS, 8080)[i]))
		try("nginx to api", l.nginx.reaches(both(l.apiNS, 9090)[i]))
		try("api to db", l.api.reaches(both(l.dbNS, 5432)[i]))
		try("api to db by udp", answered(l.api, both(l.dbNS, 5432)[i]))
		try("cron to db", l.cron.reaches(both(l.dbNS, 5432)[i]))
		try("nginx to resolver", answered(l.nginx, both(l.otherNS, 53)[i]))
		try("api to resolver", l.api.reaches(both(l.otherNS, 53)[i]))
	}
	try("worker to itself", l.work.reaches(netip.MustParseAddrPort("127.0.0.1:6000")))
	ping := l.webNS.Start(l.node.Cgroup("/system.slice/cron.service"), netlab.Command{
		Path: "/usr/bin/ping", Args: []string{"-c", "2", "-i", "0.2", "-W", "5", l.dbNS.IP4.String()}, User: agentUser,
	})
	try("cron pings db", ping.Wait(30*time.Second) == 0)
	return failed
}

// agentUser is nobody, who has no right to raw sockets.
const agentUser = 65534

// What was seen while everything was told is, as a policy, enough: everything that was
// done can be done again, nothing of it is refused, and what was not done is refused.
// What looked like an attack is not in it.
func TestLearn(t *testing.T) {
	l := newLearning(t)
	if failed := l.traffic(); len(failed) > 0 {
		t.Fatalf("while nothing is refused, these failed: %q", failed)
	}
	// An intruder in cron looks for open doors, and finds nobody.
	for port := uint16(7001); port < 7008; port++ {
		l.cron.reaches(netip.AddrPortFrom(l.dbNS.IP4, port))
	}
	eventually(t, 10*time.Second, "everything is told", func() bool {
		return strings.Contains(l.flows(), ":7007)") && strings.Contains(l.flows(), "icmp")
	})
	learned := l.file("learned.yaml")
	_, said := l.demarc(0, "policy", "learn", "--name", "shop", "--trust-domain", "shop.example", "-o", learned)
	text, err := os.ReadFile(learned)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s\n%s", said, text)
	if !strings.Contains(said, "not proposed: 7 other kinds, listed at the end of the policy") {
		t.Errorf("learn said %q", said)
	}
	l.demarc(0, "policy", "check", learned)
	p, err := policy.Parse(learned, text)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Workloads) != 5 || p.Version != 2 {
		t.Errorf("%d workloads, version %d", len(p.Workloads), p.Version)
	}
	for _, proposed := range []string{"tcp/7001", "tcp/7007"} {
		for line := range strings.Lines(string(text)) {
			if strings.Contains(line, proposed) && !strings.HasPrefix(line, "#") {
				t.Errorf("the intruder's port is proposed: %s", line)
			}
		}
	}
	if !strings.Contains(string(text), "unit cron.service -> "+l.dbNS.IP4.String()+" tcp/7007: nobody answered") {
		t.Error("the intruder's attempt is not listed")
	}

	l.node.Apply(string(text))
	l.restart()
	start := time.Now()
	if failed := l.traffic(); len(failed) > 0 {
		t.Errorf("under the learned policy these failed: %q", failed)
	}
	for _, f := range l.node.Flows("--verdict", "deny", "--since", start.Format(time.RFC3339Nano)) {
		if f.Verdict == abi.Deny {
			t.Errorf("denied: %s", netlab.Describe(f))
		}
	}
	if l.nginx.reachesWithin(netip.AddrPortFrom(l.dbNS.IP4, 5432), timeOfSilence) {
		t.Error("nginx reaches the database, which it never did")
	}
	if l.outside.reachesWithin(netip.AddrPortFrom(l.apiNS.IP4, 9090), timeOfSilence) {
		t.Error("the client reaches the API, which it never did")
	}

	// With what was learned as the base there is nothing to add, also from the files.
	flows := l.file("flows.json")
	out, _ := l.demarc(0, "flows", "--all", "-o", "json")
	if err := os.WriteFile(flows, []byte(out), 0o644); err != nil {
		t.Fatal(err)
	}
	again, said := l.demarc(0, "policy", "learn", "--from", flows, "--base", learned)
	if !strings.Contains(said, "allows all that can be proposed") {
		t.Errorf("learn with its own policy as the base: %s\n%s", said, again)
	}
}

func (l *learning) flows() string {
	out, _, _ := l.node.Demarc("flows", "--all", "-o", "wide")
	return out
}
