package main

import (
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/demarc/demarc/bpf/abi"
)

// findings are all that a probe saw.
type findings struct {
	attempt  *attempt
	hops     []hop
	denied   abi.Reason // why this host refused; Undecided = it did not
	observes bool       // this host drops nothing
}

// hop is what one router said.
type hop struct {
	Hops int        `json:"hops"`
	From netip.Addr `json:"from,omitzero"` // invalid = it said nothing
	Tag  fate       `json:"tag,omitempty"`
}

func (f *findings) proven() bool {
	a := f.attempt
	return a.result == callConnected && a.tagged() && a.answer != nil && a.answer.tag != nil
}

// probeReport is a probe's result.
type probeReport struct {
	Workload string         `json:"workload"`
	Identity uint32         `json:"identity"`
	Source   netip.AddrPort `json:"source,omitzero"` // as it left this host
	Target   netip.AddrPort `json:"target"`
	Sent     string         `json:"sent"` // tagged, nothing
	Answer   probeAnswer    `json:"answer"`
	Hops     []hop          `json:"hops,omitempty"`
	Verdict  string         `json:"verdict"` // proven, stripped, changed, unproven, refused, no-answer
	Why      string         `json:"why"`
	Hint     string         `json:"hint,omitempty"`
	Exit     int            `json:"exit"`
}

// probeAnswer is the first thing that came back all the way.
type probeAnswer struct {
	Kind   string     `json:"kind"` // syn-ack, reset, icmp, none
	From   netip.Addr `json:"from,omitzero"`
	Tagged bool       `json:"tagged,omitempty"`
	Says   string     `json:"says,omitempty"` // of ICMP
}

// Verdicts and their exit codes.
const (
	exitProven   = exitGood
	exitLost     = 1 // stripped, changed, unproven
	exitRefused  = 2
	exitNoAnswer = 3
)

// report judges. It is an error if no verdict is possible: nothing was asked.
func (f *findings) report(p *prober) (*probeReport, error) {
	a := f.attempt
	r := &probeReport{Workload: p.workload.Name(), Identity: p.workload.Identity, Target: p.target, Sent: "nothing", Hops: f.hops}
	if len(a.sent) > 0 {
		r.Source, r.Sent = a.last().from, "tagged"
		if !a.tagged() {
			return nil, hintError{usagef("%s sends no tag to tcp/%d: no crossing of its own asks for proof there", r.Workload, p.target.Port()),
				"choose a port of a crossing to a workload or a zone: demarc policy explain"}
		}
		if id := a.last().identity(); id != p.workload.Identity {
			return nil, fmt.Errorf("the tag that left is of identity %d: the cgroup of the probe is not bound to %s", id, r.Workload)
		}
	}
	r.Answer = answerOf(a)
	r.Verdict, r.Exit, r.Why, r.Hint = f.judge(r)
	return r, nil
}

func answerOf(a *attempt) probeAnswer {
	switch {
	case a.answer != nil:
		return probeAnswer{Kind: "syn-ack", From: a.answer.from.Addr(), Tagged: a.answer.tag != nil}
	case a.reset != nil:
		return probeAnswer{Kind: "reset", From: a.reset.from.Addr()}
	case a.complaint != nil:
		return probeAnswer{Kind: "icmp", From: a.complaint.from, Says: a.complaint.says}
	}
	return probeAnswer{Kind: "none"}
}

const (
	hintHere  = "demarc flows --verdict deny"
	hintThere = "on the far host: demarc flows --verdict deny"
)

// judge says what it comes to. What routers saw is believed before what the far
// side said: a far side that misses the tag refuses for that.
func (f *findings) judge(r *probeReport) (verdict string, exit int, why, hint string) {
	a := f.attempt
	if f.proven() {
		why = fmt.Sprintf("the tag of %s was taken there, and the answer's tag here", r.Workload)
		if f.observes {
			why = fmt.Sprintf("the tag of %s was taken there, and the answer has one; this host only observes, and would not have refused a bad one", r.Workload)
		}
		return "proven", exitProven, why, ""
	}
	if len(a.sent) == 0 {
		return f.judgeUnsent()
	}
	if verdict, why, hint, found := blame(f.hops); found {
		return verdict, exitLost, why, hint
	}
	switch {
	case a.answer != nil && a.answer.tag == nil:
		return "unproven", exitLost, "the answer has no tag: no demarc tags it there, or the tag is taken out" + beyond(f.hops), hintThere
	case a.answer != nil && (f.denied == abi.TagBadMAC || f.denied == abi.TagMalformed || f.denied == abi.TagUnbound):
		return "changed", exitLost, fmt.Sprintf("the answer's tag does not fit the answer (%s): it is changed on the way back", f.denied), hintHere
	case a.answer != nil && f.denied != abi.Undecided:
		return "refused", exitRefused, fmt.Sprintf("this host refused the answer: %s", f.denied), hintHere
	case a.answer != nil:
		return "refused", exitRefused, "the answer has a tag, and the connection did not come about: " + a.result, hintHere
	case a.reset != nil:
		return "refused", exitRefused, fmt.Sprintf("%s resets it: nobody listens there, or demarc there says no", a.reset.from.Addr()), hintThere
	case a.complaint != nil && a.complaint.kind == refusing:
		return "refused", exitRefused, fmt.Sprintf("%s says: %s", a.complaint.from, a.complaint.says), hintThere
	case a.complaint != nil:
		return "no-answer", exitNoAnswer, fmt.Sprintf("%s says: %s", a.complaint.from, a.complaint.says), ""
	}
	return "no-answer", exitNoAnswer, "nothing came back" + beyond(f.hops), hintThere
}

