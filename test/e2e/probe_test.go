package e2e_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/test/netlab"
)

// line is two hosts with two routers between them:
//
//	web (demarc) ---- near ---- far ---- db (demarc, or not)
type line struct {
	lab                *netlab.Lab
	web, near, far, db *netlab.Namespace
	cables             [3]*netlab.Cable
	node               *netlab.Node // of web, with agent
}

const linePolicy = webAndDB + `networks:
  beyond: {zone: app, cidrs: [10.70.3.0/24, "fd70:0:0:3::/64"]}
crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/8080, tcp/8084]}
  - {name: db-web, from: [workload/db], to: [workload/web], ports: [tcp/8082]}
  - {name: either, from: [workload/web], to: [workload/db, network/beyond], ports: [tcp/8081]}
  - {name: plain, from: [workload/web], to: [network/beyond], ports: [tcp/8083], identity: none}
`

func newLine(t *testing.T) *line {
	t.Helper()
	l := &line{lab: netlab.New(t)}
	l.web, l.near, l.far, l.db = l.lab.Island("web"), l.lab.Island("near"), l.lab.Island("far"), l.lab.Island("db")
	row := []*netlab.Namespace{l.web, l.near, l.far, l.db}
	for i := range l.cables {
		l.cables[i] = l.lab.Cable(row[i], row[i+1])
	}
	l.near.Router()
	l.far.Router()
	l.cables[0].A.LeadAll()
	l.cables[2].B.LeadAll()
	for _, p := range []string{"10.70.3.0/24", "fd70:0:0:3::/64"} {
		l.cables[1].A.Lead(netip.MustParsePrefix(p))
	}
	for _, p := range []string{"10.70.1.0/24", "fd70:0:0:1::/64"} {
		l.cables[1].B.Lead(netip.MustParsePrefix(p))
	}
	l.node = l.lab.Node(document(1, linePolicy), netlab.NodeOptions{Home: l.web})
	// Cgroups can be listed by anybody, as on a real host: the agent is nobody.
	if err := os.Chmod(filepath.Dir(l.node.Root().Dir()), 0o755); err != nil {
		t.Fatal(err)
	}
	l.node.Cgroup("/lab/web")
	return l
}

// farNode puts demarc on db, and a server of its workload.
func (l *line) farNode(t *testing.T, ports ...uint16) *netlab.Node {
	t.Helper()
	n := l.lab.Node(document(1, linePolicy), netlab.NodeOptions{CoreOnly: true, Home: l.db})
	server := startActor(t, l.db, n.Cgroup("/lab/db"))
	for _, port := range ports {
		server.serve(port)
	}
	return n
}

// probeResult is what demarc probe -o json says, without what is by chance.
type probeResult struct {
	Sent    string
	Answer  struct{ Kind, From, Says string }
	Tagged  bool
	Hops    []string
	Verdict string
	Why     string
	Exit    int
}

// probe runs demarc probe.
func (l *line) probe(t *testing.T, args ...string) probeResult {
	t.Helper()
	out, status := l.node.Run("demarc", append([]string{"probe", "-o", "json", "--timeout", "1500ms"}, args...)...)
	var r struct {
		Sent, Verdict, Why string
		Answer             struct {
			Kind, From, Says string
			Tagged           bool
		}
		Hops []struct {
			Hops      int
			From, Tag string
		}
		Exit int
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("demarc probe %v: %d: %v\n%s", args, status, err, out)
	}
	if r.Exit != status {
		t.Errorf("exit status %d, and %d in the report", status, r.Exit)
	}
	p := probeResult{Sent: r.Sent, Tagged: r.Answer.Tagged, Verdict: r.Verdict, Why: r.Why, Exit: r.Exit}
	p.Answer.Kind, p.Answer.From, p.Answer.Says = r.Answer.Kind, r.Answer.From, r.Answer.Says
	for _, h := range r.Hops {
		p.Hops = append(p.Hops, strings.TrimSpace(fmt.Sprintf("%d %s %s", h.Hops, h.From, h.Tag)))
	}
	return p
}

