package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/api"
	"github.com/demarc/demarc/agent/core/proto"
	"github.com/demarc/demarc/agent/flow"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/policy/image"
)

type probeOptions struct {
	target  string
	as      string
	timeout time.Duration
	output  string
}

// Exit codes of a probe that could not be made: those below 64 are verdicts.
const (
	exitProbeUsage      = 64
	exitProbeNotRunning = 69
	exitProbeFailed     = 70
	exitProbePermission = 77
)

func newProbeCommand(env *environment) *cobra.Command {
	var o probeOptions
	c := &cobra.Command{
		Use:   "probe HOST[:PORT]",
		Short: "Say whether the tag of a workload survives the way to a host",
		Long: `Say whether the tag that proves a workload's identity survives the way to a host.

It connects as that workload, from a cgroup of its own below the workload's, and
watches what leaves this host and what comes back. Where that proves nothing, it
sends SYNs that reach only so many hops, and compares the tag in what the routers
quote of them with the one that was sent. It sends no data. It needs root, and the
network namespace that the workload's traffic leaves from. Without PORT, that of
the workload's only crossing that asks for proof is taken.

Exit codes: 0 proven both ways, 1 the tag does not get through, 2 refused,
3 no answer; 64 usage, 69 agent not running, 70 failed, 77 no permission,
130 interrupted.`,
		Example: `  demarc probe 192.0.2.7:5432 --as api
  demarc probe db.example --as api -o json`,
		Args:              func(c *cobra.Command, args []string) error { return notProbed(oneArgument("host")(c, args)) },
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(c *cobra.Command, args []string) error {
			o.target = args[0]
			return notProbed(probeRun(c.Context(), env, o))
		},
	}
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return notProbed(usageError{err}) })
	c.Flags().StringVar(&o.as, "as", "", "the `workload` to probe as; may be left out where only one runs here")
	c.Flags().DurationVar(&o.timeout, "timeout", 3*time.Second, "how long to wait for an answer")
	outputFlag(c, &o.output, "text", "json")
	mustRegister(c, "as", completeFromAgent(env, "from"))
	return c
}

// notProbed gives an error the exit code that says that there is no verdict.
func notProbed(err error) error {
	var exit exitError
	var usage usageError
	switch {
	case err == nil, errors.As(err, &exit), errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &usage):
		var hinted hintError
		if !errors.As(err, &hinted) {
			err = hintError{err, "see: demarc probe --help"}
		}
		return exitError{exitProbeUsage, err}
	case errors.Is(err, api.ErrNotRunning):
		return exitError{exitProbeNotRunning, hintError{err, "start demarc-agent, or choose its socket with --server or DEMARC_SERVER"}}
	case errors.Is(err, api.ErrPermission), errors.Is(err, os.ErrPermission):
		return exitError{exitProbePermission, hintError{err, "run it as root"}}
	}
	return exitError{exitProbeFailed, err}
}

func probeRun(ctx context.Context, env *environment, o probeOptions) (err error) {
	host, port, err := splitTarget(o.target)
	if err != nil {
		return err
	}
	if o.timeout <= 0 {
		return usagef("--timeout is more than 0")
	}
	client, err := env.client()
	if err != nil {
		return err
	}
	defer client.Close()
	p := &prober{client: client, timeout: o.timeout}
	if err := p.choose(ctx, o.as); err != nil {
		return err
	}
	if port == 0 {
		if port, err = p.onlyPort(ctx); err != nil {
			return err
		}
	}
	addresses, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return err
	}
	p.target = netip.AddrPortFrom(addresses[0].Unmap(), port)

	// The caller dies with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := p.open(ctx); err != nil {
		return err
	}
	defer func() {
		if bad := p.close(); bad != nil && ctx.Err() == nil {
			err = bad
		}
	}()
	f, err := p.find(ctx)
	if err != nil {
		return err
	}
	r, err := f.report(p)
	if err != nil {
		return err
	}
	show := printProbe
	if o.output == "json" {
		show = func(w io.Writer, r *probeReport) error { return document(w, "json", r) }
	}
	if err := show(env.Stdout, r); err != nil {
		return err
	}
	if r.Exit != exitGood {
		return exitError{code: r.Exit}
	}
	return nil
}

