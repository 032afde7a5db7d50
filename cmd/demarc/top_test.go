package main

import (
	"fmt"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
)

func TestBoardIsBounded(t *testing.T) {
	b := newBoard()
	for i := range 3 * maxEdges {
		f := flow.Flow{Time: time.Unix(int64(i), 0), Protocol: "tcp", Source: flow.Endpoint{Zone: "edge", Workload: "web"}, Destination: flow.Endpoint{Port: uint16(i + 1)}}
		for range 2 {
			b.add(&f)
		}
	}
	if len(b.edges) != maxEdges || b.forgotten != 2*maxEdges || b.total != 6*maxEdges || b.denied != b.total {
		t.Errorf("%d edges, %d forgotten, %d flows, %d denied", len(b.edges), b.forgotten, b.total, b.denied)
	}
	if rows := b.rows("TCP/3000", sortTotal); len(rows) != 1 || rows[0].total != 2 {
		t.Errorf("the newest edge: %v", rows)
	}
	e := b.rows("tcp/3000", sortName)[0]
	for range 2 * maxOfEdge {
		b.add(&flow.Flow{Protocol: "tcp", Verdict: abi.Allow, Source: flow.Endpoint{Zone: "edge", Workload: "web"}, Destination: flow.Endpoint{Port: 3000}})
	}
	if len(e.flows) != maxOfEdge || e.total != 2+2*maxOfEdge || e.denied != 2 {
		t.Errorf("%d flows kept, %d counted, %d denied", len(e.flows), e.total, e.denied)
	}
	b.second()
	if got, want := e.rate(), float64(2+2*maxOfEdge)/(rateOver-1); got != want {
		t.Errorf("rate %v, want %v", got, want)
	}
	for range rateOver {
		b.second()
	}
	if e.rate() != 0 {
		t.Errorf("rate of nothing: %v", e.rate())
	}
}

func TestRowsAreSorted(t *testing.T) {
	b := newBoard()
	add := func(name string, n int, v abi.Verdict) {
		for range n {
			b.add(&flow.Flow{Protocol: "tcp", Verdict: v, Source: flow.Endpoint{Zone: "z", Workload: name}, Destination: flow.Endpoint{Port: 1}})
		}
	}
	add("b", 5, abi.Allow)
	b.second()
	for range rateOver {
		b.second()
	}
	add("c", 2, abi.Deny)
	add("a", 3, abi.Allow)
	b.second()
	for by, want := range map[order]string{sortRate: "a c b", sortDenied: "c b a", sortTotal: "b a c", sortName: "a b c"} {
		got := ""
		for i, e := range b.rows("", by) {
			if i > 0 {
				got += " "
			}
			got += e.source[2:]
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("by %s (-want +got):\n%s", by, d)
		}
	}
}

// TestScreenFitsEveryWindow draws on windows of any size, with every key pressed.
func TestScreenFitsEveryWindow(t *testing.T) {
	s := newScreen(newBoard(), "n1", &topOptions{sort: "rate"}, false)
	for i := range 40 {
		s.board.add(&flow.Flow{Protocol: "tcp", Source: flow.Endpoint{Zone: "edge", Workload: fmt.Sprint("a-long-name-of-a-workload-", i)}, Destination: flow.Endpoint{Port: 1}})
		s.board.find(detect.Finding{ID: fmt.Sprint(i), Title: "somebody moves"})
	}
	for _, key := range []rune{'j', 'k', '?', '?', 's', tea.KeyEnter, tea.KeyEscape, '/', 'w', tea.KeyBackspace, tea.KeyEnter, 'p', 'c', 'j'} {
		k := tea.KeyPressMsg{Code: key}
		if key < 0x7f && key > 0x20 {
			k.Text = string(key)
		}
		s.Update(k)
		for _, size := range [][2]int{{1, 1}, {10, 3}, {80, 24}, {300, 100}} {
			s.Update(tea.WindowSizeMsg{Width: size[0], Height: size[1]})
			s.View()
		}
	}
}
