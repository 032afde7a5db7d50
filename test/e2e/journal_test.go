package e2e_test

import (
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/test/netlab"
)

// kept counts the flows that an agent shows for the last hour, and those that it says
// are missing.
func kept(t *testing.T, n *netlab.Node) (flows, lost uint64) {
	t.Helper()
	out, problems, status := n.Demarc("flows", "--since", "1h", "-o", "json")
	if status != 0 || problems != "" {
		t.Fatalf("flows --since: %d %s", status, problems)
	}
	for text := range strings.Lines(out) {
		var l api.Line
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if l.Flow != nil {
			flows++
		}
		lost += l.Lost
	}
	return flows, lost
}

// TestJournal kills the agent again and again while connections are refused. What the
// kernel told is in the journal in the end, or counted as missing there, to the number.
// The agent is confined, and nobody.
func TestJournal(t *testing.T) {
	e := newEnds(t, cliBody, netlab.NodeOptions{Journal: true})
	var made, flows, lost uint64
	for round := range 4 {
		for range 1 + rand.IntN(10) {
			e.client.reaches(e.at4(7001))
		}
		if round%2 == 0 { // who reads the journal has it committed
			before := flows
			eventually(t, 30*time.Second, "a commit", func() bool {
				flows, _ = kept(t, e.node)
				return flows > before
			})
		} else {
			time.Sleep(time.Duration(rand.IntN(1500)) * time.Millisecond) // a commit comes, or does not
		}
		e.node.KillAgent()
		e.client.reaches(e.at4(7001)) // stays in the ring
		e.node.StartAgent()
	}
	// One more on each CPU, which shows what is missing before it.
	eventually(t, 30*time.Second, "every event is there or missing", func() bool {
		for range 4 {
			e.client.reaches(e.at4(7001))
		}
		rings := e.node.Rings()
		made = rings[0].Seq + rings[1].Seq
		flows, lost = kept(t, e.node)
		now := e.node.Rings()
		return flows+lost == made && now[0].Seq+now[1].Seq == made
	})
	t.Logf("%d made, %d kept, %d lost", made, flows, lost)
	if flows < 8 {
		t.Errorf("only %d of %d flows are kept", flows, made)
	}

	// They are older than the agent, and not in its memory.
	out, _, _ := e.node.Demarc("flows", "--all", "-o", "json")
	if n := uint64(strings.Count(out, "\n")); n >= flows {
		t.Errorf("%d flows are in memory, %d in the journal", n, flows)
	}

	// A bad block with others before and behind it is told. What is missing at either end
	// of a journal nobody can know.
	segments, err := filepath.Glob(filepath.Join(e.node.JournalDir(), "*.flows"))
	if err != nil || len(segments) < 3 {
		t.Fatalf("segments %q, %v", segments, err)
	}
	b, err := os.ReadFile(segments[1])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(segments[1], b, 0o600); err != nil {
		t.Fatal(err)
	}
	after, missing := kept(t, e.node)
	if after >= flows || after+missing != flows+lost {
		t.Errorf("after damage: %d kept, %d missing; before %d and %d", after, missing, flows, lost)
	}
}
