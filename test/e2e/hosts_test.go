package e2e_test

import (
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/demarc/demarc/bpf/abi"
	"github.com/demarc/demarc/test/netlab"
)

// fleet is three hosts on one switch, each with a demarc of its own. They share
// nothing but the keyring and the policy.
//
//	host a (web)  ----.
//	host b (api)  ----switch---- outside, without demarc
//	host c (db)   ----'
type fleet struct {
	lab      *netlab.Lab
	outside  *netlab.Namespace
	hosts    map[string]*netlab.Namespace
	nodes    map[string]*netlab.Node
	actors   map[string]*actor
	stranger *actor // outside
}

const fleetPolicy = `workloads:
  web: {zone: app, match: [{cgroup: /lab/web}]}
  api: {zone: app, match: [{cgroup: /lab/api}]}
  db: {zone: app, match: [{cgroup: /lab/db}]}
networks:
  visitors: {zone: app, cidrs: [%[1]s/32, "%[2]s/128"]}
crossings:
  - {name: web-api, from: [workload/web], to: [workload/api], ports: [tcp/8080, udp/8080, tcp/80]%[3]s}
  - {name: api-db, from: [workload/api], to: [workload/db], ports: [tcp/5432, udp/5432]}
  - {name: visit, from: [network/visitors], to: [workload/web], ports: [tcp/443, udp/443], identity: none}
  - {name: leave, from: [workload/db], to: [network/visitors], ports: [tcp/443, udp/443], identity: none}
`

var fleetPorts = []uint16{8080, 5432, 443}

func newFleet(t *testing.T, webAPI string) *fleet {
	t.Helper()
	f := &fleet{lab: netlab.New(t), hosts: map[string]*netlab.Namespace{}, nodes: map[string]*netlab.Node{}, actors: map[string]*actor{}}
	f.outside = f.lab.Namespace("outside")
	text := document(1, fmt.Sprintf(fleetPolicy, f.outside.IP4, f.outside.IP6, webAPI))
	for _, name := range []string{"web", "api", "db"} {
		f.hosts[name] = f.lab.Namespace(name)
		f.nodes[name] = f.lab.Node(text, netlab.NodeOptions{CoreOnly: true, Home: f.hosts[name]})
		f.actors[name] = startActor(t, f.hosts[name], f.nodes[name].Cgroup("/lab/"+name))
	}
	f.stranger = startActor(t, f.outside, f.lab.Cgroup("outside"))
	return f
}

// serve opens every port everywhere: what is not reached is not for want of a
// server.
func (f *fleet) serve() {
	for _, port := range fleetPorts {
		for _, a := range f.actors {
			a.serve(port)
		}
		f.stranger.serve(port)
	}
}

// Every declared pair connects, every other does not, TCP and UDP, IPv4 and IPv6,
// with SYN cookies too; nobody shares a map with anybody.
func TestThreeHosts(t *testing.T) {
	f := newFleet(t, "")
	f.serve()
	places := map[string]*netlab.Namespace{"outside": f.outside}
	actors := map[string]*actor{"outside": f.stranger}
	for name := range f.hosts {
		places[name], actors[name] = f.hosts[name], f.actors[name]
	}
	declared := map[string]bool{
		"web api 8080": true, "api db 5432": true, "outside web 443": true, "db outside 443": true,
	}
	for _, cookies := range []string{"1", "2"} {
		for _, ns := range f.hosts {
			ns.Sysctl("ipv4/tcp_syncookies", cookies)
		}
		var all sync.WaitGroup
		for from, a := range actors {
			all.Go(func() {
				for to, ns := range places {
					if from == to {
						continue
					}
					for _, port := range fleetPorts {
						want := declared[fmt.Sprintf("%s %s %d", from, to, port)]
						for _, address := range []netip.Addr{ns.IP4, ns.IP6} {
							a.checkReach(t, netip.AddrPortFrom(address, port), want, cookies == "1")
						}
					}
				}
			})
		}
		all.Wait()
	}
	if t.Failed() {
		for name, n := range f.nodes {
			for _, flow := range n.Flows() {
				t.Log(name, netlab.Describe(flow))
			}
		}
	}
}

// checkReach compares what an actor reaches with what is declared. UDP has no
// cookies: once is enough.
func (a *actor) checkReach(t *testing.T, at netip.AddrPort, want, udp bool) {
	t.Helper()
	if got := a.reachesWithin(at, patience(want)); got != want {
		t.Errorf("TCP %s to %s: %v, want %v", filepath.Base(a.dir), at, got, want)
	}
	if !udp {
		return
	}
	r := a.datagramsWithin(at, 3, patience(want))
	if want && r.Answered != 3 || !want && r.Answered > 0 {
		t.Errorf("UDP %s to %s: %d of 3 answered, want %v: %v", filepath.Base(a.dir), at, r.Answered, want, r.Errors)
	}
}

