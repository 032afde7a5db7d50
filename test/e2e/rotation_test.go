package e2e_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/demarc/demarc/agent/core/keyring"
	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/internal/keyfile"
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
	t.Parallel() // it waits most of its time
	r := newRotated(t, netlab.NodeOptions{CoreOnly: true})
	r.sneaking = r.newForger()
	r.control()
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
		for _, reason := range []abi.Reason{abi.TagMissing, abi.TagMalformed, abi.TagBadMAC, abi.TagWrongEpoch, abi.TagBadIdentity, abi.TagNoRoom, abi.TagStale, abi.TagUnbound, abi.TagReplayed, abi.MapFull} {
			count := n.Denied(reason)
			if i == 1 && (reason == abi.TagWrongEpoch || reason == abi.TagBadMAC) {
				refused += count
			} else if count > 0 {
				t.Errorf("host %d refused %d with %s", i, count, reason)
			}
		}
	}
	if tried := uint64(r.sneaking.tried); refused != tried || tried < 240 {
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

// newRotated makes two hosts with a keyring each and a workload on either, which meet.
func newRotated(t *testing.T, options netlab.NodeOptions) *rotated {
	t.Helper()
	r := &rotated{t: t, lab: netlab.New(t), ever: map[string]oldKey{}, tried: map[string]int{}}
	for i, name := range []string{"web", "db"} {
		r.hosts[i] = r.lab.Namespace(name)
		r.files[i] = filepath.Join(r.lab.Dir(), name+".keyring")
	}
	first, err := keyring.New(1)
	if err == nil {
		err = keyfile.Create(r.files[0], &keyring.Ring{Keys: []keyring.Key{first}})
	}
	if err != nil {
		t.Fatalf("make keyring: %v", err)
	}
	r.copyRing()
	r.learn()
	for i, name := range []string{"web", "db"} {
		options.Home, options.Keyring = r.hosts[i], r.files[i]
		r.nodes[i] = r.lab.Node(document(1, rotationPolicy), options)
		r.actors[i] = startActor(t, r.hosts[i], r.nodes[i].Cgroup("/lab/"+name))
		r.actors[i].serve(uint16(7001 - i))
	}
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
	r.t.Cleanup(l.stop) // also where the test ends early: before the actors do
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

// forger sends to db, from web's addresses and with tags of its own making. It is
// another machine on the switch, without demarc.
type forger struct {
	door, away *cable
	models     []tcpFrame // a SYN of web's in each family
	web        uint32
	port       uint16
	tried      int
}

func (r *rotated) newForger() *forger {
	r.t.Helper()
	f := &forger{door: openCable(r.t, r.hosts[1]), away: openCable(r.t, r.lab.Namespace("forger")), port: 2000}
	for _, w := range decoded(r.t, r.nodes[0], document(1, rotationPolicy)).Workloads {
		if w.Name == "web" {
			f.web = uint32(w.ID)
		}
	}
	for _, to := range both(r.hosts[1], 7000) {
		if !r.actors[0].reaches(netip.AddrPortFrom(to.Address, to.Port)) {
			r.t.Fatalf("the declared connection to %v does not come about", to)
		}
	}
	for _, s := range f.door.segments() {
		if s.flags&(flagSYN|flagACK) == flagSYN {
			// The switch would lead what is for web here, were it sent from web's device.
			copy(s.frame[6:12], []byte{2, 0, 0, 0, 0, 0x66})
			f.models = append(f.models, s)
		}
	}
	if len(f.models) != 2 {
		r.t.Fatalf("%d SYNs were seen", len(f.models))
	}
	return f
}

// syn is a SYN from a port with a tag by a key.
func (f *forger) syn(model tcpFrame, k oldKey) tcpFrame {
	return model.with(f.port, model.with(f.port, nil).tagOf(k.secret, f.web, k.epoch, 0))
}

// datagram is a datagram to the same place with a tag by a key.
func (f *forger) datagram(model tcpFrame, k oldKey) tcpFrame {
	d := datagramOf{from: netip.AddrPortFrom(model.src.Addr(), f.port), to: model.dst, when: uint32(time.Now().Unix()), nonce: 0x5eed}
	return d.frame(model.frame[:6], model.frame[6:12], d.tag(k.secret, f.web, k.epoch, tagDatagram))
}

// tryOldKeys sends what is tagged with each key that has ended; it must be refused.
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

// refused counts what db refused that was tagged with a key that it does not have.
// Epochs are used again: then it is the MAC that is wrong.
func (r *rotated) refused() uint64 {
	return r.nodes[1].Denied(abi.TagWrongEpoch) + r.nodes[1].Denied(abi.TagBadMAC)
}

// forge sends a SYN and a datagram of each family with tags by an ended key, and waits
// until each is refused.
func (r *rotated) forge(k oldKey) {
	r.t.Helper()
	f := r.sneaking
	f.port++
	for _, model := range f.models {
		for what, forged := range map[string]tcpFrame{"SYN": f.syn(model, k), "datagram": f.datagram(model, k)} {
			before := r.refused()
			f.tried++
			f.away.send(forged)
			eventually(r.t, 10*time.Second, fmt.Sprintf("refusal of a %s to %s tagged with epoch %d, %s after its end", what, model.dst, k.epoch, time.Since(k.until)),
				func() bool { return r.refused() > before })
		}
	}
}

// control shows that what the forger sends would be taken, were its key good.
func (r *rotated) control() {
	r.t.Helper()
	f := r.sneaking
	f.port++
	for _, k := range r.ever {
		for _, model := range f.models {
			f.door.segments()
			f.away.send(f.syn(model, k))
			eventually(r.t, 10*time.Second, "answer to a SYN with a true tag", func() bool {
				return slices.ContainsFunc(f.door.segments(), func(s tcpFrame) bool {
					return s.dst == netip.AddrPortFrom(model.src.Addr(), f.port) && s.flags&(flagSYN|flagACK) == flagSYN|flagACK
				})
			})
			before := r.actors[1].served("udp", 7000).Count
			f.away.send(f.datagram(model, k))
			eventually(r.t, 10*time.Second, "a datagram with a true tag arrives", func() bool { return r.actors[1].served("udp", 7000).Count > before })
		}
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
	if err := keyfile.Replace(r.files[0], &keyring.Ring{Keys: []keyring.Key{fresh}}); err != nil {
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
