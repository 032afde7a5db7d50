package learn

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/bpf/abi/record"
	"github.com/demarc/demarc/policy"
)

// Units of the examples.
const (
	web  = "/system.slice/nginx.service"
	db   = "/system.slice/system-postgresql.slice/postgresql@15-main.service"
	cron = "/system.slice/cron.service"
)

var began = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// seen makes the audits of one conversation, as the hooks tell them: what its opener
// is told of, if that is a process of this host, and its acceptor.
type seen struct {
	from, to string // cgroups; "" = somewhere else
	protocol string // tcp if empty
	source   string
	target   string
	silent   bool // nobody answers
	at       int  // seconds
	comm     string
	reason   abi.Reason // NoCrossingFor if 0
	verdict  abi.Verdict
}

func (s seen) flows() (all []*flow.Flow) {
	if s.protocol == "" {
		s.protocol = "tcp"
	}
	if s.source == "" {
		s.source = "10.0.0.1:40000"
	}
	if s.reason == 0 {
		s.reason = abi.NoCrossingFor
	}
	if s.verdict == 0 && s.reason == abi.NoCrossingFor {
		s.verdict = abi.Audit
	}
	f := flow.Flow{Time: began.Add(time.Duration(s.at) * time.Second), Verdict: s.verdict, Reason: s.reason, Protocol: s.protocol}
	source, target := netip.MustParseAddrPort(s.source), netip.MustParseAddrPort(s.target)
	f.Source = flow.Endpoint{Address: source.Addr(), Port: source.Port()}
	f.Destination = flow.Endpoint{Address: target.Addr(), Port: target.Port()}
	tell := func(direction abi.Direction, hook record.Hook, change func(*flow.Flow)) {
		one := f
		one.Direction, one.Hook = direction, hook
		if direction == abi.Egress {
			one.Source.Cgroup, one.Source.Reserved = s.from, "unmanaged"
		} else {
			one.Destination.Cgroup, one.Destination.Reserved = s.to, "unmanaged"
		}
		if change != nil {
			change(&one)
		}
		all = append(all, &one)
	}
	if s.from != "" {
		tell(abi.Egress, record.HookConnect, func(one *flow.Flow) {
			one.Source.Address, one.Source.Port, one.Comm, one.PID = netip.Addr{}, 0, s.comm, 7
		})
		tell(abi.Egress, record.HookEgress, nil)
	}
	if s.to != "" {
		tell(abi.Ingress, record.HookIngress, nil)
	}
	if s.from != "" && s.protocol == "tcp" && !s.silent {
		tell(abi.Egress, record.HookIngress, nil)
	}
	return all
}

func learner(o Options, talks ...seen) *Learner {
	l := New(o)
	for _, s := range talks {
		for _, f := range s.flows() {
			l.Add(f)
		}
	}
	return l
}

const whole = `# Learned from 15 flows, 2026-01-01T00:00:00Z to 2026-01-01T00:00:09Z. Review it: what was seen need not be what was meant.
# Zones are tiers: how many crossings a workload is from outside. Rename them to what they are.
apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: shop, version: 3}
trustDomain: shop.example
zones:
  outside: {trust: 0}
  tier-1: {trust: 10}
  tier-2: {trust: 20}
workloads:
  # unit nginx.service, seen running nginx: worker
  nginx: {zone: tier-1, match: [{systemdUnit: "nginx.service"}]}
  postgresql: {zone: tier-2, match: [{systemdUnit: "postgresql@*.service"}]}
networks:
  host-192-0-2-9: {zone: outside, cidrs: ["192.0.2.9/32"]}
crossings:
  # 3 flows, 2026-01-01T00:00:01Z to 2026-01-01T00:00:02Z, at most 3 in a second; for example 10.0.0.1:40000 -> 10.0.0.2:5432 by nginx: worker (pid 7)
  - {name: nginx-postgresql, from: [workload/nginx], to: [workload/postgresql], ports: [tcp/5432, tcp/5433], limit: {connections: 10/s}, log: denied, purpose: learned}
  # 1 flow, 2026-01-01T00:00:00Z, at most 1 in a second; for example 192.0.2.9:40000 -> 10.0.0.1:80 by nginx: worker (pid 7)
  - {name: to-nginx-tcp-80, from: [network/host-192-0-2-9], to: [workload/nginx], ports: [tcp/80], limit: {connections: 10/s}, log: denied, purpose: learned}
unmanaged: {zone: tier-1}
# Seen, and not proposed:
#   unit cron.service -> 10.0.0.2 tcp/22: nobody answered, 1 flow, 2026-01-01T00:00:09Z
`

