package e2e_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/agent/coreclient"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// Two policies that agree on one port only, and there by crossings of the same
// name at different places. Whoever looked one verdict up in both would get a
// crossing that the other policy has at that place.
const (
	swapOld = `crossings:
  - {name: old, from: [workload/web], to: [workload/db], ports: [tcp/7000-7001, udp/7000-7001], log: all}
  - {name: common, from: [workload/web], to: [workload/db], ports: [tcp/7003, udp/7003], log: all}
`
	swapNew = `crossings:
  - {name: new, from: [workload/web], to: [workload/db], ports: [tcp/7002, udp/7002], log: all}
  - {name: back, from: [workload/db], to: [workload/web], ports: [tcp/1], log: all}
  - {name: common, from: [workload/web], to: [workload/db], ports: [tcp/7003, udp/7003], log: all}
`
)

// crossingAt is what each policy says of a port; "" = denied.
var crossingAt = map[bool]map[uint16]string{
	false: {7000: "old", 7001: "old", 7002: "", 7003: "common"},
	true:  {7000: "", 7001: "", 7002: "new", 7003: "common"},
}

// The policy is swapped under traffic, first as fast as the core can, then a
// thousand times a second: each verdict is that of the one policy or of the other,
// with its crossing and its epoch, and what both allow is never refused. A swap in the
// kernel decides within 100 ms: no verdict after that is of the policy before.
func TestJ11X15SwapMidPacket(t *testing.T) {
	e := newEnds(t, swapOld, netlab.NodeOptions{CoreOnly: true})
	for port := range crossingAt[true] {
		e.server.serve(port)
	}
	e.apply(swapNew)
	epochs := epochsOf{e.node.Status().Active.Epoch: true}
	e.node.Forget()
	ports := []string{}
	for port := range crossingAt[true] {
		ports = append(ports, e.at4(port).String(), e.at6(port).String())
	}
	slices.Sort(ports)
	call[bool](e.client, "StartAttempts", AttemptArgs{To: ports, Every: 2 * time.Millisecond})

	client, err := coreclient.Dial(context.Background(), e.node.Dir()+"/core/core.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	_, descriptors, err := client.Hello()
	if err != nil {
		t.Fatal(err)
	}
	descriptors.Close()
	const byCore = 50
	slots := map[bool]uint32{} // of the last two: what was in force stays in its slot until the next change
	start := time.Now()
	for range byCore {
		s, err := client.Rollback()
		if err != nil {
			t.Fatal(err)
		}
		epochs[s.Active.Epoch] = s.Active.Version == 2
		slots[s.Active.Version == 2] = uint32(s.Active.Slot)
	}
	t.Logf("the core swapped %d times in %s: %.0f/s", byCore, time.Since(start), byCore/time.Since(start).Seconds())
	// Nobody puts the state back meanwhile.
	e.node.Core.Signal(syscall.SIGSTOP)
	defer e.node.Core.Signal(syscall.SIGCONT)
	ended := flip(t, pinned(t, e.node, "state"), slots, epochs, 12*time.Second)
	t.Logf("%d swaps in the kernel", len(ended))

	r := call[AttemptReply](e.client, "StopAttempts", true)
	t.Logf("%d connections and datagrams tried; went through: %v", r.Tried, r.Through)
	for _, problem := range r.Problems {
		t.Error(problem)
	}
	checkEpochs(t, e, epochs)
	checkEnds(t, e, ended)
}

// epochsOf says which epochs were those of the new policy.
type epochsOf map[uint32]bool

// flip swaps two filled generations by the word that the core would write, at a
// thousand times a second. It returns when each epoch was over, on CLOCK_BOOTTIME.
func flip(t *testing.T, state *ebpf.Map, slots map[bool]uint32, epochs epochsOf, d time.Duration) (ended map[uint32]time.Duration) {
	var s abi.State
	if err := state.Lookup(uint32(0), &s); err != nil {
		t.Fatal(err)
	}
	epoch := abi.ActiveEpoch(s.Active)
	isNew := epochs[epoch]
	ended = map[uint32]time.Duration{}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(d); time.Now().Before(end); <-tick.C {
		isNew = !isNew
		epoch++
		epochs[epoch] = isNew
		s.Active = abi.MakeActive(slots[isNew], abi.ActiveOn, epoch)
		if err := state.Put(uint32(0), &s); err != nil {
			t.Fatal(err)
		}
		ended[epoch-1] = sinceBoot(t)
	}
	return ended
}

func sinceBoot(t *testing.T) time.Duration {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		t.Fatal(err)
	}
	return time.Duration(now.Nano())
}

// checkEnds compares when verdicts were given with when their epoch was over: those that
// came later were just being given.
func checkEnds(t *testing.T, e *ends, ended map[uint32]time.Duration) {
	t.Helper()
	all := 0
	var late []time.Duration
	for _, f := range e.node.Flows() {
		end, known := ended[f.Epoch]
		if !known {
			continue
		}
		all++
		if after := time.Duration(f.Time.UnixNano()) - end; after > 0 {
			late = append(late, after)
		}
	}
	slices.Sort(late)
	median, longest := time.Duration(0), time.Duration(0)
	if len(late) > 0 {
		median, longest = late[len(late)/2], late[len(late)-1]
	}
	t.Logf("%d of %d verdicts were given after their epoch was over: %s in the median, %s at most", len(late), all, median, longest)
	if all < 1000 || median >= 100*time.Millisecond {
		t.Error("that is too few, or too late")
	}
}

