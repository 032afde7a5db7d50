package e2e_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/core/keyring"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// Rotation as TestE13Rotation does it.
const (
	rotateEvery   = 5 * time.Second
	rotateFor     = 2 * time.Minute
	rotateOverlap = 6 * time.Second // accepted before it is sent with, and its predecessor afterwards
	rotateLate    = 2 * time.Second // after the first host, the second one gets the file
)

const rotationPolicy = webAndDB + `crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000]}
  - {name: db-web, from: [workload/db], to: [workload/web], ports: [tcp/7001, udp/7001]}
`

// rotated is two hosts with a keyring file each.
type rotated struct {
	t        *testing.T
	lab      *netlab.Lab
	files    [2]string
	hosts    [2]*netlab.Namespace
	nodes    [2]*netlab.Node
	actors   [2]*actor
	ever     map[string]oldKey // every key that there was, by its fingerprint
	tried    map[string]int    // forgeries with each
	sneaking *forger
}

// oldKey is a key that the test remembers longer than the hosts may.
type oldKey struct {
	epoch  uint8
	secret [16]byte
	until  time.Time // as far as it was said
}

// The keys change every 5 seconds for 2 minutes while connections and new flows of
// datagrams are made all the time, in both directions, and one host gets each new
// file late. Nothing is refused that is declared, open connections live on, and a
// key is not good for a moment longer than it was to be.
func TestE13Rotation(t *testing.T) {
	r := newRotated(t)
	streams := r.openStreams()
	load := r.startLoad()

	var all sync.WaitGroup
	end := time.Now().Add(rotateFor)
	for next := time.Now(); next.Before(end); next = next.Add(rotateEvery) {
		r.until(next)
		r.rotate()
		all.Go(func() {
			r.until(next.Add(rotateLate))
			r.copyRing()
		})
		for i, s := range streams {
			if problem := call[string](r.actors[i%2], "Exchange", ExchangeArgs{Stream: s, Bytes: 64, Timeout: 20 * time.Second}); problem != "" {
				t.Errorf("the connection from before the rotation: %s", problem)
			}
		}
		r.tryOldKeys()
		all.Wait()
	}
	load.stop()

	for i, a := range r.actors {
		reply := call[TrafficReply](a, "StopTraffic", true)
		for _, p := range reply.Problems {
			t.Errorf("host %d: %s", i, p)
		}
		if reply.Connected < 1000 {
			t.Errorf("host %d made %d connections only", i, reply.Connected)
		}
		t.Logf("host %d: %d connections, %d flows of datagrams", i, reply.Connected, load.flows[i].Load())
	}
	// A stolen key: the file without it is all that is needed.
	r.withdraw()
	if len(r.ever) < 20 {
		t.Errorf("only %d keys", len(r.ever))
	}
	// Each forgery was refused, and nothing else.
	refused := uint64(0)
	for i, n := range r.nodes {
		for _, reason := range []abi.Reason{abi.TagMissing, abi.TagMalformed, abi.TagBadMAC, abi.TagWrongEpoch, abi.TagBadIdentity, abi.TagNoRoom, abi.TagStale, abi.TagUnbound} {
			count := n.Denied(reason)
			if i == 1 && (reason == abi.TagWrongEpoch || reason == abi.TagBadMAC) {
				refused += count
			} else if count > 0 {
				t.Errorf("host %d refused %d with %s", i, count, reason)
			}
		}
	}
	if tried := uint64(r.sneaking.tried); refused != tried || tried < 60 {
		t.Errorf("%d refusals, and %d forgeries", refused, tried)
	}
	if t.Failed() {
		for i, n := range r.nodes {
			for _, f := range n.Flows() {
				if f.Verdict == abi.Deny {
					t.Log(i, f.Time, netlab.Describe(f))
				}
			}
		}
	}
}

