package detect

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
)

// Whoever leaves out plain flows that come again within a second finds what is found
// with them.
func TestPlainFlowsMayBeLeftOut(t *testing.T) {
	config := DefaultConfig()
	config.NewEdge.Learn = time.Minute
	all, few := NewEngine(config), NewEngine(config)
	for _, g := range []*Engine{all, few} {
		g.SetPolicy(testPolicy(t))
	}
	random := rand.New(rand.NewPCG(1, 2))
	pick := func(of ...string) string { return of[random.IntN(len(of))] }
	r := newTrace()
	told := func(found []Finding) (out []string) {
		for _, f := range found {
			out = append(out, fmt.Sprintf("%s %s %d %s", f.Key, f.Severity, f.Confidence, f.Title))
		}
		return out
	}
	seen := map[string]time.Time{}
	left, findings, plain := 0, 0, 0
	for i := range 20_000 {
		r.events = r.events[:0]
		r.wait(time.Duration(random.IntN(20)) * time.Millisecond)
		r.epoch = uint32(1 + i/10_000)
		port := pick("443", "443", "443", "80", "8080", "9000", "9001", "22", "445", "21", "3306")
		to := pick("10.3.0.1", "10.3.0.2", "10.8.0.1", "10.8.0.2", "10.8.0.3", "10.8.0.4", "169.254.169.254") + ":" + port
		who := pick("web", "api", "batch", "mail", "jump", "nessus")
		crossing := pick("updates", "updates", "updates", "ssh", "credentials", "web-api", "scan-trap", "trap")
		if crossing == "trap" && random.IntN(50) > 0 {
			crossing = "updates"
		}
		switch random.IntN(200) {
		case 0:
			r.denied(who, to)
		case 1:
			r.opens(who, "tcp", to, abi.Audit, abi.Reason(random.IntN(40)), "")
		case 2:
			r.opens(who, "tcp", to, abi.Allow, abi.Reason(random.IntN(40)), crossing)
		case 3:
			r.opens(who, "tcp", to, abi.Provisional, abi.Unproven, "")
		case 4:
			r.accepts(who, pick("web", "api", "batch"))
		case 5:
			r.signal(who, Signal{Kind: Contact, Peer: peer(to), Protocol: "tcp"})
		case 6:
			r.arrives(pick("10.9.9.9", "10.9.9.8"), who, 8080, abi.TagStale)
		case 7, 8, 9:
			r.arrives(pick("10.9.9.9", "10.9.9.8"), who, 443, abi.ByCrossing)
			r.events[0].Flow.Verdict = abi.Allow
		default:
			r.reaches(who, to, crossing)
		}
		e := r.events[0]
		a := told(all.See(e))
		findings += len(a)
		if f := e.Flow; f != nil && few.Plain(f) {
			plain++
			same := *f // without what tells one contact from the next
			same.Time, same.Source.Port, same.PID, same.Comm = time.Time{}, 0, 0, ""
			name := fmt.Sprintf("%+v", same)
			if at, ok := seen[name]; ok && f.Time.Sub(at) < time.Second {
				left++
				if a != nil {
					t.Fatalf("%+v was left out and makes %q", f, a)
				}
				continue
			}
			seen[name] = f.Time
		}
		if d := cmp.Diff(a, told(few.See(e))); d != "" {
			t.Fatalf("event %d, %+v (-with all, +without repeats):\n%s", i, e.Flow, d)
		}
	}
	if left < 1000 || findings < 1000 || plain < 2*left {
		t.Errorf("%d of %d plain flows left out and %d findings: that shows nothing", left, plain, findings)
	}
}

// What detectors count, or look at each time, is not plain.
func TestPlain(t *testing.T) {
	g := NewEngine(nil)
	g.SetPolicy(testPolicy(t))
	usual := func() *flow.Flow {
		return newTrace().allowed("web", "10.8.0.1:443", "updates").events[0].Flow
	}
	for name, c := range map[string]struct {
		change func(*flow.Flow)
		want   bool
	}{
		"OK usual":            {func(*flow.Flow) {}, true},
		"OK provisional":      {func(f *flow.Flow) { f.Verdict, f.Reason = abi.Provisional, abi.Unproven }, true},
		"bad denied":          {func(f *flow.Flow) { f.Verdict, f.Reason = abi.Deny, abi.NoCrossingFor }, false},
		"bad would be denied": {func(f *flow.Flow) { f.Verdict = abi.WouldDeny }, false},
		"bad no verdict":      {func(f *flow.Flow) { f.Verdict = 0 }, false},
		"bad false proof":     {func(f *flow.Flow) { f.Reason = abi.TagBadMAC }, false},
		"bad raw socket":      {func(f *flow.Flow) { f.Reason = abi.RawSocket }, false},
		"bad login":           {func(f *flow.Flow) { f.Destination.Port = 21 }, false},
		"bad administration":  {func(f *flow.Flow) { f.Destination.Port = 5985 }, false},
		"bad decoy":           {func(f *flow.Flow) { f.Crossing = "trap" }, false},
		"bad metadata":        {func(f *flow.Flow) { f.Destination.Address = netip.MustParseAddr("169.254.169.254") }, false},
		"bad no address":      {func(f *flow.Flow) { f.Destination.Address = netip.Addr{} }, false},
	} {
		f := usual()
		c.change(f)
		if got := g.Plain(f); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}