// checkEpochs compares every event with the policy of its epoch.
func checkEpochs(t *testing.T, e *ends, epochs epochsOf) {
	t.Helper()
	numbers := map[string]string{}
	for _, text := range []string{swapOld, swapNew} {
		for _, c := range decoded(t, e.node, document(1, webAndDB+text)).Crossings {
			numbers[fmt.Sprintf("crossing-%d", c.Number)] = c.Name
		}
	}
	seen := map[string]int{}
	bad := 0
	for _, f := range e.node.Flows() {
		name := f.Crossing
		if known, ok := numbers[name]; ok {
			name = known // the test's names are older than the epoch
		}
		isNew, ok := epochs[f.Epoch]
		want, declared := crossingAt[isNew][f.Destination.Port]
		var legal bool
		switch f.Verdict {
		case abi.Allow:
			legal = f.Reason == abi.ByCrossing && want != "" && name == want
		case abi.Deny:
			legal = (f.Reason == abi.NoCrossingFor || f.Reason == abi.Revoked) && want == "" && name == ""
			// A caller whose handshake was cut in the middle gives up with a
			// packet that belongs to no admitted handshake.
			legal = legal || f.Reason == abi.NoState && f.Direction == abi.Ingress && f.Destination.Port != 7003
			// A SYN that was built under the policy that does not know the port
			// has no tag. Under the one that does it is refused, and sent again.
			legal = legal || f.Reason == abi.TagNoRoom && f.Direction == abi.Egress && name == want
		}
		if !ok || !declared || !legal {
			if bad++; bad <= 10 {
				t.Errorf("epoch %d (new policy: %t, known: %t): %s", f.Epoch, isNew, ok, netlab.Describe(f))
			}
		}
		seen[fmt.Sprintf("%t %s %s %s", isNew, f.Verdict, f.Reason, name)]++
	}
	t.Logf("events: %v", seen)
	for _, kind := range []string{"false allow crossing old", "true allow crossing new", "false allow crossing common", "true allow crossing common",
		"false deny no-crossing ", "true deny no-crossing "} {
		if seen[kind] < 10 {
			t.Errorf("only %d events of %q: too few to prove anything", seen[kind], kind)
		}
	}
	if bad > 0 {
		t.Errorf("%d events that neither policy explains", bad)
	}
}

// AttemptArgs are servers to try again and again, with a new socket each time.
type AttemptArgs struct {
	To    []string
	Every time.Duration
}

// AttemptReply is what came of it, by port.
type AttemptReply struct {
	Tried    int
	Through  map[string]int
	At       map[string][]time.Time // each was tried
	Problems []string
}

// attempts runs in an actor.
type attempts struct {
	traffic
	through map[string]int
	at      map[string][]time.Time
	tried   int
}

// StartAttempts starts trying.
func (a *Actor) StartAttempts(args AttemptArgs, _ *bool) error {
	ctx, cancel := context.WithCancel(context.Background())
	f := &attempts{traffic: traffic{cancel: cancel}, through: map[string]int{}, at: map[string][]time.Time{}}
	for _, to := range args.To {
		at, err := netip.ParseAddrPort(to)
		if err != nil {
			cancel()
			return err
		}
		f.repeat(ctx, args.Every, func() error { return f.try("tcp", at) })
		f.repeat(ctx, args.Every, func() error { return f.try("udp", at) })
	}
	a.attempts = f
	return nil
}

// StopAttempts ends it and tells what came of it.
func (a *Actor) StopAttempts(_ bool, reply *AttemptReply) error {
	f := a.attempts
	f.cancel()
	f.all.Wait()
	*reply = AttemptReply{Tried: f.tried, Through: f.through, At: f.at, Problems: f.reply.Problems}
	return nil
}

// try opens a flow and uses it. Port 7003 must always work; what becomes of the
// others depends on the moment.
func (f *attempts) try(network string, to netip.AddrPort) error {
	patience := 30 * time.Millisecond
	if to.Port() == 7003 {
		patience = timeToAnswer
	}
	dial := func() (net.Conn, error) { return dialStream(DialArgs{To: to.String(), Timeout: patience}) }
	if network == "udp" {
		dial = func() (net.Conn, error) { return net.Dial(network, to.String()) }
	}
	at, name := time.Now(), fmt.Sprintf("%s/%d", network, to.Port())
	c, err := dial()
	if err == nil {
		defer c.Close()
		err = exchange(c, 16, patience)
	}
	f.mu.Lock()
	f.tried++
	f.at[name] = append(f.at[name], at)
	if err == nil {
		f.through[name]++
	}
	f.mu.Unlock()
	if err != nil && to.Port() == 7003 {
		return fmt.Errorf("what both policies allow: %s %s: %w", network, to, err)
	}
	return nil
}