func newRotated(t *testing.T) *rotated {
	t.Helper()
	r := &rotated{t: t, lab: netlab.New(t), ever: map[string]oldKey{}, tried: map[string]int{}}
	for i, name := range []string{"web", "db"} {
		r.hosts[i] = r.lab.Namespace(name)
		r.files[i] = filepath.Join(r.lab.Dir(), name+".keyring")
	}
	first, err := keyring.New(1)
	if err == nil {
		err = keyring.Create(r.files[0], &keyring.Ring{Keys: []keyring.Key{first}})
	}
	if err != nil {
		t.Fatalf("make keyring: %v", err)
	}
	r.copyRing()
	r.learn()
	for i, name := range []string{"web", "db"} {
		r.nodes[i] = r.lab.Node(document(1, rotationPolicy), netlab.NodeOptions{CoreOnly: true, Home: r.hosts[i], Keyring: r.files[i]})
		r.actors[i] = startActor(t, r.hosts[i], r.nodes[i].Cgroup("/lab/"+name))
		r.actors[i].serve(uint16(7001 - i))
	}
	r.sneaking = r.newForger()
	return r
}

// until waits for a moment of the plan.
func (r *rotated) until(at time.Time) { <-time.After(time.Until(at)) }

// copyRing copies the first host's keyring to the second, in one step.
func (r *rotated) copyRing() {
	b, err := os.ReadFile(r.files[0])
	if err == nil {
		err = os.WriteFile(r.files[1]+".new", b, 0o600)
	}
	if err == nil {
		err = os.Rename(r.files[1]+".new", r.files[1])
	}
	if err != nil {
		r.t.Errorf("copy keyring: %v", err)
	}
}

// rotate adds the next key, as an operator would.
func (r *rotated) rotate() {
	r.t.Helper()
	out, _, status := r.nodes[0].Demarc("keys", "generate", "tag", "--add", r.files[0], "--overlap", rotateOverlap.String())
	if status != 0 {
		r.t.Fatalf("add key: %d\n%s", status, out)
	}
	r.learn()
}

// learn remembers the keys of the first host's file.
func (r *rotated) learn() {
	r.t.Helper()
	ring, err := keyring.Read(r.files[0])
	if err != nil {
		r.t.Fatal(err)
	}
	for _, k := range ring.Keys {
		r.ever[k.Fingerprint()] = oldKey{k.Epoch, *k.Secret(), k.Until}
	}
}

// openStreams opens a connection in each direction and family, which are to live on.
func (r *rotated) openStreams() (streams []int) {
	r.t.Helper()
	for _, family := range []func(*netlab.Namespace) netip.Addr{
		func(ns *netlab.Namespace) netip.Addr { return ns.IP4 }, func(ns *netlab.Namespace) netip.Addr { return ns.IP6 },
	} {
		for i, a := range r.actors {
			s := a.dial(netip.AddrPortFrom(family(r.hosts[1-i]), uint16(7000+i)))
			if s.Error != "" {
				r.t.Fatalf("connect from host %d: %s", i, s.Error)
			}
			streams = append(streams, s.Stream)
		}
	}
	return streams
}

// rotationLoad is what goes on during the rotations beside the actors' traffic.
type rotationLoad struct {
	all   sync.WaitGroup
	over  atomic.Bool
	flows [2]atomic.Int64
}

// startLoad makes connections and flows of datagrams, one after the other, from each
// host to the other: TCP in one family, UDP in the other.
func (r *rotated) startLoad() *rotationLoad {
	r.t.Helper()
	l := &rotationLoad{}
	for i, a := range r.actors {
		stream, datagram := r.hosts[1-i].IP4, r.hosts[1-i].IP6
		if i == 1 {
			stream, datagram = datagram, stream
		}
		port := uint16(7000 + i)
		call[bool](a, "StartTraffic", TrafficArgs{Connect: []string{netip.AddrPortFrom(stream, port).String()}})
		l.all.Go(func() {
			args := DatagramArgs{To: netip.AddrPortFrom(datagram, port).String(), Count: 1, Timeout: 20 * time.Second}
			for ; !l.over.Load(); <-time.After(20 * time.Millisecond) {
				d := call[DatagramReply](a, "Datagrams", args)
				if d.Answered != 1 {
					r.t.Errorf("a new flow of datagrams from %s: %+v", d.Local, d)
				}
				l.flows[i].Add(1)
			}
		})
	}
	return l
}

func (l *rotationLoad) stop() {
	l.over.Store(true)
	l.all.Wait()
}

// forger sends SYNs to db from web's address with tags of its own making, and looks
// for an answer.
type forger struct {
	t          *testing.T
	door, away *cable
	model      tcpFrame
	web        uint32
	port       uint16
	tried      int
}

