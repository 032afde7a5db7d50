package detect

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi/record"
)

// What a kind prints, it parses.
func TestSignalKinds(t *testing.T) {
	for k := Contact; k < signalKinds; k++ {
		var back SignalKind
		text, _ := k.MarshalText()
		if err := back.UnmarshalText(text); err != nil || back != k {
			t.Errorf("kind %d: %q reads back as %d: %v", k, text, back, err)
		}
	}
	var k SignalKind
	for _, text := range []string{"", "signal(0)", "nonsense"} {
		if err := k.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is kind %v", text, k)
		}
	}
}

// A recorded trace is read back as it was written.
func TestRecording(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	want := []Event{
		{Signal: &Signal{Kind: Shell, Time: at, Subject: 77, Workload: "web", Comm: "sh", Exe: "/bin/sh", Peer: flow.Endpoint{Port: 443},
			Values: Values{Count: 3, Window: 5 * time.Minute}}},
		{Flow: &flow.Flow{Time: at, PID: 7, Hook: record.HookConnect}},
	}
	var b bytes.Buffer
	for _, e := range want {
		if err := json.NewEncoder(&b).Encode(e); err != nil {
			t.Fatal(err)
		}
	}
	r := NewRecording(&b)
	var got []Event
	for {
		e, err := r.Next(context.Background())
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if !e.Time().Equal(at) {
			t.Errorf("time %v", e.Time())
		}
		got = append(got, e)
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b flow.Endpoint) bool { return a.Port == b.Port })); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for name, text := range map[string]string{
		"bad neither": `{}`, "bad both": `{"flow":{},"signal":{"kind":"shell"}}`, "bad kind": `{"signal":{"kind":"x"}}`, "bad json": `{"signal"`,
	} {
		if _, err := NewRecording(strings.NewReader(text)).Next(context.Background()); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
