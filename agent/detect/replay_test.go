package detect

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// What was found live is found again in what was recorded, to the last word.
func TestReplayFindsTheSame(t *testing.T) {
	r := newTrace()
	for p := range 20 {
		r.denied("web", "10.9.0.1:"+[]string{"1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16", "17", "18", "19", "20"}[p]).wait(time.Second)
	}
	r.signal("api", Signal{Kind: Shell, Exe: "/bin/sh", Peer: peer("10.9.0.1:443")})
	run := func(events []Event) []Finding {
		g, s := NewEngine(nil), NewFindings()
		g.SetPolicy(testPolicy(t))
		for _, e := range events {
			for _, f := range g.See(e) {
				s.Add(f)
			}
		}
		all, _ := s.After(0)
		return all
	}
	live := run(r.events)
	var recorded bytes.Buffer
	encoder := json.NewEncoder(&recorded)
	for i, e := range r.events {
		var line any = e
		if i%2 == 0 && e.Flow != nil {
			line = e.Flow // as demarc flows prints it
		}
		if err := encoder.Encode(line); err != nil {
			t.Fatal(err)
		}
	}
	var events []Event
	for e, err := range Replay(&recorded) {
		if err != nil {
			t.Fatal(err)
		}
		events = append(events, e)
	}
	a, _ := json.Marshal(live)
	b, _ := json.Marshal(run(events))
	if d := cmp.Diff(string(a), string(b)); d != "" || len(live) < 3 {
		t.Errorf("%d findings live; (-live +replayed):\n%s", len(live), d)
	}
}

func TestReplayRefuses(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"bad json", "{\n", "1: not an event: unexpected end of JSON input"},
		{"bad neither", "\n\n{}\n", "3: neither a flow nor a signal"},
		{"bad both", `{"flow":{"time":"2026-01-01T00:00:00Z"},"signal":{"kind":"raw"}}`, "1: both a flow and a signal"},
		{"bad time", `{"signal":{"kind":"raw"}}`, "1: the event has no time"},
		{"bad kind", `{"signal":{"kind":"rwa","time":"2026-01-01T00:00:00Z"}}`, `1: not an event: unknown signal "rwa"`},
		{"bad verdict", `{"time":"2026-01-01T00:00:00Z","verdict":"perhaps"}`, `1: not a flow: unknown verdict "perhaps"`},
		{"bad length", strings.Repeat("x", maxLine+1), "1: a line of more than 1048576 bytes"},
		{"OK losses", `{"lost":7,"where":{"kernel":7}}` + "\n", ""},
		{"OK nothing", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := ""
			for _, err := range Replay(strings.NewReader(c.text)) {
				if err != nil {
					got = err.Error()
				}
			}
			if !strings.HasPrefix(got, c.want) || (c.want == "") != (got == "") {
				t.Errorf("error %q, want %q", got, c.want)
			}
		})
	}
}

// Whatever a recording holds, it is refused or the detectors get through it, and
// what they say of it can be said in every form.
func FuzzReplay(f *testing.F) {
	f.Add([]byte(`{"time":"2026-01-01T00:00:00Z","verdict":"deny","reason":"no-crossing","protocol":"tcp","source":{"workload":"web"},"destination":{"address":"10.0.0.1","port":22}}`))
	f.Add([]byte(`{"flow":{"time":"2026-01-01T00:00:00Z","verdict":"allow","direction":"ingress","reason":"tag-bad-mac","source":{"claimed":true,"identity":9}}}`))
	for k := Contact; k < signalKinds; k++ {
		line, err := json.Marshal(Event{Signal: &Signal{Kind: k, Time: start, Subject: 77, Workload: "web", Hops: 3, PID: 1, Comm: "x", Exe: "/bin/sh", Protocol: "tcp",
			Cause: "tag-bad-mac", Peer: peer("10.0.0.1:22"), Values: Values{Count: 1 << 40, Distinct: 300, Bytes: 1 << 40, Length: 250, Labels: 1}}})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(line)
	}
	policy := testPolicy(f)
	f.Fuzz(func(t *testing.T, text []byte) {
		g, s := NewEngine(nil), NewFindings()
		g.SetPolicy(policy)
		for e, err := range Replay(bytes.NewReader(text)) {
			if err != nil {
				break
			}
			for _, found := range g.See(e) {
				s.Add(found)
			}
		}
		all, _ := s.After(0)
		for i := range all {
			if _, err := json.Marshal(all[i].OCSF()); err != nil {
				t.Errorf("%+v: %v", all[i], err)
			}
		}
	})
}
