package detect

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/demarc/demarc/bpf/abi"
)

// One of forty thousand addresses that say little scans; another workload's
// slow scan goes on beneath a flood. Both are found: rows H01, H03 and H04.
func TestNeedleInAFlood(t *testing.T) {
	r := newTrace()
	for i := range 40_000 {
		from := netip.AddrFrom4([4]byte{10, byte(100 + i>>16), byte(i >> 8), byte(i)}).String()
		r.arrives(from, "api", 8080, abi.NoCrossingFor)
		if i%4_000 == 2_000 {
			r.denied("web", fmt.Sprintf("10.9.0.%d:8081", i/4_000))
		}
		if i%1_000 == 1 {
			r.arrives("10.9.9.9", "api", uint16(1000+i/1_000), abi.NoCrossingFor)
		}
		r.wait(100 * time.Microsecond)
	}
	found := r.found(t, nil)
	for _, want := range []string{"T1046 slow-scan medium edge/web tool[4242]", "T1046 port-scan medium 10.9.9.9"} {
		if !slices.Contains(found, want) {
			t.Errorf("%q is not among %d findings, such as %q", want, len(found), found[:min(3, len(found))])
		}
	}
}

// Twenty-five thousand addresses, and as many places, cost no more memory than some.
func TestMemoryIsBounded(t *testing.T) {
	g := NewEngine(nil)
	g.SetPolicy(testPolicy(t))
	s := NewFindings()
	before := heap()
	r := newTrace()
	for i := range 25_000 {
		r.events = r.events[:0]
		from := netip.AddrFrom4([4]byte{byte(11 + i>>24), byte(i >> 16), byte(i >> 8), byte(i)}).String()
		r.arrives(from, "api", uint16(i), abi.NoCrossingFor)
		r.denied("web", fmt.Sprintf("10.%d.%d.%d:%d", byte(i>>16), byte(i>>8), byte(i), 1+i%60000))
		r.allowed("mail", fmt.Sprintf("10.%d.%d.%d:443", byte(i>>16), byte(i>>8), byte(i)), "updates")
		for _, e := range r.events {
			for _, f := range g.See(e) {
				s.Add(f)
			}
		}
	}
	grown := heap() - before
	if n := len(g.actors.others) + len(g.actors.shared); n > addressesKept+prefixesKept+1 {
		t.Errorf("%d parties are remembered", n)
	}
	const most = 64 << 20
	if grown > most {
		t.Errorf("%d bytes more are in use, at most %d are meant to be", grown, most)
	}
	runtime.KeepAlive(s)
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// A worm makes one attempt a minute, each from another workload: row K05.
func TestK05SpreadOverIdentities(t *testing.T) {
	r := newTrace()
	for i := range 8 {
		r.denied([]string{"web", "api", "batch", "mail"}[i%4], fmt.Sprintf("10.9.0.%d:8081", i)).wait(time.Minute)
	}
	if found := r.found(t, nil); !slices.Contains(found, "T1210 spread medium app/mail tool[4242]") {
		t.Errorf("found %q", found)
	}
}

// Whoever adds an edge a day, for a month, teaches nobody that they are usual: each is
// told, and so is a day with too many of them: row K06.
func TestK06PoisonedBaseline(t *testing.T) {
	g := NewEngine(nil)
	g.SetPolicy(testPolicy(t))
	told, drifted := 0, 0
	for day := range 30 {
		r := newTrace()
		r.wait(time.Duration(day) * 24 * time.Hour)
		for i := range 1 + 40*(day/29) { // forty on the last day
			r.allowed("web", fmt.Sprintf("10.8.%d.%d:443", day, i), "updates").wait(time.Minute)
		}
		for _, e := range r.events {
			for _, f := range g.See(e) {
				if f.Detector == "new-edge" && f.Severity == Info {
					told++
				}
				if f.Detector == "new-edge" && f.Severity == Low {
					drifted++
				}
			}
		}
	}
	// Of the first day everything is learned.
	if told < 28+32 || drifted == 0 {
		t.Errorf("%d edges are told, and %d beyond a day's", told, drifted)
	}
}

// One probe in ten minutes for seven days, beside what is usual: row H10.
func TestH10SlowDrip(t *testing.T) {
	r := newTrace()
	for i := range 7 * 24 * 6 {
		r.denied("web", fmt.Sprintf("10.9.%d.%d:%d", i>>8, byte(i), 1024+i))
		for h := range 5 {
			r.allowed("web", fmt.Sprintf("10.8.0.%d:443", h), "updates")
		}
		r.wait(10 * time.Minute)
	}
	if found := r.found(t, nil); !slices.Contains(found, "T1046 slow-scan medium edge/web tool[4242]") {
		t.Errorf("found %q", found)
	}
}