// checkGone shows that the probe's cgroup is gone.
func (l *line) checkGone(t *testing.T) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(l.node.Cgroup("/lab/web").Dir(), "demarc-probe-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// pathRules are what stands in the way, on one of the routers.
const (
	strip  = "add table inet t; add chain inet t c { type filter hook forward priority 0; }; add rule inet t c tcp flags & (syn|ack) == syn reset tcp option 253"
	change = "add table inet t; add chain inet t c { type filter hook forward priority 0; }; add rule inet t c tcp flags & (syn|ack) == syn tcp option @253,112,16 set 0x1234"
	number = "add table inet t; add chain inet t c { type filter hook forward priority 0; }; add rule inet t c tcp flags & (syn|ack) == syn tcp sequence set 12345"
	// The way back.
	stripAnswer  = "add table inet t; add chain inet t c { type filter hook forward priority 0; }; add rule inet t c tcp flags & (syn|ack) == (syn|ack) reset tcp option 253"
	changeAnswer = "add table inet t; add chain inet t c { type filter hook forward priority 0; }; add rule inet t c tcp flags & (syn|ack) == (syn|ack) tcp option @253,112,16 set 0x1234"
	silence      = "add table inet t; add chain inet t c { type filter hook forward priority 0; }; add rule inet t c tcp flags & (syn|ack) == syn drop"
	prohibit     = "add table inet t; add chain inet t c { type filter hook forward priority 0; }; add rule inet t c tcp flags & (syn|ack) == syn reject with icmpx type admin-prohibited"
)

// What a probe says of each kind of path, in both families.
func TestProbe(t *testing.T) {
	demarc, bare := newLine(t), newLine(t)
	demarc.farNode(t, 8080)
	bare.db.Echo(8080)
	bare.db.Echo(8081)
	both := []string{"1 near intact", "2 far intact"}
	const (
		untagged = "the answer has no tag: no demarc tags it there, or the tag is taken out; up to hop 2 (far) the tag was as sent"
		upToNear = " at hop 2 (far); it was as sent up to hop 1 (near)"
	)
	answer := func(kind, from, says string) (a struct{ Kind, From, Says string }) {
		a.Kind, a.From, a.Says = kind, from, says
		return a
	}
	synack, reset, none := answer("syn-ack", "db", ""), answer("reset", "db", ""), answer("none", "", "")
	// Who misses the tag, or its own, may refuse or be silent.
	whatever := answer("", "", "")
	for _, c := range []struct {
		name      string
		line      *line
		near, far string // rules of the routers
		port      uint16
		want      probeResult // with names in the place of addresses
	}{
		{name: "clean", line: demarc, port: 8080, want: probeResult{
			Sent: "tagged", Answer: synack, Tagged: true, Verdict: "proven", Why: "the tag of app/web was taken there, and the answer's tag here",
		}},
		{name: "stripped on the first router", line: demarc, near: strip, port: 8080, want: probeResult{
			Sent: "tagged", Answer: whatever, Hops: []string{"1 near intact", "2 far removed"}, Verdict: "stripped", Exit: 1, Why: "the tag is gone" + upToNear,
		}},
		{name: "changed on the first router", line: demarc, near: change, port: 8080, want: probeResult{
			Sent: "tagged", Answer: whatever, Hops: []string{"1 near intact", "2 far changed"}, Verdict: "changed", Exit: 1, Why: "the tag is another" + upToNear,
		}},
		{name: "renumbered on the first router", line: demarc, near: number, port: 8080, want: probeResult{
			Sent: "tagged", Answer: whatever, Hops: []string{"1 near intact", "2 far renumbered"}, Verdict: "changed", Exit: 1, Why: "the sequence number is another" + upToNear,
		}},
		{name: "stripped on the way back", line: demarc, far: stripAnswer, port: 8080, want: probeResult{
			Sent: "tagged", Answer: synack, Hops: both, Verdict: "unproven", Exit: 1, Why: untagged,
		}},
		{name: "changed on the way back", line: demarc, far: changeAnswer, port: 8080, want: probeResult{
			Sent: "tagged", Answer: synack, Tagged: true, Hops: both, Verdict: "changed", Exit: 1,
			Why: "the answer's tag does not fit the answer (tag-bad-mac): it is changed on the way back",
		}},
		{name: "no demarc on the far side", line: bare, port: 8080, want: probeResult{
			Sent: "tagged", Answer: synack, Hops: both, Verdict: "unproven", Exit: 1, Why: untagged,
		}},
		{name: "no demarc on the far side, and connected", line: bare, port: 8081, want: probeResult{
			Sent: "tagged", Answer: synack, Hops: both, Verdict: "unproven", Exit: 1, Why: untagged,
		}},
		{name: "nobody listens", line: bare, port: 8084, want: probeResult{
			Sent: "tagged", Answer: reset, Hops: both, Verdict: "refused", Exit: 2, Why: "db resets it: nobody listens there, or demarc there says no",
		}},
		{name: "dropped on the second router", line: bare, far: silence, port: 8080, want: probeResult{
			Sent: "tagged", Answer: none, Hops: both, Verdict: "no-answer", Exit: 3, Why: "nothing came back; up to hop 2 (far) the tag was as sent",
		}},
		{name: "prohibited on the first router", line: bare, near: prohibit, port: 8080, want: probeResult{
			Sent: "tagged", Answer: answer("icmp", "near", "administratively prohibited"), Hops: []string{"1 near intact", "2 near intact"},
			Verdict: "refused", Exit: 2, Why: "near says: administratively prohibited",
		}},
		{name: "not declared here", line: bare, port: 9999, want: probeResult{
			Sent: "nothing", Answer: none, Verdict: "refused", Exit: 2, Why: "this host refused it: no-crossing",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := c.line
			nft(t, l.near, "flush ruleset; "+c.near)
			nft(t, l.far, "flush ruleset; "+c.far)
			var probes sync.WaitGroup
			for _, at := range []map[string]netip.Addr{
				{"near": l.cables[0].B.IP4, "far": l.cables[1].B.IP4, "db": l.db.IP4},
				{"near": l.cables[0].B.IP6, "far": l.cables[1].B.IP6, "db": l.db.IP6},
			} {
				probes.Go(func() {
					got, want := l.probe(t, netip.AddrPortFrom(at["db"], c.port).String()), c.want
					want.Why, want.Answer.From = placed(want.Why, at), placed(want.Answer.From, at)
					want.Hops = nil
					for _, h := range c.want.Hops {
						want.Hops = append(want.Hops, placed(h, at))
					}
					if want.Answer == whatever {
						want.Answer = got.Answer
					}
					if diff := cmp.Diff(want, got); diff != "" {
						t.Errorf("%s (-want +got):\n%s", at["db"], diff)
					}
				})
			}
			probes.Wait()
			l.checkGone(t)
		})
	}
}

// placed puts addresses in the place of names.
func placed(s string, at map[string]netip.Addr) string {
	return regexp.MustCompile(`\b(near|far|db)\b`).ReplaceAllStringFunc(s, func(name string) string { return at[name].String() })
}

// What people read, and what is said where nothing can be asked.
func TestProbeText(t *testing.T) {
	l := newLine(t)
	l.farNode(t, 8080)
	nft(t, l.near, strip)
	for _, c := range []struct {
		args   string
		status int
		want   string
	}{
		{l.db.IP4.String() + ":8080 --as app/web", 1, `Probe:      app/web, 10.70.1.1:PORT -> 10.70.3.2:8080
Sent:       SYN with its tag
Answer:     ANSWER
Hop 1:      10.70.1.2, tag as sent
Hop 2:      10.70.2.2, tag removed
Verdict:    stripped: the tag is gone at hop 2 (10.70.2.2); it was as sent up to hop 1 (10.70.1.2)
Hint:       what stands there must pass TCP option 253 (ExID d3ac) as it is
`},
		{l.db.IP4.String() + ":8080 --as db", 70, "demarc: app/db has no cgroup on this host\nhint: start it first; see: demarc identities\n"},
		{l.db.IP4.String() + ":8080 --as nobody", 64, "demarc: nobody is no workload of the policy in force\nhint: see: demarc identities\n"},
		{l.db.IP4.String() + ":8083", 64, "demarc: app/web sends no tag to tcp/8083: no crossing of its own asks for proof there\n" +
			"hint: choose a port of a crossing to a workload or a zone: demarc policy explain\n"},
		{l.db.IP4.String(), 64, "demarc: choose a port: app/web proves itself on tcp/8080, tcp/8081, tcp/8084\nhint: see: demarc probe --help\n"},
		{"::1%x --as \x1b[31mweb", 64, "demarc: \\x1b[31mweb is no workload of the policy in force\nhint: see: demarc identities\n"},
	} {
		out, status := l.node.Run("demarc", append([]string{"probe", "--timeout", "1500ms"}, strings.Fields(c.args)...)...)
		out = regexp.MustCompile(`(10\.70\.1\.1):\d+`).ReplaceAllString(out, "$1:PORT")
		out = regexp.MustCompile(`(?m)^(Answer: +).*$`).ReplaceAllString(out, "${1}ANSWER")
		if diff := cmp.Diff(c.want, out); diff != "" || status != c.status {
			t.Errorf("demarc probe %s: status %d, want %d (-want +got):\n%s", c.args, status, c.status, diff)
		}
		l.checkGone(t)
	}
	// With another workload on this host it is not clear whom to be.
	l.node.Cgroup("/lab/db")
	want := "demarc: choose a workload with --as: app/db, app/web\nhint: see: demarc probe --help\n"
	eventually(t, 10*time.Second, "the agent knows the new cgroup", func() bool {
		out, status := l.node.Run("demarc", "probe", l.db.IP4.String()+":8080", "--timeout", "100ms")
		return status == 64 && out == want
	})
}

// A probe that is interrupted leaves no cgroup and no process.
func TestProbeInterrupted(t *testing.T) {
	l := newLine(t)
	nft(t, l.near, silence)
	wire := l.cables[0].A.Wire()
	p := l.node.Start("demarc", "probe", l.db.IP4.String()+":8080", "--timeout", "10m")
	wire.Await(netlab.To(tcp, l.db.IP4, 8080))
	p.Signal(syscall.SIGINT)
	if status := p.Wait(30 * time.Second); status != 130 {
		t.Errorf("exit status %d: %s", status, p.Output())
	}
	l.checkGone(t)
}
