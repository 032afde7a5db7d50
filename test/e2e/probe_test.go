package e2e_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
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
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/8080]}
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

// probe runs demarc probe, and shows that nothing of it is left.
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
	l.checkGone(t)
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
	for _, c := range []struct {
		name      string
		demarc    bool // on the far side
		served    bool // by an ordinary server, without demarc
		near, far string
		port      int
		want      probeResult // with 4 for the addresses of one family
		notFor6   bool
	}{
		{name: "clean", demarc: true, want: probeResult{Sent: "tagged", Tagged: true, Verdict: "proven", Why: "the tag of app/web was taken there, and the answer's tag here"}},
		{name: "stripped on the first router", demarc: true, near: strip, want: probeResult{
			Sent: "tagged", Hops: []string{"1 near intact", "2 far removed"}, Verdict: "stripped", Exit: 1,
			Why: "the tag is gone at hop 2 (far); it was as sent up to hop 1 (near)",
		}},
		{name: "changed on the first router", demarc: true, near: change, want: probeResult{
			Sent: "tagged", Hops: []string{"1 near intact", "2 far changed"}, Verdict: "changed", Exit: 1,
			Why: "the tag is another at hop 2 (far); it was as sent up to hop 1 (near)",
		}},
		{name: "renumbered on the first router", demarc: true, near: number, want: probeResult{
			Sent: "tagged", Hops: []string{"1 near intact", "2 far renumbered"}, Verdict: "changed", Exit: 1,
			Why: "the sequence number is another at hop 2 (far); it was as sent up to hop 1 (near)",
		}},
		{name: "stripped on the way back", demarc: true, far: stripAnswer, want: probeResult{
			Sent: "tagged", Hops: []string{"1 near intact", "2 far intact"}, Verdict: "unproven", Exit: 1,
			Why: "the answer has no tag: no demarc tags it there, or the tag is taken out; up to hop 2 (far) the tag was as sent",
		}},
		{name: "changed on the way back", demarc: true, far: changeAnswer, want: probeResult{
			Sent: "tagged", Tagged: true, Hops: []string{"1 near intact", "2 far intact"}, Verdict: "changed", Exit: 1,
			Why: "the answer's tag does not fit the answer (tag-bad-mac): it is changed on the way back",
		}},
		{name: "no demarc on the far side", served: true, want: probeResult{
			Sent: "tagged", Hops: []string{"1 near intact", "2 far intact"}, Verdict: "unproven", Exit: 1,
			Why: "the answer has no tag: no demarc tags it there, or the tag is taken out; up to hop 2 (far) the tag was as sent",
		}},
		{name: "no demarc on the far side, and connected", served: true, port: 8081, want: probeResult{
			Sent: "tagged", Hops: []string{"1 near intact", "2 far intact"}, Verdict: "unproven", Exit: 1,
			Why: "the answer has no tag: no demarc tags it there, or the tag is taken out; up to hop 2 (far) the tag was as sent",
		}},
		{name: "nobody listens", want: probeResult{
			Sent: "tagged", Hops: []string{"1 near intact", "2 far intact"}, Verdict: "refused", Exit: 2,
			Why: "db resets it: nobody listens there, or demarc there says no",
		}},
		{name: "dropped on the second router", far: silence, served: true, want: probeResult{
			Sent: "tagged", Hops: []string{"1 near intact", "2 far intact"}, Verdict: "no-answer", Exit: 3,
			Why: "nothing came back; up to hop 2 (far) the tag was as sent",
		}},
		{name: "prohibited on the first router", near: prohibit, served: true, want: probeResult{
			Sent: "tagged", Hops: []string{"1 near intact", "2 near intact"}, Verdict: "refused", Exit: 2,
			Why: "near says: administratively prohibited",
		}},
		{name: "not declared here", port: 9999, served: true, want: probeResult{
			Sent: "nothing", Verdict: "refused", Exit: 2, Why: "this host refused it: no-crossing",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLine(t)
			port := 8080
			if c.port != 0 {
				port = c.port
			}
			if c.demarc {
				l.farNode(t, uint16(port))
			}
			if c.served {
				l.db.Echo(uint16(port))
			}
			if c.near != "" {
				nft(t, l.near, c.near)
			}
			if c.far != "" {
				nft(t, l.far, c.far)
			}
			for _, six := range []bool{false, true} {
				at := map[string]netip.Addr{"near": l.cables[0].B.IP4, "far": l.cables[1].B.IP4, "db": l.db.IP4}
				if six {
					at = map[string]netip.Addr{"near": l.cables[0].B.IP6, "far": l.cables[1].B.IP6, "db": l.db.IP6}
				}
				want := c.want
				want.Why = placed(want.Why, at)
				want.Hops = nil
				for _, h := range c.want.Hops {
					want.Hops = append(want.Hops, placed(h, at))
				}
				switch got := l.probe(t, netip.AddrPortFrom(at["db"], uint16(port)).String()); {
				case want.Verdict == "refused" && want.Sent == "tagged" && c.near == "":
					want.Answer.Kind, want.Answer.From = "reset", at["db"].String()
					fallthrough
				default:
					switch {
					case want.Answer.Kind != "":
					case want.Verdict == "proven", want.Verdict == "unproven", want.Tagged:
						want.Answer.Kind, want.Answer.From = "syn-ack", at["db"].String()
					case c.near == prohibit:
						want.Answer.Kind, want.Answer.From, want.Answer.Says = "icmp", at["near"].String(), "administratively prohibited"
					case want.Exit == 1:
						// Who misses the tag may refuse or be silent.
						want.Answer = got.Answer
					default:
						want.Answer.Kind = "none"
					}
					if diff := cmp.Diff(want, got); diff != "" {
						t.Errorf("IPv6 %v (-want +got):\n%s", six, diff)
					}
				}
			}
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
		{l.db.IP4.String(), 64, "demarc: choose a port: app/web proves itself on tcp/8080, tcp/8081\nhint: see: demarc probe --help\n"},
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