// Who has no demarc sees no tag: what it is sent is byte for byte what would be
// sent without.
func TestPeersWithoutDemarcSeeNoTag(t *testing.T) {
	f := newFleet(t, "")
	f.serve()
	wire := f.outside.Wire()
	at := netip.AddrPortFrom(f.outside.IP4, 443)
	if !f.actors["db"].reaches(at) || f.actors["db"].datagrams(at, 2).Answered != 2 {
		t.Fatal("the declared network is not reached")
	}
	if !f.stranger.reaches(netip.AddrPortFrom(f.hosts["web"].IP4, 443)) {
		t.Fatal("the visitor does not reach web")
	}
	for _, p := range wire.Packets(func(p netlab.Packet) bool { return p.Proto == unix.IPPROTO_UDP && !p.Sent }) {
		if p.Surplus != 0 {
			t.Errorf("a datagram with %d bytes behind its end: %s", p.Surplus, p)
		}
	}
	for _, p := range wire.Packets(func(p netlab.Packet) bool { return p.Proto == unix.IPPROTO_TCP && p.Flags&2 != 0 && !p.Sent }) {
		if p.Tagged {
			t.Errorf("a SYN with a tag: %s", p)
		}
	}
}

// A host with another keyring proves nothing to anybody.
func TestOtherKeyring(t *testing.T) {
	f := newFleet(t, "")
	text := document(1, fmt.Sprintf(fleetPolicy, f.outside.IP4, f.outside.IP6, ""))
	ns := f.lab.Namespace("other")
	other := f.lab.Node(text, netlab.NodeOptions{CoreOnly: true, Home: ns, Keyring: f.lab.Dir() + "/other.keyring"})
	web := startActor(t, ns, other.Cgroup("/lab/web"))
	f.serve()
	at := netip.AddrPortFrom(f.hosts["api"].IP4, 8080)
	if web.reachesWithin(at, timeOfSilence) {
		t.Error("TCP with another key is admitted")
	}
	if n := web.datagramsWithin(at, 3, timeOfSilence).Answered; n != 0 {
		t.Errorf("%d datagrams with another key are answered", n)
	}
	place := netlab.Place{Address: at.Addr(), Port: 8080}
	f.nodes["api"].AwaitDenied(abi.TagBadMAC, unix.IPPROTO_TCP, place)
	f.nodes["api"].AwaitDenied(abi.TagBadMAC, unix.IPPROTO_UDP, place)
}

// A crossing says which end is translated on the way; without that, a translated
// handshake proves nothing.
func TestTranslation(t *testing.T) {
	for _, c := range []struct{ name, nat, where, rules string }{
		{"source", "source", "web", "add table ip t; add chain ip t c { type nat hook postrouting priority 100; }; add rule ip t c tcp dport 8080 snat to 10.66.8.8"},
		{"destination", "destination", "api", "add table ip t; add chain ip t c { type nat hook prerouting priority -100; }; add rule ip t c tcp dport 80 dnat to %s:8080"},
	} {
		for _, declared := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s declared %v", c.name, declared), func(t *testing.T) {
				nat := ""
				if declared {
					nat = ", nat: " + c.nat
				}
				f := newFleet(t, nat)
				f.serve()
				f.hosts["web"].Address(netip.MustParsePrefix("10.66.8.8/16"))
				f.hosts["api"].Address(netip.MustParsePrefix("10.66.9.9/16"))
				rules := c.rules
				if strings.Contains(rules, "%s") {
					rules = fmt.Sprintf(rules, f.hosts["api"].IP4)
				}
				nft(t, f.hosts[c.where], rules)
				at := netip.AddrPortFrom(f.hosts["api"].IP4, 8080)
				if c.name == "destination" {
					at = netip.MustParseAddrPort("10.66.9.9:80")
				}
				if got := f.actors["web"].reachesWithin(at, patience(declared)); got != declared {
					t.Errorf("reaches %s: %v", at, got)
				}
				if !declared {
					f.nodes["api"].AwaitDenied(abi.TagBadMAC, unix.IPPROTO_TCP, netlab.Place{Address: f.hosts["api"].IP4, Port: 8080})
				}
			})
		}
	}
}

func nft(t *testing.T, ns *netlab.Namespace, rules string) {
	t.Helper()
	c := exec.Command("nft", strings.Split("-f -", " ")...)
	c.Stdin = strings.NewReader(strings.ReplaceAll(rules, "; add", "\nadd") + "\n")
	var out []byte
	err := ns.Do(func() (err error) {
		out, err = c.CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("nft: %v\n%s\n%s", err, out, rules)
	}
}

// A listener that is older than the first policy proves itself all the same, where
// it is in the namespace of the host.
func TestListenerOlderThanPolicy(t *testing.T) {
	lab := netlab.New(t)
	host, elsewhere := lab.Namespace("host"), lab.Namespace("elsewhere")
	node := lab.Node("", netlab.NodeOptions{CoreOnly: true, Home: host})
	server := startActor(t, host, node.Cgroup("/lab/db"))
	server.serve(7000)
	client := startActor(t, elsewhere, node.Cgroup("/lab/web"))
	node.Apply(document(1, webAndDB+`crossings:
  - {name: web-db, from: [workload/web], to: [workload/db], ports: [tcp/7000, udp/7000]}
`))
	for _, address := range []netip.Addr{host.IP4, host.IP6} {
		at := netip.AddrPortFrom(address, 7000)
		if !client.reaches(at) {
			t.Errorf("%s is not reached", at)
		}
		if n := client.datagrams(at, 2).Answered; n != 2 {
			t.Errorf("%d of 2 datagrams to %s are answered", n, at)
		}
	}
	if limits := node.Status().Limits; len(limits) != 1 { // that root is not kept from anything
		t.Errorf("limits %q", limits)
	}
}