// splitTarget splits HOST[:PORT]; port 0 = not given.
func splitTarget(s string) (host string, port uint16, err error) {
	bad := usagef("%q is no HOST or HOST:PORT", s)
	if _, err := netip.ParseAddr(s); err == nil {
		return s, 0, nil // an IPv6 address is full of colons
	}
	if inner, ok := strings.CutPrefix(s, "["); ok && strings.HasSuffix(inner, "]") {
		if _, err := netip.ParseAddr(inner[:len(inner)-1]); err != nil {
			return "", 0, bad
		}
		return inner[:len(inner)-1], 0, nil
	}
	if !strings.Contains(s, ":") && s != "" {
		return s, 0, nil
	}
	host, text, err := net.SplitHostPort(s)
	if err != nil || host == "" {
		return "", 0, bad
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 {
		return "", 0, usagef("%q is no port", text)
	}
	return host, uint16(n), nil
}

// prober makes the connections of one probe, as one workload.
type prober struct {
	client   *api.Client
	timeout  time.Duration
	target   netip.AddrPort
	workload api.Identity
	root     string // of the managed tree
	observes bool   // nothing is dropped on this host

	watch  *watch
	caller *caller
	wake   [2]int // a pipe that is written to when the probe is interrupted
	undo   func() bool
}

// place is the target as it is in packets, which name no device.
func (p *prober) place() netip.AddrPort {
	return netip.AddrPortFrom(p.target.Addr().WithZone(""), p.target.Port())
}

// choose finds the workload to be.
func (p *prober) choose(ctx context.Context, as string) error {
	status, err := p.client.Status(ctx)
	if err != nil {
		return err
	}
	if status.State != proto.StateEnforcing && status.State != proto.StateObserving && status.State != proto.StateDegraded {
		return hintError{fmt.Errorf("nothing is tagged here: the state is %s", status.State), "see: demarc status"}
	}
	p.root, p.observes = status.Core.Root, status.State == proto.StateObserving
	identities, err := p.client.Identities(ctx)
	if err != nil {
		return fmt.Errorf("list identities: %w", err)
	}
	var here []api.Identity
	var names []string
	for _, i := range identities {
		if i.Reserved != "" {
			continue
		}
		wanted := as == i.Workload || as == i.Name()
		if wanted && len(i.Cgroups) == 0 {
			return hintError{fmt.Errorf("%s has no cgroup on this host", i.Name()), "start it first; see: demarc identities"}
		}
		if wanted || as == "" && len(i.Cgroups) > 0 {
			here, names = append(here, i), append(names, i.Name())
		}
	}
	switch {
	case len(here) == 1:
		p.workload = here[0]
		return nil
	case as != "":
		return hintError{usagef("%s is no workload of the policy in force", flow.Escape(as)), "see: demarc identities"}
	case len(here) == 0:
		return hintError{errors.New("no workload has a cgroup on this host"), "start one first; see: demarc identities"}
	}
	return usagef("choose a workload with --as: %s", strings.Join(names, ", "))
}

// onlyPort is the port of the workload's crossings that ask for proof.
func (p *prober) onlyPort(ctx context.Context) (uint16, error) {
	b, err := p.client.Image(ctx)
	if err != nil {
		return 0, err
	}
	img, err := image.Decode(b)
	if err != nil {
		return 0, err
	}
	spans := provableSpans(img, p.workload.Workload)
	if len(spans) == 1 && spans[0].Low == spans[0].High {
		return spans[0].Low, nil
	}
	var names []string
	for _, s := range spans {
		name := fmt.Sprintf("tcp/%d-%d", s.Low, s.High)
		if s.Low == s.High {
			name = fmt.Sprintf("tcp/%d", s.Low)
		}
		names = append(names, name)
	}
	if len(names) == 0 {
		names = []string{"no TCP port"}
	}
	return 0, usagef("choose a port: %s proves itself on %s", p.workload.Name(), strings.Join(names, ", "))
}

// provableSpans are the TCP ports on which a workload opens connections that need
// proof, each once, sorted.
func provableSpans(img *image.Image, workload string) (spans []image.Span) {
	self := slices.IndexFunc(img.Workloads, func(w image.Workload) bool { return w.Name == workload })
	for _, c := range img.Crossings {
		from := slices.ContainsFunc(c.From, func(t image.Term) bool {
			return t.Kind == image.TermWorkload && int(t.Index) == self || t.Kind == image.TermZone && t.Index == uint32(img.Workloads[self].Zone) ||
				t.Kind == image.TermAny
		})
		to := slices.ContainsFunc(c.To, func(t image.Term) bool { return t.Kind == image.TermWorkload || t.Kind == image.TermZone })
		if !from || !to || c.Need == image.NoProof {
			continue
		}
		for _, s := range c.Ports {
			if s.Proto == image.TCP && !slices.Contains(spans, s) {
				spans = append(spans, s)
			}
		}
	}
	slices.SortFunc(spans, func(a, b image.Span) int { return int(a.Low) - int(b.Low) })
	return spans
}

// open starts the caller and the watch.
func (p *prober) open(ctx context.Context) error {
	if err := unix.Pipe2(p.wake[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return os.NewSyscallError("pipe", err)
	}
	var err error
	if p.watch, err = openWatch(); err == nil {
		p.caller, err = startCaller(p.root, p.workload.Cgroups)
	}
	if err != nil {
		if p.watch != nil {
			p.watch.close()
		}
		return errors.Join(err, unix.Close(p.wake[0]), unix.Close(p.wake[1]))
	}
	p.undo = context.AfterFunc(ctx, func() { _, _ = unix.Write(p.wake[1], []byte{1}) })
	return nil
}

func (p *prober) close() error {
	p.watch.close()
	err := p.caller.stop()
	if p.undo() { // otherwise somebody may be writing
		err = errors.Join(err, unix.Close(p.wake[0]), unix.Close(p.wake[1]))
	}
	return err
}

// attempt is one connection and what was seen of it.
type attempt struct {
	port      uint16     // of ours
	sent      []*segment // SYNs as they left, each different one once
	answer    *segment   // SYN-ACK
	reset     *segment
	complaint *complaint
	result    string // what the caller was told
}

// note takes what was seen, if it is of this attempt.
func (a *attempt) note(s *sighting, target netip.AddrPort, identity uint32) {
	peer := target // as this host's own translation leaves it
	if len(a.sent) > 0 {
		peer = a.last().to
	}
	switch seg, c := s.segment, s.complaint; {
	case seg != nil && s.outgoing:
		ours := seg.is(tcpSYN) && seg.from.Port() == a.port && (seg.to == target || seg.identity() == identity)
		if ours && (len(a.sent) == 0 || fateOf(a.sent[len(a.sent)-1:], seg) != tagIntact) {
			a.sent = append(a.sent, seg)
		}
	case seg != nil:
		if seg.to.Port() != a.port || seg.from != peer && seg.from != target || len(a.sent) == 0 {
			return
		}
		switch answers := seg.ack == a.last().seq+1; {
		case seg.is(tcpSYN|tcpACK) && answers && a.answer == nil:
			a.answer = seg
		case seg.flags&tcpRST != 0 && answers:
			a.reset = seg
		}
	case c != nil && !s.outgoing:
		if about := c.about; about.from.Port() == a.port && (about.to == peer || about.to == target) {
			a.complaint = c
		}
	}
}

func (a *attempt) last() *segment { return a.sent[len(a.sent)-1] }

// tagged says whether our SYN left with a tag.
func (a *attempt) tagged() bool { return len(a.sent) > 0 && a.last().tag != nil }

// told says whether somebody said something to our SYN.
func (a *attempt) told() bool { return a.answer != nil || a.reset != nil || a.complaint != nil }

// try makes one connection that goes no further than so many hops; 0 = all the way.
func (p *prober) try(ctx context.Context, hops int, wait time.Duration) (*attempt, error) {
	a := &attempt{}
	if err := p.caller.ask(callRequest{To: p.target, Hops: hops}); err != nil {
		return nil, err
	}
	end := time.Now().Add(wait)
	var seen []*sighting // before the caller's port is known
	for stopped := false; a.result == ""; {
		// What comes from further away than a hop is all that is wanted of it.
		if !stopped && (time.Now().After(end) || hops > 0 && a.told()) {
			if err := p.caller.ask(callRequest{Stop: true}); err != nil {
				return nil, err
			}
			stopped = true
		}
		left := time.Until(end)
		if stopped {
			left = 10 * time.Second // the caller's own end: it does nothing else
		}
		readable, err := p.poll(ctx, left)
		if err != nil {
			return nil, err
		}
		for {
			r, ok, err := p.caller.reply(readable)
			if err != nil {
				return nil, err
			}
			if !ok {
				break
			}
			readable = false
			if r.Port != 0 {
				a.port = r.Port
			} else {
				a.result = r.Result
			}
		}
		// What made the caller's result was on a device before.
		for ok := true; ok; {
			var s *sighting
			if s, ok, err = p.watch.next(); err != nil {
				return nil, err
			}
			if s != nil {
				seen = append(seen, s)
			}
		}
		if a.port == 0 {
			continue
		}
		for _, s := range seen {
			a.note(s, p.place(), p.workload.Identity)
		}
		seen = nil
	}
	return a, nil
}

// poll waits for packets or the caller, and says whether it can be read.
func (p *prober) poll(ctx context.Context, wait time.Duration) (readable bool, err error) {
	fds := []unix.PollFd{
		{Fd: int32(p.watch.fd), Events: unix.POLLIN}, {Fd: int32(p.caller.out.Fd()), Events: unix.POLLIN}, {Fd: int32(p.wake[0]), Events: unix.POLLIN},
	}
	// One more: what is left of a millisecond must not be polled for busily.
	_, err = unix.Poll(fds, int(max(wait, 0).Milliseconds())+1)
	switch {
	case ctx.Err() != nil:
		return false, ctx.Err()
	case err != nil && !errors.Is(err, unix.EINTR):
		return false, os.NewSyscallError("poll", err)
	}
	return err == nil && fds[1].Revents != 0, nil
}

// Bounds of the search along the path.
const (
	maxHops   = 30
	maxSilent = 3 // routers in a row that say nothing
	hopWait   = time.Second
)

// find makes the connection, and searches the path where that proved nothing.
func (p *prober) find(ctx context.Context) (*findings, error) {
	start := time.Now()
	a, err := p.try(ctx, 0, p.timeout)
	if err != nil {
		return nil, err
	}
	f := &findings{attempt: a, observes: p.observes}
	if f.proven() {
		return f, nil
	}
	if a.result != callConnected && (a.answer != nil || len(a.sent) == 0) {
		if f.denied, err = p.denial(ctx, start, a.port); err != nil {
			return nil, err
		}
	}
	if !a.tagged() {
		return f, nil
	}
	silent := 0
	for n := 1; n <= maxHops && silent < maxSilent; n++ {
		a, err := p.try(ctx, n, min(p.timeout, hopWait))
		if err != nil {
			return nil, err
		}
		h := hop{Hops: n}
		c := a.complaint
		if c == nil && a.told() {
			break // it is there
		}
		silent++
		if c != nil {
			h.From, h.Tag, silent = c.from, fateOf(a.sent, &c.about), 0
		}
		f.hops = append(f.hops, h)
		if _, _, _, found := blame(f.hops); found || c != nil && c.kind != expired {
			break
		}
	}
	for len(f.hops) > 0 && !f.hops[len(f.hops)-1].From.IsValid() {
		f.hops = f.hops[:len(f.hops)-1]
	}
	return f, nil
}

// tellWithin is how long a verdict of the kernel may take to be told by the agent.
const tellWithin = 2 * time.Second

// denial is why this host refused a packet of a connection; Undecided = it did not.
func (p *prober) denial(ctx context.Context, since time.Time, port uint16) (abi.Reason, error) {
	query := url.Values{"since": {since.Add(-time.Second).Format(time.RFC3339Nano)}, "verdict": {abi.Deny.String()}}
	for end := time.Now().Add(tellWithin); ; {
		for line, err := range p.client.Flows(ctx, query) {
			if err != nil {
				return abi.Undecided, err
			}
			f := line.Flow
			if f != nil && f.Direction == abi.Egress && f.Protocol == "tcp" && f.Source.Identity == p.workload.Identity &&
				(f.Source.Port == port || f.Source.Port == 0) && f.Destination.Port == p.target.Port() {
				return f.Reason, nil
			}
		}
		if time.Now().After(end) {
			return abi.Undecided, nil
		}
		select {
		case <-ctx.Done():
			return abi.Undecided, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}