// The whole document, for a client, a web server, a database and somebody who looks
// for an open port; in whatever order the flows come.
func TestProposal(t *testing.T) {
	talks := []seen{
		{to: web, source: "192.0.2.9:40000", target: "10.0.0.1:80"},
		{from: web, to: db, target: "10.0.0.2:5432", at: 1, comm: "nginx: worker"},
		{from: web, to: db, source: "10.0.0.1:40001", target: "10.0.0.2:5432", at: 1},
		{from: web, to: db, source: "10.0.0.1:40002", target: "10.0.0.2:5433", at: 2},
		{from: cron, target: "10.0.0.2:22", at: 9, silent: true},
	}
	o := Options{Name: "shop", TrustDomain: "shop.example", Version: 3}
	p, err := learner(o, talks...).Propose()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(whole, string(p.Text)); d != "" {
		t.Errorf("proposal (-want +got):\n%s", d)
	}
	for range 5 {
		again, err := learner(o, talks...).Propose()
		if err != nil || string(again.Text) != string(p.Text) {
			t.Fatalf("another time another policy: %v\n%s", err, again.Text)
		}
	}
}

// Nothing that could be an attack, or that somebody has already decided, is proposed;
// it is listed with the reason.
func TestDoubtIsListed(t *testing.T) {
	good := seen{from: web, to: db, target: "10.0.0.2:5432"}
	for _, c := range []struct {
		name string
		talk seen
		edit func(*flow.Flow)
		want string // "" = it is proposed
	}{
		{"OK", seen{from: web, to: cron, target: "10.0.0.3:99"}, nil, ""},
		{"bad denied", seen{from: web, to: cron, target: "10.0.0.3:99", verdict: abi.Deny, reason: abi.Revoked}, nil, "it was denied (revoked): what is enforced is not widened by trying"},
		{"bad MAC", seen{from: web, to: cron, target: "10.0.0.3:99", verdict: abi.Audit, reason: abi.TagBadMAC}, nil, "it failed a check (tag-bad-mac)"},
		{"bad spoof", seen{from: web, to: cron, target: "10.0.0.3:99", verdict: abi.Audit, reason: abi.Spoof}, nil, "it failed a check (spoof)"},
		{"bad no proof", seen{from: web, to: cron, target: "10.0.0.3:99", verdict: abi.Audit, reason: abi.TagMissing}, nil, "a crossing asks for a proof and there was none"},
		{"bad over limit", seen{from: web, to: cron, target: "10.0.0.3:99", verdict: abi.Audit, reason: abi.OverLimit}, nil, "it was over the limit of its crossing; raise the limit yourself"},
		{"bad raw", seen{from: web, to: cron, target: "10.0.0.3:99", verdict: abi.Audit, reason: abi.RawSocket}, nil, "it came from a raw socket, which could send anything"},
		{"bad protocol", seen{from: web, to: cron, target: "10.0.0.3:0", protocol: "gre"}, nil, "protocol gre has no ports; declare it as any, if at all"},
		{"bad silent", seen{from: web, target: "10.0.0.3:99", silent: true}, nil, "nobody answered"},
		{"bad session", seen{from: "/user.slice/user-0.slice/session-3.scope", to: cron, target: "10.0.0.3:99"}, nil, "a person's session is no workload"},
		{"bad nobody", seen{from: "/", target: "10.0.0.3:99"}, nil, "a local process of no workload is at one end: declare a workload for it, or a crossing with unmanaged"},
		{"bad claim", seen{to: cron, target: "10.0.0.3:99"}, func(f *flow.Flow) { f.Source.Claimed, f.Source.Identity = true, 5 }, "its peer failed to prove what it claimed to be"},
		{"bad unmanaged", seen{to: cron, target: "10.0.0.3:99"}, func(f *flow.Flow) { f.Source.Reserved, f.Proof = "unmanaged", abi.ProofIdentity },
			"a local process of no workload is at one end: declare a workload for it, or a crossing with unmanaged"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := learner(Options{}, good)
			for _, f := range c.talk.flows() {
				if c.edit != nil {
					c.edit(f)
				}
				l.Add(f)
			}
			p, err := l.Propose()
			if err != nil {
				t.Fatal(err)
			}
			proposed, listed := 0, strings.Join(p.Refused, "\n")
			for line := range strings.Lines(string(p.Text)) {
				if strings.Contains(line, "- {name: ") {
					proposed++
				}
			}
			if want := map[bool]int{true: 2, false: 1}[c.want == ""]; proposed != want {
				t.Errorf("%d crossings, want %d:\n%s", proposed, want, p.Text)
			}
			if c.want == "" && listed != "" || !strings.Contains(listed, c.want) {
				t.Errorf("listed %q, want %q", listed, c.want)
			}
			if c.want != "" && !strings.Contains(string(p.Text), c.want) {
				t.Error("the policy does not say so")
			}
		})
	}
}