// judgeUnsent judges where nothing was seen to leave.
func (f *findings) judgeUnsent() (verdict string, exit int, why, hint string) {
	switch result := f.attempt.result; {
	case f.denied != abi.Undecided:
		return "refused", exitRefused, fmt.Sprintf("this host refused it: %s", f.denied), hintHere
	case result == "EPERM":
		return "refused", exitRefused, "this host refused it", hintHere
	case result == callStopped:
		return "no-answer", exitNoAnswer, "nothing left this host", hintHere
	default:
		return "no-answer", exitNoAnswer, "nothing left this host: " + result, ""
	}
}

// blames are what a hop's quote says that something before it did, and what to do.
var blames = map[fate]struct{ verdict, why, hint string }{
	tagRemoved:    {"stripped", "the tag is gone", "what stands there must pass TCP option 253 (ExID d3ac) as it is"},
	tagChanged:    {"changed", "the tag is another", "what stands there must pass TCP option 253 (ExID d3ac) as it is"},
	tagRenumbered: {"changed", "the sequence number is another", "what stands there must not rewrite sequence numbers"},
	tagTranslated: {"changed", "an address or a port is another", "say so in the crossing: nat: source or nat: destination"},
}

// blame finds the first hop at which the tag was not what it had been.
func blame(hops []hop) (verdict, why, hint string, found bool) {
	last := "this host"
	for _, h := range hops {
		place := fmt.Sprintf("hop %d (%s)", h.Hops, h.From)
		if h.Tag == tagIntact {
			last = place
		}
		if b, ok := blames[h.Tag]; ok {
			return b.verdict, fmt.Sprintf("%s at %s; it was as sent up to %s", b.why, place, last), b.hint, true
		}
	}
	return "", "", "", false
}

// beyond says how far the tag was seen as it was sent.
func beyond(hops []hop) string {
	for i := len(hops) - 1; i >= 0; i-- {
		if hops[i].Tag == tagIntact {
			return fmt.Sprintf("; up to hop %d (%s) the tag was as sent", hops[i].Hops, hops[i].From)
		}
	}
	return ""
}

// printProbe writes the report for people.
func printProbe(w io.Writer, r *probeReport) error {
	p := printer{w: w}
	source := "this host"
	if r.Source.IsValid() {
		source = r.Source.String()
	}
	p.row("Probe", "%s, %s -> %s", r.Workload, source, r.Target)
	if r.Sent == "tagged" {
		p.row("Sent", "SYN with its tag")
	} else {
		p.row("Sent", "nothing")
	}
	switch a := r.Answer; a.Kind {
	case "syn-ack":
		with := "without a tag"
		if a.Tagged {
			with = "with a tag"
		}
		p.row("Answer", "SYN-ACK %s, from %s", with, a.From)
	case "reset":
		p.row("Answer", "reset, from %s", a.From)
	case "icmp":
		p.row("Answer", "%s, from %s", a.Says, a.From)
	default:
		p.row("Answer", "none")
	}
	words := map[fate]string{
		tagIntact: "tag as sent", tagRemoved: "tag removed", tagChanged: "tag changed", tagRenumbered: "sequence number changed",
		tagTranslated: "address or port changed", tagUnknown: "too little quoted to say",
	}
	for _, h := range r.Hops {
		label := fmt.Sprintf("Hop %d", h.Hops)
		if !h.From.IsValid() {
			p.row(label, "silent")
			continue
		}
		p.row(label, "%s, %s", h.From, words[h.Tag])
	}
	p.row("Verdict", "%s: %s", strings.ReplaceAll(r.Verdict, "-", " "), r.Why)
	if r.Hint != "" {
		p.row("Hint", "%s", r.Hint)
	}
	return p.err
}