func (r *rotated) newForger() *forger {
	r.t.Helper()
	f := &forger{t: r.t, door: openCable(r.t, r.hosts[1]), away: openCable(r.t, r.hosts[0]), port: 2000}
	for _, w := range decoded(r.t, r.nodes[0], document(1, rotationPolicy)).Workloads {
		if w.Name == "web" {
			f.web = uint32(w.ID)
		}
	}
	if !r.actors[0].reaches(netip.AddrPortFrom(r.hosts[1].IP4, 7000)) {
		r.t.Fatal("the declared connection does not come about")
	}
	for _, s := range f.door.segments() {
		if s.flags&(flagSYN|flagACK) == flagSYN {
			f.model = s
		}
	}
	if f.model.frame == nil {
		r.t.Fatal("no SYN was seen")
	}
	return f
}

// tryOldKeys sends a SYN with a tag of each key that has ended; it must be refused.
// The control is the load, whose tags are good.
func (r *rotated) tryOldKeys() {
	r.t.Helper()
	for print, k := range r.ever {
		// What ends now may be a moment later in the kernel's clock.
		if k.until.IsZero() || time.Since(k.until) < 100*time.Millisecond || r.tried[print] == 4 {
			continue
		}
		r.tried[print]++
		r.forge(k)
	}
}

// forge sends one, and waits until it is refused.
func (r *rotated) forge(k oldKey) {
	r.t.Helper()
	f, n := r.sneaking, r.nodes[1]
	f.port++
	bare := f.model.with(f.port, nil)
	forged := f.model.with(f.port, bare.tagOf(k.secret, f.web, k.epoch, 0))
	refused := func() uint64 { return n.Denied(abi.TagWrongEpoch) + n.Denied(abi.TagBadMAC) }
	f.door.segments()
	before := refused()
	f.tried++
	f.away.send(forged)
	answered := false
	eventually(r.t, 10*time.Second, "refusal of a tag of an ended key", func() bool {
		for _, s := range f.door.segments() {
			answered = answered || s.dst == forged.src && s.flags&(flagSYN|flagACK) == flagSYN|flagACK
		}
		return answered || refused() > before
	})
	if answered {
		r.t.Errorf("epoch %d is taken %s after its end", k.epoch, time.Since(k.until))
	}
}

// withdraw takes all keys away at once, for a new one. As soon as the core says that
// it wiped them, none of them is good.
func (r *rotated) withdraw() {
	r.t.Helper()
	had := map[string]oldKey{}
	ring, err := keyring.Read(r.files[0])
	if err != nil {
		r.t.Fatal(err)
	}
	used := map[uint8]bool{}
	for _, k := range ring.Keys {
		used[k.Epoch] = true
		had[k.Fingerprint()] = oldKey{k.Epoch, *k.Secret(), k.Until}
	}
	epoch := uint8(0)
	for used[epoch] {
		epoch++
	}
	fresh, err := keyring.New(epoch)
	if err != nil {
		r.t.Fatal(err)
	}
	print := fresh.Fingerprint()
	if err := keyring.Replace(r.files[0], &keyring.Ring{Keys: []keyring.Key{fresh}}); err != nil {
		r.t.Fatal(err)
	}
	r.copyRing()
	for _, n := range r.nodes {
		eventually(r.t, 20*time.Second, "the core follows the file", func() bool {
			before, since, found := strings.Cut(n.Core.Output(), "fingerprint="+print)
			for print, k := range had {
				if !strings.Contains(before, "fingerprint="+print) {
					continue // the file did not stay long enough
				}
				wiped := strings.Contains(since, fmt.Sprintf("msg=\"tag key wiped\" epoch=%d\n", k.epoch))
				ended := !k.until.IsZero() && time.Now().After(k.until)
				found = found && (wiped || ended)
			}
			return found
		})
	}
	for _, k := range had {
		k.until = time.Now()
		r.forge(k)
	}
	if got := r.nodes[1].Denied(abi.TagWrongEpoch); got < uint64(len(had)) {
		r.t.Errorf("%d refusals for the epoch, and %d keys were withdrawn", got, len(had))
	}
	if !r.actors[0].reaches(netip.AddrPortFrom(r.hosts[1].IP4, 7000)) {
		r.t.Error("the declared connection does not come about with the new key")
	}
}