func TestScanIsListed(t *testing.T) {
	talks := []seen{{from: web, to: db, target: "10.0.0.2:5432"}}
	for port := range maxPorts + 1 {
		talks = append(talks, seen{from: cron, target: fmt.Sprintf("10.0.0.2:%d", 1000+port)})
	}
	p, err := learner(Options{}, talks...).Propose()
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"unit cron.service -> an address tcp: 33 ports look like a scan, or are chosen at random, 33 flows, 2026-01-01T00:00:00Z"}
	if d := cmp.Diff(want, p.Refused); d != "" || strings.Contains(string(p.Text), "tcp/1000") {
		t.Errorf("refused (-want +got):\n%s", d)
	}
}

// A name that a process, or whoever made a flow file, chose starts no line and no key.
func TestNamesAreTame(t *testing.T) {
	l := learner(Options{}, seen{from: "/lab/we\"b\ncrossings: [x]", to: db, target: "10.0.0.2:5432", comm: "x\ny: z\x1b]0;"})
	p, err := l.Propose()
	if err != nil {
		if !strings.Contains(err.Error(), "no valid policy") {
			t.Fatal(err)
		}
		return // refused as a whole
	}
	for line := range strings.Lines(string(p.Text)) {
		if strings.HasPrefix(line, "crossings: [x]") || strings.HasPrefix(line, "y: z") || strings.ContainsRune(line, 0x1b) {
			t.Errorf("a name made a line: %q", line)
		}
	}
}

func TestNothing(t *testing.T) {
	p, err := learner(Options{}, seen{from: cron, target: "10.0.0.2:22", silent: true}).Propose()
	if !errors.Is(err, ErrNothing) || len(p.Refused) != 1 {
		t.Errorf("%v, %v", err, p)
	}
}

const base = `apiVersion: demarc.dev/v1alpha1
kind: BoundaryPolicy
metadata: {name: shop, version: 4}   # grows
trustDomain: shop.example
zones: {edge: {trust: 10}, data: {trust: 20}}
workloads:
  web: {zone: edge, match: [{systemdUnit: nginx.service}]}   # ours
  db: {zone: data, match: [{systemdUnit: "postgresql@*.service"}]}
crossings:
  # the only way in
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/5432], limit: {connections: 5/s}, log: all}
unmanaged: {zone: edge}
`

