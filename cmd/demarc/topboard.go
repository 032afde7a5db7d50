package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/demarc/demarc/agent/detect"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
)

// Bounds of what is remembered.
const (
	maxEdges    = 1000
	maxOfEdge   = 50 // flows of one edge
	maxFindings = 100
	rateOver    = 5 // seconds
)

// edge is everybody who talks to somebody else on one port.
type edge struct {
	source, destination, port string

	total, denied uint64
	seconds       [rateOver]uint64 // flows, by second
	newest        time.Time
	reason        string // of the newest, with its crossing
	verdict       abi.Verdict
	flows         []flow.Flow // the newest last
}

func (e *edge) String() string { return e.source + " -> " + e.destination + " " + e.port }

// rate is flows a second over the last full seconds.
func (e *edge) rate() float64 {
	sum := uint64(0)
	for _, n := range e.seconds[1:] {
		sum += n
	}
	return float64(sum) / (rateOver - 1)
}

// board sums flows up.
type board struct {
	edges           map[string]*edge
	total, denied   uint64
	lost, forgotten uint64 // flows; edges that found no room
	findings        []detect.Finding
}

func newBoard() *board { return &board{edges: map[string]*edge{}} }

func (b *board) add(f *flow.Flow) {
	if f.Verdict.OfShadow() { // nothing came of it
		return
	}
	port := f.Protocol
	if f.Destination.Port != 0 {
		port = fmt.Sprintf("%s/%d", f.Protocol, f.Destination.Port)
	}
	name := func(e flow.Endpoint) string {
		if label := e.Label(); label != "unknown" || !e.Address.IsValid() {
			return label
		}
		return e.Address.String()
	}
	e := edge{source: name(f.Source), destination: name(f.Destination), port: cmp.Or(port, f.Hook.String())}
	key := e.String()
	at := b.edges[key]
	if at == nil {
		if len(b.edges) >= maxEdges {
			b.forget()
		}
		at = &e
		b.edges[key] = at
	}
	b.total++
	at.total++
	at.seconds[0]++
	if f.Verdict == abi.Deny || f.Verdict == abi.Audit {
		b.denied++
		at.denied++
	}
	at.newest, at.verdict = f.Time, f.Verdict
	at.reason = strings.TrimSpace(f.Reason.String() + " " + f.Crossing)
	if len(at.flows) == maxOfEdge {
		at.flows = slices.Delete(at.flows, 0, 1)
	}
	at.flows = append(at.flows, *f)
}

// forget drops the edge that was not seen for the longest time.
func (b *board) forget() {
	oldest := ""
	for key, e := range b.edges {
		if oldest == "" || e.newest.Before(b.edges[oldest].newest) {
			oldest = key
		}
	}
	delete(b.edges, oldest)
	b.forgotten++
}

// second begins another second.
func (b *board) second() {
	for _, e := range b.edges {
		copy(e.seconds[1:], e.seconds[:])
		e.seconds[0] = 0
	}
}

// find takes a finding, or a newer state of one.
func (b *board) find(f detect.Finding) {
	b.findings = slices.DeleteFunc(b.findings, func(g detect.Finding) bool { return g.ID == f.ID })
	if len(b.findings) == maxFindings {
		b.findings = b.findings[1:]
	}
	b.findings = append(b.findings, f)
}

// order is what rows are sorted by.
type order int

const (
	sortRate order = iota
	sortDenied
	sortTotal
	sortName
	orders
)

func (o order) String() string { return [...]string{"rate", "denied", "total", "name"}[o] }

// rows are the edges that hold a text, in an order.
func (b *board) rows(text string, by order) (rows []*edge) {
	for key, e := range b.edges {
		if strings.Contains(strings.ToLower(key+" "+e.reason), strings.ToLower(text)) {
			rows = append(rows, e)
		}
	}
	slices.SortFunc(rows, func(x, y *edge) int {
		switch by {
		case sortRate:
			return cmp.Or(cmp.Compare(y.rate(), x.rate()), cmp.Compare(y.total, x.total), cmp.Compare(x.String(), y.String()))
		case sortDenied:
			return cmp.Or(cmp.Compare(y.denied, x.denied), cmp.Compare(y.total, x.total), cmp.Compare(x.String(), y.String()))
		case sortTotal:
			return cmp.Or(cmp.Compare(y.total, x.total), cmp.Compare(x.String(), y.String()))
		}
		return cmp.Compare(x.String(), y.String())
	})
	return rows
}