func extended(t *testing.T, talks ...seen) *Proposal {
	t.Helper()
	b, err := policy.Parse("base.yaml", []byte(base))
	if err != nil {
		t.Fatal(err)
	}
	p, err := learner(Options{Base: b}, talks...).Propose()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// A base stays as it is; what it lacks is added where it belongs, and told.
func TestBase(t *testing.T) {
	p := extended(t,
		seen{from: web, to: db, target: "10.0.0.2:5432"},
		seen{from: web, to: db, target: "10.0.0.2:5433"},
		seen{from: cron, to: db, source: "10.0.0.1:50000", target: "10.0.0.2:5432", at: 3, comm: "cron"},
		seen{from: db, target: "192.0.2.1:123", protocol: "udp", at: 4})
	want := strings.NewReplacer("version: 4", "version: 5", "postgresql@*.service\"}]}\n", `postgresql@*.service"}]}
  # learned:
  # unit cron.service, seen running cron
  cron: {zone: edge, match: [{systemdUnit: "cron.service"}]}
`, "log: all}\n", `log: all}
  # learned:
  # 1 flow, 2026-01-01T00:00:03Z, at most 1 in a second; for example 10.0.0.1:50000 -> 10.0.0.2:5432 by cron (pid 7)
  - {name: cron-db, from: [workload/cron], to: [workload/db], ports: [tcp/5432], limit: {connections: 10/s}, log: denied, purpose: learned}
  # 1 flow, 2026-01-01T00:00:04Z, at most 1 in a second; for example 10.0.0.1:40000 -> 192.0.2.1:123
  - {name: db-to-udp-123, from: [workload/db], to: [network/host-192-0-2-1], ports: [udp/123], limit: {connections: 10/s}, log: denied, purpose: learned}
  # 1 flow, 2026-01-01T00:00:00Z, at most 1 in a second; for example 10.0.0.1:40000 -> 10.0.0.2:5433
  - {name: web-db-2, from: [workload/web], to: [workload/db], ports: [tcp/5433], limit: {connections: 10/s}, log: denied, purpose: learned}
`).Replace(base) + `networks:
  host-192-0-2-1: {zone: edge, cidrs: ["192.0.2.1/32"]}
`
	if d := cmp.Diff(want, string(p.Text)); d != "" {
		t.Errorf("extended (-want +got):\n%s", d)
	}
	added := []string{
		"workload cron in zone edge: unit cron.service",
		"network host-192-0-2-1 in zone edge",
		"crossing cron-db: workload/cron -> workload/db tcp/5432",
		"crossing db-to-udp-123: workload/db -> network/host-192-0-2-1 udp/123",
		"crossing web-db-2: workload/web -> workload/db tcp/5433",
	}
	if d := cmp.Diff(added, p.Added); d != "" {
		t.Errorf("added (-want +got):\n%s", d)
	}
}

func TestBaseThatAllowsAll(t *testing.T) {
	p := extended(t, seen{from: web, to: db, target: "10.0.0.2:5432"})
	if string(p.Text) != base || len(p.Added) != 0 {
		t.Errorf("added %q:\n%s", p.Added, p.Text)
	}
}

// What would break a rule of the base is for a person to decide: here a way from the
// edge to the data that skips the tier between them.
func TestBaseKeepsItsRules(t *testing.T) {
	text := strings.Replace(base, "data: {trust: 20}", "app: {trust: 15}, data: {trust: 20}", 1)
	text = strings.Replace(text, "limit: {connections: 5/s}", "waive: {rule: no-skip, reason: legacy}, limit: {connections: 5/s}", 1)
	b, err := policy.Parse("base.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	p, err := learner(Options{Base: b}, seen{from: web, to: db, target: "10.0.0.2:5433"}, seen{from: db, to: web, target: "10.0.0.1:80", source: "10.0.0.2:9"}).Propose()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"crossing db-web: workload/db -> workload/web tcp/80"}, p.Added); d != "" {
		t.Errorf("added (-want +got):\n%s", d)
	}
	if len(p.Refused) != 1 || !strings.Contains(p.Refused[0], "workload/web -> workload/db tcp/5433: ") || !strings.Contains(p.Refused[0], "skips a level in between") {
		t.Errorf("refused %q", p.Refused)
	}
}

func TestFlowsOfAnotherPolicy(t *testing.T) {
	l := New(Options{})
	for _, f := range (seen{from: web, to: db, target: "10.0.0.2:5432"}).flows() {
		f.Source.Workload, f.Source.Zone, f.Source.Reserved = "web", "edge", ""
		l.Add(f)
	}
	if _, err := l.Propose(); err == nil || !strings.Contains(err.Error(), "edge/web, which is not declared: give the policy that was in force with --base") {
		t.Error(err)
	}
}

func TestPlaces(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for _, c := range []struct {
		path string
		want place
		word string
	}{
		{web, place{unit, "nginx.service"}, "nginx"},
		{db, place{unit, "postgresql@*.service"}, "postgresql"},
		{"/system.slice/nginx.service/worker", place{unit, "nginx.service"}, "nginx"},
		{"/system.slice/system-a.slice/a@b.c.service", place{unit, "a@*.service"}, "a"},
		{"/system.slice/run-r123.scope", place{unit, "run-r123.scope"}, "run-r123"},
		{"/system.slice/docker-" + id + ".scope", place{container, "/system.slice/docker-" + id + ".scope"}, "container-0123456789ab"},
		{"/docker/" + id + "/init", place{container, "/docker/" + id}, "container-0123456789ab"},
		{"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod01234567_89ab_cdef_0123_456789abcdef.slice/cri-containerd-" + id + ".scope",
			place{container, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod01234567_89ab_cdef_0123_456789abcdef.slice"}, "pod-01234567-89a"},
		{"/kubepods/besteffort/pod01234567-89ab-cdef-0123-456789abcdef/" + id, place{container, "/kubepods/besteffort/pod01234567-89ab-cdef-0123-456789abcdef"}, "pod-01234567-89a"},
		{"/user.slice/user-1000.slice/session-3.scope", place{session, "session session-3.scope"}, ""},
		{"/user.slice/user-1000.slice/user@1000.service/app.slice/x.service", place{session, "session user@1000.service"}, ""},
		{"/lab/Web_1", place{cgroup, "/lab/Web_1"}, "web-1"},
		{"/lab/nginx.service", place{cgroup, "/lab/nginx.service"}, "nginx-service"},
	} {
		got := placeOf(c.path)
		if got != c.want || c.word != "" && got.word() != c.word {
			t.Errorf("%s: %+v %q, want %+v %q", c.path, got, got.word(), c.want, c.word)
		}
	}
}

// Whatever is seen, only so much is remembered.
func TestMemoryIsBounded(t *testing.T) {
	l := New(Options{})
	f := (seen{from: cron, target: "10.0.0.2:22"}).flows()[1]
	for i := range maxTalks + 1000 {
		f.Source.Address = netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		f.Destination.Port = uint16(i)
		l.Add(f)
	}
	if len(l.talks) != maxTalks || len(l.order) != maxTalks || len(l.refused) > maxRefused+1 || len(l.edges) > maxEdges || len(l.calls) > maxTalks {
		t.Errorf("%d talks, %d kinds, %d refused", len(l.talks), len(l.edges), len(l.refused))
	}
	l.foldAll()
	if n := len(l.refused); n > maxRefused+1 {
		t.Errorf("%d refused", n)
	}
}

func TestBlocks(t *testing.T) {
	hosts := func(n int, pattern string) (all []netip.Addr) {
		for i := range n {
			all = append(all, netip.MustParseAddr(fmt.Sprintf(pattern, i)))
		}
		return all
	}
	for _, c := range []struct {
		name      string
		addresses []netip.Addr
		more      bool
		want      string
		exact     int
	}{
		{"few", hosts(2, "10.0.0.%d"), false, "[10.0.0.0/32 10.0.0.1/32]", 0},
		{"one block", hosts(17, "10.0.0.%d"), false, "[10.0.0.0/24]", 17},
		{"one block of IPv6", hosts(17, "fd00::%d"), false, "[fd00::/64]", 17},
		{"everywhere", hosts(40, "10.0.%d.1"), false, "[0.0.0.0/0]", 40},
		{"more than is remembered", hosts(2, "10.0.0.%d"), true, "[0.0.0.0/0]", 2},
		{"with a zone", []netip.Addr{netip.MustParseAddr("fe80::1%eth0")}, false, "[fe80::1/128]", 0},
	} {
		got, exact := blocks(c.addresses, c.more)
		if fmt.Sprint(got) != c.want || exact != c.exact {
			t.Errorf("%s: %v %d, want %s %d", c.name, got, exact, c.want, c.exact)
		}
	}
}
